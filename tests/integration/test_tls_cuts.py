# SPDX-License-Identifier: Apache-2.0
"""Connections over TLS that are cut where it hurts most, and certificates that change meanwhile: the migration goes on,
and no page is wrong."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import tls

Start = Callable[..., Any]
MIB = 1 << 20

pytestmark = pytest.mark.needs("uffd-user")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(os.urandom(6 * MIB))
    return path


def start(side: Start, image: Path, relay: tls.Relay, dest: Any, secured: Path, bandwidth: str) -> Any:
    """The source of a migration through the relay."""
    slowly = ("--max-bandwidth", bandwidth, "--control", image.with_name("source"))
    arguments = ("source", "--json", "--machine", "image", "--image", image, "--tls", secured, *slowly)
    return side(*arguments, "--connect", relay.address)


def dest_of(side: Start, image: Path, secured: Path) -> Any:
    return side("dest", "--json", "--dump", image.with_name("copy"), "--tls", secured, "--listen", "127.0.0.1:0")


def completes(image: Path, *both: Any) -> list[dict[str, Any]]:
    results = []
    for one in both:
        status, result, errors = one.end()
        assert status == 0, errors
        assert result["status"] == "completed"
        results.append(result)
    assert image.with_name("copy").read_bytes() == image.read_bytes()
    return results


def test_inside_a_handshake(side: Start, operator: Callable[[str], Any], image: Path) -> None:
    """Of a recovery: each connection is cut a little later than the last, at either end, until nothing more is."""
    dest = dest_of(side, image, tls.directory())
    with tls.Relay(dest.address) as relay:
        source = start(side, image, relay, dest, tls.directory(), "64KiB/s")
        for one in (source, dest):
            one.wait_status("postcopy-active")
        relay.down()
        for one in (source, dest):
            one.wait_status("postcopy-paused")
        for count, way in itertools.product((0, 1, 5, 100, 400, 1000), ("reset", "close")):
            relay.cuts += [(tls.after(count), None, way), (None, tls.after(count), way)]
        cuts, before = len(relay.cuts), relay.cut
        relay.up()
        operator("source").ask("set", "--max-bandwidth", "none")
        completes(image, source, dest)
        assert relay.cut - before > cuts // 2  # the others ended before they came to it


def test_inside_a_record(side: Start, image: Path) -> None:
    """Of pages on their way: in the head, in the middle and before the last byte of a record."""
    # Only a connection of the push comes to so many records before it is cut somewhere else.
    places = [(20, 0), (21, 2), (22, 5), (23, 700), (24, -1), (25, -16)]
    dest = dest_of(side, image, tls.directory())
    with tls.Relay(dest.address) as relay:
        for number, at in places:
            relay.cuts += [(tls.inside_record(number, at), None, "close" if number % 2 else "reset") for _ in range(4)]
        source = start(side, image, relay, dest, tls.directory(), "2MiB/s")
        results = completes(image, source, dest)
        assert relay.cut >= len(places) // 2
    assert all(result["recoveries"]["count"] >= 2 for result in results)


@pytest.mark.parametrize("case", ["renewed", "renewed after its end", "of another CA"])
def test_certificates_that_change_while_it_is_paused(
    side: Start, operator: Callable[[str], Any], image: Path, tmp_path: Path, case: str
) -> None:
    """Neither process is told. Where the source's has ended, and while the two hosts trust different authorities, they
    do not come together."""
    first, second = tls.Site(tmp_path / "first"), tls.Site(tmp_path / "second", "the next CA")
    source_files, dest_files = first.issue("source"), first.issue("dest")
    dest = dest_of(side, image, dest_files)
    with tls.Relay(dest.address) as relay:
        source = start(side, image, relay, dest, source_files, "64KiB/s")
        for one in (source, dest):
            one.wait_status("postcopy-active")
        relay.down()
        for one in (source, dest):
            one.wait_status("postcopy-paused")
        renewed = first
        if case == "of another CA":
            renewed = second
            shutil.copytree(second.issue("dest", days=3), dest_files, dirs_exist_ok=True)
        elif case == "renewed after its end":
            first.issue("source", days=1, now=datetime.now(UTC) - timedelta(days=2))
        if case != "renewed":
            relay.up()
            said = "certificate here has expired" if renewed is first else "not signed by the CA that is trusted here"
            source.wait_for_errors(said)
            assert source.events("progress")[-1]["status"] == "postcopy-paused"
        if renewed is first:
            first.issue("dest", days=3)
        files = renewed.issue("source", days=3)
        if files != source_files:
            shutil.copytree(files, source_files, dirs_exist_ok=True)
        relay.up()
        operator("source").ask("set", "--max-bandwidth", "none")
        results = completes(image, source, dest)
    two_days = datetime.now(UTC) + timedelta(days=2)
    assert all(result["tls"]["expires-at"] > two_days.timestamp() for result in results)
