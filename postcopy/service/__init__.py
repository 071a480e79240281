# SPDX-License-Identifier: Apache-2.0
"""One owner of machines and migrations (`service`), with the policies `source`, `destination` and `daemon`; and what
operates it from outside: a control socket, metrics, notifications to systemd (docs/operating.md)."""

from __future__ import annotations

from postcopy._log import add_migration
from postcopy.service.client import ControlClient
from postcopy.service.schema import ControlError
from postcopy.service.server import ControlServer

__all__ = ["ControlClient", "ControlError", "ControlServer", "add_migration"]
