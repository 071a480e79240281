# SPDX-License-Identifier: Apache-2.0
"""The table of options, and what is made from it: parsers, ``--help``, requests of the control socket, and the command
lines of the demo's two sides."""

from __future__ import annotations

import math
import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from postcopy._host import run_record
from postcopy.cli import make_parser
from postcopy.cli._commands import COMMANDS
from postcopy.cli._parser import Parser, defaults_of, options_of, values, written
from postcopy.dataplane.ahead import Prefetch, Way
from postcopy.errors import ConfigurationError
from postcopy.machines.kinds import MachineOptions
from postcopy.migration.source import SourceOptions
from postcopy.output import Output
from postcopy.service import options, schema
from postcopy.service.config import (
    ArrivalOptions,
    DaemonConfig,
    DestinationConfig,
    OperatingOptions,
    PagerConfig,
    SourceConfig,
)
from postcopy.service.options import Group, Option, record, to_arguments
from postcopy.testbed.demo import DemoCommand

# A value of every option that has one, as a user writes it, and what it is to a record.
WRITTEN: dict[str, tuple[str, Any]] = {
    "allow-uid": ("4,65534", (4, 65534)),
    "api-socket": ("fc.sock", "fc.sock"),
    "allow": ("/srv/vms/,tap:vm*", "/srv/vms/,tap:vm*"),
    "max-machines-per-peer": ("3", 3),
    "max-memory-per-peer": ("2GiB", 2 << 30),
    "drive": ("root=/a,b=/c", "root=/a,b=/c"),
    "firecracker": (sys.executable, sys.executable),
    "backing": ("anon", "anon"),
    "bulk-channels": ("3", 3),
    "busy-poll": ("20", 20),
    "chaos": ("cut:every=1", "cut:every=1"),
    "connect": ("[::1]:7", None),
    "control": ("/run/x.sock", "/run/x.sock"),
    "deadline": ("5", 5.0),
    "disk": ("d.img", "d.img"),
    "dump": ("copy", "copy"),
    "from": ("salvage", "salvage"),
    "heartbeat": ("300ms", 0.3),
    "image": ("i.img", "i.img"),
    "kind": ("rv64", "rv64"),
    "images": ("snapshots", "snapshots"),
    "into": ("whole", "whole"),
    "listen": ("127.0.0.1:0", None),
    "log-level": ("debug", "debug"),
    "machine": ("rv64", "rv64"),
    "compress": ("zstd", "zstd"),
    "max-bandwidth": ("8mbit", 1_000_000),
    "max-downtime": ("50ms", 0.05),
    "max-memory": ("8GiB", 8 << 30),
    "max-vms": ("10", 10),
    "memory": ("64MiB", 64 << 20),
    "metrics": (":9100", ":9100"),
    "metrics-file": ("x.prom", "x.prom"),
    "migrate-after": ("0.25", 0.25),
    "mode": ("hybrid", "hybrid"),
    "name": ("vm1", "vm1"),
    "net": ("tap:tap0", "tap:tap0"),
    "net-address": ("10.0.0.9", (10 << 24) + 9),
    "net-mac": ("52:54:00:12:34:56", 0x525400123456),
    "on-failure": ("exit", False),
    "on-lost": ("kill", True),
    "output": ("whole.img", "whole.img"),
    "pager": ("process", True),
    "peer-file": ("peer", "peer"),
    "precopy": ("auto", math.inf),
    "precopy-rounds": ("7", 7),
    "preload": ("vm1.preload", "vm1.preload"),
    "qemu": (f"{sys.executable} -m 'a b'", (sys.executable, "-m", "a b")),
    "qmp": ("vm1.qmp", "vm1.qmp"),
    "program": ("/opt/bin/postcopy", "/opt/bin/postcopy"),
    "prefetch": ("both:16", Prefetch(Way.BOTH, 16)),
    "push-after": ("1.5", 1.5),
    "readers": ("3", 3),
    "record-for": ("2.5", 2.5),
    "record-working-set": ("new.ws", "new.ws"),
    "recover-for": ("forever", math.inf),
    "report": ("r.html", "r.html"),
    "restart-burst": ("9", 9),
    "run-for": ("1.5", 1.5),
    "salvage": ("s", "s"),
    "seed": ("18446744073709551615", 2**64 - 1),
    "serve": ("forever", math.inf),
    "socket": ("s.sock", "s.sock"),
    "tls": ("certificates", "certificates"),
    "tls-authz": ("send:*.example.org", "send:*.example.org"),
    "tls-hostname": ("host-b.example.org", "host-b.example.org"),
    "to": ("host:7", None),
    "user": ("nobody:users", "nobody:users"),
    "vcpus": ("2", 2),
    "workload": ("idle", "idle"),
    "used-memory": ("1.5MiB", 3 << 19),
    "working-set": ("vm.ws", "vm.ws"),
}
WRITTEN_OF: dict[tuple[str, str], tuple[str, Any]] = {("pager", "prefetch"): ("all", "all")}
"""Of one command only."""
TABLES = ("source", "dest", "daemon", "pager", "demo", "merge", "chaos")


