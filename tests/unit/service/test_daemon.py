# SPDX-License-Identifier: Apache-2.0
"""The daemon's own decisions, with migrations that are none; tests/integration/test_operating.py has the whole."""

from __future__ import annotations

import io
import re
import socket
from typing import Any
from unittest.mock import Mock

import pytest

from postcopy._stop import Stop
from postcopy.errors import ConfigurationError, ConnectionLost, PostcopyError, ResourceError
from postcopy.machines import BlockLayout, Machine, MachineState
from postcopy.migration.destination import DestinationMigration
from postcopy.migration.precopy import Mode
from postcopy.migration.source import SourceMigration, SourceOptions
from postcopy.net import Address, Asking
from postcopy.output import Output
from postcopy.records.control import AllSteered, Settings, Steered
from postcopy.service._attempts import Attempts
from postcopy.service.config import ArrivalOptions, DaemonConfig
from postcopy.service.control import ControlHandler, find
from postcopy.service.daemon import MAX_LEFT, MAX_MACHINES, Daemon
from postcopy.service.schema import ControlError, Request
from postcopy.service.service import Phase
from postcopy.wire import State


def _daemon(limit: int = 0) -> Daemon:
    output = Output(False, io.StringIO(), io.StringIO())
    return Daemon(DaemonConfig(SourceOptions(max_bandwidth_bytes_per_s=limit), ArrivalOptions()), output)


def _job(state: State, kind: Any = SourceMigration) -> Mock:
    job = Mock(spec=kind)
    job.state = state
    job.status = "active"
    job.cancellable = state in (State.READY, State.HANDED)
    job.cancel.return_value = job.cancellable
    return job


def _move(daemon: Daemon, name: str, state: State, kind: Any = SourceMigration) -> Mock:
    owned = daemon._add(name, Phase.LEAVING if kind is SourceMigration else Phase.ARRIVING)
    owned.migration = job = _job(state, kind)
    return job


@pytest.mark.parametrize(
    ("limit", "states", "expected"),
    [
        (0, [State.POSTCOPY, State.POSTCOPY], [0, 0]),
        (900, [State.POSTCOPY], [900]),
        (900, [State.POSTCOPY, State.COMMITTED, State.POSTCOPY], [300, 300, 300]),
        # One that does not push takes nothing, and finds the part that it will have.
        (900, [State.POSTCOPY, State.POSTCOPY, State.READY], [450, 450, 300]),
        (900, [State.POSTCOPY, State.PAUSED, State.COMPLETED], [900, 450, 450]),
        (1, [State.POSTCOPY, State.POSTCOPY], [1, 1]),  # 0 would be no limit
    ],
)
def test_shares(limit: int, states: list[State], expected: list[int]) -> None:
    daemon = _daemon(limit)
    jobs = [_move(daemon, f"m{number}", state) for number, state in enumerate(states)]
    _move(daemon, "arriving", State.POSTCOPY, DestinationMigration)
    daemon.share_bandwidth()
    assert [job.set_bandwidth.call_args.args[0] for job in jobs] == expected


async def test_set_reaches_those_under_way() -> None:
    daemon = _daemon()
    out, into = _move(daemon, "a", State.POSTCOPY), _move(daemon, "b", State.POSTCOPY, DestinationMigration)
    daemon.machines[0].sending = SourceOptions()
    settings = {"max-bandwidth": 77, "recover-for": 5.0, "bulk-channels": 3, "push-after": 9}
    assert await ControlHandler(daemon).execute(Request("set", dict(settings))) == Settings(
        max_bandwidth=77,
        bulk_channels=3,
        mode="postcopy",
        precopy=0.0,
        max_downtime=0.3,
        push_after=9.0,
        recover_for=5.0,
    )
    out.set_bandwidth.assert_called_with(77)
    out.set_push_after.assert_called_with(9)
    assert daemon.machines[0].sending.push_after_s == 9
    for job in (out, into):
        job.set_recover_for.assert_called_with(5.0)


