# SPDX-License-Identifier: Apache-2.0
"""Connections: who may open one, and what becomes of it.

One host listens, the other one connects; which is the source does not matter. Every connection, control or data, begins
with the handshake of `protocol`. Then a control connection stays a Trio stream, while a data connection stops being
Python's business: its descriptor is detached, made blocking and handed to the core. For that to work nothing behind the
handshake may have been read, so the handshake is read with exactly as many bytes as it asks for.

**Coming back.** A migration that has lost its connection is a *membership* that goes on: whoever knows its id and token
and brings a higher epoch than anybody before gets its place, even while this side still believes in the old connection,
which may be half open. The side that had called calls again, at first several times a second, and at another address
when it is told one (`Route`); the side that listens does not look at where somebody calls from.

**Strangers.** A listening port will be found by port scanners, browsers and the wrong version of ourselves. Until a
peer has said a proper hello it gets `HANDSHAKE_TIMEOUT_S` and 64 KiB; at most `MAX_HALF_OPEN` may be in that state,
and one more costs the *oldest* its place, since an honest peer needs one round trip only. Whatever it does, the
listener goes on. A data connection must name a migration that is going on and its token, which only went over that
migration's control connection.

Resource handling: a stream belongs to whoever got it last; what a `Door` has collected when it closes unused, it
closes.

Error handling: `ConfigurationError` for an address that makes no sense, `ResourceError` for one that cannot be
listened on, `PeerError` and `ProtocolError` for the other host, each naming its address.
"""

from __future__ import annotations

import abc
import contextlib
import errno
import ipaddress
import logging
import math
import os
import random
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import trio

from postcopy._errors import ConfigurationError, PeerError, ProtocolError, ResourceError
from postcopy._fd import FdHolder
from postcopy.migration.protocol import (
    NO_SUCH_MIGRATION,
    ClientHandshake,
    Hello,
    RefusedError,
    ServerHandshake,
    one_line,
    same_secret,
)

HANDSHAKE_TIMEOUT_S = 10.0
CHANNELS_TIMEOUT_S = 30.0
MAX_HALF_OPEN = 64
ACCEPT_PAUSE_S = 0.1
RECONNECT_FIRST_S, RECONNECT_CAP_S = 0.02, 0.2
"""Pauses between attempts to come back: doubled from the first to the cap, each cut at random to half or more, so that
the first page after a short cut comes within a fraction of a second."""
RECONNECT_PATIENT_AFTER_S, RECONNECT_PATIENT_CAP_S = 60.0, 2.0
"""A network that has been away for so long is asked less often."""
RECONNECT_ATTEMPT_S = 1.0
"""An attempt that is not answered is begun anew: the network may have come back just after the kernel asked."""
_NO_ROOM = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})

WRONG_TOKEN = "wrong token"
HELD = "paused by the operator"

log = logging.getLogger(__name__)

# ---- Addresses


@dataclass(frozen=True)
class Address:
    host: str  # name or number, without brackets; empty to listen everywhere
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host or '*'}:{self.port}"


def parse_address(text: str, *, listening: bool = False) -> Address:
    """``HOST:PORT`` or ``[IPV6]:PORT``. To listen, HOST may be empty or ``*`` and PORT 0 (the system chooses)."""

    def unusable(reason: str) -> ConfigurationError:
        return ConfigurationError(
            f"{one_line(text, 80)!r} is not an address: {reason};"
            " write HOST:PORT, as in 192.0.2.7:7777 or [2001:db8::7]:7777"
        )

    host, colon, port_text = text.rpartition(":")
    if not colon or text.endswith("]"):
        raise unusable("it has no port")
    if host.startswith("["):
        if not host.endswith("]"):
            raise unusable("the bracket is not closed")
        host = host[1:-1]
        try:
            ipaddress.IPv6Address(host.partition("%")[0])
        except ValueError:
            raise unusable(f"{host!r} is not an IPv6 address") from None
    elif ":" in host:
        raise unusable("an IPv6 address needs brackets")
    if not (port_text.isascii() and port_text.isdigit()):
        raise unusable(f"the port {port_text!r} is not a number")
    port = int(port_text) if len(port_text) < 6 else 65536
    if port > 65535:
        raise unusable("a port is at most 65535")
    if listening:
        return Address("" if host == "*" else host, port)
    if not port:
        raise unusable("port 0 cannot be connected to")
    if host in ("", "*"):
        raise unusable("it has no host")
    if not host.isprintable() or " " in host:
        raise unusable("the host has characters that no host name has")
    return Address(host, port)


