# SPDX-License-Identifier: Apache-2.0
"""``--report``: what a process keeps of its migrations, and what its child draws; and `postcopy report`."""

from __future__ import annotations

import errno
import importlib.util
import io
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import trio
import trio.testing
from timelines import MIGRATION, Json, both, dest, run, source, text

from postcopy._stop import Stop
from postcopy.cli._main import main
from postcopy.errors import ConfigurationError
from postcopy.output import Output
from postcopy.report import Reporter
from postcopy.report import _reporter as reporter_module

pytestmark = pytest.mark.slow


def make(path: Path) -> tuple[Reporter, Output, io.StringIO]:
    said = io.StringIO()
    output = Output(False, None, said)
    return Reporter(str(path), output), output, said


def take(reporter: Reporter, line: Json) -> None:
    reporter.take(line["event"], {key: value for key, value in line.items() if key != "event"})


async def drawn(path: Path) -> None:
    while not path.exists():  # noqa: ASYNC110, ASYNC240 -- another process makes it
        await trio.sleep(0.02)


def ended(status: str = "completed") -> Json:
    return {"event": "migration-ended", "side": "dest", "migration-id": MIGRATION, "status": status, "error": None}


async def test_a_page_is_there_when_a_migration_has_ended_and_the_process_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    reporter, output, said = make(path)
    found = ""

    async def command(stop: Stop) -> bool:
        nonlocal found
        take(reporter, run("daemon"))
        take(reporter, dest())
        take(reporter, ended())
        with trio.fail_after(100):
            await drawn(path)
        found = path.read_text()
        return True

    assert await reporter.around(command)(Stop())
    assert "Migration of vm1" in found
    assert f"postcopy: report: {path}" in said.getvalue()
    assert os.listdir(tmp_path) == ["page.html"]
    del output