async def test_between_two_attempts() -> None:
    """A migration whose connection was lost, and that is begun again, has not failed; it can be cancelled."""
    daemon = _daemon()
    job = _move(daemon, "a", State.ABORTED)
    [owned] = daemon.machines
    job.failure, job.may_try_again, job.connecting, job.migration_id = ConnectionLost("cut"), True, False, "ff"
    job.cancelled, job.paused_ns = False, 0
    owned.sending, owned.attempts = SourceOptions(), Attempts(1.0)
    assert owned.is_begun_again
    control = ControlHandler(daemon)
    await control.execute(Request("set", {"max-bandwidth": 77, "recover-for": 5.0}))
    assert (owned.sending.max_bandwidth_bytes_per_s, owned.sending.recover_for_s) == (77, 5.0)
    cancelled = await control.execute(Request("migrate-cancel", {}))
    assert cancelled == AllSteered(migrations=[Steered(machine="a", migration_id="ff")])
    assert owned.stop.is_set()
    assert not owned.is_begun_again
    with pytest.raises(ControlError, match="no migration is going on"):
        await control.execute(Request("migrate-cancel", {}))


@pytest.mark.parametrize("mode", [Mode.POSTCOPY, Mode.STOP_AND_COPY])
async def test_no_rounds_no_downtime_to_set(mode: Mode) -> None:
    daemon = _daemon()
    job = _move(daemon, "a", State.READY)
    job.mode, job.paused_ns = mode, 0
    [owned] = daemon.machines
    owned.machine, owned.sending = Mock(spec=Machine), SourceOptions(mode=mode)
    with pytest.raises(ControlError, match=f"--max-downtime goes with --precopy: .* of mode {mode}"):
        await ControlHandler(daemon).execute(Request("set", {"machine": "a", "max-downtime": 1.0}))


async def test_why_it_has_failed_is_in_its_result() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        config = DaemonConfig(SourceOptions(), ArrivalOptions(), listen=Address(*other.getsockname()))
        daemon = Daemon(config, Mock(spec=Output))
        with pytest.raises(ResourceError) as caught:
            await daemon.run(Stop())
    [result] = [call.args[1] for call in daemon.output.emit.call_args_list if call.args[0] == "result"]  # type: ignore[attr-defined]
    assert (result.status, result.error) == ("failed", str(caught.value))


def test_names() -> None:
    daemon = _daemon()
    daemon._add("a", Phase.HERE).machine = Mock(spec=Machine)
    daemon._add("", Phase.ARRIVING)  # nobody knows yet what it is: not meant by one who names none
    with pytest.raises(ConfigurationError, match="already"):
        daemon._add("a", Phase.HERE)
    with pytest.raises(ControlError, match="no machine 'b'"):
        find(daemon.machines, "b")
    assert find(daemon.machines, None).name == "a"
    daemon._add("b", Phase.HERE).machine = Mock(spec=Machine)
    with pytest.raises(ControlError, match="several machines: a, b; choose with --machine NAME"):
        find(daemon.machines, None)
    # Its migration has completed, its end here has not: the name is free, so that it may come back at once.
    find(daemon.machines, "b").migration = _job(State.COMPLETED)
    assert daemon._add("b", Phase.HERE) is find(daemon.machines, "b")
    for number in range(MAX_MACHINES - len(daemon.machines)):
        daemon._add(f"m{number}", Phase.HERE)
    with pytest.raises(ConfigurationError, match=str(MAX_MACHINES)):
        daemon._add("one more", Phase.HERE)


@pytest.mark.parametrize("name", ["", "a b", "-", "x" * 64, "\n", 7, ["a"]])
def test_names_that_a_peer_may_not_give(name: object) -> None:
    daemon = _daemon()
    owned = daemon._add("arriving", Phase.ARRIVING)
    with pytest.raises(ConfigurationError, match="name"):
        daemon.make_arriving(owned, "rv64", {"name": name}, [BlockLayout("x", 4096, 4096)])
    assert owned.name == "arriving"


