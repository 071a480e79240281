# SPDX-License-Identifier: Apache-2.0
"""What a user can get wrong: one line that says so, and a status that is not 0."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SOURCE = "source --machine kvm --connect 127.0.0.1:1"
CASES = [
    ("", 2, "COMMAND"),
    ("fly", 2, "unknown command 'fly'; there are source, dest,"),
    ("sorce --hold", 2, "unknown command 'sorce'; did you mean source?"),
    ("source", 2, "source needs --machine or --from"),
    ("source --machine kvm", 2, "source needs --hold, --listen, --connect or --peer-file"),
    ("source --machine kvm --listen :0 --connect a:1", 2, "--connect does not go with --listen"),
    ("source --machine kvm --connect localhost", 2, "it has no port"),
    ("source --machine kvm --connect ::1:7", 2, "needs brackets"),
    ("source --machine kvm --connect a:65536", 2, "at most 65535"),
    ("dest --connect 127.0.0.1:1", 1, "connection refused; start the other side first"),
    ("dest --connect nosuchhost.invalid:7", 1, "cannot be resolved"),
    ("dest --listen 192.0.2.1:7 --insecure", 1, "name an address of this host"),
    ("dest --listen :0 --backing tape", 2, "--backing: memfd, anon or hugetlb, not 'tape'"),
    ("dest --listen :0 --run-for soon", 2, "--run-for: seconds, as 2.5 or 200ms, not 'soon'"),
    ("dest --listen :0 --dump /nonexistent/file", 2, "directory /nonexistent does not exist"),
    ("dest --listen :0 --dump /", 2, "that is a directory"),
    (f"{SOURCE} --memory 0", 2, "0 bytes"),
    (f"{SOURCE} --memory much", 2, "--memory: a size, as 512MiB, 1.5GiB or 4096B, not 'much'"),
    (f"{SOURCE} --memory -1", 2, "--memory"),
    (f"{SOURCE} --memory 900TiB", 1, "remedy"),
    (
        f"{SOURCE} --memory 12345B",
        2,
        "--memory: 12345 bytes are not a multiple of the page size, 4 KiB; did you mean 16KiB?",
    ),
    (f"{SOURCE} --memory 1GB", 2, "did you mean 1GiB?"),
    (f"{SOURCE} --memory 64", 2, "--memory: '64' has no unit; write 64MiB, or 64B for bytes"),
    (f"{SOURCE} --memory 64MiB --used-memory 65MiB", 2, "--used-memory 65MiB is more than --memory 64MiB"),
    (f"{SOURCE} --max-bandwidth 100", 2, "'100' has no unit; write 100MiB/s (bytes) or 100mbit (bits)"),
    (f"{SOURCE} --vcpus 0", 2, "1 to 8 vcpus"),
    (f"{SOURCE} --vcpus 9", 2, "1 to 8 vcpus"),
    (
        f"{SOURCE} --workload dance",
        2,
        "--workload: idle, dirty, random, disk, echo, sequential, zipf or phases, not 'dance'",
    ),
    (f"{SOURCE} --workload radnom", 2, "not 'radnom'; did you mean random?"),
    (f"{SOURCE} --image x", 2, "--image has no meaning"),
    (f"{SOURCE} --bulk-channels 0", 2, "from 1 to 16"),
    (f"{SOURCE} --max-bandwidth fast", 2, "--max-bandwidth: a rate, as 100MiB/s or 100mbit, or none, not 'fast'"),
    (f"{SOURCE} --serve 2", 2, "--serve goes with"),
    ("source --machine image --listen :0", 2, "needs --image FILE"),
    ("source --machine image --image /nonexistent --listen :0", 2, "No such file"),
    ("source --machine image --image / --listen :0", 2, "not a regular file"),
    ("source --machine image --image EMPTY --listen :0", 2, "empty"),
    ("source --machine image --image IMAGE --memory 1GiB --listen :0", 2, "--memory has no meaning"),
    ("demo --machine image --memory 1B", 2, "at least"),
    ("source --machine rv64 --conect a:1", 2, "unknown option --conect; did you mean --connect?"),
    ("source --machine rv64 --connect a:1 --run-for 3", 2, "source has no --run-for; dest, demo have"),
    (f"{SOURCE} --recover-for never", 2, "--recover-for: seconds or \"forever\", not 'never'"),
    (f"{SOURCE} --memory", 2, "--memory: a value is missing"),
    (f"{SOURCE} --json=yes", 2, "--json takes no value"),
    (f"{SOURCE} now", 2, "source has no use for 'now'"),
    (
        f"{SOURCE} --metrics-file /nonexist/x.prom",
        2,
        "--metrics-file /nonexist/x.prom: directory /nonexist does not exist",
    ),
    ("merge /tmp", 2, "merge needs --output or --into"),
    ("merge /tmp --output IMAGE2", 2, "/tmp is not a directory that --salvage has written: it has no manifest.json"),
    ("merge /nonexist --output IMAGE2", 2, "/nonexist does not exist; name a directory that --salvage has written"),
    ("merge IMAGE --output IMAGE2", 2, "is not a directory"),
    ("ctl", 2, "ctl needs REQUEST"),
    ("ctl sit", 2, "unknown request 'sit'"),
    ("ctl migrate-puase", 2, "unknown request 'migrate-puase'; did you mean migrate-pause"),
    ("ctl pause", 2, "unknown request 'pause'; did you mean migrate-pause?"),
    ("ctl status vm1", 2, "ctl status has no use for 'vm1'; did you mean --machine vm1?"),
    ("ctl --control /nonexist migrate nowhere", 2, "HOST:PORT: 'nowhere' is not an address: it has no port"),
    ("dest --listen :0 --metrics 9707", 2, "--metrics: '9707' is not an address"),
    ("source --machine rv64 --hold --serve 2", 2, "--serve has no meaning with --hold"),
    ("lab link h1 braek", 2, "cut, heal, rate or delay, not 'braek'"),
    ("ctl migrate", 2, "ctl migrate needs HOST:PORT"),
    ("ctl status --force", 2, "ctl status has no --force; ctl end, ctl reclaim, ctl quit have"),
    ("ctl set --max-bandwidth 5", 2, "write 5MiB/s (bytes) or 5mbit (bits)"),
    ("ctl start rv64 --memory 64", 2, "write 64MiB"),
    ("lab", 2, "lab needs"),
    ("lab lnik h1 cut", 2, "did you mean link?"),
    ("lab up --rate 100", 2, "--rate: '100' has no unit"),
    ("lab link h1 delay 5", 2, "'5' has no unit; write 5ms or 5s"),
    ("probe --require fly", 2, "--require: there is no 'fly'"),
    ("chaos --listen :0", 2, "chaos needs --to"),
    ("chaos cut:every=x --listen :0 --to a:1", 2, "every: seconds, as 2.5 or 200ms, not 'x'"),
    ("bench fualt", 2, "did you mean fault?"),
    ("faultpaths compare IMAGE IMAGE", 2, "is not JSON"),
    ("completion csh", 2, "bash, zsh or fish, not 'csh'"),
]


@pytest.mark.needs("kvm")
@pytest.mark.parametrize(("line", "status", "reason"), CASES, ids=[line or "(nothing)" for line, _, _ in CASES])
def test_one_line(run_in_child: Callable[..., Any], tmp_path: Path, line: str, status: int, reason: str) -> None:
    (tmp_path / "EMPTY").touch()
    (tmp_path / "IMAGE").write_bytes(b"x" * 10000)
    arguments = [str(tmp_path / word) if word in ("EMPTY", "IMAGE", "IMAGE2") else word for word in line.split()]
    done = run_in_child([sys.executable, "-m", "postcopy", *arguments])
    assert done.returncode == status, done.stderr
    lines = done.stderr.splitlines()
    if status == 2:  # nothing has begun
        assert len(lines) == 1, done.stderr
    assert [line for line in lines if "error" in line] == lines[-1:], done.stderr
    assert lines[-1].startswith("postcopy: error: ")
    assert reason in lines[-1]
    assert not done.stdout


@pytest.mark.parametrize(
    ("memory", "status", "reason"), [("1GB", 2, "source: --memory: 1000000000 bytes"), ("900TiB", 1, "remedy")]
)
def test_a_demo_ends_as_its_side_did(run_in_child: Callable[..., Any], memory: str, status: int, reason: str) -> None:
    done = run_in_child([sys.executable, "-m", "postcopy", "demo", "--machine", "rv64", "--memory", memory])
    assert done.returncode == status, done.stderr
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    assert len(errors) == 1, done.stderr
    assert reason in errors[0]


@pytest.mark.parametrize("text", ["{}", '{"schema": 2}', "[]"])
def test_what_is_no_report(run_in_child: Callable[..., Any], tmp_path: Path, text: str) -> None:
    report = tmp_path / "a.json"
    report.write_text(text)
    done = run_in_child([sys.executable, "-m", "postcopy", "faultpaths", "compare", str(report), str(report)])
    assert done.returncode == 2
    assert "not a report that `postcopy faultpaths --json` has written" in done.stderr
    assert "Error(" not in done.stderr


def test_version(run_in_child: Callable[..., Any]) -> None:
    done = run_in_child([sys.executable, "-m", "postcopy", "--version"])
    assert done.returncode == 0
    assert done.stdout.startswith("postcopy 0.")