async def test_a_command_that_ends_while_its_page_is_drawn_has_it(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    reporter, _, _ = make(path)

    async def command(stop: Stop) -> bool:
        take(reporter, dest())
        take(reporter, ended())
        await trio.testing.wait_all_tasks_blocked()  # a child has been asked for
        return True

    assert await reporter.around(command)(Stop())
    assert "Migration of vm1" in path.read_text()


async def test_a_command_that_fails_has_its_page(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    reporter, _, _ = make(path)

    async def command(stop: Stop) -> bool:
        take(reporter, {"event": "result", "side": "source", "status": "failed", "error": "no route to host"})
        raise ConfigurationError("no route to host")

    with pytest.raises(BaseExceptionGroup) as caught:
        await reporter.around(command)(Stop())
    assert caught.group_contains(ConfigurationError)
    assert "no route to host" in path.read_text()


async def test_a_command_that_is_ended_at_once_does_not_wait_for_its_page(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    reporter, _, _ = make(path)

    async def command(stop: Stop) -> bool:
        take(reporter, dest())
        await trio.sleep_forever()
        return True

    with trio.CancelScope() as scope:
        scope.cancel()
        await reporter.around(command)(Stop())
    assert not path.exists()


@pytest.mark.parametrize("asked", [False, True])
async def test_a_signal_ends_the_drawing_and_not_the_command(
    asked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whether or not it was a signal that has ended the command: it has done what was asked."""
    monkeypatch.setattr(reporter_module, "python", lambda *arguments: ["sleep", "1000"])
    reporter, _, said = make(tmp_path / "page.html")
    stop, result = Stop(), []

    async def command(stop: Stop) -> bool:
        if asked:
            stop.ask("SIGTERM")
        take(reporter, dest())
        return True

    async def run() -> None:
        result.append(await reporter.around(command)(stop))

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            while not result:
                await trio.testing.wait_all_tasks_blocked(0.05)
                assert not stop.ask("Ctrl-C")
    assert result == [True]
    assert "was not drawn: ended by Ctrl-C" in caplog.text
    assert said.getvalue() == ""


@pytest.mark.parametrize("lines", [[dest(), ended()], []])
async def test_the_end_of_a_daemon_is_not_drawn(lines: list[Json], tmp_path: Path) -> None:
    """It would be the same page again, for which the process would wait; or a page about nothing."""
    path = tmp_path / "page.html"
    reporter, _, _ = make(path)

    async def command(stop: Stop) -> bool:
        for line in lines:
            take(reporter, line)
        if lines:
            with trio.fail_after(100):
                await drawn(path)
                while not reporter._in_file:  # noqa: ASYNC110
                    await trio.sleep(0.02)
        take(reporter, {"event": "result", "side": "daemon", "status": "completed", "error": None})
        path.unlink(missing_ok=True)
        return True

    assert await reporter.around(command)(Stop())
    assert not path.exists()


async def test_what_cannot_be_drawn_is_a_message(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = tmp_path / "pages"
    directory.mkdir()
    reporter, _, said = make(directory / "page.html")

    async def command(stop: Stop) -> bool:
        shutil.rmtree(directory)
        take(reporter, dest())
        take(reporter, ended())
        return True

    with caplog.at_level(logging.WARNING):
        assert await reporter.around(command)(Stop())
    assert f"was not drawn: --output {directory / 'page.html'}: directory {directory} does not exist" in caplog.text
    assert "postcopy: report:" not in said.getvalue()


@pytest.mark.parametrize(
    "error", [OSError(errno.EAGAIN, "no more processes"), RuntimeError("can't start new thread"), MemoryError("none")]
)
async def test_no_process_to_draw_it(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The command, which may have machines, goes on."""
    tried = trio.Event()

    async def run_process(*arguments: object, **options: object) -> None:
        tried.set()
        raise error

    monkeypatch.setattr(trio, "run_process", run_process)
    reporter, _, said = make(tmp_path / "page.html")

    async def command(stop: Stop) -> bool:
        take(reporter, dest())
        take(reporter, ended())
        await tried.wait()
        await trio.testing.wait_all_tasks_blocked()
        return True

    assert await reporter.around(command)(Stop())
    assert caplog.text.count("was not drawn") == 2  # then, and at the end
    assert error.args[-1] in caplog.text
    assert "postcopy: report:" not in said.getvalue()


async def test_ctrl_c_is_not_for_what_draws() -> None:
    says = "import os, sys; sys.exit(f'in group {os.getpgrp() - os.getpid()}')"  # 0: its own
    assert await reporter_module._child([sys.executable, "-c", says], b"", 0) == "in group 0"


async def test_what_is_wrong_is_said_before_anything_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def command(stop: Stop) -> bool:
        raise AssertionError("it has begun")

    reporter, _, _ = make(tmp_path / "missing" / "page.html")
    with pytest.raises(ConfigurationError, match=r"--report .*: directory .* does not exist"):
        await reporter.around(command)(Stop())
    reporter, _, _ = make(tmp_path / "page.html")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"pip install 'postcopy\[report\]'"):
        await reporter.around(command)(Stop())


async def test_what_virtual_machines_wait_for_begins_in_any_case(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As a pager whose process before has died, on a disk that is full by now."""

    async def command(stop: Stop) -> bool:
        return True

    reporter, _, _ = make(tmp_path / "missing" / "page.html")
    assert await reporter.around(command, patient=True)(Stop())
    assert "missing does not exist" in caplog.text


def test_kept_are_the_last_migrations_and_little_of_each(tmp_path: Path) -> None:
    reporter, output, _ = make(tmp_path / "page.html")
    assert output.listeners == [reporter.take]
    lines = (run("daemon"), dest(), source(), ended(), {"event": "progress", "side": "dest"})
    for number in range(24):
        for line in lines:
            take(reporter, line | ({"migration-id": f"{number:032x}"} if "migration-id" in line else {}))
    kept = reporter._run + b"".join(one for lines in reporter._lines.values() for one in lines.values())
    assert kept.count(b'"event": "run"') == 1
    assert kept.count(b'"event": "timeline"') == 2 * reporter_module.MOST_MIGRATIONS
    assert b"progress" not in kept
    assert f"{23:032x}".encode() in kept
    assert f"{23 - reporter_module.MOST_MIGRATIONS:032x}".encode() not in kept


# ---- postcopy report


def test_both_sides_from_two_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_bytes(text(run("source"), source()))
    (tmp_path / "b.jsonl").write_bytes(text(run("dest"), dest()))
    assert main(["report", "a.jsonl", "b.jsonl", "--hdr", "faults.hlog"]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "both sides" in page
    assert page.count("<article") == 1
    assert "Tag=dest:vm1:whole" in (tmp_path / "faults.hlog").read_text()
    assert capsys.readouterr() == ("", "postcopy: latencies: faults.hlog\npostcopy: report: report.html\n")


def test_pictures_as_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lines.jsonl").write_bytes(both())
    (tmp_path / "svg").mkdir()
    assert main(["report", "lines.jsonl", "--svg", "svg"]) == 0
    assert sorted(os.listdir("svg")) == ["latency.svg", "over-time.svg", "pause.svg", "residency.svg"]
    for picture in (tmp_path / "svg").iterdir():
        assert ElementTree.parse(picture).getroot().tag == "{http://www.w3.org/2000/svg}svg"
        assert picture.stat().st_size < 96 << 10
        assert "prefers-color-scheme: dark" in picture.read_text()


def test_from_standard_input(tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    command = [sys.executable, "-m", "postcopy", "report", "-", "--output", str(target)]
    done = subprocess.run(command, input=both(), capture_output=True, timeout=100, check=False)
    assert (done.returncode, done.stdout, done.stderr.decode()) == (0, b"", f"postcopy: report: {target}\n")
    assert "Migration of vm1" in target.read_text()
    assert os.stat(target).st_mode & 0o777 == 0o644


def test_a_matplotlib_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    """And numpy has no threads by then: with little address space they end the process with SIGSEGV."""
    (tmp_path / "matplotlib.py").write_text(
        "import os\n"
        "assert os.environ['OPENBLAS_NUM_THREADS'] == '1'\n"
        "raise ImportError('libfreetype.so.6: cannot open')\n"
    )
    command = [sys.executable, "-P", "-m", "postcopy", "report", "-", "--output", str(tmp_path / "page.html")]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=100, check=False,
        env={name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
        | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("postcopy: error: report: matplotlib cannot be loaded: libfreetype.so.6")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["none.jsonl"], "none.jsonl: No such file or directory"),
        (["."], ".: a directory, not a regular file"),
        (["binary"], "binary: its first line is no JSON"),
        (["good.jsonl", "--output", "none/page.html"], "--output none/page.html: directory"),
        (["good.jsonl", "--output", "."], "--output .: that is a directory"),
        (["good.jsonl", "--svg", "none"], "--svg none: no such directory"),
        (["good.jsonl", "--hdr", "none/log"], "--hdr none/log: directory"),
        (["good.jsonl", "--output", "./good.jsonl"], "--output ./good.jsonl: that is read, and would be replaced"),
        (["good.jsonl", "--hdr", "good.jsonl"], "--hdr good.jsonl: that is read, and would be replaced"),
    ],
)  # fmt: skip
def test_what_is_asked_for_wrongly(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "binary").write_bytes(b"\x7fELF")
    (tmp_path / "good.jsonl").write_bytes(text(run("dest")))
    before = sorted(os.listdir("."))
    assert main(["report", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert sorted(os.listdir(".")) == before


@pytest.mark.parametrize("lines", [b"", text(run("dest")), b"\n\n"], ids=["empty", "one that ended early", "blank"])
def test_lines_without_a_migration_make_no_page(
    lines: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of a command that has failed before there was one, in a pipe."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lines").write_bytes(lines)
    (tmp_path / "before.html").write_text("an earlier page")
    for more in ([], ["--svg", "."]):
        assert main(["report", "lines", "--output", "before.html", *more]) == 1
        assert "there is no migration in these lines" in capsys.readouterr().err
    assert sorted(os.listdir(".")) == ["before.html", "lines"]
    assert (tmp_path / "before.html").read_text() == "an earlier page"
