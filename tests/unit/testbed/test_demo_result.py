# SPDX-License-Identifier: Apache-2.0
"""What the demo makes of the results of both sides."""

from __future__ import annotations

import io
import signal

import pytest
import trio
from msgspec.structs import replace
from rich.console import Console

from postcopy.errors import MigrationError, ResourceError
from postcopy.records import as_json
from postcopy.records.events import DestResult, SourceResult
from postcopy.records.migration import Check, Guest
from postcopy.testbed.demo._command import _make_image
from postcopy.testbed.demo._result import merge, show
from postcopy.testbed.demo._side import Side

SOURCE = SourceResult(
    side="source", status="completed", error=None, kind="kvm", verified=None, verification=[], overhead_bytes=0,
    served=1, downtime_ms=27.0, guest_at_pause=Guest(state="paused", nonce="0x1", operations=7),
)  # fmt: skip
DEST = DestResult(
    side="dest", status="completed", error=None, kind="kvm", verified=True, overhead_bytes=0, dump=None,
    verification=[Check(ok=True, what="all pages", how="replayed")], migration_id="ab",
    guest=Guest(state="running", nonce="0x1", operations=9),
)  # fmt: skip


def test_one_machine() -> None:
    result = merge(SOURCE, DEST)
    assert (result.side, result.status, result.verified) == ("demo", "completed", True)
    assert (result.migration_id, result.downtime_ms) == ("ab", 27.0)
    assert [check.ok for check in result.verification] == [True, True, True]
    assert len(DEST.verification) == 1
    written = as_json(result)
    assert (written["source"]["side"], written["dest"]["side"]) == ("source", "dest")
    text = io.StringIO()
    show(result, "kvm, 64 MiB", Console(file=text, width=120))
    assert "kvm, 64 MiB: completed" in text.getvalue()
    assert "27.0 ms" in text.getvalue()


@pytest.mark.parametrize(
    ("guest", "wrong"),
    [
        (Guest(state="running", nonce="0x2", operations=9), "the nonce was 0x1 at the source, and is 0x2"),
        (Guest(state="running", nonce="0x1", operations=6), "7 operations at the pause, 6 at the end"),
        (None, "the nonce was 0x1 at the source, and is None"),
    ],
)
def test_another_machine(guest: Guest | None, wrong: str) -> None:
    result = merge(SOURCE, replace(DEST, guest=guest))
    assert result.verified is False
    assert any(wrong in check.what for check in result.verification if not check.ok)


def test_what_was_not_asked_for_and_what_failed() -> None:
    assert merge(SOURCE, replace(DEST, verified=None)).verified is None
    rebooted = Guest(state="running", nonce="0x2", operations=9)
    assert merge(SOURCE, replace(DEST, verified=None, guest=rebooted)).verified is False  # seen without being asked
    failed = merge(replace(SOURCE, status="failed", error="the cable"), DEST)
    assert (failed.status, failed.error, failed.verified) == ("failed", "the cable", False)


@pytest.mark.parametrize(
    ("here", "verified", "checks", "verdict"),
    [
        ("0x1", True, 2, True),
        ("0x1", None, 2, None),
        ("0x2", True, 2, False),
        (None, True, 2, False),  # its memory was read
        (None, None, 1, None),  # it was not, and the guest had no time to say it
    ],
)
def test_whether_it_is_the_same_machine(
    here: str | None, verified: bool | None, checks: int, verdict: bool | None
) -> None:
    guest = Guest(state="running", nonce=here, operations=9)
    result = merge(SOURCE, replace(DEST, verified=verified, verification=[], guest=guest))
    assert len(result.verification) == checks
    assert result.verified is verdict


def test_an_image_that_has_no_room() -> None:
    with pytest.raises(ResourceError, match=r"/dev/full: .*make room there"):
        _make_image("/dev/full", 1 << 20)


async def test_a_side_that_was_killed_is_said_to_be() -> None:
    """Its last words, that it listens, are not why."""
    side = Side("dest", DestResult, ["dest", "--json", "--listen", "127.0.0.1:0"])
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(side.run, None)
            await side.address_known.wait()
            assert side._child is not None
            side._child.signal(signal.SIGKILL)
            with pytest.raises(MigrationError, match=r"dest: it has died \(SIGKILL\)"):
                await side.good_end()
