# SPDX-License-Identifier: Apache-2.0
"""The laboratory without a network: plans, words, records, and whom it ends."""

from __future__ import annotations

import argparse
import errno
import ipaddress
import os
import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopy._child import python
from postcopy.cli import make_parser
from postcopy.errors import ConfigurationError, ResourceError
from postcopy.testbed import _linux
from postcopy.testbed.lab import _lab as lab
from postcopy.testbed.lab import _members as members
from postcopy.testbed.lab import _state as state
from postcopy.testbed.lab import command
from postcopy.testbed.lab._plan import (
    MAX_HOSTS,
    MAX_RATE,
    MIN_RATE,
    PREFIX4,
    PREFIX6,
    LabPlan,
    format_rate,
    parse_delay_us,
    parse_rate,
)


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POSTCOPY_LAB_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that has a mark, as one that was started in a host."""
    mark = f"unit:{secrets.token_hex(8)}"
    with subprocess.Popen(["sleep", "1000"], env={**os.environ, members.MARK: mark}) as process:
        # The environment is the child's own once it has become `sleep`, which is when Popen returns.
        yield process
        process.kill()


def mark_of(process: subprocess.Popen[bytes]) -> str:
    environment = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
    prefix = f"{members.MARK}=".encode()
    return next(entry.removeprefix(prefix).decode() for entry in environment if entry.startswith(prefix))


def record_of(process: subprocess.Popen[bytes], **changes: Any) -> state.Record:
    record = state.Record(
        version=1,
        name="unit",
        mark="unit:0",
        pid=process.pid,
        started=_linux.start_time(process.pid),
        pid_namespace=_linux.inode("/proc/self/ns/pid"),
        user=False,
        kept=True,
        switch=3,
        inodes=(),
        mtu=1500,
        hosts={},
    )
    return msgspec.structs.replace(record, **changes)


# --- plans and words


def test_every_host_has_its_own_addresses_on_one_network() -> None:
    hosts = LabPlan(hosts=MAX_HOSTS).host_plans
    assert [host.name for host in hosts] == [f"h{n}" for n in range(1, MAX_HOSTS + 1)]
    for attribute in ("ipv4", "ipv6", "mac"):
        assert len({getattr(host, attribute) for host in hosts}) == MAX_HOSTS
    assert len({ipaddress.ip_interface(f"{host.ipv4}/{PREFIX4}").network for host in hosts}) == 1
    assert len({ipaddress.ip_interface(f"{host.ipv6}/{PREFIX6}").network for host in hosts}) == 1
    assert all(ipaddress.ip_address(host.ipv6).is_private for host in hosts)
    assert all(int(host.mac[:2], 16) & 0b11 == 0b10 for host in hosts)  # locally administered, one station


@pytest.mark.parametrize("name", ["", "Lab", "../etc", "a/b", "-x", ".x", "a b", "x" * 41, "ä", "a\n"])
def test_names_that_are_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match="is no name for a laboratory"):
        LabPlan(name)
    with pytest.raises(ConfigurationError, match="is no name for a laboratory"):
        lab.down(name)


@pytest.mark.parametrize("changes", [{"hosts": 0}, {"hosts": MAX_HOSTS + 1}, {"mtu": 1279}, {"mtu": 65536}])
def test_plans_that_make_no_sense(changes: dict[str, int]) -> None:
    with pytest.raises(ConfigurationError):
        LabPlan(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("off", None),
        ("100mbit", 12_500_000),
        ("1.5Mbit/s", 187_500),
        ("8kbit", 1000),
        ("8000bit", 1000),
        ("10MiB/s", 10 << 20),
    ],
)
def test_rates(text: str, rate: int | None) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize("text", ["", "100", "1kbit", "fast", "-1mbit", "1e3bit", "nanbit", "40gbit"])
def test_words_that_are_no_rates(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"a rate|has no unit"):
        parse_rate(text)


@given(st.none() | st.integers(MIN_RATE, MAX_RATE))
def test_a_rate_that_is_shown_can_be_asked_for(rate: int | None) -> None:
    assert parse_rate(format_rate(rate)) == rate


@pytest.mark.parametrize(("text", "delay_us"), [("off", 0), ("5ms", 5000), ("0.005s", 5000), ("2s", 2_000_000)])
def test_delays(text: str, delay_us: int) -> None:
    assert parse_delay_us(text) == delay_us


@pytest.mark.parametrize("text", ["", "ms", "-1ms", "61s", "nan", "inf", "soon"])
def test_words_that_are_no_delays(text: str) -> None:
    with pytest.raises(ConfigurationError, match="seconds from 0 to 60"):
        parse_delay_us(text)


def test_a_delay_has_its_unit() -> None:
    with pytest.raises(ConfigurationError, match="'5' has no unit; write 5ms or 5s"):
        parse_delay_us("5")


def parsed(*arguments: str) -> argparse.Namespace:
    return make_parser(("lab",)).parse_args(("lab", *arguments))


def test_a_command_keeps_its_own_options() -> None:
    args = parsed("exec", "--name", "x", "h1", "--", "ls", "--name", "y", "--", "-l")
    assert (args.name, args.host) == ("x", "h1")
    assert args.command_line[-5:] == ["ls", "--name", "y", "--", "-l"]


@pytest.mark.parametrize("arguments", [("rate",), ("delay",), ("cut", "1"), ("heal", "1")])
def test_changes_of_a_cable_with_a_value_too_many_or_too_few(arguments: tuple[str, ...]) -> None:
    with pytest.raises(ConfigurationError, match=r"takes (a|no) value"):
        command.run(parsed("link", "h1", *arguments))


def test_a_command_must_be_there() -> None:
    with pytest.raises(ConfigurationError, match="exec needs a command"):
        command.run(parsed("exec", "h1", "--"))


# --- what is missing


@pytest.mark.parametrize(
    ("number", "root", "remedy"),
    [
        (errno.EPERM, False, "as root"),
        (errno.EPERM, True, "CAP_NET_ADMIN"),
        (errno.ENOSPC, False, "max_net_namespaces"),
        (errno.EINVAL, True, "CONFIG_NET_NS"),
    ],
)
def test_without_namespaces_it_says_what_would_help(number: int, root: bool, remedy: str) -> None:
    error = lab._no_namespaces(number, os.strerror(number), root=root)
    assert remedy in error.remedy
    assert os.strerror(number) in error.message


@pytest.mark.parametrize(
    ("doing", "number", "remedy"),
    [
        ("make-switch", errno.EOPNOTSUPP, "modprobe -a bridge veth"),
        ("shape", errno.ENOENT, "sch_tbf"),
        ("attach-tap", errno.ENOENT, "modprobe tun"),
        ("attach-tap", errno.EACCES, "/dev/net/tun"),
        ("set-link", errno.EPERM, "another user"),
    ],
)
def test_what_the_kernel_lacks(sleeper: subprocess.Popen[bytes], doing: str, number: int, remedy: str) -> None:
    error = lab.Lab(record_of(sleeper)).explain(doing, number, os.strerror(number))
    assert isinstance(error, ResourceError)
    assert remedy in error.remedy


# --- records


def test_what_is_not_up() -> None:
    assert lab.names() == []
    assert not lab.down("unit")
    with pytest.raises(ConfigurationError, match="is not up: make it with `postcopy lab up --name unit`"):
        lab.Lab.find("unit")


def test_a_directory_that_others_can_write_to_is_refused(directory: Path) -> None:
    directory.chmod(0o777)
    with pytest.raises(ResourceError, match="only this user can write to"):
        lab.names()


def test_a_directory_that_is_somewhere_else_is_refused(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = directory / "link"
    link.symlink_to(directory)
    monkeypatch.setenv("POSTCOPY_LAB_DIR", str(link))
    with pytest.raises(ResourceError, match="only this user can write to"):
        lab.names()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 2}', "\0", '{"version": 1, "name": 3}'])
def test_a_record_that_is_none(directory: Path, text: str) -> None:
    (directory / "unit.json").write_text(text)
    for ask in (lab.Lab.find, lab.down):
        with pytest.raises(ConfigurationError, match="is not the record of a laboratory: remove it"):
            ask("unit")


@pytest.mark.parametrize("changes", [{}, {"pid": 2**22 + 1}])
def test_a_record_of_another_pid_namespace_is_left_alone(
    directory: Path, sleeper: subprocess.Popen[bytes], changes: dict[str, int]
) -> None:
    """Whether or not there is a process of that number here."""
    state.write(directory, record_of(sleeper, pid_namespace=1, **changes))
    for ask in (lab.Lab.find, lab.down):
        with pytest.raises(ConfigurationError, match="another PID namespace"):
            ask("unit")
    assert lab.names() == ["unit"]
    assert sleeper.poll() is None


def test_one_that_cannot_be_ended_does_not_keep_the_others(directory: Path, sleeper: subprocess.Popen[bytes]) -> None:
    state.write(directory, record_of(sleeper, name="first", pid_namespace=1))
    state.write(directory, record_of(sleeper, started=1))
    with pytest.raises(ConfigurationError, match="another PID namespace"):
        command.run(parsed("down", "--all"))
    assert lab.names() == ["first"]
    assert sleeper.poll() is None


def test_another_process_with_the_holders_number_is_spared(directory: Path, sleeper: subprocess.Popen[bytes]) -> None:
    record = record_of(sleeper, inodes=(_linux.inode(f"/proc/{sleeper.pid}/ns/net"),))
    assert record.started
    record.started -= 1
    state.write(directory, record)
    with pytest.raises(ConfigurationError, match="a crash has left its record"):
        lab.Lab.find("unit")
    assert lab.down("unit")
    assert lab.names() == []
    assert sleeper.poll() is None


def test_a_process_with_the_mark_is_ended(directory: Path, sleeper: subprocess.Popen[bytes]) -> None:
    holder = record_of(sleeper, mark=mark_of(sleeper), pid=2**22 + 1, started=1)
    state.write(directory, holder)
    assert lab.down("unit")
    assert sleeper.wait(20) < 0


def test_only_the_very_laboratory_is_taken_down(directory: Path, sleeper: subprocess.Popen[bytes]) -> None:
    state.write(directory, record_of(sleeper, mark="unit:1"))
    assert not lab.down("unit", "unit:2")
    assert lab.names() == ["unit"]


def test_a_process_that_does_not_listen_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "TERM_S", 0.1)
    mark = f"unit:{secrets.token_hex(8)}"
    deaf = ["sh", "-c", "trap '' TERM; echo deaf; while :; do sleep 1000; done"]
    with subprocess.Popen(deaf, stdout=subprocess.PIPE, env={**os.environ, members.MARK: mark}) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"deaf\n"
        assert members.end_processes(mark) >= 1
        assert process.wait(20) == -9
    assert list(members.processes(mark)) == []


def test_a_process_is_known_by_its_start() -> None:
    assert _linux.start_time(os.getpid()) == _linux.start_time(os.getpid())
    assert _linux.start_time(2**22 + 1) is None
    with subprocess.Popen(["true"]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert _linux.start_time(process.pid) is None  # a zombie holds nothing


def test_a_maker_that_was_killed_leaves_no_traceback() -> None:
    """The process that sets up interfaces has no reader for its answer any more."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            python("-m", "postcopy.testbed.lab._netlink"),
            input=b'{"user": null, "actions": []}\n',
            stdout=writing,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")
