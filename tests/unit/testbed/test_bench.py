# SPDX-License-Identifier: Apache-2.0
"""What `postcopy bench` says of what it has measured, and what is refused before anything is."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from lines import parse_line

from postcopy.cli import main
from postcopy.dataplane.histogram import Histogram
from postcopy.errors import MigrationError
from postcopy.records.results import Curve, Measurement
from postcopy.testbed.bench import FIGURES, STUDIES, _contention, _of, _recording, _text
from postcopy.testbed.bench._common import Found, Touched, by_turns, joined, medians, ratio, worker
from postcopy.testbed.bench._firecracker_move import _calls_ms
from postcopy.testbed.bench._recovery import tail
from postcopy.testbed.bench._worker import distribution


def figures() -> list[Measurement]:
    idle = {"idle-p50": 1.0, "idle-p99": 2.0, "idle-max": 50.0}
    rounds = [{"p50": p50, "p99": 20.0, "max": 4000.0} | idle for p50 in (1.5, 2.0, 30.0)]
    names = ("mmap p50, 1 fault pending", "munmap p50, bulk <placement>")
    return [ratio(f"{name} / none", rounds, "p50", "idle-p50", 1.5) for name in names]


def test_the_plot_has_medians_and_the_ratio_to_idle() -> None:
    _, *lines = _contention.text_contention(figures(), 107).splitlines()
    assert [line.split()[0] for line in lines] == ["mmap", "mmap", "munmap", "munmap"]
    assert lines[0].split("none pending")[1].split() == [
        "█" + "▒" * 3 + "·" * 17,
        "1.00",
        "/",
        "2.00",
        "/",
        "50",
        "1.00",
    ]
    assert lines[1].count("█") < lines[1].count("▒") + lines[1].count("█") < 50
    assert lines[1].count("·") > lines[0].count("·")
    assert lines[1].split("2.00 / 20.00 / 4000")[1].split() == ["2.00"]


def test_a_plot_in_a_narrow_terminal() -> None:
    lines = _contention.text_contention(figures(), 80).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].endswith("ratio")
    assert all(line.split()[-1] == f"{float(line.split()[-1]):.2f}" for line in lines[1:])


LOG = """\
2026-11-28T21:03:10.349824335 [vm:fc_api] The API server received a Patch request on "/vm" with body "{}".
2026-11-28T21:03:10.349997632 [vm:main] 'pause vm' VMM action took 133 us.
2026-11-28T21:03:10.350010220 [vm:fc_api] The request was executed successfully. Status code: 204 No Content.
2026-11-28T21:03:10.350013986 [vm:fc_api] 'pause vm' API request took 198 us.
2026-11-28T21:03:10.350100000 [vm:fc_api] The API server received a Get request on "/".
2026-11-28T21:03:10.350300000 [vm:fc_api] The request was executed successfully. Status code: 200 OK.
2026-11-28T21:03:10.350423944 [vm:fc_api] The API server received a Put request on "/snapshot/create" with body "{}".
2026-11-28T21:03:10.365607734 [vm:fc_api] Received Error. Status code: 400 Bad Request. Message: Create snapshot error
"""


def test_what_calls_of_firecracker_took() -> None:
    assert _calls_ms(LOG, 2) == pytest.approx(0.186 + 15.184)
    with pytest.raises(MigrationError, match="2 of at least 3 calls"):
        _calls_ms(LOG, 3)


def test_a_figure_in_words() -> None:
    name = "faults 0.5 ms apart, Trio handler busy polling / C handler sleeping, p50"
    note = "4 KiB pages, half of them received, in random runs of 64; simulated on bitmaps"
    rounds = [{"trio-us": 113.0, "c-us": 84.0}] * 3
    lines = _text(ratio(name, rounds, "trio-us", "c-us", 1.5, note=note), 80).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[:2] == [name, "    1.35, at most 1.5: goal reached"]
    assert " ".join(" ".join(lines[4:]).split()) == note
    assert "1.35, at most 1.3: GOAL NOT REACHED" in _text(ratio(name, rounds, "trio-us", "c-us", 1.3), 80)
    found = ratio(name, rounds, "c-us", "trio-us", 0.8, at_most=False)
    assert "0.74, at least 0.8: GOAL NOT REACHED" in _text(found, 80)
    assert "84.00, no goal" in _text(ratio(name, rounds, "c-us", None, None), 80)


def test_a_curve_in_words() -> None:
    rounds = [{"1": us, "100": us, "10000": 2 * us} for us in (10.0, 12.0, 14.0)]
    curve = Curve(over="faults pending", x_unit="1", at={"1": 1.0, "100": 100.0, "10000": 1e4})
    *_, one, hundred, most = _text(ratio("a fault", rounds, "10000", "1", 1.5, curve=curve), 80).splitlines()
    assert one.count("█") * 2 == hundred.count("█") * 2 == most.count("█")
    assert [line.split()[0] for line in (one, hundred, most)] == ["1", "100", "10000"]
    assert most.split("█")[-1].split() == ["24.00", "us", "20.00", "..", "28.00"]


def test_a_part_that_one_round_lacks() -> None:
    found = ratio("a downtime", [{"downtime": 1.0, "load": 0.5}, {"downtime": 3.0}], "downtime", None, 1.0)
    assert found.values["load"].rounds == [0.5, None]
    assert medians(found) == {"downtime": 2.0}
    assert "load" not in _text(found, 80)


def test_a_tail_is_that_of_all_rounds() -> None:
    found = tail("a recovery", [[float(1000 * number + ms) for ms in range(25)] for number in range(5)])
    assert found.values["p99"].rounds == [4023.0]  # of 125, one is longer; in each round there is none above its p99
    assert found.values["longest"].rounds == [4024.0]
    assert found.result == pytest.approx(4023 / 500)
    assert found.note == "125 cuts of 0.1 to 1 s, all connections reset"


async def test_each_part_comes_first_as_often_as_the_others() -> None:
    called: list[str] = []

    async def part(name: str) -> str:
        called.append(name)
        return name.upper()

    turns = await by_turns(4, {name: partial(part, name) for name in "abc"})
    assert turns == [{"a": "A", "b": "B", "c": "C"}] * 4
    assert [list(turn) for turn in turns] == [["a", "b", "c"]] * 4
    assert "".join(called) == "abcbcacababc"


def test_one_that_fails_does_not_end_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def measure_fault(rounds: int) -> list[Measurement]:
        raise MigrationError("a process of a measurement failed")

    async def measure_pager_process(rounds: int) -> list[Measurement]:
        return [ratio("a cost", [{"1": 2.0}] * rounds, "1", None, 2.5)]

    monkeypatch.setattr("postcopy.testbed.bench._fault.measure_fault", measure_fault)
    monkeypatch.setattr("postcopy.testbed.bench._fault.measure_pager_process", measure_pager_process)
    assert main(["bench", "fault", "pager-process", "--rounds", "2"]) == 1
    printed = capsys.readouterr()
    assert "fault: a process of a measurement failed" in printed.err
    assert "goal reached" in printed.out
    assert main(["bench", "pager-process", "--json"]) == 0
    began, line = map(parse_line, capsys.readouterr().out.splitlines())
    assert (began["event"], began["command"], began["options"]) == ("run", "bench", {"figures": "pager-process"})
    assert line["event"] == "measurement"
    assert line["values"] == {"1": {"unit": "us", "rounds": [2.0] * 5, "better": "less"}}
    assert (line["figure"], line["result"], line["reached"]) == ("pager-process", 2.0, True)


@pytest.mark.parametrize("name", [*FIGURES, *STUDIES])
def test_every_figure_can_be_measured(name: str) -> None:
    assert callable(_of(name, "measure"))


def test_what_is_not_measured_in_time_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what was is kept."""

    async def measure_fault(rounds: int) -> list[Measurement]:
        return [ratio("a fault", [{"p50": 2.0}] * rounds, "p50", None, 2.5)]

    async def measure_rv64(rounds: int) -> list[Measurement]:
        await trio.sleep_forever()
        raise AssertionError

    monkeypatch.setattr("postcopy.testbed.bench._fault.measure_fault", measure_fault)
    monkeypatch.setattr("postcopy.testbed.bench._machine.measure_rv64", measure_rv64)
    monkeypatch.setattr("postcopy.testbed.bench.QUICK", ("fault", "rv64", "dirty"))
    path = tmp_path / "x.jsonl"
    assert main(["bench", "quick", "--within", "1", "--output", str(path)]) == 0
    said = capsys.readouterr()
    assert "a fault" in said.out
    assert [line.split()[2] for line in said.err.splitlines()] == ["rv64", "dirty"]
    began, line = map(parse_line, path.read_text().splitlines())
    assert (began["event"], line["name"]) == ("run", "a fault")
    assert main(["bench", "rv64", "--within", "1"]) == 1  # nothing is
    capsys.readouterr()
    assert main(["bench", "fault", "--hdr", str(tmp_path / "x.hlog")]) == 1  # measured, but it has no distribution
    said = capsys.readouterr()
    assert "a fault" in said.out
    assert "--hdr: no line has a distribution" in said.err


