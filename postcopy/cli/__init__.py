# SPDX-License-Identifier: Apache-2.0
"""The `postcopy` command: `main` is what the console script calls. See `_main` for what it returns, `_parser` for the
commands that there are, and `postcopy.service.options` for their options."""

from __future__ import annotations

from postcopy.cli._main import main
from postcopy.cli._parser import make_parser

__all__ = ["main", "make_parser"]
