# SPDX-License-Identifier: Apache-2.0
"""What `postcopy ctl` shows of a migration that it waits for."""

from __future__ import annotations

import contextlib
import io
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, cast

import pytest
import trio

from postcopy._stop import Stop
from postcopy.cli.ctl import CtlCommand, make
from postcopy.errors import ConfigurationError, MigrationError, PeerError, known_error
from postcopy.output import Output
from postcopy.records import VERSION
from postcopy.service.client import ControlClient, ProcessGoneError
from postcopy.service.schema import ControlError

OF = {"migration-id": "ff", "direction": "outgoing", "machine": "one", "peer": "192.0.2.7:7777", "error": None}
ENDED = {"status": "completed", "downtime-ms": 24.71, "total-ms": 219.2}


class Client:
    """A process that sends the machine `one` away."""

    def __init__(self, *events: tuple[str, dict[str, Any]]) -> None:
        self._events = [{"event": event, "data": data} for event, data in events]

    async def execute(self, command: str, arguments: dict[str, Any]) -> dict[str, Any]:
        return {"machine": "one", "migration-id": "ff"}

    async def next_event(self) -> dict[str, Any]:
        await trio.testing.wait_all_tasks_blocked()  # what there is to show is shown
        return self._events.pop(0)


@contextlib.asynccontextmanager
async def connected(client: Client) -> AsyncIterator[ControlClient]:
    yield cast(ControlClient, client)


async def run(monkeypatch: pytest.MonkeyPatch, client: Client, stop: Stop, **given: Any) -> tuple[bool, str]:
    """A command, on a socket that `client` stands for: whether it was done, and what it said on stderr."""
    monkeypatch.setattr(ControlClient, "open", lambda path, checks: connected(client))
    stderr = io.StringIO()
    output = Output(False, io.StringIO(), stderr)
    done = await CtlCommand({"control": "x", **given}, output).run(stop)
    return done, stderr.getvalue()


async def migrate(*events: tuple[str, dict[str, Any]], **given: Any) -> str:
    stderr = io.StringIO()
    command = CtlCommand({"request": "migrate", "control": "x", **given}, Output(False, io.StringIO(), stderr))
    try:
        assert await command._migrate(cast(ControlClient, Client(*events)))
    finally:
        command._output.close()
    return stderr.getvalue()


async def test_names_of_files_are_those_of_this_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that is asked has another one."""
    monkeypatch.chdir(tmp_path)
    for request, name in (("upgrade", "program"), ("start", "api-socket"), ("start", "disk")):
        command = CtlCommand({"request": request, "control": "x", name: "a/../b"}, Output(False, None, io.StringIO()))
        assert command._arguments == {name: str(tmp_path / "b")}
        command._output.close()


async def test_progress_of_a_migration(capsys: pytest.CaptureFixture[str]) -> None:
    ram = {"total": 64 << 20, "page-size": 4096, "transferred": 16 << 20, "demand-pages": 96, "background-pages": 4000}
    job = OF | {"status": "postcopy-active", "ram": ram}
    guest = {"state": "paused", "operations": 7}
    machines = [{"name": "one", "memory": 64 << 20, "guest": guest, "migration": job}]
    text = await migrate(
        ("migration-status", OF | {"status": "active"}),
        ("migration-status", OF | {"status": "failed", "direction": "incoming"}),  # sent to where it is
        ("progress", {"side": "daemon", "machines": machines}),
        ("migration-status", OF | {"status": "postcopy-active"}),
        ("migration-status", OF | {"status": "postcopy-paused", "error": "the cable is out"}),
        ("migration-status", OF | {"status": "completed"}),
        ("migration-ended", OF | ENDED),
    )
    lines = text.splitlines()
    # (what was counted before is not all of it)
    assert [line.partition("; time:")[0] for line in lines if "completed" in line] == [
        "one: completed; the machine runs at the destination"
    ]
    assert lines[0].startswith("one: connecting to the destination; time: ")
    assert any(
        line.startswith("one: sending pages; the machine runs at the destination; memory: 25 %, 16 MiB of 64 MiB;")
        and "; pages: 96 on demand, 4000 in background" in line
        for line in lines
    )
    assert "one: postcopy-paused: the cable is out" in lines
    assert capsys.readouterr().out == "one has moved to 192.0.2.7:7777: downtime 24.7 ms, total time 219 ms\n"


async def test_one_that_is_begun_again() -> None:
    """Another attempt has another id, and none before it is connected. That it goes on is said once for each loss."""
    again = OF | {"attempts": 2, "migration-id": None}
    other = {"machine": "two", "migration-id": None}
    text = await migrate(
        ("migration-status", OF | {"status": "active", "attempts": 1}),
        ("migration-status", again | {"status": "connecting", "error": "the cable is out"}),
        ("migration-ended", again | other | {"status": "failed", "error": "of another machine"}),
        ("migration-status", again | {"status": "setup", "migration-id": "ee"}),
        ("migration-status", again | {"status": "active", "migration-id": "ee"}),
        ("migration-ended", again | ENDED | {"migration-id": "ee"}),
    )
    said = [line for line in text.splitlines() if "again" in line or "None" in line]
    assert [line for line in said if "time:" not in line] == ["one: the cable is out; trying again (attempt 2)"]


async def test_json_of_a_migration(capsys: pytest.CaptureFixture[str]) -> None:
    assert await migrate(("migration-ended", OF | ENDED), json=True) == ""
    assert json.loads(capsys.readouterr().out) == OF | ENDED


async def test_migration_that_fails() -> None:
    with pytest.raises(MigrationError, match="one has not moved: failed: no such host"):
        await migrate(("migration-ended", OF | {"status": "failed", "error": "no such host"}))


@pytest.mark.parametrize("request_name", ["migrate", "migrate-cancel"])
async def test_what_the_process_does_not_understand(request_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its exit status is 2, whether or not progress is shown beside."""

    class Refuses(Client):
        async def execute(self, command: str, arguments: dict[str, Any]) -> dict[str, Any]:
            if command == "events":
                return {}
            raise ControlError("BadArguments", "there is no machine 'two' here")

    with pytest.raises(BaseExceptionGroup) as caught:
        await run(monkeypatch, Refuses(), Stop(), request=request_name)
    error = known_error(caught.value)
    assert isinstance(error, ConfigurationError)
    assert str(error) == "there is no machine 'two' here"


