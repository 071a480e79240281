# SPDX-License-Identifier: Apache-2.0
"""Notifications to systemd, for units with ``Type=notify`` (sd_notify(3)): datagrams to the socket in NOTIFY_SOCKET.

Nothing is said, and nothing is done, where that variable is not set. What cannot be delivered is never an error: a
service manager that does not listen is no reason to lose a machine.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping

from postcopy.wire import one_line


class Notifier:
    """Says what changed. The plain methods do not block."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._socket: socket.socket | None = None
        self._ready = False
        path = environment.get("NOTIFY_SOCKET", "")
        if path[:1] in ("/", "@"):
            self._path = "\0" + path[1:] if path.startswith("@") else path
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._socket.setblocking(False)

    def ready(self) -> None:
        """The process can be used; said once."""
        if not self._ready:
            self._ready = True
            self._send("READY=1")

    def status(self, text: str) -> None:
        """One line for `systemctl status`."""
        self._send(f"STATUS={one_line(text, 200)}")

    def stopping(self) -> None:
        self._send("STOPPING=1")

    def extend(self, seconds: float) -> None:
        """It goes on ending for at least so long from now, whatever the unit's TimeoutStopSec= says."""
        self._send(f"EXTEND_TIMEOUT_USEC={round(seconds * 1e6)}")

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, text: str) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.sendto(text.encode(), self._path)
