# SPDX-License-Identifier: Apache-2.0
"""TLS (docs/tls.md)."""