MAX_PEER_FILE_BYTES = 4096


def read_peer_file(path: str) -> Address:
    """The HOST:PORT that is all a file holds. `ConfigurationError` when it cannot be read or says something else."""
    try:
        # O_NONBLOCK: opening a FIFO must not wait for a writer, nor reading one.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            content = os.read(fd, MAX_PEER_FILE_BYTES + 1)
        finally:
            os.close(fd)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigurationError(f"--peer-file {path}: {reason}") from error
    if len(content) > MAX_PEER_FILE_BYTES:
        raise ConfigurationError(f"--peer-file {path}: more than {MAX_PEER_FILE_BYTES} bytes; write one HOST:PORT")
    try:
        return parse_address(content.decode("utf-8", "replace").strip())
    except ConfigurationError as error:
        raise ConfigurationError(f"--peer-file {path}: {error}") from error


class Route:
    """Where the peer listens, for a side that connects. It may change while a migration lasts: that disturbs no
    connection, the next attempt to come back goes there. Trio thread only."""

    def __init__(self, address: Address, look_up: Callable[[], Address] | None = None) -> None:
        """`look_up` says where the peer is now, or raises `ConfigurationError`."""
        self.address = address
        self.proven = False  # somebody there has known the migration
        self._named = address  # as the user has written it; `address` may be what that resolved to
        self._look_up = look_up
        self._changed = trio.Event()

    def change(self, address: Address) -> None:
        """From the next attempt on, which is made at once."""
        self._named = address
        if address != self.address:
            log.warning("the peer is now looked for at %s", address)
            self.address = address
            self.proven = False
        self.wake()

    def wake(self) -> None:
        """Has the next attempt made at once."""
        self._changed.set()
        self._changed = trio.Event()

    def refresh(self, *, told: bool = False) -> None:
        """Looks up where the peer is. What cannot be understood is logged, and the old address stays. `told`: the user
        has asked for it, so a name is resolved anew even if it is the same one."""
        if self._look_up is None:
            return
        try:
            address = self._look_up()
        except ConfigurationError as error:
            log.warning("%s; the peer is looked for at %s as before", error, self.address)
            return
        if told or address != self._named:
            self.change(address)

    def answered(self, asked: Address, address: Address) -> None:
        """The peer is there: this very address from now on, not the name, which might mean another host next time.
        Unless another one was named while it was asked."""
        if asked == self.address:
            self.address = address
            self.proven = True

    async def pause(self, seconds: float) -> bool:
        """Sleeps, but not longer than the address stays the same. True when it has changed."""
        with trio.move_on_after(seconds):
            await self._changed.wait()
            return True
        return False


def address_of(stream: trio.SocketStream) -> Address:
    """Where the other end is. `PeerError` when it is already gone."""
    try:
        name = stream.socket.getpeername()
    except OSError as error:
        raise PeerError("the connection was closed") from error
    return Address(str(name[0]), int(name[1])) if isinstance(name, tuple) else Address("local", 0)


# ---- The connecting side


async def connect(address: Address, hello: Hello, timeout_s: float = HANDSHAKE_TIMEOUT_S) -> trio.SocketStream:
    """A connection on which the peer has said welcome. Every address that a host name has is tried.

    Bounded by `timeout_s` for the connection and again for the handshake. Cancellable. Errors: `PeerError`,
    `ProtocolError`.
    """
    try:
        with trio.fail_after(timeout_s):
            stream = await trio.open_tcp_stream(address.host, address.port)
    except trio.TooSlowError:
        raise PeerError(f"{address}: no answer within {timeout_s:g} s") from None
    except socket.gaierror as error:
        raise PeerError(f"{address}: the name {address.host!r} cannot be resolved ({error.strerror})") from error
    except (OSError, UnicodeError, ValueError) as error:  # ValueError: a name that IDNA cannot encode
        raise PeerError(f"{address}: {_connect_reason(error)}") from error
    try:
        return await client_handshake(stream, hello, timeout_s)
    except RefusedError as error:
        raise RefusedError(f"{address}: {error}", error.reason) from error
    except (PeerError, ProtocolError) as error:
        raise type(error)(f"{address}: {error}") from error


