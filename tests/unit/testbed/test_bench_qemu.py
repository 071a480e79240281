# SPDX-License-Identifier: Apache-2.0
"""QEMU beside postcopy: the guest that is checked in, what is refused, how its trace is read."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from postcopy.cli import main
from postcopy.errors import ResourceError
from postcopy.testbed.bench._qemu import check_qemu
from postcopy.testbed.bench._qemu_run import GUEST, PLACED, QEMU, REQUEST, Qemu, Run, latencies_us, percentiles_us


@pytest.mark.skipif(platform.machine() != "x86_64", reason="its assembler is for another processor")
def test_the_guest_is_what_its_source_says(tmp_path: Path) -> None:
    source, made, program = GUEST.with_suffix(".S"), tmp_path / "guest.o", tmp_path / "guest.bin"
    subprocess.run(["as", "--32", "-o", made, source], check=True)
    link: list[str | Path] = ["ld", "-m", "elf_i386", "--oformat", "binary", "-Ttext", "0x100000", "-o", program, made]
    subprocess.run(link, check=True)
    assert GUEST.read_bytes() == program.read_bytes()
    assert len(GUEST.read_bytes()) <= 512


@pytest.mark.parametrize(
    ("says", "complaint"),
    [
        (None, "QEMU is not installed"),
        ("QEMU emulator version 6.2.0 (Debian 1:6.2)", "is too old: version 6.2"),
        ("something else", "is too old: it does not tell its version"),
    ],
)
def test_a_qemu_that_cannot_be_used(
    says: str | None, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if says is not None:
        (tmp_path / QEMU).write_text(f"#!/bin/sh\necho '{says}'\n")
        (tmp_path / QEMU).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ResourceError, match=complaint) as raised:
        check_qemu()
    assert "qemu-system-x86" in raised.value.remedy


def test_a_qemu_that_is_new_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / QEMU).write_text("#!/bin/sh\necho 'QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)'\n")
    (tmp_path / QEMU).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    check_qemu()


def test_without_qemu_nothing_is_measured_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("postcopy.testbed.bench._measurement", None)
    assert main(["bench", "fault", "qemu"]) == 1
    assert "QEMU is not installed" in capsys.readouterr().err


def test_events_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = [("MIGRATION", 1, "active"), ("MIGRATION", 2, "completed"), ("RESUME", 3, None)]
    lines = [
        json.dumps({"event": name, "timestamp": {"seconds": 1, "microseconds": us}, "data": {"status": status}})
        for name, us, status in [*events, ("MIGRATION", 4, "failed")]
    ]
    (tmp_path / QEMU).write_text(
        f"""#!{sys.executable}
import os, re, sys, time
monitor = int(re.search(r"id=monitor,fd=(\\d+)", " ".join(sys.argv))[1])
os.write(monitor, {chr(10).join([*lines, ""]).encode()!r})
time.sleep(1000)
"""
    )
    (tmp_path / QEMU).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    qemu = Qemu(Run(32 << 20, "postcopy"), incoming=True, log=None)
    try:
        assert qemu.event_us("MIGRATION", "completed") == 1_000_002
        assert qemu.event_us("RESUME") == 1_000_003
        with pytest.raises(SystemExit, match="destination: the migration is failed"):
            qemu.event_us("STOP")
    finally:
        qemu.close()


def test_latencies_of_a_trace() -> None:
    ask = f"{REQUEST} Request for HVA=0x7f000000%s000 rb=pc.ram offset=0x1000 pid=7"
    log = "\n".join(
        [
            f"7@100.999990:{PLACED} host=0x7f0000001000",  # in the background
            f"7@100.999990:{ask % 2}",
            f"7@100.999995:{ask % 3}",
            f"7@100.999999:{ask % 2}",  # raised again while it waits
            f"7@101.000010:{PLACED} host=0x7f0000002000",
            f"7@101.000100:{PLACED} host=0x7f0000003000",
            f"7@101.000200:{PLACED} host=0x7f0000002000",
        ]
    )
    assert latencies_us(log) == [20, 105]
    assert percentiles_us([1, 2, 3]) == {"p50": 2.0, "p99": 2.0}
    assert percentiles_us(latencies_us("")) == {"p50": 0.0, "p99": 0.0}
