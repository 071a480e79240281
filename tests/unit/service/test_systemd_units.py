# SPDX-License-Identifier: Apache-2.0
"""The example units start commands that exist, with options that they have."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from postcopy.cli import make_parser
from postcopy.service.options import MAX_SOCKET_PATH_BYTES

UNITS = sorted((Path(__file__).parents[3] / "examples" / "systemd").glob("*.service"))


def _settings(unit: Path) -> list[tuple[str, str]]:
    text = re.sub(r"\\\n\s*", "", unit.read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith(("#", "["))]
    return [(name, value) for name, _, value in (line.partition("=") for line in lines)]


def test_there_are_units() -> None:
    assert len(UNITS) >= 2


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_unit(unit: Path) -> None:
    settings = _settings(unit)
    assert ("Type", "notify") in settings
    (command,) = [value for name, value in settings if name == "ExecStart"]
    program, *arguments = shlex.split(command.replace("%i", "7777"))
    assert Path(program).name == "postcopy"
    args = make_parser(arguments).parse_args(arguments)
    assert args.log_json
    # The control socket is in the unit's own directory, which systemd makes and removes.
    (directory,) = [value.replace("%i", "7777") for name, value in settings if name == "RuntimeDirectory"]
    assert args.control.startswith(f"/run/{directory}/")
    assert len(args.control) <= MAX_SOCKET_PATH_BYTES
