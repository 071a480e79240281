# SPDX-License-Identifier: Apache-2.0
"""The path to the peer is gone for good, and there is another one: the side that connects reads it, and both go on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Start = Callable[..., Any]
MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(os.urandom(6 * MIB))
    return path


def source_of(image: Path) -> tuple[Any, ...]:
    """That would take more than a minute, until `quickly`."""
    slowly = ("--max-bandwidth", "64KiB/s", "--control", image.with_name("source"))
    return ("source", "--json", "--machine", "image", "--image", image, *slowly)


def quickly(operator: Callable[[str], Any]) -> None:
    """The rest may come at once."""
    operator("source").ask("set", "--max-bandwidth", "none")


def start(side: Start, calls: str, image: Path, peer: Path) -> tuple[Any, Any, Any]:
    """A slow migration through a first cable, with `calls` (source or dest) reading its peer's address from a file. The
    caller, the other side, the cable."""
    arguments: dict[str, tuple[Any, ...]] = {
        "source": source_of(image),
        "dest": ("dest", "--json", "--dump", image.with_name("copy")),
    }
    listener = side(*arguments["source" if calls == "dest" else "dest"], "--listen", "127.0.0.1:0")
    cable = side("chaos", "none", "--json", "--listen", "127.0.0.1:0", "--to", listener.address)
    peer.write_text(cable.address + "\n")
    caller = side(*arguments[calls], "--peer-file", peer)
    for one in (caller, listener):
        one.wait_status("postcopy-active")
    return caller, listener, cable


@pytest.mark.needs("uffd-user")
@pytest.mark.parametrize("calls", ["source", "dest"])
def test_read_again_at_a_signal(
    side: Start, operator: Callable[[str], Any], image: Path, tmp_path: Path, calls: str
) -> None:
    peer = tmp_path / "peer"
    caller, listener, cable = start(side, calls, image, peer)
    cable.signal(signal.SIGKILL)
    caller.wait_status("postcopy-paused")
    for nonsense in (b"nowhere", b""):  # changes nothing
        peer.write_bytes(nonsense)
        caller.signal(signal.SIGHUP)
        caller.wait_for_errors("is looked for at 127.0.0.1:" if not nonsense else "'nowhere' is not an address")
    other = side("chaos", "none", "--json", "--listen", "127.0.0.1:0", "--to", listener.address)
    peer.write_text(other.address)
    caller.signal(signal.SIGHUP)
    quickly(operator)
    for one in (caller, listener):
        status, result, errors = one.end()
        assert status == 0, errors
        assert result["status"] == "completed"
        assert result["recoveries"]["count"] == 1
    assert f"the peer is now looked for at {other.address}" in caller.end()[2]
    assert caller.end()[1]["peer"] == other.address
    assert image.with_name("copy").read_bytes() == image.read_bytes()


@pytest.mark.needs("uffd-user")
@pytest.mark.parametrize("calls", ["source", "dest"])
def test_read_again_when_it_is_lost(
    side: Start, operator: Callable[[str], Any], image: Path, tmp_path: Path, calls: str
) -> None:
    """Nobody says anything: the file says it when it is needed. What works meanwhile is left alone."""
    peer = tmp_path / "peer"
    caller, listener, cable = start(side, calls, image, peer)
    other = side("chaos", "none", "--json", "--listen", "127.0.0.1:0", "--to", listener.address)
    peer.write_text(other.address)
    caller.signal(signal.SIGHUP)
    caller.wait_for_errors(f"the peer is now looked for at {other.address}")
    assert not any((line.get("recoveries") or {}).get("count") for line in caller.lines)
    peer.write_text(cable.address)
    caller.signal(signal.SIGHUP)
    caller.wait_for_errors(f"the peer is now looked for at {cable.address}")
    peer.write_text(other.address)
    cable.signal(signal.SIGKILL)
    caller.wait_status("postcopy-paused")
    quickly(operator)
    for one in (caller, listener):
        status, result, errors = one.end()
        assert status == 0, errors
        assert result["recoveries"]["count"] == 1
    assert image.with_name("copy").read_bytes() == image.read_bytes()


@pytest.mark.needs("uffd-user")
def test_the_listener_takes_it_from_anywhere(
    side: Start, operator: Callable[[str], Any], image: Path, tmp_path: Path
) -> None:
    """It knows its peer by the migration's token, not by where it calls from."""
    listener = side("dest", "--json", "--listen", ":0", "--insecure", "--dump", tmp_path / "copy")
    listener.wait_for("address", lambda line: line["event"] == "listening")
    listener.wait_status("setup")  # by then it has printed all its addresses
    addresses = [line["address"] for line in listener.events("listening")]
    six = next((f"[::1]:{address.rpartition(':')[2]}" for address in addresses if address.startswith("[")), None)
    four = next((f"127.0.0.1:{address.rpartition(':')[2]}" for address in addresses if address[0].isdigit()), None)
    if four is None or six is None:
        pytest.skip("this host has one family of addresses only")
    first = side("chaos", "none", "--json", "--listen", "127.0.0.1:0", "--to", four)
    peer = tmp_path / "peer"
    peer.write_text(first.address)
    caller = side(*source_of(image), "--peer-file", peer)
    caller.wait_status("postcopy-active")
    peer.write_text(six)
    first.signal(signal.SIGKILL)
    caller.wait_status("postcopy-paused")
    quickly(operator)
    for one in (caller, listener):
        status, result, errors = one.end()
        assert status == 0, errors
        assert result["recoveries"]["count"] == 1
    assert listener.end()[1]["peer"].startswith("[::1]:")
    assert (tmp_path / "copy").read_bytes() == image.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--peer-file", "{directory}/none"), "No such file"),
        (("--peer-file", "{directory}"), "a directory, not a regular file"),
        (("--peer-file", "{directory}/image"), "more than 4096 bytes"),
        (("--peer-file", "{directory}/image", "--connect", "127.0.0.1:1"), "--connect does not go with --peer-file"),
        ((), "dest needs --listen, --connect or --peer-file"),
    ],
)
def test_files_that_say_nothing(
    side: Start, image: Path, tmp_path: Path, arguments: tuple[str, ...], reason: str
) -> None:
    status, _, errors = side("dest", *(argument.format(directory=tmp_path) for argument in arguments)).end()
    assert status == 2
    assert reason in errors
    assert errors.count("postcopy: error:") == 1