async def client_handshake(stream: trio.SocketStream, hello: Hello, timeout_s: float) -> trio.SocketStream:
    """Says hello and waits for the welcome. Closes the stream unless it succeeds."""
    handshake = ClientHandshake(hello)
    try:
        with trio.fail_after(timeout_s):
            await stream.send_all(handshake.send_hello())
            while wanted := handshake.wanted():
                handshake.receive_data(await stream.receive_some(wanted))
    except BaseException as error:
        await trio.aclose_forcefully(stream)
        if isinstance(error, trio.TooSlowError):
            raise PeerError(f"no handshake within {timeout_s:g} s; is that a postcopy port?") from None
        if isinstance(error, trio.BrokenResourceError):
            raise PeerError(f"the connection broke during the handshake{_cause(error)}") from error
        raise
    return stream


def _connect_reason(error: Exception) -> str:
    # open_tcp_stream wraps what each address said
    cause: BaseException | None = error.__cause__ or error
    while isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    if isinstance(cause, ConnectionRefusedError):
        return "connection refused; start the other side first, with --listen"
    text = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause)
    return one_line(text or type(cause).__name__, 200)


def _cause(error: BaseException) -> str:
    cause = error.__cause__
    return f" ({cause.strerror})" if isinstance(cause, OSError) and cause.strerror else ""


def detach(stream: trio.SocketStream) -> FdHolder:
    """The stream's socket, blocking, for the core; the stream must not be used any more."""
    fd = FdHolder(stream.socket.detach())
    os.set_blocking(fd.fd, True)
    return fd


# ---- Doors: how the data channels of one migration come in, on either side

ChannelKey = tuple[str, int]  # ("urgent", 3)


@dataclass(frozen=True)
class Session:
    """What a data connection must know."""

    migration: bytes
    token: bytes
    epoch: int


def keep_alive(fd: FdHolder, silence_s: float) -> FdHolder:
    """Lets the kernel end a data connection that has been dead for `silence_s`, idle or not (tcp(7)); passes it on."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd.fd)) as handle:
        seconds = max(1, math.ceil(silence_s / 3))
        handle.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        handle.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, seconds)
        handle.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, seconds)
        handle.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2)
        handle.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, math.ceil(silence_s * 1000))
    return fd


class Membership(abc.ABC):
    """A migration's place among the connections of this host, kept while it has none.

    It can be *held*, by whoever operates it: the connection is then given up and none is made or let in, until it is
    let go again. The other side finds that somebody is there who does not take it back yet, and asks again.
    """

    def __init__(self) -> None:
        self._held = False
        self._changed = trio.Event()

    def is_held(self) -> bool:
        return self._held

    def hold(self) -> None:
        """Gives the connection up and makes no other one until `let_go`."""
        self._held = True
        self._notify()

    def let_go(self) -> None:
        """Looks for the peer (again), now."""
        self._held = False
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    @abc.abstractmethod
    async def next_link(self) -> tuple[Link, Session]:
        """The next connection with the same peer, and the session with its epoch. Waits as long as it takes;
        cancellable. `RefusedError` when the peer is there and knows nothing of this migration (any more)."""

    @abc.abstractmethod
    async def superseded(self) -> None:
        """Returns when `next_link` has something although the present connection has not ended. `PeerError` when it is
        to be given up since the membership is held."""


class Door(abc.ABC):
    """Open it before the peer can know the session, since the peer may be faster than our next line."""

    @abc.abstractmethod
    async def channels(self, shards: int, bulk_channels: int) -> dict[ChannelKey, FdHolder]:
        """All data channels, within `CHANNELS_TIMEOUT_S`. Called once; the descriptors are the caller's."""


