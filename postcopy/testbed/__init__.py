# SPDX-License-Identifier: Apache-2.0
"""What tests of a migration need, ours and those of others: a network that fails as it is told."""

from __future__ import annotations

from postcopy.testbed.chaos import ChaosPlan, ChaosProxy, Statistics, open_chaos_proxy

__all__ = ["ChaosPlan", "ChaosProxy", "Statistics", "open_chaos_proxy"]
