# SPDX-License-Identifier: Apache-2.0
"""Moving a machine: the protocol (bytes in, messages out), the connections it runs on, and the engine of each side."""
