# SPDX-License-Identifier: Apache-2.0
"""What a command shows while it works: JSON lines on stdout, and for people, on stderr, a live view or plain lines.

Output must never lose a machine, or delay one: every line goes through a queue, which a thread of its own writes, so
that only that thread waits for a slow reader (`_writer`). Progress is dropped when it is not read; results, endings
and errors are kept as long as the process lives, and for a few seconds at its end.
"""

from __future__ import annotations

from postcopy.output._output import LogHandler, Output, make_output
from postcopy.output._view import count_machines
from postcopy.output._writer import Kind

__all__ = ["Kind", "LogHandler", "Output", "count_machines", "make_output"]
