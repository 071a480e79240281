# SPDX-License-Identifier: Apache-2.0
"""One connection under TLS, over a socket pair: as a stream, in place, and as it is given to the core."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509.oid import NameOID
from tls import connect
from trio.testing import wait_all_tasks_blocked

from postcopy.tls import Credentials, TlsError, TlsStream, detach, in_place, stream_of
from postcopy.tls._authority import issue, new_authority

pytestmark = pytest.mark.needs("tls")

MUCH = 8 << 20  # more than any two socket buffers hold


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("tls")
    new_authority(where / "ca")
    issue(where / "ca", ["host-a", "127.0.0.1", "xn--bcher-kva.example"], where / "host")
    return where / "host"


def plain_pair() -> tuple[trio.SocketStream, trio.SocketStream]:
    here, there = socket.socketpair()
    return tuple(trio.SocketStream(trio.socket.from_stdlib_socket(end)) for end in (here, there))  # type: ignore[return-value]


@asynccontextmanager
async def pair(host: Path, session: bytes = b"") -> AsyncIterator[tuple[TlsStream, TlsStream]]:
    """Client and server, with their handshake done."""
    credentials = Credentials(host)
    async with connected(credentials, session) as both:
        yield both


@asynccontextmanager
async def connected(
    credentials: Credentials, session: bytes = b"", name: str = "host-a"
) -> AsyncIterator[tuple[TlsStream, TlsStream]]:
    here, there = plain_pair()
    server: list[TlsStream] = []

    async def accept() -> None:
        server.append(await credentials.accept(there))

    with trio.fail_after(60):
        async with here, there:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(accept)
                client = await connect(credentials, here, name, session)
            yield client, server[0]


async def receive_all(stream: trio.abc.ReceiveStream) -> bytes:
    received = bytearray()
    async for data in stream:
        received += data
    return bytes(received)


async def test_both_ways_and_an_orderly_end(host: Path) -> None:
    async with pair(host) as (client, server):
        assert (client.peer.name, client.peer.resumed) == ("host-a", False)
        assert server.peer.names == (("dns", "host-a"), ("ip", "127.0.0.1"), ("dns", "xn--bcher-kva.example"))
        assert server.peer.subject == "CN=host-a"
        assert client.peer.fingerprint != server.peer.fingerprint
        sent = os.urandom(MUCH)
        got: list[bytes] = []

        async def receive(stream: TlsStream) -> None:
            got.append(await receive_all(stream))

        async def send(stream: TlsStream) -> None:
            await stream.send_all(sent)
            await stream.send_eof()

        async with trio.open_nursery() as nursery:  # all four at the same time
            for stream in (client, server):
                nursery.start_soon(receive, stream)
                nursery.start_soon(send, stream)
        assert got == [sent, sent]


async def test_a_cut_is_no_end(host: Path) -> None:
    async with pair(host) as (client, server):
        assert client.read_now() is None  # (unread sessions would make a reset of the end)
        await client.send_all(b"the last words")
        client.socket.close()
        assert await server.receive_some() == b"the last words"
        with pytest.raises(trio.BrokenResourceError, match="cut") as caught:
            await server.receive_some()
        assert isinstance(caught.value.__cause__, OSError)
        assert caught.value.__cause__.errno == errno.EPIPE


async def test_closing_says_so(host: Path) -> None:
    async with pair(host) as (client, server):
        await client.aclose()
        assert await server.receive_some() == b""
        assert await server.receive_some() == b""


async def test_a_closed_stream(host: Path) -> None:
    """Its number may be another file's: nothing is done with it."""
    async with pair(host) as (client, _):
        await client.aclose()
        await client.aclose()
        for use in (client.receive_some, client.handshake, client.send_eof, client.wait_send_all_might_not_block):
            with pytest.raises(trio.ClosedResourceError):
                await use()
        with pytest.raises(trio.ClosedResourceError):
            await client.send_all(b"x")
        assert client.session == b""


async def test_a_send_that_was_cancelled_has_broken_the_stream(host: Path) -> None:
    async with pair(host) as (client, server):
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.send_all, bytes(MUCH))
                await wait_all_tasks_blocked()
                scope.cancel()
        assert scope.cancelled_caught
        with pytest.raises(trio.BrokenResourceError, match="in part"):
            await client.send_all(b"more")
        await client.aclose()
        with pytest.raises(trio.BrokenResourceError):  # what came is no message's end
            await receive_all(server)


async def test_a_send_that_need_not_wait_is_done_or_not_begun(host: Path) -> None:
    """Cancelled while other tasks run, as by a signal: what says why this side ends comes after it."""
    async with pair(host) as (client, server):
        with trio.CancelScope() as scope:
            sender = trio.lowlevel.current_task()

            class CancelAtFirstYield(trio.abc.Instrument):
                def after_task_step(self, task: trio.lowlevel.Task) -> None:
                    if task is sender:
                        scope.cancel()

            instrument = CancelAtFirstYield()
            trio.lowlevel.add_instrument(instrument)
            try:
                await client.send_all(b"sent")
            finally:
                trio.lowlevel.remove_instrument(instrument)
        assert scope.cancel_called
        assert not scope.cancelled_caught
        assert await server.receive_some() == b"sent"
        with trio.CancelScope() as scope:
            scope.cancel()
            await client.send_all(b"not begun")
        assert scope.cancelled_caught
        await client.send_all(b"nothing is torn")
        assert await server.receive_some() == b"nothing is torn"


