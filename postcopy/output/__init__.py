# SPDX-License-Identifier: Apache-2.0
"""What a command shows while it works: JSON lines on stdout, and for people, on stderr, a live view or plain lines.

Output is never a reason to lose a machine, or to hold one up: every line goes through a queue (`_writer`), and a thread
that waits for the reader in everybody's place. Progress is dropped when nobody reads it; results, endings and errors
are kept for as long as the process lives, and a few seconds of its end.
"""

from __future__ import annotations

from postcopy.output._output import LogHandler, Output, make_output
from postcopy.output._writer import Kind

__all__ = ["Kind", "LogHandler", "Output", "make_output"]
