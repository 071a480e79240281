# SPDX-License-Identifier: Apache-2.0
"""Names that no file can have are refused where they are said, by the option's name."""

from __future__ import annotations

import pytest

from postcopy.cli import make_parser
from postcopy.errors import ConfigurationError

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