class Link(abc.ABC):
    """A control connection that has been welcomed, and the way to more connections with the same peer."""

    def __init__(self, control: trio.SocketStream, peer: Address) -> None:
        self.control = control
        self.peer = peer

    def reconnect_to(self, address: Address) -> None:
        """When the connection is lost (or has been), the peer is looked for there. `ConfigurationError` on the side
        that listens: it takes the peer from wherever it comes."""
        raise ConfigurationError(f"this side listens; tell the other one to connect to {address} or wherever this is")

    @abc.abstractmethod
    def door(self, session: Session) -> contextlib.AbstractContextManager[Door]:
        """Lets data channels of `session` come in as long as the block lasts."""

    @abc.abstractmethod
    def membership(self, session: Session) -> contextlib.AbstractContextManager[Membership]:
        """Keeps the way open for the peer, or to it, as long as the block lasts."""


def _keys(shards: int, bulk_channels: int) -> list[ChannelKey]:
    return [("urgent", shard) for shard in range(shards)] + [("bulk", number) for number in range(bulk_channels)]


class CallingLink(Link):
    """We have connected, so we open the data channels too."""

    def __init__(self, control: trio.SocketStream, route: Route, asked: Address, side: str) -> None:
        """`asked`: the address of the route that has answered."""
        super().__init__(control, address_of(control))
        self._route = route
        self._side = side
        route.answered(asked, self.peer)

    @classmethod
    async def open(cls, where: Address | Route, side: str) -> CallingLink:
        """Connects to a listening peer. `side` is what we are: ``source`` or ``dest``."""
        route = where if isinstance(where, Route) else Route(where)
        asked = route.address
        stream = await connect(asked, Hello("control", side, 0, b"", 0, b""))
        try:
            return cls(stream, route, asked, side)
        except PeerError:
            await trio.aclose_forcefully(stream)
            raise

    def reconnect_to(self, address: Address) -> None:
        self._route.change(address)

    @contextlib.contextmanager
    def door(self, session: Session) -> Iterator[Door]:
        yield _CallingDoor(self.peer, self._side, session)

    @contextlib.contextmanager
    def membership(self, session: Session) -> Iterator[Membership]:
        yield _CallingMembership(self._route, self._side, session)


class _CallingMembership(Membership):
    def __init__(self, route: Route, side: str, session: Session) -> None:
        super().__init__()
        self._route = route
        self._side = side
        self._session = session

    def let_go(self) -> None:
        super().let_go()
        self._route.wake()

    async def next_link(self) -> tuple[Link, Session]:
        began_s = trio.current_time()
        pause_s = RECONNECT_FIRST_S
        said = ""
        self._route.refresh()
        while True:
            while self.is_held():
                await self._changed.wait()
            # Each attempt has an epoch of its own: one that was lost on its way must not be taken for the next one.
            session = self._session = replace(self._session, epoch=self._session.epoch + 1)
            hello = Hello("control", self._side, 0, session.migration, session.epoch, session.token)
            try:
                asked = self._route.address
                stream = await connect(asked, hello, RECONNECT_ATTEMPT_S)
                try:
                    if not self.is_held():
                        return CallingLink(stream, self._route, asked, self._side), session
                except BaseException:
                    await trio.aclose_forcefully(stream)
                    raise
                await trio.aclose_forcefully(stream)
            except (PeerError, ProtocolError) as error:
                if isinstance(error, RefusedError) and error.reason in (NO_SUCH_MIGRATION, WRONG_TOKEN):
                    # Of the host that we had been with this is an answer. At a new address it may be anybody's.
                    if self._route.proven:
                        raise
                    if str(error) != said:
                        log.warning("%s; is that the right address?", error)
                elif str(error) != said:
                    log.info("not connected again yet: %s", error)
                said = str(error)
            if await self._route.pause(pause_s * random.uniform(0.5, 1)):
                began_s, pause_s = trio.current_time(), RECONNECT_FIRST_S
                continue
            patient = trio.current_time() - began_s > RECONNECT_PATIENT_AFTER_S
            pause_s = min(2 * pause_s, RECONNECT_PATIENT_CAP_S if patient else RECONNECT_CAP_S)

    async def superseded(self) -> None:
        while not self.is_held():  # nobody but this side connects
            await self._changed.wait()
        raise PeerError(HELD)


