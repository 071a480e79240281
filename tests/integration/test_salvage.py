# SPDX-License-Identifier: Apache-2.0
"""Two sides that never find each other again: what each of them has is written down, and makes a whole."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Start = Callable[..., Any]
MIB = 1 << 20


@pytest.fixture
def salvages(side: Start, tmp_path: Path) -> dict[str, Any]:
    """A migration of an image that was cut for good half way, as both sides have left it."""
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(24 * MIB)
        for megabyte in (1, 2, 3, 9, 17):
            file.seek(megabyte * MIB)
            file.write(os.urandom(MIB))
    dest = side("dest", "--json", "--listen", "127.0.0.1:0", "--salvage", tmp_path / "dest")
    cable = side("chaos", "none", "--json", "--listen", "127.0.0.1:0", "--to", dest.address)
    arguments = ("--machine", "image", "--image", image, "--max-bandwidth", "1MiB/s", "--salvage", tmp_path / "source")
    source = side("source", "--json", *arguments, "--connect", cable.address)
    dest.wait_for("pages", lambda line: line.get("ram", {}).get("background-pages", 0) > 300)
    cable.signal(signal.SIGKILL)
    for one in (source, dest):
        one.wait_status("postcopy-paused")
        one.signal(signal.SIGTERM)
    remaining = 0
    for one in (source, dest):
        status, result, errors = one.end()
        assert (status, result["status"]) == (1, "postcopy-paused"), errors
        assert "salvage written to" in errors
        remaining = result["ram"].get("remaining", 0)
    found: dict[str, Any] = {"image": image, "remaining": remaining, "id": result["migration-id"]}
    return found | {"source": tmp_path / "source", "dest": tmp_path / "dest"}


@pytest.mark.needs("uffd-user")
def test_both_make_a_whole(side: Start, salvages: dict[str, Any], tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    status, result, errors = side("merge", "--json", salvages["source"], salvages["dest"], "--output", merged).end()
    assert status == 0, errors
    assert result["in-doubt"] == 0
    assert result["migration-id"] == salvages["id"]
    assert result["from-source"] == salvages["remaining"] > 0
    assert result["from-dest"] == 24 * MIB - salvages["remaining"]
    assert merged.read_bytes() == salvages["image"].read_bytes()
    assert merged.stat().st_blocks * 512 <= 5 * MIB + (64 << 10)
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.needs("uffd-user")
def test_one_alone_says_what_it_does_not_know(side: Start, salvages: dict[str, Any], tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    status, result, errors = side("merge", "--json", salvages["dest"], "--output", merged).end()
    assert status == 1
    assert result["in-doubt"] == salvages["remaining"]
    assert sum(item["pages"] * item["page-bytes"] for item in result["ranges-in-doubt"]) == salvages["remaining"]
    said = [line for line in errors.splitlines() if "in doubt: block" in line]
    assert len(said) == 1  # one block
    again = side("merge", "--verbose", salvages["dest"], "--output", tmp_path / "again").end()[2]
    assert len([line for line in again.splitlines() if "in doubt: block" in line]) == len(result["ranges-in-doubt"])
    ours, theirs = merged.read_bytes(), salvages["image"].read_bytes()
    doubtful = bytearray(len(ours))
    for item in result["ranges-in-doubt"]:
        begin = item["first-page"] * item["page-bytes"]
        doubtful[begin : begin + item["pages"] * item["page-bytes"]] = b"\x01" * (item["pages"] * item["page-bytes"])
    page = result["ranges-in-doubt"][0]["page-bytes"]
    for begin in range(0, len(ours), page):
        if not doubtful[begin]:
            assert ours[begin : begin + page] == theirs[begin : begin + page]


@pytest.mark.needs("uffd-user")
def test_what_does_not_belong_together(side: Start, salvages: dict[str, Any], tmp_path: Path) -> None:
    def refused(reason: str, *paths: Path, output: Path = tmp_path / "merged") -> None:
        status, _, errors = side("merge", *paths, "--output", output).end()
        assert status == 2
        assert reason in errors
        assert errors.count("postcopy: error:") == 1

    refused("of the same side", salvages["dest"], salvages["dest"])
    refused("is not a directory that --salvage has written", tmp_path)
    refused("exists already", salvages["dest"], output=salvages["image"])
    other = tmp_path / "other"
    shutil.copytree(salvages["source"], other)
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(manifest | {"migration": "00"}))
    refused("of different migrations", other, salvages["dest"])
    (other / "manifest.json").write_text(json.dumps(manifest | {"blocks": [{"name": 1}]}))
    refused("its manifest is damaged", other)
    (other / "manifest.json").write_text(json.dumps(manifest))
    os.truncate(other / "00.memory", MIB)
    refused("the memory of block", other)
    shutil.copytree(salvages["source"], tmp_path / "another")
    (tmp_path / "another" / "00.map").write_bytes(b"\xff" * 20)
    refused("the map of block 0 is unusable", tmp_path / "another")
    assert not (tmp_path / "merged").exists()


def test_target_that_is_there(side: Start, tmp_path: Path) -> None:
    """Found out while nothing is lost yet."""
    status, _, errors = side("dest", "--listen", "127.0.0.1:0", "--salvage", tmp_path).end()
    assert status == 2
    assert "exists already" in errors