async def test_ctrl_c_before_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not known then whether there is a migration."""
    stop = Stop()

    class Hangs(Client):
        async def execute(self, command: str, arguments: dict[str, Any]) -> dict[str, Any]:
            if command == "migrate":
                stop.set()
                await trio.sleep_forever()
            return {}

    done, said = await run(monkeypatch, Hangs(), stop, request="migrate", machine="one")
    assert not done
    assert "postcopy: the migration of one goes on, if it has begun; `postcopy ctl --control x top` shows it" in said
    assert "to stop it: postcopy ctl --control x migrate-cancel --machine one" in said


class Broken(io.StringIO):
    """A pipe whose reader has gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


class Busy(Client):
    """Sends events, and shows its machines, for as long as it is asked."""

    async def execute(self, command: str, arguments: dict[str, Any] | None = None) -> dict[str, Any]:
        return {"side": "daemon", "machines": []}

    async def next_event(self) -> dict[str, Any]:
        await trio.lowlevel.checkpoint()
        return {"event": "machine-left", "data": OF}


@pytest.mark.parametrize("request_name", ["events", "top"])
async def test_nobody_reads(request_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `ctl events | head -1`: an end in order, and no traceback."""
    monkeypatch.setattr("sys.stdout", Broken())
    with trio.fail_after(30):
        assert await run(monkeypatch, Busy(), Stop(), request=request_name) == (True, "")


async def test_top_of_a_process_that_hangs_is_not_its_end(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.abc.Clock
) -> None:
    class Hangs(Busy):
        error: PeerError = ProcessGoneError("x: the process is gone")
        asked = 0

        async def execute(self, command: str, arguments: dict[str, Any] | None = None) -> dict[str, Any]:
            self.asked += 1
            if self.asked > 1:
                raise self.error
            return await super().execute(command, arguments)

    assert await run(monkeypatch, Hangs(), Stop(), request="top") == (
        True, "postcopy: the process at x has ended\n"
    )  # fmt: skip
    Hangs.error = PeerError("x: status was not answered within 60 s")
    with pytest.raises(BaseExceptionGroup) as caught:
        await run(monkeypatch, Hangs(), Stop(), request="top")
    assert str(known_error(caught.value)) == "x: status was not answered within 60 s"


ESCAPES = "\x1b]0;title\x07\x1b[31mred\u202eder\nline\r\x9b"


@asynccontextmanager
async def answering(path: str, *answers: dict[str, Any]) -> AsyncIterator[None]:
    """A socket with a greeting, on which anything is answered with these lines."""

    async def serve(stream: trio.SocketStream) -> None:
        await stream.send_all(b'{"postcopy": {"version": "1", "schema": %d}}\n' % VERSION)
        with suppress(trio.BrokenResourceError):
            async for asked in stream:
                for line in asked.splitlines():
                    for answer in answers:
                        await stream.send_all(json.dumps({"id": json.loads(line)["id"], **answer}).encode() + b"\n")

    listener = trio.socket.socket(socket.AF_UNIX)
    await listener.bind(path)
    listener.listen()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, serve, [trio.SocketListener(listener)])
        yield
        nursery.cancel_scope.cancel()


async def ask(path: str, request: str, **given: Any) -> None:
    """`PostcopyError` as the command line takes it from there; a traceback is anything else."""
    output = Output(False, io.StringIO(), io.StringIO())
    try:
        with trio.fail_after(60):
            await make({"request": request, "control": path, **given}, output)(Stop())
    except BaseExceptionGroup as group:
        raise known_error(group) from group
    finally:
        output.close()


STEERED = {"enabled": True, "machine": "one", "migration-id": "ff", "added": "since"}
"""What `events` and `migrate` are answered with."""
STATUS = {
    "side": "daemon",
    "pid": 7,
    "listening": [ESCAPES],
    "settings": {"recover-for": "forever", "added": {"since": 1}},
    "machines": [
        {"name": ESCAPES, "kind": ESCAPES, "memory": 0, "guest": {"state": "running", "failure": ESCAPES},
         "migration": {"side": "source", "status": "active", "error": ESCAPES, "elapsed-ms": 1, "added": None}},
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    "answer",
    [
        {}, {"machines": "x"}, {"machines": [{}]}, {"commands": [1]}, STATUS | {"pid": float("1e999")},
        STATUS | {"pid": 10**400},
    ],
)  # fmt: skip
@pytest.mark.parametrize("request_", ["status", "commands", "migrate", "start", "top"])
async def test_answers_that_are_none(tmp_path: Path, request_: str, answer: dict[str, Any]) -> None:
    """Of a socket that is no postcopy's."""
    path = str(tmp_path / "socket")
    async with answering(path, {"return": answer}):
        with pytest.raises(PeerError, match=f"{path}: "):
            await ask(path, request_, to="a:1", kind="rv64")


async def test_one_that_is_of_two_kinds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a daemon, with what a pager has: by that it would be taken for one, and shown as one, which it is not."""
    path = str(tmp_path / "socket")
    async with answering(path, {"return": STATUS | {"vms": [{"name": "x"}], "added": "since"}}):
        await ask(path, "status")
        async with ControlClient.open(path, checks=True) as client:
            assert (await client.execute("status")).keys() == {*STATUS, "added"}
    assert "daemon" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("event", "problem"),
    [
        ({"event": "progress"}, "an event without a name or data"),
        ({"event": "progress", "data": {}}, "the event progress is none that postcopy gives: .*`side`"),
        ({"event": "migration-ended", "data": {"machine": 1}}, "the event migration-ended is none"),
    ],
)
async def test_events_that_are_none(tmp_path: Path, event: dict[str, Any], problem: str) -> None:
    path = str(tmp_path / "socket")
    async with answering(path, {"return": STEERED}, {"event": "added", "data": {}}, event):
        with pytest.raises(PeerError, match=problem):
            await ask(path, "migrate", to="a:1")


async def test_what_need_not_be_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A mistake in what is shown would be a traceback."""
    path = str(tmp_path / "socket")
    ended = {"side": "source", "status": "completed", "error": None, "machine": "one", "downtime-ms": 1, "total-ms": 2}
    event = {"event": "migration-ended", "data": ended | {"migration-id": "ff", "direction": "outgoing"}}
    async with answering(path, {"return": STEERED}, {"event": "progress", "data": STATUS}, event):
        await ask(path, "migrate", to="a:1")
    assert "one has moved" in capsys.readouterr().out


@pytest.mark.parametrize("request_", ["status", "commands", "end", "migrate"])
async def test_no_escapes(tmp_path: Path, capsys: pytest.CaptureFixture[str], request_: str) -> None:
    """What the process says moves no cursor, whatever it is."""
    path = str(tmp_path / "socket")
    answer = (
        STATUS
        | STEERED
        | {
            "commands": [{"name": ESCAPES, "help": ESCAPES, "arguments": []}],
            "machine": ESCAPES,
        }
    )
    async with answering(path, {"return": answer}):
        await ask(path, request_, **({"to": "a:1", "detach": True} if request_ == "migrate" else {}))
    async with answering(path + "2", {"error": {"class": "Failed", "desc": ESCAPES}}):
        with pytest.raises(ControlError):
            await ask(path + "2", request_, to="a:1")
    text = capsys.readouterr().out
    assert all(char.isprintable() or char == "\n" for char in text), repr(text)
    assert request_ == "end" or "red" in text
    assert "\nline" not in text
