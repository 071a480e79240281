# SPDX-License-Identifier: Apache-2.0
"""How many connections the background push has where that is not said."""

from __future__ import annotations

import os

from postcopy.wire import MAX_BULK_CHANNELS


def bulk_channels_for_host(cpus: int | None = None) -> int:
    """One for each processor of this host, and two at least: while the thread of one waits, that of the other works."""
    found = len(os.sched_getaffinity(0)) if cpus is None else cpus
    return min(max(2, found), MAX_BULK_CHANNELS)
