# SPDX-License-Identifier: Apache-2.0
"""Connections under TLS: who gets in, what the others are told, and what the next ones cost."""

from __future__ import annotations

import math
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import trio
from tls import client_hello, connect
from trio.testing import MockClock, wait_all_tasks_blocked

from postcopy import net as c
from postcopy import wire as p
from postcopy._native import lib
from postcopy.errors import ConfigurationError, PeerError
from postcopy.net import acceptor as acceptor_module
from postcopy.net import connecting
from postcopy.tls import Credentials, DataChannel, TlsError, TlsStream, stream_of
from postcopy.tls._authority import issue, new_authority
from tests.unit.net.support import SESSION

pytestmark = [pytest.mark.needs("tls"), pytest.mark.usefixtures("patient_tls")]

DAY = timedelta(days=1)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("tls")
    for name in ("ca", "other-ca"):
        new_authority(where / name)
    issue(where / "ca", ["host-a", "127.0.0.1"], where / "host-a")
    issue(where / "ca", ["host-b", "127.0.0.1"], where / "host-b")
    issue(where / "ca", ["host-c"], where / "elsewhere")
    issue(where / "other-ca", ["host-b", "127.0.0.1"], where / "stranger")
    issue(where / "ca", ["host-b", "127.0.0.1"], where / "expired", days=1, now=datetime.now(UTC) - 2 * DAY)
    shutil.copytree(where / "stranger", where / "impostor")
    shutil.copy(where / "ca" / "ca-cert.pem", where / "impostor")
    return where


async def protection(directory: Path, *authz: str) -> c.Protection:
    return c.Protection(Credentials(directory, authz))


@asynccontextmanager
async def listening(
    protection: c.Protection,
    side: str = "source",
    why_refused: Callable[[c.Asking], str] = lambda asking: "",
    host: str = "127.0.0.1",
) -> AsyncIterator[c.Acceptor]:
    acceptor = await c.Acceptor.open(c.Address(host, 0), side, why_refused, protection=protection)
    try:
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(acceptor.serve)
                yield acceptor
                nursery.cancel_scope.cancel()
    finally:
        await acceptor.close()


async def both_channels(
    link: c.Link, seen: c.Link, session: c.Session = SESSION
) -> list[tuple[DataChannel, DataChannel]]:
    """Two urgent and a bulk one, both ends of each."""
    ends: dict[str, dict[c.ChannelKey, DataChannel]] = {}

    async def collect(name: str, open_channels: c.OpenChannels) -> None:
        ends[name] = await open_channels(2, 1)

    with link.channel_set(session) as mine, seen.channel_set(session) as theirs:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(collect, "mine", mine)
            nursery.start_soon(collect, "theirs", theirs)
    return [(channel, ends["theirs"][key]) for key, channel in ends["mine"].items()]


async def exchange(channels: list[tuple[DataChannel, DataChannel]]) -> list[tuple[bool, bool]]:
    """Something goes over each; whether it was that of an earlier session, as each end says."""
    resumed = []
    for pair in channels:
        one, other = (stream_of(*channel.detach()) for channel in pair)
        assert isinstance(one, TlsStream)
        assert isinstance(other, TlsStream)
        async with one, other:
            await one.send_all(b"a page")
            assert await other.receive_some() == b"a page"
        resumed.append((one.peer.resumed, other.peer.resumed))
    return resumed


async def test_all_connections_of_a_migration(certificates: Path) -> None:
    ours, theirs = await protection(certificates / "host-a"), await protection(certificates / "host-b")
    async with listening(theirs) as acceptor:
        link = await c.CallingLink.open(acceptor.addresses[0], "dest", protection=ours)
        seen = await acceptor.next_link()
        assert (link.identity, seen.identity) == ("host-b", "host-a")
        assert link.certificate is not None
        assert seen.certificate is not None
        assert link.certificate.subject == "CN=host-b"
        assert not seen.certificate.resumed
        assert await exchange(await both_channels(link, seen)) == [(True, True)] * 3
        await link.control.send_all(b"there")
        assert await seen.control.receive_some(100) == b"there"
        await link.control.aclose()
        assert await seen.control.receive_some(100) == b""
        await seen.control.aclose()


