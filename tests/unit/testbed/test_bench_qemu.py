# SPDX-License-Identifier: Apache-2.0
"""QEMU beside postcopy: the guest that is checked in, what is refused, how its trace is read."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import pytest

from postcopy.errors import ResourceError
from postcopy.testbed.bench._qemu import check_qemu
from postcopy.testbed.bench._qemu_run import GUEST, PLACED, QEMU, REQUEST, latencies_us, percentiles_us


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