async def test_a_read_that_was_cancelled_has_lost_nothing(host: Path) -> None:
    async with pair(host) as (client, server):
        with trio.move_on_after(0.01):
            await server.receive_some()
        await client.send_all(b"here")
        assert await server.receive_some() == b"here"


async def test_a_handshake_that_was_cancelled_goes_on(host: Path) -> None:
    credentials = Credentials(host)
    here, there = plain_pair()
    async with here, there:
        client = TlsStream(here.socket, await credentials.context(server=False), "host-a")
        server = TlsStream(there.socket, await credentials.context(server=True))
        with trio.fail_after(60):
            for stream in (client, server) * 3:
                with trio.move_on_after(0.01):
                    await stream.handshake()
            await server.handshake()
            await client.handshake()
        assert server.peer.name == "host-a"


async def test_in_place(host: Path) -> None:
    """Nothing is left in the library when there is nothing to read, and a piece of a record is nothing yet."""
    async with pair(host) as (client, server):
        assert in_place(client) is client
        assert client.read_now() is None
        assert not client.pending
        sent = bytes(range(256)) * 100
        assert server.write_now(sent) == len(sent)
        got = bytearray()
        with trio.fail_after(60):
            while len(got) < len(sent):
                if data := client.read_now(1000):
                    got += data
                    assert len(data) <= 1000
                    continue
                assert not client.pending
                await trio.lowlevel.wait_readable(client.socket)
        assert bytes(got) == sent
        assert client.read_now() is None


async def test_in_place_until_the_peer_takes_nothing(host: Path) -> None:
    """What was not taken is given again, and nothing is sent twice."""
    async with pair(host) as (client, server):
        block = os.urandom(MUCH)
        sent = 0
        while more := client.write_now(memoryview(block)[sent:]):
            sent += more
        assert 0 < sent < MUCH
        received: list[bytes] = []

        async def receive() -> None:
            received.append(await receive_all(server))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            await client.send_all(block[sent:])
            await client.send_eof()
        assert received == [block]


async def test_without_tls_in_place() -> None:
    here, there = plain_pair()
    one, other = in_place(here), in_place(there)
    assert one is not None
    assert other is not None
    assert one.read_now() is None
    assert not one.pending
    assert other.write_now(b"here") == 4
    assert one.read_now() == b"here"
    await there.aclose()
    assert one.read_now() == b""
    with pytest.raises(trio.BrokenResourceError):
        one.write_now(b"x")
    await here.aclose()
    with pytest.raises(trio.ClosedResourceError):
        one.read_now()
    assert in_place(trio.testing.memory_stream_pair()[0]) is None


async def test_to_the_core_and_back(host: Path) -> None:
    """What has arrived meanwhile is still there; who has it next owns socket and TLS."""
    async with pair(host) as (client, server):
        await server.send_all(b"before")
        channel = detach(client)
        assert os.get_blocking(channel.fd.fd)
        with pytest.raises(trio.ClosedResourceError):
            await client.receive_some()
        fd, tls = channel.detach()
        assert tls is not None
        again = stream_of(fd, tls)
        assert isinstance(again, TlsStream)
        assert await again.receive_some() == b"before"
        await again.send_all(b"after")
        assert await server.receive_some() == b"after"
        channel = detach(again)
        for use in (lambda: detach(again), lambda: again.peer):
            with pytest.raises(trio.ClosedResourceError):
                use()
        channel.close()
        channel.close()
        with pytest.raises(trio.BrokenResourceError):
            await server.receive_some()


async def test_the_next_connection_resumes_the_session(host: Path) -> None:
    """Any number of them; not with other credentials, of which the old session knows nothing."""
    credentials = Credentials(host)
    async with connected(credentials) as (client, server):
        assert client.session == b""  # it comes behind the handshake
        await server.send_all(b"welcome")
        assert await client.receive_some() == b"welcome"
        session = client.session
        assert server.session == b""
    for _ in range(2):
        async with connected(credentials, session) as (client, server):
            assert client.peer.resumed
            assert server.peer.resumed
            assert server.peer.name == "host-a"
            assert server.peer.fingerprint != client.peer.fingerprint
    async with pair(host, session) as (client, server):  # another process at the other end
        assert not client.peer.resumed


async def test_what_is_no_session_is_no_harm(host: Path) -> None:
    async with pair(host, b"\xff" * 300) as (client, _):
        assert not client.peer.resumed