async def test_without_tls_a_peer_is_its_address() -> None:
    async with listening(c.LOCAL) as acceptor:
        link = await c.CallingLink.open(acceptor.addresses[0], "dest")
        seen = await acceptor.next_link()
        assert (link.identity, seen.identity, seen.certificate) == ("127.0.0.1", "127.0.0.1", None)
        for end in (link, seen):
            await end.control.aclose()


WRONG = [
    ("impostor", "host-b", "was not signed by the CA that is trusted here", "does not know the CA"),
    ("host-a", "stranger", "", "was not signed by the CA that is trusted here"),
    ("host-a", "expired", "", "has expired"),
    ("expired", "host-b", "has expired", "has expired"),
    ("host-a", "elsewhere", "", "not for 127.0.0.1, but for .*host-c.*--tls-hostname"),
]


@pytest.mark.parametrize(("caller", "called", "logged", "reason"), WRONG)
async def test_those_that_do_not_come_to_terms(
    certificates: Path, caller: str, called: str, logged: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Both hosts learn why. `logged`: where it listens, if that is not the caller's alert."""
    ours, theirs = await protection(certificates / caller), await protection(certificates / called)
    async with listening(theirs) as acceptor:
        with pytest.raises(PeerError, match=reason) as caught:
            await c.CallingLink.open(acceptor.addresses[0], "dest", protection=ours)
        assert str(acceptor.addresses[0]) in str(caught.value)
        while not acceptor.bad_handshakes:  # noqa: ASYNC110  (a counter)
            await trio.sleep(0.01)
        assert (acceptor.accepted, acceptor.refused) == (0, 0)
        assert (logged or "the peer has ended the TLS connection") in caplog.text


async def test_a_peer_that_is_refused_and_stays(
    certificates: Path, caplog: pytest.LogCaptureFixture, mock_clock: MockClock
) -> None:
    """What was wrong with it is logged, not that it took too long."""
    stranger = Credentials(certificates / "stranger")
    async with listening(await protection(certificates / "host-a")) as acceptor:
        plain = await trio.open_tcp_stream(acceptor.addresses[0].host, acceptor.addresses[0].port)
        stream = TlsStream(plain.socket, await stranger.context(server=False), "127.0.0.1")
        async with stream:
            with pytest.raises(TlsError):
                await stream.handshake()
            [scope] = acceptor._half_open
            while scope.deadline != math.inf:  # it has been refused there too
                await wait_all_tasks_blocked()
            mock_clock.jump(connecting.HANDSHAKE_TIMEOUT_S)
            while acceptor._half_open:
                await wait_all_tasks_blocked()
    assert acceptor.bad_handshakes == 1
    assert "the peer has ended the TLS connection" in caplog.text
    assert "in time" not in caplog.text


async def test_the_name_of_a_route(certificates: Path) -> None:
    ours, theirs = await protection(certificates / "host-a"), await protection(certificates / "elsewhere")
    async with listening(theirs) as acceptor:
        route = c.Route(acceptor.addresses[0], tls_hostname="host-c")
        link = await c.CallingLink.open(route, "dest", protection=ours)
        seen = await acceptor.next_link()
        for one, other in await both_channels(link, seen):
            one.close()
            other.close()
        for end in (link, seen):
            await end.control.aclose()


async def test_plain_where_tls_is_spoken(certificates: Path) -> None:
    async with listening(await protection(certificates / "host-b")) as acceptor:
        with pytest.raises(p.RefusedError, match="under TLS only: give --tls DIR on both hosts") as caught:
            await c.CallingLink.open(acceptor.addresses[0], "dest")
        assert caught.value.code == c.Code.TLS_NEEDED
        assert acceptor.refused == 1


async def test_tls_where_plain_is_spoken(certificates: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with listening(c.LOCAL) as acceptor:
        with pytest.raises(PeerError, match="the other end does not use TLS"):
            await c.CallingLink.open(
                acceptor.addresses[0], "dest", protection=await protection(certificates / "host-a")
            )
        assert "a TLS client, not a postcopy peer; if that is postcopy, give --tls DIR on both hosts" in caplog.text


@pytest.mark.parametrize(
    "said", [b"SSH-2.0-x\r\n", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\xff\xff" + bytes(70_000), b""]
)
async def test_something_else_calls(certificates: Path, said: bytes) -> None:
    async with listening(await protection(certificates / "host-b")) as acceptor:
        stream = await trio.open_tcp_stream(acceptor.addresses[0].host, acceptor.addresses[0].port)
        async with stream:
            try:
                await stream.send_all(said)
                await stream.send_eof()
                while await stream.receive_some():
                    pass
            except trio.BrokenResourceError:  # it has heard enough
                pass
        while not acceptor.bad_handshakes:  # noqa: ASYNC110  (a counter)
            await trio.sleep(0.01)
        link = await c.CallingLink.open(
            acceptor.addresses[0], "dest", protection=await protection(certificates / "host-a")
        )
        await link.control.aclose()


# ---- authorisation


@pytest.mark.parametrize(("side", "does"), [("source", "send"), ("dest", "take")])
@pytest.mark.parametrize("what", ["first", "returning", "data"])
async def test_a_peer_that_may_not(certificates: Path, side: str, does: str, what: str) -> None:
    """By its name, at each connection that it opens, resumed or not."""
    allowed = "take" if does == "send" else "send"
    theirs = await protection(certificates / "host-b", f"{allowed}:host-a", f"{does}:host-c")
    channel = "urgent" if what == "data" else "control"
    hello = p.Hello(channel, side, 0, b"" if what == "first" else SESSION.migration, int(what != "first"))
    caller = connecting.Caller(await protection(certificates / "host-a"))
    async with listening(theirs, "dest" if side == "source" else "source") as acceptor:
        for count in (1, 2):
            with pytest.raises(p.RefusedError, match=rf"host-a.* may not {does} a machine") as caught:
                await caller.connect(acceptor.addresses[0], hello, token=SESSION.token)
            assert caught.value.code == c.Code.UNAUTHORISED
            assert acceptor.unauthorised == acceptor.refused == count


async def test_noise_keeps_no_refusal_out_of_the_log(certificates: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Lines of those that have proven nothing are few in a while, and use up those of peers with a certificate in no
    case."""
    caller = connecting.Caller(await protection(certificates / "host-a"))
    async with listening(await protection(certificates / "host-b", "send:host-c"), "dest") as acceptor:
        for _ in range(3):
            async with await trio.open_tcp_stream("127.0.0.1", acceptor.addresses[0].port) as noise:
                await noise.send_all(b"\x16\x03\x01\x00\x01\x00")
                await noise.send_eof()
                await noise.receive_some()
        with pytest.raises(p.RefusedError):
            await caller.connect(acceptor.addresses[0], p.Hello("control", "source", 0, b"", 0))
    assert caplog.text.count("TLS handshake") == 1
    assert caplog.text.count("host-a may not send a machine to here") == 1


@pytest.mark.parametrize(("side", "does"), [("source", "take"), ("dest", "send")])
async def test_a_peer_that_is_called_and_may_not(certificates: Path, side: str, does: str) -> None:
    """A source gives its machine to no destination that is not named, and the other way round."""
    called = "dest" if side == "source" else "source"
    other = "send" if does == "take" else "take"
    async with listening(await protection(certificates / "host-b"), called) as acceptor:
        for patterns, good in ([f"{does}:host-b"], True), ([f"{other}:host-b", f"{does}:host-c"], False):
            ours = await protection(certificates / "host-a", *patterns)
            if good:
                await (await c.CallingLink.open(acceptor.addresses[0], side, protection=ours)).control.aclose()
            else:
                with pytest.raises(PeerError, match=rf"host-b.* may not {does} a machine.*--tls-authz"):
                    await c.CallingLink.open(acceptor.addresses[0], side, protection=ours)


async def test_who_asks(certificates: Path) -> None:
    """A policy is told who it is, and who waits already."""
    asked: list[c.Asking] = []

    def why_refused(asking: c.Asking) -> str:
        asked.append(c.Asking(asking.identity, tuple(asking.waiting)))
        return "enough" if len(asked) == 3 else ""

    async with listening(await protection(certificates / "host-b"), why_refused=why_refused) as acceptor:
        links = []
        for host in ("host-a", "host-b"):
            ours = await protection(certificates / host)
            links.append(await c.CallingLink.open(acceptor.addresses[0], "dest", protection=ours))
        with pytest.raises(p.RefusedError, match="enough"):
            await c.CallingLink.open(
                acceptor.addresses[0], "dest", protection=await protection(certificates / "host-a")
            )
        assert asked == [
            c.Asking("host-a", ()),
            c.Asking("host-b", ("host-a",)),
            c.Asking("host-a", ("host-a", "host-b")),
        ]
        for link in links:
            await link.control.aclose()


async def test_handshakes_take_turns(certificates: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many begin one at a time: others run between any two. (None waits for a look at the certificates here,
    for which they stand in line too.)"""
    monkeypatch.setattr("postcopy.tls._credentials.LOOK_TIMEOUT_S", 0.0)
    steps: list[int] = []  # in which pass of the event loop

    class Passes(trio.abc.Instrument):
        count = 0

        def before_io_wait(self, timeout: float) -> None:
            self.count += 1

    class Counted:
        def __getattr__(self, name: str) -> Any:
            if name == "pc_tls_handshake":
                steps.append(passes.count)
            return getattr(lib, name)

    passes = Passes()
    monkeypatch.setattr("postcopy.tls._connection.lib", Counted())
    async with listening(await protection(certificates / "host-b")) as acceptor:
        host, port = acceptor.addresses[0].host, acceptor.addresses[0].port
        clients = [await trio.open_tcp_stream(host, port) for _ in range(20)]
        await wait_all_tasks_blocked()
        trio.lowlevel.add_instrument(passes)
        for client in clients:
            client.socket._sock.send(client_hello())  # type: ignore[attr-defined]
        while len(steps) < len(clients):  # noqa: ASYNC110  (a list)
            await trio.sleep(0.001)
        trio.lowlevel.remove_instrument(passes)
        assert len(set(steps)) == len(clients)
        for client in clients:
            await client.aclose()


# ---- coming back


@asynccontextmanager
async def a_migration(ours: c.Protection, theirs: c.Protection, **how: Any) -> AsyncIterator[tuple[Any, ...]]:
    """Both ends' reconnectors, of a migration that has had its data channels."""
    async with listening(theirs) as acceptor:
        link = await c.CallingLink.open(acceptor.addresses[0], "dest", protection=ours)
        seen = await acceptor.next_link()
        with link.reconnector(SESSION) as caller, seen.reconnector(SESSION) as called:
            for ends in await both_channels(link, seen):
                for end in ends:
                    end.close()
            for one in (link, seen):
                await one.control.aclose()
            yield acceptor, caller, called


async def comes_back(caller: c.Reconnector, called: c.Reconnector) -> tuple[c.Link, c.Link, c.Session]:
    found: list[tuple[c.Link, c.Session]] = []

    async def find() -> None:
        found.append(await caller.next_link())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(find)
        there, session = await called.next_link()
    return found[0][0], there, session


@pytest.mark.parametrize("renewed", [False, True])
async def test_a_recovery_resumes_every_connection(certificates: Path, tmp_path: Path, renewed: bool) -> None:
    """But not with certificates that were renewed meanwhile, which both sides use from the next connection on."""
    mine = Path(shutil.copytree(certificates / "host-a", tmp_path / "host"))
    ours, theirs = await protection(mine), await protection(certificates / "host-b")
    async with a_migration(ours, theirs) as (acceptor, caller, called):
        if renewed:
            issue(certificates / "ca", ["host-new"], mine)
        link, there, session = await comes_back(caller, called)
        assert there.certificate is not None
        assert there.certificate.resumed is not renewed
        assert there.identity == ("host-new" if renewed else "host-a")
        assert isinstance(link, c.CallingLink)
        assert len(link._caller._early) == 3  # the data channels were begun with it
        accepted = acceptor.bad_handshakes
        assert await exchange(await both_channels(link, there, session)) == [(not renewed, not renewed)] * 3
        assert acceptor.bad_handshakes == accepted  # they were all used
        for one in (link, there):
            await one.control.aclose()


async def test_a_session_that_the_peer_does_not_take_is_offered_once(certificates: Path) -> None:
    """A server of before ends such a connection without a word where the client's certificate has ended meanwhile."""
    ours, theirs = await protection(certificates / "host-a"), await protection(certificates / "host-b")
    assert theirs.credentials is not None
    accept, resumed = theirs.credentials.accept, []

    async def accept_none_resumed(plain: trio.SocketStream) -> TlsStream:
        stream = await accept(plain)
        resumed.append(stream.peer.resumed)
        if stream.peer.resumed:
            plain.socket.shutdown(trio.socket.SHUT_RDWR)
            raise trio.BrokenResourceError("a session is of no use here")
        return stream

    async with listening(theirs) as acceptor:
        caller, hello = connecting.Caller(ours), p.Hello("control", "dest", 0, b"", 0)
        stream, _ = await caller.connect(acceptor.addresses[0], hello)
        theirs.credentials.accept = accept_none_resumed  # type: ignore[method-assign,assignment]
        with pytest.raises(PeerError):
            await caller.connect(acceptor.addresses[0], hello)
        again, _ = await caller.connect(acceptor.addresses[0], hello)
        assert resumed == [True, False]
        for one in (stream, again):
            await one.aclose()


async def test_a_session_outlasts_a_refusal(certificates: Path) -> None:
    """A host that is busy is asked again and again."""
    ours, theirs = await protection(certificates / "host-a"), await protection(certificates / "host-b")
    reason = ""
    async with listening(theirs, why_refused=lambda asking: reason) as acceptor:
        caller, hello = connecting.Caller(ours), p.Hello("control", "dest", 0, b"", 0)
        stream, _ = await caller.connect(acceptor.addresses[0], hello)
        reason = "busy"
        for _ in range(2):
            with pytest.raises(p.RefusedError, match="busy"):
                await caller.connect(acceptor.addresses[0], hello)
        reason = ""
        again, _ = await caller.connect(acceptor.addresses[0], hello)
        assert isinstance(again, TlsStream)
        assert again.peer.resumed
        for one in (stream, again):
            await one.aclose()


async def test_a_peer_that_may_no_longer_is_refused_when_it_comes_back(certificates: Path) -> None:
    """Its session would still be good."""
    ours, theirs = await protection(certificates / "host-a"), await protection(certificates / "host-b")
    async with a_migration(ours, theirs) as (acceptor, caller, _):
        assert theirs.credentials is not None
        theirs.credentials.authorisation = type(theirs.credentials.authorisation)(["host-c"])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(caller.next_link)
            while acceptor.unauthorised < 3:  # noqa: ASYNC110  (a counter)
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()


async def test_connections_that_were_begun_too_early(certificates: Path) -> None:
    """The other side has waited for them no longer: they are begun again."""
    ours, theirs = await protection(certificates / "host-a"), await protection(certificates / "host-b")
    async with a_migration(ours, theirs) as (acceptor, caller, called):
        link, there, session = await comes_back(caller, called)
        while len(acceptor._half_open) < 3:  # noqa: ASYNC110  (a table)
            await trio.sleep(0.01)
        for scope in list(acceptor._half_open):
            scope.cancel()
        assert await exchange(await both_channels(link, there, session)) == [(True, True)] * 3
        for one in (link, there):
            await one.control.aclose()


async def test_connections_that_were_begun_too_early_do_not_outlast_a_pause(certificates: Path) -> None:
    ours, theirs = await protection(certificates / "host-a"), await protection(certificates / "host-b")
    async with a_migration(ours, theirs) as (_, caller, called):
        link, there, _ = await comes_back(caller, called)
        for one in (link, there):
            await one.control.aclose()
        caller.pause()
        assert len(caller._caller._early) == 3
        async with trio.open_nursery() as nursery:
            nursery.start_soon(caller.next_link)
            await wait_all_tasks_blocked()
            assert not caller._caller._early
            nursery.cancel_scope.cancel()


def test_a_data_connection_to_where_no_interface_leads() -> None:
    with pytest.raises(PeerError, match="fe80::1%gone0"):
        connecting.Opening(c.Address("fe80::1%gone0", 7), connecting._Secured(None, ""))


async def test_nothing_is_begun_early_where_that_was_in_vain(certificates: Path) -> None:
    ours, theirs = await protection(certificates / "host-a"), await protection(certificates / "host-b")
    async with a_migration(ours, theirs) as (acceptor, caller, called):
        called.pause()
        bad = acceptor.bad_handshakes
        async with trio.open_nursery() as nursery:
            nursery.start_soon(caller.next_link)
            refused = acceptor.refused
            while acceptor.refused < refused + 5:  # noqa: ASYNC110  (a counter)
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
        while acceptor._half_open:  # noqa: ASYNC110  (a table)
            await trio.sleep(0.01)
        assert acceptor.bad_handshakes <= bad + 3


async def test_all_is_begun_early_again_where_the_network_was_cut(
    certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recovery that is slower than the one before would only be cut more easily."""
    ours, theirs = await protection(certificates / "host-a"), await protection(certificates / "host-b")
    async with a_migration(ours, theirs) as (acceptor, caller, called):
        secure, cuts = acceptor._secure, 0

        async def cut(*arguments: Any) -> bool:
            nonlocal cuts
            cuts += 1
            if cuts <= 4:  # the control connection, and what was begun with it
                raise trio.BrokenResourceError("cut")
            return bool(await secure(*arguments))

        monkeypatch.setattr(acceptor, "_secure", cut)
        link, there, session = await comes_back(caller, called)
        assert isinstance(link, c.CallingLink)
        assert len(link._caller._early) == 3
        assert await exchange(await both_channels(link, there, session)) == [(True, True)] * 3
        for one in (link, there):
            await one.control.aclose()


# ---- unfinished handshakes


async def test_a_host_takes_no_places_of_another_one(certificates: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With more connections than there are places it costs its own; one of another host stays, though it is older."""
    monkeypatch.setattr(acceptor_module, "MAX_HALF_OPEN", 8)

    async def begin(acceptor: c.Acceptor, source: str) -> trio.SocketStream:
        sock = trio.socket.socket()
        await sock.bind((source, 0))
        await sock.connect((acceptor.addresses[0].host, acceptor.addresses[0].port))
        return trio.SocketStream(sock)

    async with listening(await protection(certificates / "host-b")) as acceptor:
        honest = await begin(acceptor, "127.0.0.2")
        many = [await begin(acceptor, "127.0.0.3") for _ in range(20)]
        while acceptor.bad_handshakes < 13:  # noqa: ASYNC110  (a counter)
            await trio.sleep(0.01)
        assert sorted(acceptor._half_open.values()) == ["127.0.0.2"] + ["127.0.0.3"] * 7
        caller = connecting.Caller(await protection(certificates / "host-a"))
        opening = connecting._Secured(await caller.protection.credentials.context(server=False), "127.0.0.1")  # type: ignore[union-attr]
        stream = opening.over(honest)
        await caller._greet(stream, opening, p.Hello("control", "dest", 0, b"", 0), b"", p.PROTOCOL_VERSION)
        assert acceptor.accepted == 1
        for each in (honest, *many):
            await trio.aclose_forcefully(each)


async def test_a_host_that_has_too_many_loses_those_that_it_needs_later(
    certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the one before them, whose handshake is going on."""
    monkeypatch.setattr(acceptor_module, "MAX_HALF_OPEN", 4)
    ours = await protection(certificates / "host-a")
    assert ours.credentials is not None
    async with listening(await protection(certificates / "host-b")) as acceptor:
        address = acceptor.addresses[0]
        plain = [await trio.open_tcp_stream(address.host, address.port)]
        while not acceptor._half_open:  # noqa: ASYNC110  (a table)
            await trio.sleep(0.01)
        first = next(iter(acceptor._half_open))
        for count in range(1, 7):
            plain.append(await trio.open_tcp_stream(address.host, address.port))
            await connect(ours.credentials, plain[-1], "127.0.0.1")
            while len(acceptor._silent) < min(count, 3):  # noqa: ASYNC110  (a table)
                await trio.sleep(0.01)
        while acceptor.bad_handshakes < 3:  # noqa: ASYNC110  (a counter)
            await trio.sleep(0.01)
        assert first in acceptor._half_open
        assert not first.cancel_called
        for each in plain:
            await trio.aclose_forcefully(each)


@pytest.mark.parametrize(
    ("address", "host"),
    [("192.0.2.7", "192.0.2.7"), ("2001:db8:1:2:3::4", "2001:db8:1:2::/64"), ("fe80::1%eth0", "fe80::/64")],
)
def test_what_counts_as_one_host(address: str, host: str) -> None:
    assert c.Address(address, 1).network == host


async def test_certificates_are_looked_at_before_anybody_can_call(certificates: Path, tmp_path: Path) -> None:
    nothing = c.Protection(Credentials(tmp_path))
    with pytest.raises(ConfigurationError, match=r"ca-cert\.pem is not there"):
        await c.Acceptor.open(c.Address("127.0.0.1", 0), "dest", lambda asking: "", protection=nothing)
    async with listening(await protection(certificates / "host-b")) as acceptor:
        with pytest.raises(ConfigurationError, match=r"ca-cert\.pem is not there"):
            await c.CallingLink.open(acceptor.addresses[0], "dest", protection=nothing)
