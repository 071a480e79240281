# SPDX-License-Identifier: Apache-2.0
"""Operating a postcopy process from outside: a control socket, metrics, and word to systemd (docs/operating.md)."""

from __future__ import annotations

from postcopy._logs import add_migration

from .client import ControlClient
from .schema import PROTOCOL, ControlError
from .server import ControlServer

__all__ = ["PROTOCOL", "ControlClient", "ControlError", "ControlServer", "add_migration"]