async def test_the_name_that_was_called(host: Path) -> None:
    credentials = Credentials(host)
    good_names, bad_names = ("127.0.0.1", "HOST-A", "host-a.", "b\u00fccher.example"), ("host-b", "127.0.0.2")
    for name, good in [(name, name in good_names) for name in good_names + bad_names]:
        here, there = plain_pair()
        async with here, there, trio.open_nursery() as nursery:

            async def accept(end: trio.SocketStream = there, good: bool = good) -> None:
                if good:
                    await credentials.accept(end)
                    return
                with pytest.raises(TlsError, match="the peer has ended the TLS connection"):
                    await credentials.accept(end)

            nursery.start_soon(accept)
            if good:
                await connect(credentials, here, name)
            else:
                with pytest.raises(TlsError, match=f"not for {name}, but for .*host-a.* --tls-hostname"):
                    await connect(credentials, here, name)


@pytest.mark.parametrize("name", ["a\0host-a", "host a\n", "x" * 300, "a..b", "\udc80"])
async def test_what_is_no_name(host: Path, name: str) -> None:
    credentials = Credentials(host)
    here, there = plain_pair()
    async with here, there:
        with pytest.raises(TlsError, match="is no name that a certificate could have"):
            await connect(credentials, here, name)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, list[x509.GeneralName]], Path]:
    """``foreign("CN", [names])``: a host's directory, by an authority that lets through what ours would not."""
    where = tmp_path_factory.mktemp("foreign")
    new_authority(where / "ca")
    ca = x509.load_pem_x509_certificate((where / "ca/ca-cert.pem").read_bytes())
    ca_key = serialization.load_pem_private_key((where / "ca/ca-key.pem").read_bytes(), None)

    def make(common_name: str, names: list[x509.GeneralName]) -> Path:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)] if common_name else [])
        now = datetime.now(UTC)
        builder = x509.CertificateBuilder(ca.subject, subject, key.public_key(), x509.random_serial_number())
        builder = builder.not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(hours=1))
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        certificate = builder.sign(ca_key, SHA256())  # type: ignore[arg-type]
        out = Path(tempfile.mkdtemp(dir=where))
        (out / "ca-cert.pem").write_bytes((where / "ca/ca-cert.pem").read_bytes())
        for role in ("server", "client"):
            (out / f"{role}-cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
            form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
            (out / f"{role}-key.pem").write_bytes(key.private_bytes(*form))
            (out / f"{role}-key.pem").chmod(0o600)
        return out

    return make


def dns(*names: str) -> list[x509.GeneralName]:
    return [x509.DNSName._init_without_validation(name) for name in names]


@pytest.mark.parametrize(
    ("common_name", "names", "good"),
    [
        ("host-b.example.org", [], False),  # a subject is no name
        ("host-b.example.org", [x509.UniformResourceIdentifier("spiffe://example.org/x")], False),
        ("", dns("h*.example.org", "*t-b.example.org", "*.org", "*"), False),
        ("", dns("host-b.example.org\0.evil"), False),
        ("", dns("*.example.org"), True),
        ("", dns("x" * 4096, *(f"h{number}.example" for number in range(1000)), "host-b.example.org"), True),
    ],
)
async def test_what_names_a_peer(
    foreign: Callable[[str, list[x509.GeneralName]], Path], common_name: str, names: list[x509.GeneralName], good: bool
) -> None:
    credentials = Credentials(foreign(common_name, names))
    here, there = plain_pair()
    async with here, there, trio.open_nursery() as nursery:

        async def accept() -> None:
            with contextlib.suppress(TlsError):
                await credentials.accept(there)

        nursery.start_soon(accept)
        with contextlib.nullcontext() if good else pytest.raises(TlsError, match="is not for host-b"):
            await connect(credentials, here, "host-b.example.org")


async def test_a_peer_whose_names_no_line_could_hold(foreign: Callable[[str, list[x509.GeneralName]], Path]) -> None:
    """What comes from a certificate is printed and logged: nothing of it begins a line, moves a cursor, or is cut."""
    bad = "evil\n2026 error\x1b[2J\u202e\x85"
    names = dns("a\nb", "a b", "x\x1b[2J", "nul\0", "", "last.example.org", "127.0.0.1")
    credentials = Credentials(foreign(bad, names))
    async with connected(credentials, name="last.example.org") as (client, _):
        assert client.peer.names == (("dns", "last.example.org"), ("dns", "127.0.0.1"))
        assert "\n" not in client.peer.known_as
        assert "\x1b" not in client.peer.known_as


@pytest.mark.parametrize(
    ("common_name", "subject"),
    [
        ("host,O=Example", r"CN=host\,O=Example"),
        ("b\u00fccher ", "CN=b\u00fccher\\ "),
        ("host\u202e1", ""),
        ("host\u00a01", ""),
        ("host\n1", r"CN=host\0A1"),
        ("host\0", r"CN=host\00"),
    ],
)
async def test_what_a_subject_is(
    foreign: Callable[[str, list[x509.GeneralName]], Path], common_name: str, subject: str
) -> None:
    """As patterns are matched against: all of it, as RFC 2253 has it; none where a person would read another one."""
    credentials = Credentials(foreign(common_name, dns("host-a")))
    async with connected(credentials) as (_, server):
        assert server.peer.subject == subject
