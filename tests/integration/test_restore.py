# SPDX-License-Identifier: Apache-2.0
"""A machine whose migration was cut for good goes on: from both salvages, or from the source's alone."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Start = Callable[..., Any]
MIB = 1 << 20


def _cut_for_good(side: Start, tmp_path: Path, kind: str) -> tuple[Path, Path]:
    """The salvages of source and destination, of a machine that was in the middle of its move."""
    dest = side("dest", "--json", "--listen", "127.0.0.1:0", "--salvage", tmp_path / "dest")
    cable = side("chaos", "none", "--json", "--listen", "127.0.0.1:0", "--to", dest.address)
    machine = ("--machine", kind, "--memory", "96MiB", "--vcpus", "2", "--workload", "random", "--max-bandwidth")
    where = ("--salvage", tmp_path / "source", "--connect", cable.address)
    source = side("source", "--json", *machine, "2MiB/s", *where)
    dest.wait_for("pages", lambda line: line.get("ram", {}).get("background-pages", 0) > 20)
    cable.signal(signal.SIGKILL)
    for one in (source, dest):
        one.wait_status("postcopy-paused")
        one.signal(signal.SIGTERM)
    for one in (source, dest):
        status, result, errors = one.end()
        assert (status, result["status"]) == (1, "postcopy-paused"), errors
    return tmp_path / "source", tmp_path / "dest"


def _goes_on(side: Start, *arguments: Any) -> tuple[dict[str, Any], str]:
    """It is started, computes, moves, and every page of it is what it must be. The destination's result."""
    dest = side("dest", "--json", "--listen", "127.0.0.1:0", "--run-for", "0.2")
    source = side("source", "--json", *arguments, "--connect", dest.address, "--migrate-after", "0.2")
    status, result, said = source.end()
    assert status == 0, said
    assert result["status"] == "completed"
    assert result["guest-at-pause"]["failures"] == 0
    status, result, errors = dest.end()
    assert status == 0, errors
    assert result["verified"] is True
    return result, said


def _refused(side: Start, reason: str, *arguments: Any) -> None:
    status, _, errors = side("source", *arguments, "--listen", "127.0.0.1:0").end()
    assert status == 2, errors
    assert reason in errors
    assert errors.count("postcopy: error:") == 1


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("rv64", marks=pytest.mark.needs("uffd-user")),
        pytest.param("kvm", marks=pytest.mark.needs("kvm", "uffd")),
    ],
)
def test_from_both_sides(side: Start, tmp_path: Path, kind: str) -> None:
    source, dest = _cut_for_good(side, tmp_path, kind)
    if not json.loads((dest / "manifest.json").read_text())["paused"]:
        # On many hosts no signal reaches a vCPU that waits for a page in KVM. (U/test_salvage has one that was paused.)
        assert kind == "kvm"
        status, result, _ = side("merge", "--json", source, dest, "--into", tmp_path / "whole").end()
        assert (status, result["device-state"], result["torn"]) == (1, False, True)
        return
    whole = tmp_path / "whole"
    status, result, errors = side("merge", "--json", source, dest, "--into", whole).end()
    assert status == 0, errors
    assert (result["device-state"], result["in-doubt"], result["torn"]) == (True, 0, False)
    _refused(side, "would be zeros", "--from", dest)
    _refused(side, "--reclaim is for the salvage of a source", "--from", whole, "--reclaim")
    _goes_on(side, "--from", whole)
    _refused(side, "has been started before", "--from", whole)
    _goes_on(side, "--from", whole, "--force")


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("rv64", marks=pytest.mark.needs("uffd-user")),
        pytest.param("kvm", marks=pytest.mark.needs("kvm", "uffd")),
    ],
)
def test_from_the_source_alone(side: Start, tmp_path: Path, kind: str) -> None:
    """As it was at the switchover; only where it is said that the destination is dead."""
    source, _ = _cut_for_good(side, tmp_path, kind)
    _refused(side, "may be running there", "--from", source)
    _, said = _goes_on(side, "--from", source, "--reclaim")
    assert "in the state of the switchover" in said


@pytest.mark.needs("uffd-user")
def test_what_cannot_be_started(side: Start, tmp_path: Path) -> None:
    source, dest = _cut_for_good(side, tmp_path, "rv64")
    manifest = json.loads((source / "manifest.json").read_text())

    def changed(**fields: Any) -> Path:
        other = tmp_path / "other"
        shutil.rmtree(other, ignore_errors=True)
        shutil.copytree(source, other)
        (other / "manifest.json").write_text(json.dumps(manifest | fields))
        return other

    _refused(side, "could not be paused", "--from", changed(paused=False), "--reclaim")
    _refused(side, "a machine of kind image does not run", "--from", changed(machine="image"), "--reclaim")
    _refused(side, "is not a directory that --salvage has written", "--from", tmp_path)
    _refused(side, "does not go with --from", "--from", source, "--memory", "1GiB")
    _refused(side, "--reclaim and --force go with --from", "--machine", "rv64", "--reclaim")
    for damaged in (changed(config={}), changed(machine="no-such"), changed(config=manifest["config"] | {"vcpus": 3})):
        status, _, errors = side("source", "--from", damaged, "--reclaim", "--listen", "127.0.0.1:0").end()
        assert status == 1, errors
        assert errors.count("postcopy: error:") == 1
        assert not (damaged / "started").exists()
    state = bytearray((source / "state").read_bytes())
    for number in range(0, len(state), 97):
        state[number] ^= 0xFF
    broken = changed()
    (broken / "state").write_bytes(state)
    status, _, errors = side("source", "--from", broken, "--reclaim", "--listen", "127.0.0.1:0").end()
    assert status == 1, errors
    # The destination's, whose machine could not be paused, has no state: what is merged cannot be started either.
    torn = tmp_path / "torn"
    shutil.copytree(dest, torn)
    there = json.loads((dest / "manifest.json").read_text())
    (torn / "manifest.json").write_text(json.dumps(there | {"paused": False}))
    status, result, errors = side("merge", "--json", source, torn, "--into", tmp_path / "merged").end()
    assert status == 1
    assert (result["device-state"], result["torn"]) == (False, True)
    _refused(side, "could not be paused", "--from", tmp_path / "merged")


@pytest.mark.needs("uffd-user")
def test_interrupted_and_started_nowhere(side: Start, tmp_path: Path) -> None:
    """A machine that never ran from there is not said to have been started."""
    source, _ = _cut_for_good(side, tmp_path, "rv64")
    status, _, errors = side("source", "--from", source, "--reclaim", "--connect", "127.0.0.1:1").end()
    assert status == 1, errors
    assert not (source / "started").exists()
    assert (source / "state").exists()