class _CallingDoor(Door):
    def __init__(self, peer: Address, side: str, session: Session) -> None:
        self._peer = peer
        self._side = side
        self._session = session

    async def channels(self, shards: int, bulk_channels: int) -> dict[ChannelKey, FdHolder]:
        opened: dict[ChannelKey, FdHolder] = {}
        session = self._session
        try:
            with trio.fail_after(CHANNELS_TIMEOUT_S):
                for kind, index in _keys(shards, bulk_channels):
                    hello = Hello(kind, self._side, index, session.migration, session.epoch, session.token)
                    opened[kind, index] = detach(await connect(self._peer, hello))
        except BaseException as error:
            for fd in opened.values():
                fd.close()
            if isinstance(error, trio.TooSlowError):
                raise PeerError(f"{self._peer}: the data channels took more than {CHANNELS_TIMEOUT_S:g} s") from None
            raise
        return opened


# ---- The listening side


class Refusal(Exception):
    """Why a hello is not welcome; the peer is told."""


class _ListeningDoor(Door):
    def __init__(self, session: Session, peer: Address) -> None:
        self.session = session
        self._peer = peer
        self._wanted: set[ChannelKey] | None = None  # unknown until the destination has said how many shards it has
        self._reserved: set[ChannelKey] = set()
        self._arrived: dict[ChannelKey, FdHolder] = {}
        self._changed = trio.Event()

    def reserve(self, hello: Hello) -> ChannelKey:
        if not same_secret(self.session.token, hello.token):
            raise Refusal(WRONG_TOKEN)
        if hello.epoch != self.session.epoch:
            raise Refusal(f"stale epoch {hello.epoch}, this is {self.session.epoch}")
        key = (hello.channel, hello.index)
        if self._wanted is not None and key not in self._wanted:
            raise Refusal(f"this migration has no {hello.channel} channel {hello.index}")
        if key in self._reserved:
            raise Refusal(f"{hello.channel} channel {hello.index} is connected already")
        self._reserved.add(key)
        return key

    def release(self, key: ChannelKey) -> None:
        """The peer that had reserved it went away before it was welcome."""
        self._reserved.discard(key)

    def enter(self, key: ChannelKey, stream: trio.SocketStream) -> None:
        self._arrived[key] = detach(stream)
        self._changed.set()

    async def channels(self, shards: int, bulk_channels: int) -> dict[ChannelKey, FdHolder]:
        self._wanted = set(_keys(shards, bulk_channels))
        for kind, index in self._reserved - self._wanted:
            raise ProtocolError(f"{self._peer}: opened {kind} channel {index}, which this migration does not have")
        with trio.move_on_after(CHANNELS_TIMEOUT_S) as scope:
            while len(self._arrived) < len(self._wanted):
                self._changed = trio.Event()
                await self._changed.wait()
        if scope.cancelled_caught and len(self._arrived) < len(self._wanted):
            missing = ", ".join(f"{kind} {index}" for kind, index in sorted(self._wanted - set(self._arrived)))
            raise PeerError(f"{self._peer}: did not open these data channels in {CHANNELS_TIMEOUT_S:g} s: {missing}")
        arrived, self._arrived = self._arrived, {}
        return arrived

    def close(self) -> None:
        for fd in self._arrived.values():
            fd.close()
        self._arrived.clear()


class _ListeningMembership(Membership):
    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session
        self._links: list[tuple[Link, Session]] = []

    def reserve(self, hello: Hello) -> None:
        """`Refusal` unless the peer may come back with this. From here on its epoch is used up."""
        if not same_secret(self.session.token, hello.token):
            raise Refusal(WRONG_TOKEN)
        if self.is_held():
            raise Refusal(HELD)
        if hello.epoch <= self.session.epoch:
            raise Refusal(f"stale epoch {hello.epoch}, this is {self.session.epoch}")
        self.session = replace(self.session, epoch=hello.epoch)

    def enter(self, link: Link, epoch: int) -> None:
        for old, _ in self._links:
            old.control.socket.close()
        self._links = [(link, replace(self.session, epoch=epoch))]
        self._notify()

    def hold(self) -> None:
        self.close()  # one that has just come may come again
        super().hold()

    async def next_link(self) -> tuple[Link, Session]:
        while not self._links:
            await self._changed.wait()
        return self._links.pop()

    async def superseded(self) -> None:
        while not self._links:
            if self.is_held():
                raise PeerError(HELD)
            await self._changed.wait()

    def close(self) -> None:
        for link, _ in self._links:
            link.control.socket.close()
        self._links.clear()