def test_memory_of_a_peer_counts_from_its_offer_on() -> None:
    """Also where a machine has none yet, as one whose process is still being started."""
    config = DaemonConfig(SourceOptions(), ArrivalOptions(), max_memory_per_peer_bytes=8192)
    daemon = Daemon(config, Output(False, io.StringIO(), io.StringIO()))

    def offer(name: str) -> None:
        owned = daemon._add(name, Phase.ARRIVING)
        owned.peer = "a"
        daemon.make_arriving(owned, "rv64", {}, [BlockLayout("x", 4096, 4096)])

    for name in ("first", "second"):
        with pytest.raises(PostcopyError) as refused:  # not forgotten yet
            offer(name)
        assert not isinstance(refused.value, ResourceError)
    with pytest.raises(ResourceError, match="may have"):
        offer("third")


async def test_one_that_cannot_be_made_has_failed_under_its_name() -> None:
    """Also when it has none: it gets one from its kind then."""
    for given, name in (({"name": "vm1"}, r"vm1\Z"), ({"name": None}, "rv64-"), ({}, "rv64-")):
        daemon = _daemon()
        owned = daemon._add("arriving", Phase.ARRIVING)
        with pytest.raises(PostcopyError):
            daemon.make_arriving(owned, "rv64", given, [BlockLayout("x", 4096, 4096)])
        assert re.match(name, owned.name)


@pytest.mark.parametrize(
    ("state", "class_of_error"),
    [(State.READY, None), (State.HANDED, None), (State.POSTCOPY, "NotNow"), (State.PAUSED, "NotNow")],
)
async def test_cancel_before_the_point_of_no_return_only(state: State, class_of_error: str | None) -> None:
    daemon = _daemon()
    job = _move(daemon, "a", state)
    if class_of_error is None:
        cancelled = await ControlHandler(daemon).execute(Request("migrate-cancel", {}))
        assert isinstance(cancelled, AllSteered)
        assert [one.machine for one in cancelled.migrations] == ["a"]
    else:
        with pytest.raises(ControlError) as caught:
            await ControlHandler(daemon).execute(Request("migrate-cancel", {}))
        assert caught.value.kind == class_of_error
    assert job.cancel.called  # which does nothing to one that has been decided
    assert not daemon.machines[0].stop.is_set()  # which would end it in any case


async def test_quit_loses_no_machine_unasked() -> None:
    daemon = _daemon()
    daemon._add("a", Phase.HERE).machine = Mock(spec=Machine, live=True, outlives=False)
    with pytest.raises(ControlError, match=r"a: the machine runs only here: .* or say quit --force"):
        await ControlHandler(daemon).execute(Request("quit", {}))
    assert not daemon.stop.is_set()
    await ControlHandler(daemon).execute(Request("quit", {"force": True}))
    assert daemon.stop.is_set()
    with pytest.raises(ControlError, match="about to end"):
        await ControlHandler(daemon).execute(Request("start", {"kind": "rv64"}))
    assert daemon._why_refused(Asking("host", []))


async def test_a_process_of_its_own_is_ended_by_force_only() -> None:
    """Also one that is paused, since its destination was lost: it may be the only one."""
    daemon = _daemon()
    job = _move(daemon, "a", State.ABORTED)
    (owned,) = daemon.machines
    owned.machine = machine = Mock(spec=Machine, live=True, outlives=True)
    for state in (MachineState.RUNNING, MachineState.PAUSED):
        machine.statistics.return_value.state = state
        assert owned.stays == state.value
        with pytest.raises(ControlError, match=f"a: it is {state.value}, and would be destroyed"):
            await ControlHandler(daemon).execute(Request("end", {"machine": "a"}))
    owned.phase = Phase.HERE
    await ControlHandler(daemon).execute(Request("end", {"machine": "a", "force": True}))
    assert machine.destroy.called
    assert not machine.close.called
    job.state = State.COMPLETED
    assert not owned.stays


def test_what_has_left_is_kept_for_metrics_and_bounded() -> None:
    daemon = _daemon()
    for number in range(MAX_LEFT + 5):
        _move(daemon, f"m{number}", State.COMPLETED)
        daemon._forget(daemon.machines[-1])
    assert daemon.rows() == []
    assert [name for name, _, _ in daemon.all_rows()] == [f"m{number}" for number in range(5, MAX_LEFT + 5)]
    daemon._add("m20", Phase.HERE)
    assert [name for name, _, _ in daemon.all_rows()].count("m20") == 1
