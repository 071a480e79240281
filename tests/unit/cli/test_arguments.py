# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a command line is said in the words of the user, and what was probably meant."""

from __future__ import annotations

import re
import shlex

import pytest

from postcopy.cli import make_parser, sides
from postcopy.cli._parser import values
from postcopy.errors import ConfigurationError
from postcopy.output import Output

LISTEN = ("--listen", "127.0.0.1:0")
SOURCE = ("source", "--machine", "rv64", *LISTEN)


@pytest.mark.parametrize("name", ["", "x" * 256, "x/" * 2100, "a\0b"], ids=["empty", "name", "path", "null"])
@pytest.mark.parametrize(
    ("command", "option"),
    [
        (("dest", *LISTEN), "--dump"),
        (("dest", *LISTEN), "--salvage"),
        (("dest", *LISTEN), "--control"),
        (("dest", *LISTEN), "--metrics-file"),
        (("dest", *LISTEN), "--disk"),
        (("dest",), "--peer-file"),
        (SOURCE, "--salvage"),
        (SOURCE, "--control"),
        (SOURCE, "--image"),
        (("source", *LISTEN), "--from"),
        (("daemon",), "--control"),
        (("merge", "salvage"), "--output"),
        (("merge", "salvage"), "--into"),
    ],
)
def test_refused_by_name(command: tuple[str, ...], option: str, name: str) -> None:
    arguments = [*command, option, name]
    with pytest.raises(ConfigurationError, match=f"^{option}: "):
        make_parser(arguments).parse_args(arguments)


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("--control", "x" * 108, "at most 107 bytes"),
        ("--net", "", "write tap:NAME"),
        ("--net", "tap0", "write tap:NAME"),
    ],
)
@pytest.mark.parametrize("command", [("dest", *LISTEN), SOURCE, ("daemon",)])
def test_refused_for_what_it_is(command: tuple[str, ...], option: str, value: str, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^{option}: .*{reason}"):
        make_parser(command).parse_args([*command, option, value])


def test_one_of_each() -> None:
    for arguments in (["merge", "salvage"], ["merge", "salvage", "--output", "a", "--into", "b"], ["source", *LISTEN]):
        with pytest.raises(ConfigurationError):
            make_parser(arguments).parse_args(arguments)


MISTYPED = [
    ("source --machin rv64", "unknown option --machin; did you mean --machine? (see `postcopy source --help`)"),
    ("source -machine rv64", "unknown option -machine; did you mean --machine?"),
    ("source \u2014machine rv64 --hold", "unknown option \u2014machine; did you mean --machine?"),
    ("source \u2014", "unknown option \u2014 (see"),
    ("source -", "source has no use for '-'"),
    ("source --machine rv64 --memory -vcpus 2", "unknown option -vcpus; did you mean --vcpus?"),
    ("source --hold -vx --machine rv64", "unknown option -vx"),
    ("source --hold -v=1 --machine rv64", "-v/--verbose takes no value"),
    ("dest --listen :0 --no-verify=1", "--verify/--no-verify takes no value"),
    ("source kvm --listen :0", "source has no use for 'kvm'; did you mean --machine kvm?"),
    ("source --machine rv64 host-b:7777", "source has no use for 'host-b:7777'; did you mean --connect host-b:7777?"),
    ("dest :7777", "dest has no use for ':7777'; did you mean --listen :7777?"),
    ("dest --listen :0 ''", "dest has no use for '' (see"),
    ("daemon vm1", "daemon has no use for 'vm1'; did you mean --name vm1?"),
    ("ctl end vm1", "ctl end has no use for 'vm1'; did you mean --machine vm1?"),
    ("ctl start kvm vm1", "ctl start has no use for 'vm1'; did you mean --name vm1?"),
    ("ctl migrate vm1 host-b:7777", "HOST:PORT: 'vm1' is not an address"),
    ("ctl migrate --machin vm1 host-b:7777", "unknown option --machin; did you mean --machine?"),
    ("ctl migrate --to host-b:7777", "ctl migrate has no --to; write HOST:PORT without it"),
    ("ctl --json status", "ctl has no --json; ctl commands, ctl status, ctl events, ... have"),
    ("ctl --control= status", "--control: the path is empty;"),
    ("ctl start image", "KIND: kvm, rv64, firecracker, qemu or program, not 'image'"),
    ("ctl start kvm --image a.img", "unknown option --image"),
    ("daemon --machine image", "--machine: kvm, rv64, firecracker, qemu or program, not 'image'"),
    ("lab link h1 delay -5ms", "lab link has no use for '-5ms' (see `postcopy lab link --help`)"),
    ("lab up mine", "lab up has no use for 'mine'; did you mean --name mine?"),
    ("faultpaths pin", "unknown command 'pin'; there are compare, merge"),
    ("chaos --listen :0", "chaos needs --to"),
    ("merge", "merge needs DIR"),
    ("lab exec", "lab exec needs HOST"),
    ("source --machine rv64 --from x --hold", "--from does not go with --machine"),
]


@pytest.mark.parametrize(("line", "said"), MISTYPED)
def test_what_was_meant(line: str, said: str) -> None:
    arguments = shlex.split(line)
    with pytest.raises(ConfigurationError) as caught:
        make_parser(arguments).parse_args(arguments)
    assert str(caught.value).startswith(said)
    assert " --help`)" in str(caught.value)


@pytest.mark.parametrize("line", ["source --help", "source --bogus x --help", "lab up --nme x -h", "-h"])
def test_help_is_given_whatever_else_is_wrong(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        make_parser(line.split()).parse_args(line.split())
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("usage: postcopy")


def test_the_command_in_a_host_is_left_alone() -> None:
    for line in ("lab exec h1 -- ip --bogus -x", "lab exec h1 ip --bogus -x"):
        told = make_parser(line.split()).parse_args(line.split())
        assert [word for word in told.command_line if word != "--"] == ["ip", "--bogus", "-x"]


def test_what_argparse_says_in_other_words_is_said_as_it_is() -> None:
    with pytest.raises(ConfigurationError, match=r"^something new \(see `postcopy --help`\)$"):
        make_parser([]).error("something new")


def test_hold_is_for_machines_that_run() -> None:
    for line, said in (
        ("source --machine image --image a.img --hold", "--hold keeps a machine running, which an image is not"),
        ("source --machine rv64 --hold --salvage s", "--salvage has no meaning with --hold"),
        ("source --machine rv64 --hold --serve 2", "--serve has no meaning with --hold"),
        ("source --machine rv64 --hold --migrate-after 1", "--migrate-after has no meaning with --hold"),
    ):
        given = values(make_parser(line.split()).parse_args(line.split()))
        with pytest.raises(ConfigurationError, match=said):
            sides.make(given, Output(False, None, None))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("dest --listen :0 --machine firecracker", "--machine firecracker: say where it is loaded, --api-socket PATH"),
        ("dest --listen :0 --machine qemu", "--machine qemu: say where it is loaded, --qmp PATH"),
        ("dest --listen :0 --qmp a --qemu sh", "--qemu COMMAND to have it started; one of both"),
        ("dest --listen :0 --machine kvm --api-socket a --firecracker sh", "to have it started; one of both"),
        ("dest --listen :0 --machine program", "--machine program: say --preload PATH"),
        ("dest --listen :0 --qmp a --dump b", "--dump does not go with --qmp"),
        ("dest --listen :0 --qemu sh --run-for 1", "--run-for does not go with --qemu"),
    ],
)
def test_where_a_machine_is_loaded_that_is_a_process_of_its_own(line: str, said: str) -> None:
    given = values(make_parser(line.split()).parse_args(line.split()))
    with pytest.raises(ConfigurationError, match=re.escape(said)):
        sides.make(given, Output(False, None, None))


@pytest.mark.parametrize("command", ["''", '"\'"', "/no/such/qemu"])
def test_a_command_that_is_none_is_refused(command: str) -> None:
    arguments = ["dest", "--listen", ":0", "--qemu", command.strip('"')]
    with pytest.raises(ConfigurationError, match=r"^--qemu: "):
        make_parser(arguments).parse_args(arguments)