def test_where_there_is_no_room_for_one_file_there_may_be_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()

    async def measure_fault(rounds: int) -> list[Measurement]:
        gone.rmdir()  # while it is measured, as a disk fills
        waits = Histogram()
        waits.add(1000)
        return [ratio("a fault", [{"p50": 2.0}] * rounds, "p50", None, 2.5, distributions={"a": distribution(waits)})]

    monkeypatch.setattr("postcopy.testbed.bench._fault.measure_fault", measure_fault)
    log = tmp_path / "x.hlog"
    assert main(["bench", "fault", "--output", str(gone / "x"), "--hdr", str(log)]) == 1
    assert capsys.readouterr().err == (
        f"postcopy: error: --output {gone}/x: directory {gone} does not exist (remedy: name another file)\n"
    )
    assert log.exists()


def test_what_was_measured_before_ctrl_c_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a study too, and when it is pressed again while the children end."""

    async def measure_fault(rounds: int) -> list[Measurement]:
        return [ratio("a fault", [{"p50": 2.0}] * rounds, "p50", None, 2.5)]

    async def measure_rv64(rounds: int) -> list[Measurement]:
        signal.raise_signal(signal.SIGINT)
        await trio.sleep_forever()
        raise AssertionError

    async def measure_scale(given: Mapping[str, Any], found: Found) -> None:
        curve = Curve(over="things", x_unit="1", at={"1": 1})
        found.write({"event": "timeline"})
        found.measurements = [ratio("things: a cost", [{"1": 2.0}], "1", None, None, curve=curve)]
        try:
            signal.raise_signal(signal.SIGINT)
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                for number in (signal.SIGINT, signal.SIGTERM):
                    signal.raise_signal(number)
                    await trio.sleep(0.01)

    monkeypatch.setattr("postcopy.testbed.bench._fault.measure_fault", measure_fault)
    monkeypatch.setattr("postcopy.testbed.bench._machine.measure_rv64", measure_rv64)
    monkeypatch.setattr("postcopy.testbed.bench._scale.measure_scale", measure_scale)
    path = tmp_path / "x.jsonl"
    for words, events in (
        (["fault", "rv64", "fault"], ["run", "measurement"]),
        (["scale"], ["run", "timeline", "measurement"]),
    ):
        assert main(["bench", *words, "--output", str(path)]) == 1
        assert [json.loads(line)["event"] for line in path.read_text().splitlines()] == events
    assert "a cost" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_what_was_measured_is_written_when_it_is_ended_between_two_figures(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def measure_fault(rounds: int) -> list[Measurement]:
        return [ratio("a fault", [{"p50": 2.0}] * rounds, "p50", None, 2.5)]

    def text_of(measurements: Sequence[Measurement], width: int) -> str:
        signal.raise_signal(number)
        return ""

    monkeypatch.setattr("postcopy.testbed.bench._fault.measure_fault", measure_fault)
    monkeypatch.setattr("postcopy.testbed.bench.text_of", text_of)
    path = tmp_path / "x.jsonl"
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        assert main(["bench", "fault", "rv64", "--output", str(path)]) == 1
    finally:
        signal.signal(signal.SIGHUP, before)
    assert [json.loads(line)["event"] for line in path.read_text().splitlines()] == ["run", "measurement"]


def test_ctrl_c_is_no_matter_of_a_worker() -> None:
    """In a terminal it goes to all processes of the foreground: the one that has started a worker ends it."""
    command = worker("_worker", json.dumps({"role": "floor-source", "size_bytes": 1 << 20, "urgent_fd": 0}))
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(b"go\n", 60) == (b"{}\n", b"")  # who it would serve is not there
        assert process.returncode == 0


def test_what_was_measured_before_an_error_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever it is: minutes of measuring are worth more than the last figure."""

    async def measure_fault(rounds: int) -> list[Measurement]:
        return [ratio("a fault", [{"p50": 2.0}] * rounds, "p50", None, 2.5)]

    async def measure_rv64(rounds: int) -> list[Measurement]:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("postcopy.testbed.bench._fault.measure_fault", measure_fault)
    monkeypatch.setattr("postcopy.testbed.bench._machine.measure_rv64", measure_rv64)
    path = tmp_path / "x.jsonl"
    assert main(["bench", "fault", "rv64", "--output", str(path)]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert [json.loads(line)["event"] for line in path.read_text().splitlines()] == ["run", "measurement"]


@pytest.mark.parametrize("options", [(), ("--json",)], ids=["words", "lines"])
def test_files_are_complete_whatever_becomes_of_the_standard_output(
    options: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with `| head -1`: its reader goes while the second of three is measured."""
    reader, writer = os.pipe()
    measured: list[int] = []

    async def measure_fault(rounds: int) -> list[Measurement]:
        measured.append(rounds)
        if len(measured) == 2:
            os.close(reader)
        return [ratio(f"fault {number}", [{"p50": 2.0}] * rounds, "p50", None, 2.5) for number in range(2)]

    for figure in ("fault", "pager_process", "bulk_delay"):
        monkeypatch.setattr(f"postcopy.testbed.bench._fault.measure_{figure}", measure_fault)
    path = tmp_path / "x.jsonl"
    with open(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(["bench", "fault", "pager-process", "bulk-delay", "--output", str(path), *options]) == 0
        assert [json.loads(line)["event"] for line in path.read_text().splitlines()] == ["run", *["measurement"] * 6]
        measured.append(0)
        assert main(["bench", "fault", "bulk-delay", *options]) == 1  # no reader, and no file: nothing to go on for
    assert len(measured) == (4 if options else 5)


def test_each_file_is_written_whatever_becomes_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def measure_migrate(given: Mapping[str, Any], found: Found) -> None:
        (tmp_path / "lines").mkdir()  # meanwhile
        found.measurements = [ratio("a downtime", [{"1": 2.0}], "1", None, None)]

    asked: list[bytes] = []

    def no_process(*_: Any, **more: Any) -> Any:
        asked.append(more["input"])
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr("postcopy.testbed.bench._migrate.measure_migrate", measure_migrate)
    monkeypatch.setattr("subprocess.run", no_process)
    files = [f"--{option}={tmp_path}/{name}" for option, name in (("output", "lines"), ("hdr", "h"), ("report", "r"))]
    assert main(["bench", "migrate", *files]) == 1
    said = capsys.readouterr().err.splitlines()
    assert [line.split(":")[2].split()[0] for line in said] == ["--output", "--hdr", "--report"]
    assert "that is a directory" in said[0]
    assert "a downtime" in str(asked)


def test_a_signal_that_is_ignored_stays_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under nohup, or in the background of a script; also while a report is drawn."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    seen: list[Any] = []

    def draw(*_: Any, **__: Any) -> subprocess.CompletedProcess[bytes]:
        seen.extend(map(signal.getsignal, numbers))
        return subprocess.CompletedProcess([], 0)

    async def measure_migrate(given: Mapping[str, Any], found: Found) -> None:
        seen.extend(map(signal.getsignal, numbers))
        found.measurements = [ratio("a downtime", [{"1": 2.0}], "1", None, None)]

    monkeypatch.setattr("postcopy.testbed.bench._migrate.measure_migrate", measure_migrate)
    monkeypatch.setattr("subprocess.run", draw)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        assert main(["bench", "migrate", "--report", str(tmp_path / "x.html")]) == 0
        assert list(map(signal.getsignal, numbers)) == [signal.SIG_IGN] * 3
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert seen == [signal.SIG_IGN] * 6


def test_what_a_worker_lacks_is_one_line() -> None:
    code = """
import threading
from postcopy.testbed.bench import _uffd, _worker

def main(what):
    if what == "mistake":
        raise ValueError(what)
    threading.Thread.start = lambda self: (_ for _ in ()).throw(RuntimeError("can't start new thread"))
    trio.run(trio.to_thread.run_sync, print)

import trio
_uffd.main = main
_worker.call("_uffd", sys.argv[1])
"""
    command = [sys.executable, "-P", "-c", f"import sys\n{code}"]
    done = subprocess.run([*command, "thread"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("postcopy: error: no thread can be started (remedy: ")
    assert len(done.stderr.splitlines()) == 1
    done = subprocess.run([*command, "mistake"], capture_output=True, text=True, check=False)
    assert "Traceback" in done.stderr


def test_options_that_make_no_sense(capsys: pytest.CaptureFixture[str]) -> None:
    for words, complaint in (
        (("fault", "--output", "/nonexistent/x"), "directory /nonexistent does not exist"),
        (("fault", "--output", "-"), "--output -: that is no file; write ./- for one of that name"),
        (("fault", "--hdr", "/nonexistent/x"), "directory /nonexistent does not exist"),
        (("fault", "--memory", "1GiB"), "bench fault has no --memory; bench migrate has"),
        (("quick", "--dimension", "memory"), "bench quick has no --dimension; bench scale has"),
        (("--policies", "hybrid"), "bench has no --policies; bench migrate has"),
        (("migrate", "fault"), "bench migrate has no use for 'fault'"),
        (("fault", "bulkk"), "did you mean bulk?"),
        (("falt",), "unknown figure 'falt'; did you mean fault?"),
        (("compare", "a.jsonl"), "bench compare needs B.jsonl"),
        (("compare", "a.jsonl", "b.jsonl", "--rounds", "3"), "bench compare has no --rounds"),
        (("--rounds", "3", "compare", "a.jsonl", "b.jsonl"), "bench compare has no --rounds"),
        (("--quick",), "bench has no --quick; write bench quick"),
        (("migrate", "--memory", "0"), "--memory: 0 bytes for 1 vcpus: the machine needs at least 16 MiB"),
        (("migrate", "--memory", "67108865B"), "must be a multiple of 4096 bytes"),
        (("migrate", "--bandwidth", "1bit"), "--bandwidth: a rate from 1mbit to "),
        (("migrate", "--delay", "1h"), "--delay: seconds from 0 to "),
        (("scale", "migrate"), "bench scale has no use for 'migrate' ("),
        (("scale", "memory"), "did you mean --dimension memory?"),
    ):
        assert main(["bench", *words]) == 2
        assert complaint in capsys.readouterr().err


def test_the_cost_of_recording() -> None:
    """A quarter more in recorded blocks is found whatever grows or falls steadily meanwhile; and the words."""
    drift = [75.0 + block for block in range(64)]
    recorded = [us * (1.25 if _recording.is_recorded(block) else 1.0) for block, us in enumerate(drift)]
    found, same = _recording._figure(recorded), _recording._figure(drift)
    assert found.result == pytest.approx(1.25, rel=1e-3)
    assert (found.reached, same.reached) == (False, True)
    assert str(found.note).startswith("1.250, 95 % interval 1.250 .. 1.250; of 8 times 8 blocks")
    unclear = _recording._figure(drift[:32] + recorded[32:])
    assert unclear.reached is None
    assert "at most 1.01: not clear" in _text(unclear, 80)


def test_a_distribution_is_that_of_the_core() -> None:
    histogram, generator = Histogram(), random.Random(1)
    values = [int(2 ** generator.uniform(0, 40)) for _ in range(1000)]
    for value in values:
        histogram.add(value)
    found = distribution(histogram)
    assert (found.count, found.sum_ns, found.max_ns) == (1000, sum(values), max(values))
    seen = 0
    for edge, count in zip(found.bucket_edges_ns, found.bucket_counts, strict=True):
        seen += count
        assert seen == sum(value <= edge for value in values)  # an edge is the highest value of its bucket
        assert histogram.percentile(100 * (seen - 0.5) / 1000) == min(edge, found.max_ns)
    both = joined([Touched({}, found), Touched({}, found)])
    assert both.count == 2000
    assert both.bucket_counts == [2 * count for count in found.bucket_counts]
