# SPDX-License-Identifier: Apache-2.0
"""The line that every `--json` begins with: where it ran, and what was asked for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from lines import parse_line

from postcopy import __version__, _host
from postcopy._host import run_line, run_record


def test_it_says_what_ran_where() -> None:
    line = parse_line(run_line("source", {"memory": "64MiB", "vcpus": 2, "hybrid": True, "quiet": False, "to": None}))
    assert (line["event"], line["command"], line["version"]) == ("run", "source", __version__)
    assert line["options"] == {"memory": "64MiB", "vcpus": "2", "hybrid": "yes"}
    host = line["host"]
    assert host["kernel"] == os.uname().release
    assert host["usable-cpus"] <= host["cpus"] == os.cpu_count()
    assert host["memory"] > host["page-size"] == os.sysconf("SC_PAGE_SIZE")


def test_it_does_not_say_where_secrets_are() -> None:
    told = run_record("dest", {
        "tls": "/etc/keys", "tls_authz": ("CN=a",), "tls-hostname": "b", "peer_file": "/x", "control": "/run/y",
        "protection": object(), "connect": object(), "user": "root", "figures": ["fault", "bulk"], "seed": 7,
    })["options"]  # fmt: skip
    assert told == {"figures": "fault,bulk", "seed": "7"}


def test_it_is_bounded() -> None:
    told = run_record("dest", {"x": "y" * 10_000} | {f"n{number}": number for number in range(1000)})["options"]
    assert len(told) == 100
    assert max(map(len, told.values())) == 200


ARM = "processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd\nCPU part\t: 0xd0c\n\nprocessor\t: 1\n"
PHYSICAL = "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t\t: fpu vme\n\n"


@pytest.mark.parametrize(
    ("text", "cpu", "virtual"),
    [
        (ARM, None, None),
        (PHYSICAL, "Some CPU @ 2 GHz", False),
        (PHYSICAL + PHYSICAL.replace("vme", "hypervisor"), "Some CPU @ 2 GHz", False),  # the first one says it
        (PHYSICAL.replace("vme", "hypervisor"), "Some CPU @ 2 GHz", True),
        ("nonsense", None, None),
        ("", None, None),
    ],
)
def test_processors_that_tell_more_or_less(
    text: str, cpu: str | None, virtual: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_host, "read", lambda path, at_most=-1: text if path == "/proc/cpuinfo" else "")
    host = parse_line(run_line("bench", {}))["host"]
    assert (host["cpu"], host["virtual"]) == (cpu, virtual)
    assert host["thp"] is host["governor"] is None


def test_no_more_of_a_file_is_read_than_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"ab\0c" * 1000)
    assert _host.read(str(path), 6) == "ab\ncab"
    assert len(_host.read(str(path))) == 4000
    assert _host.read(str(tmp_path / "none")) == ""
