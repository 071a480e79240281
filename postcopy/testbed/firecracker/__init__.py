# SPDX-License-Identifier: Apache-2.0
"""A real, unmodified Firecracker for tests and measurements: `find` its binary, `Firecracker` runs one, with a guest of
ours (`guest_path`, csrc/machine/guest/vmm.c) that checks its own memory and says so on the serial port.

Everything here blocks, and knows nothing of the machine `firecracker`: what is tested is driven by other code than its
own. From Trio call it in a worker thread. A `Firecracker` owns its process and its directory, until `close`.
"""

from __future__ import annotations

from postcopy.testbed._guest import GuestLine
from postcopy.testbed.firecracker._find import BINARY, find, guest_path, version_of
from postcopy.testbed.firecracker._process import ApiError, Firecracker, serving_engine

__all__ = ["BINARY", "ApiError", "Firecracker", "GuestLine", "find", "guest_path", "serving_engine", "version_of"]
