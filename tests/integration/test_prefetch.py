# SPDX-License-Identifier: Apache-2.0
"""Prefetch policies, working sets and a push that is held back, in real migrations: each between two processes, whose
machine verifies its memory at the end."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sides import Operator

Start = Callable[..., Any]

pytestmark = pytest.mark.needs("uffd-user")
MACHINE = ("--machine", "rv64", "--memory", "16MiB", "--used-memory", "6MiB", "--vcpus", "1", "--seed", "7")
DEMO = ("demo", "--json", *MACHINE, "--migrate-after", "0.1", "--run-for", "0.2")
HELD = ("--push-after", "20")  # longer than the guest takes to ask for all that is not zero, on any host


def moved(side: Start, *arguments: Any) -> dict[str, Any]:
    """What the pages of one migration have been."""
    status, result, errors = side(*DEMO, *arguments).end(100)
    assert status == 0, errors
    assert result["verified"] is True
    ram: dict[str, Any] = result["ram"]
    pages = ram["total"] // ram["page-size"]
    assert sum(ram[f"{kind}-pages"] for kind in ("demand", "prefetched", "background", "zero")) == pages
    return ram


@pytest.mark.parametrize("more", [(), ("--pager", "process", "--tls")], ids=["threads", "process, TLS"])
def test_fewer_pages_are_waited_for(side: Start, more: tuple[str, ...]) -> None:
    """A guest that writes one page after the other, with nothing but what it or its prefetch asks for."""
    ram = moved(side, "--workload", "dirty", *HELD, "--prefetch", "adaptive", *more)
    assert ram["prefetched-pages"] > 4 * ram["demand-pages"]
    assert ram["prefetched-pages"] >= ram["prefetch-hits"] > ram["prefetched-pages"] / 2


def test_a_working_set_is_replayed(side: Start, tmp_path: Path) -> None:
    """In random order, where no policy foresees anything; through a pager of which another process has recorded it."""
    path = tmp_path / "vm.ws"
    recorded = moved(side, "--workload", "random", *HELD, "--record-working-set", path, "--pager", "process")
    assert recorded["demand-pages"] > 200
    assert path.stat().st_size > recorded["demand-pages"]
    replayed = moved(side, "--workload", "random", *HELD, "--working-set", path)
    assert replayed["prefetched-pages"] > recorded["demand-pages"] / 2
    assert replayed["demand-pages"] < recorded["demand-pages"] / 2


def test_a_push_that_is_held_for_ever(side: Start, operator: Callable[[str], Operator], tmp_path: Path) -> None:
    """Nothing is pushed, and what nobody asks for does not come, until the source is told to push."""
    image = tmp_path / "image"
    image.write_bytes(random.Random(7).randbytes(4 << 20))
    source = side(
        "source", "--json", "--control", tmp_path / "s", "--machine", "image", "--image", image, "--listen",
        "127.0.0.1:0", "--push-after", "forever",
    )  # fmt: skip
    dest = side("dest", "--json", "--connect", source.address, "--dump", tmp_path / "copy")
    at = operator("s")
    dest.wait_status("postcopy-active")
    assert at.request("status")["settings"]["push-after"] == "forever"
    seen = dest.wait_for("a second look at it", lambda line: line.get("elapsed-ms", 0) > 1500 and "ram" in line)["ram"]
    assert seen["remaining"] == 4 << 20
    assert at.request("set", **{"push-after": 0})["push-after"] == 0
    for one in (source, dest):
        status, result, errors = one.end()
        assert status == 0, errors
        assert result["ram"]["remaining"] == 0
    assert (tmp_path / "copy").read_bytes() == image.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--working-set", "damaged.ws"), "this is no working set; record it again"),
        (("--record-working-set", "nowhere/vm.ws"), "--record-working-set nowhere/vm.ws"),
    ],
)
def test_what_cannot_be(
    side: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], reason: str
) -> None:
    """It is said at once."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "damaged.ws").write_text("not one")
    status, _, errors = side("dest", "--listen", "127.0.0.1:0", *arguments).end()
    assert status == 2
    assert reason in errors


def _works(name: str, here: dict[str, Any]) -> bool:
    return bool(here[name]["guest"]["operations"])


def _has_arrived(name: str, here: dict[str, Any]) -> bool:
    return bool(here[name]["migration"]["status"] == "completed")


def test_a_daemon_has_a_directory_of_them(side: Start, operator: Callable[[str], Operator], tmp_path: Path) -> None:
    """One for each machine, by its name; a machine that has none there comes all the same."""
    sets = tmp_path / "sets"
    sets.mkdir()
    there = side(
        "daemon", "--json", "--control", tmp_path / "d", "--listen", "127.0.0.1:0", "--working-set", sets,
        "--record-working-set", sets,
    )  # fmt: skip
    for name in ("one", "two"):
        source = side(
            "daemon", "--json", "--control", tmp_path / name, *MACHINE, "--workload", "random", "--name", name,
            "--push-after", "1",
        )  # fmt: skip
        at = operator(name)
        at.wait("its operations", partial(_works, name))
        at.ask("migrate", there.address)
        operator("d").wait("its arrival", partial(_has_arrived, name))
        at.ask("quit")
        assert source.end()[0] == 0
    for name in ("one", "two"):
        assert (sets / f"{name}.ws").stat().st_size > 0
    status, _, errors = side("daemon", "--listen", "127.0.0.1:0", "--working-set", sets / "one.ws").end()
    assert status == 2
    assert "must be a directory" in errors
