# SPDX-License-Identifier: Apache-2.0
"""The bad network, tried with an echo behind it."""

from __future__ import annotations

import contextlib
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio
from trio.testing import MockClock

from postcopy.errors import ConfigurationError, ResourceError
from postcopy.net import Address
from postcopy.records import Record
from postcopy.records.commands import Cut
from postcopy.testbed.chaos import ChaosPlan, ChaosProxy, open_chaos_proxy

JUMP_S = 0.5
"""A clock that jumps sooner would do so while the kernel of a busy host still has bytes on their way."""


@asynccontextmanager
async def echo_behind(plan: ChaosPlan | None = None) -> AsyncIterator[ChaosProxy]:
    async def echo(stream: trio.SocketStream) -> None:
        try:
            async for data in stream:
                await stream.send_all(data)
        except trio.BrokenResourceError:
            pass

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            [listener] = await nursery.start(partial(trio.serve_tcp, echo, 0, host="127.0.0.1"))
            port = listener.socket.getsockname()[1]
            async with open_chaos_proxy(Address("127.0.0.1", port), plan) as proxy:
                yield proxy
            nursery.cancel_scope.cancel()


async def connect(proxy: ChaosProxy) -> trio.SocketStream:
    return await trio.open_tcp_stream(proxy.address.host, proxy.address.port)


async def exchange(stream: trio.SocketStream, data: bytes) -> bytes:
    """Sends it all, says that no more comes, and reads what comes back."""
    back = bytearray()
    async with trio.open_nursery() as nursery:

        async def send() -> None:
            await stream.send_all(data)
            await stream.send_eof()

        nursery.start_soon(send)
        async for some in stream:
            back += some
    return bytes(back)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["none", "split", "slow", "slow:rate=4MiB/s,delay=1ms"])
async def test_what_it_must_not_change(kind: str) -> None:
    data = random.Random(1).randbytes(100_000 if kind == "split" else 300_000)
    async with echo_behind(ChaosPlan.parse(kind, 7)) as proxy, await connect(proxy) as stream:
        assert await exchange(stream, data) == data
        assert proxy.statistics.bytes_out == proxy.statistics.bytes_back == len(data)
        assert proxy.statistics.connections == 1


@pytest.mark.needs("ipv6")
async def test_it_listens_in_both_families() -> None:
    async with open_chaos_proxy("127.0.0.1:1", listen="[::]:0") as proxy:
        for host in ("127.0.0.1", "::1"):
            with trio.fail_after(30):
                await (await trio.open_tcp_stream(host, proxy.address.port)).aclose()


async def test_an_address_that_cannot_be_listened_on() -> None:
    with pytest.raises(ResourceError, match=r"cannot listen on 192\.0\.2\.1:0"):
        async with open_chaos_proxy("127.0.0.1:1", listen="192.0.2.1:0"):
            pass


async def test_an_end_is_passed_on() -> None:
    async with echo_behind() as proxy, await connect(proxy) as stream:
        assert await exchange(stream, b"") == b""


async def test_delay(autojump_clock: MockClock) -> None:
    """Both ways, and the order stays in spite of the jitter."""
    autojump_clock.autojump_threshold = JUMP_S
    async with echo_behind(ChaosPlan(delay_s=5, jitter_s=1)) as proxy, await connect(proxy) as stream:
        began_s = trio.current_time()
        assert await exchange(stream, bytes(range(256)) * 100) == bytes(range(256)) * 100
        assert trio.current_time() - began_s >= 10


async def test_rate(autojump_clock: MockClock) -> None:
    autojump_clock.autojump_threshold = JUMP_S
    async with echo_behind(ChaosPlan(rate_bytes_per_s=10_000)) as proxy, await connect(proxy) as stream:
        began_s = trio.current_time()
        assert len(await exchange(stream, bytes(100_000))) == 100_000
        assert trio.current_time() - began_s >= 9


async def test_reset_and_refuse_and_heal() -> None:
    async with echo_behind() as proxy:
        streams = [await connect(proxy) for _ in range(3)]
        for stream in streams:
            await stream.send_all(b"hello")
            assert await stream.receive_some() == b"hello"
        proxy.refuse()
        proxy.cut("reset")
        for stream in streams:
            with pytest.raises(trio.BrokenResourceError):
                await stream.receive_some()
            await stream.aclose()
        async with await connect(proxy) as late:
            with pytest.raises(trio.BrokenResourceError):
                await late.receive_some()
        proxy.heal()
        async with await connect(proxy) as stream:
            assert await exchange(stream, b"again") == b"again"
        assert proxy.statistics.cuts == proxy.statistics.refused == 1


async def test_close_is_an_orderly_end() -> None:
    async with echo_behind() as proxy, await connect(proxy) as stream:
        await stream.send_all(b"hello")
        assert await stream.receive_some() == b"hello"
        proxy.cut("close")
        assert await stream.receive_some() == b""


