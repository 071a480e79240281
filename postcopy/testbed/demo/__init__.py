# SPDX-License-Identifier: Apache-2.0
"""`postcopy demo`: a source and a destination as two processes on this host, a machine between them, and a verdict.

The two run exactly what a user would run, and the demo sees them from outside only: it reads their JSON lines.
Its own checks are those that need both sides: the machine at the destination is the very one that was booted at the
source (the nonce that it made for itself, kept in its memory only), and it went on where it had been (its
counters).

With ``--lab`` each side is in a host of a laboratory, with a real cable between them, which is pulled out in the
middle of postcopy and put back when both sides have noticed.

Whatever happens, no process is left: the children are ended by the demo's own end, in order first, then by force.
"""

from __future__ import annotations

from postcopy.testbed.demo._command import OPTIONS, DemoCommand, defaults, make

__all__ = ["OPTIONS", "DemoCommand", "defaults", "make"]
