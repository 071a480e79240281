# SPDX-License-Identifier: Apache-2.0
"""Every way in which a command can be ended, at every stage: the machine is where the state says, and so is the status.

(Connecting: test_listening. Output that is not read: test_output. Losing the peer: test_migration.)
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Start = Callable[..., Any]
RV64 = ("--machine", "rv64", "--memory", "24MiB", "--workload", "random")
# So much that not all of it is there when it is ended: it asks for tens of megabytes a second.
LARGE = ("--machine", "rv64", "--memory", "192MiB", "--workload", "random", "--max-bandwidth", "64KiB/s")

pytestmark = pytest.mark.needs("uffd-user")

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def _ended(one: Any, status: str, *, exit_status: int = 1) -> dict[str, Any]:
    returncode, result, errors = one.end()
    assert returncode == exit_status, errors
    assert result["status"] == status, result
    assert errors.count("postcopy: error:") == (1 if exit_status else 0), errors
    return dict(result)


@pytest.mark.parametrize("number", SIGNALS)
def test_before_anybody_has_come(side: Start, number: signal.Signals) -> None:
    for one in (side("source", "--json", *RV64, "--listen", "127.0.0.1:0"), side("dest", "--json", "--listen", ":0")):
        assert one.address
        one.signal(number)
        result = _ended(one, "failed")
        assert "interrupted" in result["error"]


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("who", ["source", "dest"])
def test_before_the_decision(side: Start, who: str, number: signal.Signals) -> None:
    """The machine stays at the source, which goes on with it when it is not the one that ends."""
    dest = side("dest", "--json", "--listen", "127.0.0.1:0")
    source = side("source", "--json", *RV64, "--connect", dest.address, "--migrate-after", "600")
    source.wait_status("active")
    dest.wait_status("active")
    one = source if who == "source" else dest
    one.signal(number)
    if who == "source":
        _ended(source, "cancelled")
        dest.wait_for_errors("waiting for the next one")
        return
    _ended(dest, "cancelled")
    failed = source.wait_for("failure", lambda line: line["event"] == "migration-ended")
    later = source.wait_for(
        "progress", lambda line: line["event"] == "progress" and line["elapsed-ms"] > failed["elapsed-ms"]
    )
    source.operations_after(later)
    source.signal(number)
    _ended(source, "failed")


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("who", ["source", "dest"])
def test_after_the_decision(side: Start, tmp_path: Path, who: str, number: signal.Signals) -> None:
    """It is ended as it was asked for; what it has is in its salvage, and the other side keeps the rest, paused."""
    dest = side("dest", "--json", "--listen", "127.0.0.1:0", "--salvage", tmp_path / "dest")
    source = side(
        "source", "--json", *LARGE, "--connect", dest.address, "--salvage", tmp_path / "source",
    )  # fmt: skip
    dest.wait_status("postcopy-active")
    source.wait_status("postcopy-active")
    one, other = (source, dest) if who == "source" else (dest, source)
    one.signal(number)
    _ended(one, "postcopy-paused")
    assert (tmp_path / who / "manifest.json").exists()
    other.wait_status("postcopy-paused")
    other.signal(number)
    _ended(other, "postcopy-paused")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "dest"}


@pytest.mark.parametrize("number", SIGNALS)
def test_when_all_of_it_is_there(side: Start, number: signal.Signals) -> None:
    """A destination without a time to run is ended so, and that is how it succeeds."""
    dest = side("dest", "--json", "--listen", "127.0.0.1:0")
    source = side("source", "--json", *RV64, "--connect", dest.address)
    _ended(source, "completed", exit_status=0)
    dest.wait_status("completed")
    dest.signal(number)
    assert _ended(dest, "completed", exit_status=0)["verified"] is True