def table(command: str) -> tuple[Group, ...]:
    groups = options_of(command)
    assert groups is not None
    return groups


def all_options(command: str) -> list[Option]:
    return [option for group in table(command) for option in group]


def parsed(*arguments: str) -> dict[str, Any]:
    return values(make_parser(arguments).parse_args(arguments))


def help_of(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        make_parser(arguments).parse_args([*arguments, "--help"])
    return re.sub(r"\s+", " ", capsys.readouterr().out)


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every command has one, and every option of the table is there, with its own words."""
    text = help_of(command, capsys=capsys)
    if command in TABLES:
        for option in all_options(command):
            assert option.positional or re.search(rf"--{option.name}[ ,]", text), option.name
            assert option.help in text
            assert option.metavar is None or option.metavar in text


@pytest.mark.parametrize("parser", list(make_parser(None).walk()), ids=lambda parser: parser.prog)
def test_every_help_is_whole(parser: Parser, monkeypatch: pytest.MonkeyPatch) -> None:
    """A description, examples that are understood, and lines that fit a terminal."""
    monkeypatch.setenv("COLUMNS", "80")
    text = parser.format_help()
    assert parser.description
    assert not [line for line in text.splitlines() if len(line) > 80]
    assert all(argument.help for _, arguments in parser.sections() for argument in arguments)
    shown = re.sub(r"\\\n *", "", re.split(r"\nexamples?:\n", text)[-1])
    examples = re.findall(r"(?m)^ {4}(?:source <\()?postcopy (.*?)\)?$", shown)
    assert examples or parser.prog == "postcopy"
    for example in examples:
        words = shlex.split(re.split(r" && | [>|] ", example)[0])
        assert vars(make_parser(words).parse_args(words))["command"] == words[0]


@pytest.mark.parametrize("command", ["source", "dest", "daemon", "demo"])
def test_help_shows_the_defaults_of_the_records(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(command, capsys=capsys)
    shown = 0
    for option in all_options(command):
        default = defaults_of(command).get(option.key)
        if default not in (None, "") and not option.flag and "(default" not in option.help:
            assert f"{option.help} (default: {option.format(default)})" in text
            assert option.parse(option.format(default)) == default
            shown += 1
    assert shown > 3
    assert "(default: 256MiB)" in text or command == "dest"
    assert "(default: forever)" in text or command == "demo"


def test_ctl_shows_them_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert "size of its memory, as 1GiB (default: 256MiB)" in help_of("ctl", "start", capsys=capsys)


@pytest.mark.parametrize("command", TABLES)
def test_each_option_is_there_once(command: str) -> None:
    keys = [option.key for option in all_options(command)]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize(
    ("command", "option"),
    [(command, option) for command in TABLES for option in all_options(command) if not option.positional],
    ids=lambda value: value.name if isinstance(value, Option) else value,
)
def test_what_is_written_is_read(command: str, option: Option) -> None:
    """And written again, as the demo does for its two sides, it is read the same."""
    if option.flag:
        assert option.to_arguments(True) == [f"--{option.name}"]
        return
    text, value = WRITTEN_OF.get((command, option.name)) or WRITTEN[option.name]
    read = option.parse(text)
    assert value is None or read == pytest.approx(value)
    name, again, *more = option.to_arguments((read, read) if option.repeats else read)
    assert name == f"--{option.name}"
    assert option.parse(again) == read
    assert more == ([name, again] if option.repeats else [])


def test_a_table_is_in_the_parser() -> None:
    """Each option of `source`, given on the command line, comes out under the name of the record's field."""
    others = {"machine", "listen", "connect", "peer-file", "hold"}
    given = [option for option in all_options("source") if option.name not in others]
    words = [word for option in given for word in ([f"--{option.name}", *(WRITTEN.get(option.name) or ("",))[:1]])]
    told = parsed("source", *filter(None, words), "--connect", "host:7")
    assert told.keys() == {option.key for option in given} | {"connect", "command"}


def test_what_was_not_given_is_missing() -> None:
    """So that the defaults are those of the records."""
    assert parsed("dest", "--listen", ":0").keys() == {"command", "listen"}
    assert parsed("chaos", "--listen", ":0", "--to", "a:1").keys() == {"command", "listen", "to"}
    assert parsed("ctl", "--control", "x.sock", "status").keys() == {"command", "control", "request"}
    assert record(ArrivalOptions, {}) == ArrivalOptions()
    assert record(SourceOptions, {"bulk_channels": 7, "json": True}) == SourceOptions(bulk_channels=7)


RECORDS: dict[str, Sequence[type[Any]]] = {
    "source": (SourceConfig, MachineOptions, SourceOptions, OperatingOptions),
    "dest": (DestinationConfig, ArrivalOptions, OperatingOptions),
    "daemon": (DaemonConfig, MachineOptions, SourceOptions, ArrivalOptions, OperatingOptions),
    "pager": (PagerConfig, OperatingOptions),
}


@pytest.mark.parametrize("command", RECORDS)
def test_every_option_is_of_a_record(command: str) -> None:
    """Or of the command line itself: a misspelt field would be an option that does nothing."""
    known = {item.name for kind in RECORDS[command] for item in fields(kind)}
    own = {"json", "log_level", "log_json", "user", "peer_file", "hold", "path", "reclaim", "force"}
    own |= {"tls", "tls_hostname", "tls_authz", "insecure", "report"}  # of which `Protection` and `Route` are made
    assert {option.key for option in all_options(command)} <= known | own


def test_what_a_run_is_said_to_be() -> None:
    """As a user writes it, with the policies; a command line may have passwords in it."""
    secret = f"{sys.executable} -object secret,id=a,data=hunter2"
    more = ("--prefetch", "both:4", "--run-for", "3", "--verify", "--pager", "process", "--tls", "/etc/keys")
    told = run_record("dest", written(parsed("dest", "--listen", ":7", "--qemu", secret, *more)))["options"]
    assert told == {"prefetch": "both:4", "run-for": "3", "verify": "yes", "pager": "process"}
    told = run_record("source", written(parsed("source", "--machine", "rv64", "--precopy", "auto", "--connect", "a:7")))
    assert told["options"] == {"machine": "rv64", "precopy": "auto"}


def test_an_option_that_repeats() -> None:
    """A tuple of all values, also as JSON."""
    given = parsed("daemon", "--tls-authz", "send:a", "--tls-authz", "b")
    assert given["tls_authz"] == ("send:a", "b")
    assert options.TLS_AUTHZ.from_json(options.TLS_AUTHZ.to_json(("send:a", "b"))) == ("send:a", "b")
    bad: list[object] = ["a", [1], [[]], ["send:"], ["a"] * 257]
    for wrong in bad:
        with pytest.raises(ConfigurationError):
            options.TLS_AUTHZ.from_json(wrong)


# ---- The control socket


@pytest.mark.parametrize(
    ("request_name", "name"),
    [(name, option.name) for name, command in schema.COMMANDS.items() for option in command.options],
)
def test_requests_have_the_same_options(request_name: str, name: str) -> None:
    """A request's argument is read as the command line's option of this name, as a text and as a number."""
    option = schema.COMMANDS[request_name].arguments[name]
    if option.flag:
        assert option.from_json(True) is True
        for no_flag in (1, "yes"):
            with pytest.raises(ConfigurationError):
                option.from_json(no_flag)
        return
    text, _ = WRITTEN[name] if name != "machine" else ("vm1", "vm1")
    value = option.parse(text)
    assert option.from_json(text) == value
    if isinstance(value, int):
        assert option.from_json(value) == value
    bad: list[object] = [True, None, [], {}, "", "\0", 1.5e300]
    for wrong in bad:
        with pytest.raises(ConfigurationError):
            option.from_json(wrong)


@pytest.mark.parametrize("request_name", schema.COMMANDS)
def test_ctl_takes_what_a_request_takes(request_name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of("ctl", "--control", "x.sock", request_name, capsys=capsys)
    command = schema.COMMANDS[request_name]
    for option in command.options if request_name != "events" else ():
        assert option.help in text
        assert (f"--{option.name}" in text) is (option.name != command.bare)


def test_a_program_is_looked_for_as_a_shell_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "fc"
    program.touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigurationError, match="no program of this name"):  # it cannot be run
        options.parse_program("fc")
    program.chmod(0o700)
    monkeypatch.chdir(tmp_path.parent)
    for name in ("fc", str(program), f"{tmp_path.name}/fc"):
        assert options.parse_program(name) == str(program)


def test_ctl_sends_numbers() -> None:
    given = parsed("ctl", "--control", "x.sock", "set", "--max-bandwidth", "1MiB/s", "--recover-for", "forever")
    assert (given["max-bandwidth"], given["recover-for"]) == (1 << 20, math.inf)
    forever = options.RECOVER_FOR.to_json(math.inf)
    assert schema.parse_arguments("set", {"max-bandwidth": 1 << 20, "recover-for": forever}) == {
        "max-bandwidth": 1 << 20,
        "recover-for": math.inf,
    }
    assert schema.parse_arguments("set", {"max-bandwidth": 0}) == {"max-bandwidth": 0}


# ---- What the demo passes on


def demo(*arguments: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What its two sides are told, as they read it."""
    command = DemoCommand(parsed("demo", *arguments), Output(False, None, None))
    return parsed(*command._source_arguments("127.0.0.1:7")), parsed(*command._dest_arguments("127.0.0.1"))


def test_the_demo_passes_on_what_a_side_has() -> None:
    """All that was said, to each side that has such an option; but how the demo itself writes its log."""
    own = {"chaos", "report", "lab", "tls", "insecure", "deadline", "image", "machine", "json", "log-json"}
    given = [option for option in all_options("demo") if option.name not in own]
    words = to_arguments(
        table("demo"), {option.key: True if option.flag else option.parse(WRITTEN[option.name][0]) for option in given}
    )
    told = parsed("demo", "--machine", "rv64", *words)
    source, dest = demo("--machine", "rv64", *words, "--json", "--log-json")
    for side, command in ((source, "source"), (dest, "dest")):
        taken = {option.key for option in all_options(command)} & {option.key for option in given}
        assert {key: side[key] for key in taken} == {key: told[key] for key in taken}
        assert side["json"]
        assert "log_json" not in side
    assert source.keys() >= {"connect", "kind", "keep", "memory_bytes", "bulk_channels", "release_ram", "seed"}
    assert dest.keys() >= {"listen", "run_for_s", "pager_process", "verify", "dump"}


def test_what_the_demo_chooses() -> None:
    source, dest = demo("--machine", "rv64", "--chaos", "cut")
    assert source["memory_bytes"] == 256 << 20
    assert (source["vcpus"], source["workload"], source["keep"]) == (2, "random", False)
    assert source["max_bandwidth_bytes_per_s"] == (256 << 20) // 6
    assert (source["migrate_after_s"], dest["run_for_s"]) == (1.0, 2.0)
    source, _ = demo("--machine", "image", "--image", "x", "--backing", "anon", "--chaos", "none", "--seed", "3")
    assert source.keys() & {"memory_bytes", "vcpus", "workload", "seed"} == set()
    protected = {"--tls": {"tls"}, "--lab": {"tls"}, "--lab --insecure": {"insecure"}, "--chaos none": set()}
    for words, options_of_it in protected.items():
        for side in demo("--machine", "rv64", *words.split()):
            assert side.keys() & {"tls", "insecure"} == options_of_it
    for wrong in ("--insecure", "--lab --tls --insecure"):
        with pytest.raises(ConfigurationError, match="for --lab without --tls"):
            demo("--machine", "rv64", *wrong.split())


def test_groups_have_titles_of_their_own() -> None:
    for command in options.COMMANDS:
        titles = [group.title for group in table(command) if group.title]
        assert len(titles) == len(set(titles))


# ---- The default control socket


def test_default_control_of_a_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    assert options.default_control() == "/run/user/1000/postcopy/control.sock"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    with pytest.raises(ConfigurationError, match=r"XDG_RUNTIME_DIR is not set.*say --control PATH"):
        options.default_control()


def test_default_control_of_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same in a shell, which has XDG_RUNTIME_DIR, and in a system service, which has not."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    for runtime in ("/run/user/0", ""):
        monkeypatch.setenv("XDG_RUNTIME_DIR", runtime)
        assert options.default_control() == "/run/postcopy/control.sock"
