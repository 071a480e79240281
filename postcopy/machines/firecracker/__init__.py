# SPDX-License-Identifier: Apache-2.0
"""Firecracker, unmodified: what it says to the handler of its page faults (`handshake`), and how one is driven over its
API."""