async def test_half_open() -> None:
    """Nothing comes, and nobody says why; a connection made afterwards works."""
    async with echo_behind() as proxy, await connect(proxy) as stream:
        await stream.send_all(b"hello")
        assert await stream.receive_some() == b"hello"
        proxy.cut("freeze")
        await stream.send_all(b"anybody?")
        async with await connect(proxy) as other:
            assert await exchange(other, b"here") == b"here"
        with trio.move_on_after(0.1) as scope:
            await stream.receive_some()
        assert scope.cancelled_caught


async def test_freeze_and_thaw() -> None:
    async with echo_behind() as proxy, await connect(proxy) as stream:
        await stream.send_all(b"hello")
        assert await stream.receive_some() == b"hello"
        proxy.freeze()
        await stream.send_all(b"later")
        with trio.move_on_after(0.1) as scope:
            await stream.receive_some()
        assert scope.cancelled_caught
        proxy.thaw()
        assert await stream.receive_some() == b"later"


async def test_truncate() -> None:
    data = random.Random(1).randbytes(5000)
    async with echo_behind() as proxy, await connect(proxy) as stream:
        await stream.send_all(b"hello")
        assert await stream.receive_some() == b"hello"
        proxy.cut("truncate")
        back = b""
        with contextlib.suppress(trio.BrokenResourceError):  # a reset, or an orderly end
            await stream.send_all(data)
            while some := await stream.receive_some():
                back += some
        assert len(back) < 64
        assert data.startswith(back)


async def test_corrupt() -> None:
    data = bytes(5000)
    async with echo_behind() as proxy, await connect(proxy) as stream:
        await stream.send_all(b"hello")
        assert await stream.receive_some() == b"hello"
        proxy.cut("corrupt")
        back = await exchange(stream, data)
        assert len(back) == len(data)
        assert sum(byte.bit_count() for byte in back) == 1
        assert proxy.statistics.flipped == 1


@pytest.mark.slow
async def test_by_itself(autojump_clock: MockClock) -> None:
    """The same seed does the same again, another one something else."""
    autojump_clock.autojump_threshold = 0.05

    async def events_of(seed: int) -> list[tuple[float, object]]:
        events: list[tuple[float, object]] = []
        began_s = trio.current_time()

        def log(event: str, record: Record) -> None:
            assert isinstance(record, Cut)
            events.append((round(trio.current_time() - began_s, 6), record.way))

        plan = ChaosPlan.parse("all:every=1..2,down=0.5", seed)
        async with open_chaos_proxy("127.0.0.1:9", plan, log=log):
            await trio.sleep(60)
        return events

    first = await events_of(7)
    assert len(first) > 20
    assert {way for _, way in first} == {"reset", "close", "freeze", "truncate", "corrupt"}
    assert await events_of(7) == first
    assert await events_of(8) != first


@pytest.mark.parametrize(
    ("text", "plan"),
    [
        ("none", ChaosPlan()),
        ("cut", ChaosPlan(cut_every_s=(0.1, 0.5))),
        (
            "cut:every=1,down=200ms,ways=reset+freeze",
            ChaosPlan(cut_every_s=(1, 1), down_s=(0.2, 0.2), ways=("reset", "freeze")),
        ),
        ("slow:rate=10MiB/s", ChaosPlan(delay_s=0.005, jitter_s=0.002, rate_bytes_per_s=10 << 20)),
    ],
)
def test_words(text: str, plan: ChaosPlan) -> None:
    assert ChaosPlan.parse(text) == plan


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no plan begins with ''; there are none, slow"),
        ("rain", "no plan begins with 'rain'; there are none, slow"),
        ("slow:delay=5ms,rate=100", "rate: '100' has no unit; write 100MiB/s"),
        ("split:split=7", "split: '7' has no unit; write 7MiB, or 7B for bytes"),
        ("frezee", "did you mean freeze?"),
        ("cut:often", "no setting is called 'often'; write for instance cut:every=0.2..0.5,down=100ms"),
        ("cut:evry=1", "no setting is called 'evry'; did you mean every"),
        ("cut:every", "'every' has no value; write for instance cut:every="),
        ("cut:ways=rset", "'rset' is no way to cut a connection; did you mean reset"),
        ("cut:every=x", "every: seconds, as 2.5 or 200ms, not 'x'"),
        ("cut:every=2..1", "the second time is before the first"),
        ("cut:every=-1", "not '-1'"),
        ("cut:ways=bite", "'bite' is no way to cut a connection"),
        ("slow:rate=fast", "fast"),
    ],
)
def test_words_that_make_no_sense(text: str, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        ChaosPlan.parse(text)
