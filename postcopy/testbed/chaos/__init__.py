# SPDX-License-Identifier: Apache-2.0
"""A TCP proxy that is a bad network: slow, jittery, cut, half open, lying.

It stands between the two hosts of a migration, in the place of the cable. What it does to *bytes* (delay, rate,
splitting, flipped bits) it does to each connection in each direction by itself; what it does to *connections* it does
to all of them at once, as a cable would. A connection that is made while the cable is cut is reset, or, where it is
frozen, accepted and never answered.

Everything random comes from one seed, and from the number of the connection, so that a failure can be had again: the
same seed decides the same delays, the same ways and times of cutting. Which byte is under way when the cable is cut
depends on the machine all the same.

Resource handling: all connections belong to the proxy and end with the block of `open_chaos_proxy`. At most
`QUEUED_CHUNKS` chunks wait in each direction of a connection: a receiver that stops reading stops the sender, as TCP
would.
"""

from __future__ import annotations

from postcopy.testbed.chaos._plan import KINDS, ChaosPlan
from postcopy.testbed.chaos._proxy import ChaosProxy, Statistics, open_chaos_proxy

__all__ = ["KINDS", "ChaosPlan", "ChaosProxy", "Statistics", "open_chaos_proxy"]
