# SPDX-License-Identifier: Apache-2.0
"""The example units start commands that exist, with options that they have."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from postcopy.cli import make_parser
from postcopy.service.daemon import FORCED_END_S
from postcopy.service.operation import EXTEND_EVERY_S, EXTEND_S
from postcopy.service.options import MAX_SOCKET_PATH_BYTES
from postcopy.units import parse_seconds

UNITS = sorted((Path(__file__).parents[3] / "examples" / "systemd").glob("*.service"))


def _settings(unit: Path) -> list[tuple[str, str]]:
    text = re.sub(r"\\\n\s*", "", unit.read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith(("#", "["))]
    return [(name, value) for name, _, value in (line.partition("=") for line in lines)]


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_stopping_loses_nothing(unit: Path) -> None:
    """The process asks for more time before the unit's is over, again and again; nothing else ends it, or a pager of
    its. (Under signals: test_ends `test_what_systemd_does`.)"""
    settings = dict(_settings(unit))
    assert settings["KillMode"] == "mixed"
    assert settings.keys().isdisjoint({"ExecStop", "KillSignal", "RestartKillSignal", "SendSIGHUP", "SendSIGKILL"})
    assert settings.keys().isdisjoint({"Requires", "Requisite", "BindsTo", "PartOf"})  # it ends with no other unit
    stop_s = parse_seconds(settings["TimeoutStopSec"])
    assert stop_s > FORCED_END_S + EXTEND_EVERY_S
    assert EXTEND_S > FORCED_END_S > EXTEND_EVERY_S
    # Machines that run in a daemon end with it: so systemd is not to stop it, and `postcopy ctl quit` does.
    assert ("RefuseManualStop" in settings) == (" daemon " in settings["ExecStart"])


def test_there_are_units() -> None:
    assert len(UNITS) >= 3


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze: install systemd")
def test_systemd_takes_them(tmp_path: Path) -> None:
    names = []
    program = Path(sys.executable).with_name("postcopy")
    for unit in sorted(UNITS[0].parent.iterdir()):
        name = unit.name.replace("@.", "@7777.")
        (tmp_path / name).write_text(unit.read_text().replace("/usr/local/bin/postcopy", str(program)))
        names += [name] if unit.suffix in (".service", ".socket") else []
    command = ["systemd-analyze", "verify", *(f"./{name}" for name in names)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    about_ours = [line for line in done.stderr.splitlines() if "postcopy" in line]
    assert (done.returncode, about_ours) == (0, [])


def test_the_pager_comes_back_with_its_virtual_machines() -> None:
    (unit,) = [unit for unit in UNITS if unit.stem == "postcopy-pager"]
    settings = dict(_settings(unit))
    assert settings["NotifyAccess"] == "all"  # its main process is the keeper, and what says READY=1 an engine
    assert settings["Environment"] == f"FDSTORE={settings['FileDescriptorStoreMax']}"
    assert settings["Restart"] == "on-failure"
    assert int(settings["LimitNOFILE"]) >= 4 * int(settings["FileDescriptorStoreMax"])  # the keeper takes a quarter
    sockets = dict(_settings(unit.with_suffix(".socket")))
    own = f"/run/{settings['RuntimeDirectory']}/"  # which goes with the service
    assert not sockets["ListenStream"].startswith(own)


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_unit(unit: Path) -> None:
    settings = _settings(unit)
    assert ("Type", "notify") in settings
    (command,) = [value for name, value in settings if name == "ExecStart"]
    program, *arguments = shlex.split(command.replace("%i", "7777"))
    assert Path(program).name == "postcopy"
    args = make_parser(arguments).parse_args(arguments)
    assert args.log_json
    assert getattr(args, "tls", None) == ("/etc/postcopy/tls" if "listen" in args else None)
    # The control socket is in the unit's own directory, which systemd makes and removes.
    (directory,) = [value.replace("%i", "7777") for name, value in settings if name == "RuntimeDirectory"]
    assert args.control.startswith(f"/run/{directory}/")
    assert len(args.control) <= MAX_SOCKET_PATH_BYTES