class _ListeningLink(Link):
    def __init__(self, control: trio.SocketStream, reception: Reception) -> None:
        super().__init__(control, address_of(control))
        self._reception = reception

    @contextlib.contextmanager
    def door(self, session: Session) -> Iterator[Door]:
        door = _ListeningDoor(session, self.peer)
        doors = self._reception.doors
        doors[session.migration] = door
        try:
            yield door
        finally:
            del doors[session.migration]
            door.close()

    @contextlib.contextmanager
    def membership(self, session: Session) -> Iterator[Membership]:
        membership = _ListeningMembership(session)
        members = self._reception.members
        members[session.migration] = membership
        try:
            yield membership
        finally:
            del members[session.migration]
            membership.close()


class Reception:
    """A listening side: welcomes control connections as long as somebody takes them, and sends data connections to the
    door of their migration.

    Statistics: `accepted`, `refused`, `strangers` count connections by what became of them.
    """

    def __init__(self, side: str, listeners: list[trio.SocketListener], vacancy: Callable[[int], str]) -> None:
        """`vacancy` is asked at each control connection, with the number of those that nobody has taken yet: empty
        to let it in, else the reason why not."""
        self.doors: dict[bytes, _ListeningDoor] = {}
        self.members: dict[bytes, _ListeningMembership] = {}
        self.accepted = self.refused = self.strangers = 0
        self._side = side
        self._listeners = listeners
        self._vacancy = vacancy
        self._waiting = 0
        self._half_open: dict[object, trio.CancelScope] = {}  # oldest first
        self._send_link, self._links = trio.open_memory_channel[Link](16)

    @classmethod
    async def open(cls, address: Address, side: str, vacancy: Callable[[int], str]) -> Reception:
        """Listens on every address that the host name has. `ResourceError` when that is not possible."""
        try:
            listeners = await trio.open_tcp_listeners(address.port, host=address.host or None)
        except socket.gaierror as error:
            raise ResourceError(
                f"cannot listen on {address}: the name cannot be resolved ({error.strerror})",
                "name an address of this host, or leave it out: --listen :PORT",
            ) from error
        except (OSError, UnicodeError, ValueError) as error:
            number = error.errno if isinstance(error, OSError) else None
            remedy = {
                errno.EADDRINUSE: "choose another port, or end who has it: ss -ltnp",
                errno.EADDRNOTAVAIL: "name an address of this host: ip address",
                errno.EACCES: "choose a port from 1024 on",
            }.get(number or 0, "")
            reason = os.strerror(number) if number else str(error)
            raise ResourceError(f"cannot listen on {address}: {one_line(reason, 200)}", remedy) from error
        return cls(side, listeners, vacancy)

    @property
    def addresses(self) -> list[Address]:
        """Where it listens; with port 0 the port that the system chose."""
        names = [listener.socket.getsockname() for listener in self._listeners]
        return [Address(str(name[0]), int(name[1])) for name in names]

    async def next_link(self) -> Link:
        """The next control connection, the caller's from then on."""
        link = await self._links.receive()
        self._waiting -= 1
        return link

    async def serve(self) -> None:
        """Accepts connections until cancelled, then closes the listeners."""
        try:
            async with trio.open_nursery() as nursery:
                for listener in self._listeners:
                    nursery.start_soon(self._accept, listener, nursery)
        finally:
            while True:  # control connections that nobody took
                try:
                    link = self._links.receive_nowait()
                except trio.WouldBlock:
                    break
                link.control.socket.close()

    async def close(self) -> None:
        """Stops listening. `serve` must have ended."""
        for listener in self._listeners:
            await listener.aclose()

    async def _accept(self, listener: trio.SocketListener, nursery: trio.Nursery) -> None:
        # Not trio.serve_listeners: that closes a stream when its handler returns, and ours gives it away.
        while True:
            try:
                stream = await listener.accept()
            except OSError as error:
                if error.errno not in _NO_ROOM:
                    raise
                log.error("cannot accept a connection: %s", error.strerror)
                await trio.sleep(ACCEPT_PAUSE_S)  # descriptors may become free
                continue
            nursery.start_soon(self._greet, stream)

    async def _greet(self, stream: trio.SocketStream) -> None:
        """One connection from its first byte until somebody has it. Never raises, whatever the peer does."""
        peer = "a peer that left at once"
        key = object()
        taken = False
        try:
            peer = str(address_of(stream))
            if len(self._half_open) >= MAX_HALF_OPEN:
                oldest = next(iter(self._half_open))
                self._half_open.pop(oldest).cancel()
            with trio.move_on_after(HANDSHAKE_TIMEOUT_S) as scope:
                self._half_open[key] = scope
                taken = await self._handshake(stream, peer)
            if scope.cancelled_caught:
                raise PeerError("no complete handshake in time")
        except (PeerError, ProtocolError) as error:
            self.strangers += 1
            log.warning("%s: %s", peer, error)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            self.strangers += 1
            log.warning("%s: the connection broke during the handshake%s", peer, _cause(error))
        finally:
            self._half_open.pop(key, None)
            if not taken:
                stream.socket.close()

    async def _handshake(self, stream: trio.SocketStream, peer: str) -> bool:
        handshake = ServerHandshake()
        await stream.send_all(handshake.send_preamble())
        try:
            while wanted := handshake.wanted():
                handshake.receive_data(await stream.receive_some(wanted))
        except ProtocolError as error:
            with contextlib.suppress(trio.BrokenResourceError):
                await stream.send_all(handshake.send_refused(str(error)))
            raise
        hello = handshake.hello
        assert hello is not None
        try:
            if hello.side == self._side:
                raise Refusal(f"both hosts are {'sources' if hello.side == 'source' else 'destinations'}")
            if hello.channel == "control":
                return await self._greet_control(stream, handshake, hello)
            door = self.doors.get(hello.migration)
            if door is None:
                raise Refusal(NO_SUCH_MIGRATION)
            place = door.reserve(hello)
        except Refusal as refusal:
            self.refused += 1
            level = logging.INFO if str(refusal) == HELD else logging.WARNING  # which is asked for again and again
            log.log(level, "%s: refused a %s connection: %s", peer, hello.channel, refusal)
            await stream.send_all(handshake.send_refused(str(refusal)))
            return False
        try:
            await stream.send_all(handshake.send_welcome())
        except BaseException:
            door.release(place)
            raise
        if self.doors.get(hello.migration) is not door:
            return False  # closed while we said welcome
        door.enter(place, stream)
        self.accepted += 1
        return True

    async def _greet_control(self, stream: trio.SocketStream, handshake: ServerHandshake, hello: Hello) -> bool:
        if hello.epoch or hello.migration:
            return await self._greet_again(stream, handshake, hello)
        reason = self._vacancy(self._waiting)
        if reason:
            raise Refusal(reason)
        self._waiting += 1  # now: while we say welcome, the next one may ask for the same place
        try:
            await stream.send_all(handshake.send_welcome())
            self._send_link.send_nowait(_ListeningLink(stream, self))
        except BaseException as error:
            self._waiting -= 1
            if isinstance(error, trio.WouldBlock):
                raise PeerError("too many connections are waiting") from None
            raise
        self.accepted += 1
        return True

    async def _greet_again(self, stream: trio.SocketStream, handshake: ServerHandshake, hello: Hello) -> bool:
        member = self.members.get(hello.migration)
        if member is None:
            raise Refusal(NO_SUCH_MIGRATION)
        member.reserve(hello)
        await stream.send_all(handshake.send_welcome())
        # Somebody with a higher epoch may have come while we said welcome, and the migration may have ended or be held.
        if self.members.get(hello.migration) is not member or member.session.epoch != hello.epoch or member.is_held():
            return False
        member.enter(_ListeningLink(stream, self), hello.epoch)
        self.accepted += 1
        return True
