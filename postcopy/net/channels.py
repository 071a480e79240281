# SPDX-License-Identifier: Apache-2.0
"""Connections: who may open one, and what becomes of it.

One host listens, the other one connects; which is the source does not matter. Every connection, control or data, begins
with the handshake of `protocol`. Then a control connection stays a Trio stream, while a data connection stops being
Python's business: its descriptor is detached, made blocking and handed to the core. For that to work nothing behind the
handshake may have been read, so the handshake is read with exactly as many bytes as it asks for.

**Coming back.** A migration that has lost its connection goes on, by its *reconnector*: whoever knows its id and token
and brings a higher epoch than anybody before gets its place, even while this side still believes in the old connection,
which may be half open. The side that had called calls again, at first several times a second, and at another address
when it is told one (`Route`); the side that listens does not look at where somebody calls from. What counts is not that
a connection came about but that the migration *went on* over it: who connects and then fails waits longer each time,
and is let in less often by the side that listens.

**Who is believed.** Ids are no secret (they are in logs), tokens are. A hello proves that it knows the token of the
migration that it names, and an id that is in use is nobody else's. Welcome and refusal prove it too, or decide nothing:
whoever answers at the peer's address may be anybody. What the real peer proves is that the migration is over on its
side, and how: each host remembers those that have ended with it (`Endings`) and tells those who come back later; the
side that calls can call once more only to say that (`Reconnector.announce`).

**Strangers.** A listening port will be found by port scanners, browsers and the wrong version of ourselves. Until a
peer has said a proper hello it gets `HANDSHAKE_TIMEOUT_S` and 16 KiB; at most `MAX_HALF_OPEN` may be in that state,
and one more costs the *oldest* its place, since an honest peer needs one round trip only. Whatever it does, the
listener goes on. A source that calls is in that state until its offer is there (`OFFER_TIMEOUT_S`): a hello alone is
no migration, and takes nobody's place. A data connection must know the token of a migration that is going on, which
only went over that migration's control connection.

Resource handling: a stream belongs to whoever got it last; what a `ChannelSet` has collected when it closes unused, it
closes.

Error handling: `ConfigurationError` for an address that makes no sense, `ResourceError` for one that cannot be
listened on, `PeerError` and `ProtocolError` for the other host, each naming its address.
"""

from __future__ import annotations

import abc
import contextlib
import enum
import errno
import ipaddress
import logging
import math
import os
import random
import select
import socket
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import trio

from postcopy._fd import FdHolder
from postcopy.errors import ConfigurationError, PeerError, ProtocolError, ResourceError
from postcopy.wire.protocol import (
    HEADER_BYTES,
    NO_SUCH_MIGRATION,
    PROTOCOL_VERSION,
    ClientHandshake,
    Ended,
    EndedElsewhere,
    Hello,
    Offer,
    OlderPeerError,
    RefusedError,
    Reject,
    ServerHandshake,
    decode,
    encode,
    one_line,
)

HANDSHAKE_TIMEOUT_S = 10.0
CHANNELS_TIMEOUT_S = 30.0
OFFER_TIMEOUT_S = 10.0
MAX_HALF_OPEN = 64
MAX_WAITING = 16  # control connections that nobody has taken yet
ACCEPT_PAUSE_S = 0.1
EARLY_PAUSE_S = 0.05
RECONNECT_FIRST_S, RECONNECT_CAP_S = 0.02, 0.2
"""Pauses between attempts to come back: doubled from the first to the cap, each cut at random to half or more, so that
the first page after a short cut comes within a fraction of a second."""
RECONNECT_PATIENT_AFTER_S, RECONNECT_PATIENT_CAP_S = 60.0, 2.0
"""A network that has been away for so long is asked less often."""
FREE_RETURNS = 8
"""How often a peer may come back without going on before the side that listens lets it in less often."""
LASTING_S = 0.05
"""A migration that goes on for less than this before it is lost again is not looked for at once every time: some
failures (a page that cannot be sent) come back as soon as everything is there."""
RECONNECT_ATTEMPT_S = 1.0
"""An attempt that is not answered is begun anew: the network may have come back just after the kernel asked."""
SEE_OFF_BYTES = 64 * 1024
_NO_ROOM = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})

MAX_ENDINGS = 1024
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
        self._named = address  # as the user has written it; `address` may be what that resolved to
        self._look_up = look_up
        self._changed = trio.Event()

    def change(self, address: Address) -> None:
        """From the next attempt on, which is made at once."""
        self._named = address
        if address != self.address:
            log.warning("the peer is now looked for at %s", address)
            self.address = address
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


async def connect(
    address: Address,
    hello: Hello,
    timeout_s: float = HANDSHAKE_TIMEOUT_S,
    *,
    token: bytes = b"",
    version: int = PROTOCOL_VERSION,
) -> tuple[trio.SocketStream, int]:
    """A connection on which the peer has said welcome, and the version that is spoken there: an older one than
    `version` where the peer has no newer one. `token` is that of the migration that the hello names. Every address that
    a host name has is tried.

    Bounded by `timeout_s` for the connection and again for the handshake. Cancellable. Errors: `PeerError`,
    `ProtocolError`, `ResourceError`.
    """
    while True:
        try:
            with trio.fail_after(timeout_s):
                stream = await trio.open_tcp_stream(address.host, address.port)
        except trio.TooSlowError:
            raise PeerError(f"{address}: no answer within {timeout_s:g} s") from None
        except socket.gaierror as error:
            raise PeerError(f"{address}: the name {address.host!r} cannot be resolved ({error.strerror})") from error
        except (OSError, UnicodeError, ValueError) as error:  # ValueError: a name that IDNA cannot encode
            cause = _first_cause(error)
            if isinstance(cause, OSError) and cause.errno in _NO_ROOM:
                remedy = "let it have more of them: ulimit -n" if cause.errno in (errno.EMFILE, errno.ENFILE) else ""
                raise ResourceError(f"cannot connect to {address}: {cause.strerror}", remedy) from error
            raise PeerError(f"{address}: {_connect_reason(cause)}") from error
        try:
            return await client_handshake(stream, hello, timeout_s, token=token, version=version), version
        except OlderPeerError as older:
            version = older.version  # lower each time
        except RefusedError as error:
            raise RefusedError(f"{address}: {error}", error.reason, error.code, error.proven) from error
        except (PeerError, ProtocolError) as error:
            raise type(error)(f"{address}: {error}") from error


async def client_handshake(
    stream: trio.SocketStream,
    hello: Hello,
    timeout_s: float,
    *,
    token: bytes = b"",
    version: int = PROTOCOL_VERSION,
) -> trio.SocketStream:
    """Says hello and waits for the welcome. Closes the stream unless it succeeds."""
    handshake = ClientHandshake(hello, token, version)
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


def _first_cause(error: Exception) -> BaseException:
    """What the first address said: `open_tcp_stream` wraps what each of them did."""
    cause: BaseException = error.__cause__ or error
    while isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    return cause


def _connect_reason(cause: BaseException) -> str:
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


# ---- Channel sets: how the data channels of one migration come in, on either side

ChannelKey = tuple[str, int]  # ("urgent", 3)


@dataclass(frozen=True)
class Session:
    """What a data connection must know."""

    migration: bytes
    token: bytes
    epoch: int


class Endings:
    """How the migrations have ended that were here: for peers that come back later and do not know it. The last
    `MAX_ENDINGS` of them; one for a process. Trio thread only."""

    def __init__(self, limit: int = MAX_ENDINGS) -> None:
        self._limit = limit
        self._ended: OrderedDict[bytes, tuple[bytes, Ended]] = OrderedDict()

    def remember(self, session: Session, how: Ended) -> None:
        self._ended[session.migration] = (session.token, how)
        self._ended.move_to_end(session.migration)
        while len(self._ended) > self._limit:
            self._ended.popitem(last=False)

    def find(self, migration: bytes) -> tuple[bytes, Ended] | None:
        """Its token, and how it has ended; None for one that is not known."""
        return self._ended.get(migration)

    def refusal(self, hello: Hello, version: int) -> Refusal:
        """What is to be said to somebody who asks for a migration that is not going on here (any more)."""
        known = self.find(hello.migration)
        if known is None or version < 3:
            return Refusal(NO_SUCH_MIGRATION, Code.UNKNOWN)
        token, how = known
        if not hello.is_signed(token, version):
            return Refusal(WRONG_TOKEN, Code.WRONG_TOKEN)
        return Refusal(f"the migration has ended here: {how}", how, token)


def keep_alive(fd: FdHolder, silence_s: float) -> FdHolder:
    """Lets the kernel end a data connection that has been dead for `silence_s`, idle or not (tcp(7)); passes it on."""
    handle = socket.socket(fileno=fd.fd)
    try:
        seconds = max(1, math.ceil(silence_s / 3))
        handle.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        handle.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, seconds)
        handle.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, seconds)
        handle.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2)
        handle.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, math.ceil(silence_s * 1000))
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOPROTOOPT):  # of a socket that is no TCP connection
            raise
    finally:
        handle.detach()  # the descriptor stays its holder's
    return fd


class Reconnector(abc.ABC):
    """A migration's place among the connections of this host, kept while it has none.

    It can be *held*, by whoever operates it: the connection is then given up and none is made or let in, until it is
    let go again. The other side finds that somebody is there who does not take it back yet, and asks again.
    """

    def __init__(self) -> None:
        self.answered = trio.Event()  # set when the peer is there, and only does not take us back now; may be replaced
        self._held = False
        self._changed = trio.Event()
        self._went_on_s = math.inf

    def went_on(self) -> None:
        """The migration goes on over the connection that `next_link` gave: the next loss is a new one, and is not made
        to wait for what failed before; but for a little, where this does not last. To be said when a recovery has
        succeeded."""
        self._went_on_s = trio.current_time()

    def _has_lasted(self) -> bool:
        """At a loss: whether it had gone on for a while since this was asked before."""
        went_on_s, self._went_on_s = self._went_on_s, math.inf
        return trio.current_time() - went_on_s >= LASTING_S

    def ended(self, how: Ended) -> None:  # noqa: B027  (only who is asked has to remember it)
        """The migration is over here: whoever comes back for it from now on is told how, and not let in. To be said
        before the reconnector ends; the last word counts."""

    async def announce(self, how: Ended) -> None:
        """Tells the peer that it is over here, where it would not come and ask: on the side that calls. Tries as long
        as it takes; returns when the peer has heard it or has ended it itself, and at once on the side that listens,
        which is asked. After `ended`. Cancellable."""
        await trio.lowlevel.checkpoint()

    def is_paused(self) -> bool:
        return self._held

    def pause(self) -> None:
        """Gives the connection up and makes no other one until `recover`."""
        self._held = True
        self._notify()

    def recover(self) -> None:
        """Looks for the peer (again), now."""
        self._held = False
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    @abc.abstractmethod
    async def next_link(self) -> tuple[Link, Session]:
        """The next connection with the same peer, and the session with its epoch. Waits as long as it takes;
        cancellable. `EndedElsewhere` when the peer has proven to be there and to have ended it; a refusal that proves
        nothing is no reason to end the wait."""

    @abc.abstractmethod
    async def superseded(self) -> None:
        """Returns when `next_link` has something although the present connection has not ended. `PeerError` when it is
        to be given up since the reconnector is held."""


class ChannelSet(abc.ABC):
    """Open it before the peer can know the session, since the peer may be faster than our next line."""

    @abc.abstractmethod
    async def channels(self, shards: int, bulk_channels: int) -> dict[ChannelKey, FdHolder]:
        """All data channels, within `CHANNELS_TIMEOUT_S`. Called once; the descriptors are the caller's."""


class Link(abc.ABC):
    """A control connection that has been welcomed, and the way to more connections with the same peer."""

    def __init__(self, control: trio.SocketStream, peer: Address, version: int = PROTOCOL_VERSION) -> None:
        """`version` of the protocol is what is spoken on it, and on all that belong to it."""
        self.control = control
        self.peer = peer
        self.version = version

    def reconnect_to(self, address: Address) -> None:
        """When the connection is lost (or has been), the peer is looked for there. `ConfigurationError` on the side
        that listens: it takes the peer from wherever it comes."""
        raise ConfigurationError(f"this side listens; tell the other one to connect to {address} or wherever this is")

    @abc.abstractmethod
    def channel_set(self, session: Session) -> contextlib.AbstractContextManager[ChannelSet]:
        """Lets data channels of `session` come in as long as the block lasts. `PeerError` for an id that is in use."""

    @abc.abstractmethod
    def reconnector(self, session: Session) -> contextlib.AbstractContextManager[Reconnector]:
        """Keeps the way open for the peer, or to it, as long as the block lasts. `PeerError` for the id of a migration
        that is going on here, or was."""


def _keys(shards: int, bulk_channels: int) -> list[ChannelKey]:
    return [("urgent", shard) for shard in range(shards)] + [("bulk", number) for number in range(bulk_channels)]


class CallingLink(Link):
    """We have connected, so we open the data channels too."""

    def __init__(self, control: trio.SocketStream, route: Route, asked: Address, side: str, version: int) -> None:
        """`asked`: the address of the route that has answered."""
        super().__init__(control, address_of(control), version)
        self._route = route
        self._side = side
        route.answered(asked, self.peer)

    @classmethod
    async def open(cls, where: Address | Route, side: str) -> CallingLink:
        """Connects to a listening peer. `side` is what we are: ``source`` or ``dest``."""
        route = where if isinstance(where, Route) else Route(where)
        asked = route.address
        stream, version = await connect(asked, Hello("control", side, 0, b"", 0))
        try:
            return cls(stream, route, asked, side, version)
        except PeerError:
            await trio.aclose_forcefully(stream)
            raise

    def reconnect_to(self, address: Address) -> None:
        self._route.change(address)

    @contextlib.contextmanager
    def channel_set(self, session: Session) -> Iterator[ChannelSet]:
        yield _CallingChannelSet(self.peer, self._side, session, self.version)

    @contextlib.contextmanager
    def reconnector(self, session: Session) -> Iterator[Reconnector]:
        yield _CallingReconnector(self._route, self._side, session, self.version)


class Sparing:
    """For log lines that may come again and again: the first at once, then one after a second, two, four, up to a
    minute; from the beginning after a minute without."""

    def __init__(self) -> None:
        self._next_s = -math.inf
        self._pause_s = 0.0

    def due(self) -> bool:
        now_s = trio.current_time()
        if now_s < self._next_s:
            return False
        self._pause_s = 1.0 if now_s > self._next_s + 60 else min(2 * self._pause_s, 60.0)
        self._next_s = now_s + self._pause_s
        return True


class _CallingReconnector(Reconnector):
    def __init__(self, route: Route, side: str, session: Session, version: int) -> None:
        super().__init__()
        self._route = route
        self._side = side
        self._session = session
        self._version = version
        self._pause_s = 0.0  # before the next attempt
        self._lost_s = math.inf  # when the search began
        self._spare = Sparing()

    def went_on(self) -> None:
        super().went_on()
        self._pause_s = min(self._pause_s, RECONNECT_CAP_S)
        self._lost_s = math.inf

    def recover(self) -> None:
        super().recover()
        self._route.wake()

    async def next_link(self) -> tuple[Link, Session]:
        if self._has_lasted():
            self._pause_s, self._spare = 0.0, Sparing()
        self._route.refresh()
        while True:
            await self._pause()
            found = await self._attempt()
            if found is not None:
                stream, asked, session = found
                try:
                    link = CallingLink(stream, self._route, asked, self._side, self._version)
                except PeerError:
                    stream.socket.close()
                    continue
                # Whether that was a success is not known yet: see `went_on`.
                self._pause_s = min(max(2 * self._pause_s, RECONNECT_FIRST_S), RECONNECT_PATIENT_CAP_S)
                return link, session

    async def announce(self, how: Ended) -> None:
        if self._version < 3:
            return  # it could not be understood
        with contextlib.suppress(EndedElsewhere):
            while True:
                await self._pause()
                if (found := await self._attempt(how)) is not None:
                    found[0].socket.close()
                    return

    async def _pause(self) -> None:
        """Until the next attempt is due."""
        now_s = trio.current_time()
        self._lost_s = min(self._lost_s, now_s)
        if self._pause_s and await self._route.pause(self._pause_s * random.uniform(0.5, 1)):
            self._pause_s, self._lost_s, self._spare = 0.0, trio.current_time(), Sparing()
        while self.is_paused():
            await self._changed.wait()

    async def _attempt(self, how: Ended | None = None) -> tuple[trio.SocketStream, Address, Session] | None:
        """One call, and the pause that follows it when nobody has answered. `EndedElsewhere`."""
        # Each attempt has an epoch of its own: one that was lost on its way must not be taken for the next one.
        session = self._session = replace(self._session, epoch=self._session.epoch + 1)
        hello = Hello("control", self._side, 0, session.migration, session.epoch, how or "")
        asked = self._route.address
        try:
            stream, _ = await connect(asked, hello, RECONNECT_ATTEMPT_S, token=session.token, version=self._version)
            if not self.is_paused() or how is not None:
                return stream, asked, session
            stream.socket.close()
        except (PeerError, ProtocolError, ResourceError) as error:
            if isinstance(error, RefusedError) and error.ended is not None:
                raise EndedElsewhere(error.ended, str(error)) from error
            # Anybody may answer there: whatever else is said decides nothing.
            if isinstance(error, RefusedError) and error.proven:
                self.answered.set()
            if self._spare.due():
                answered = isinstance(error, RefusedError) and error.reason != HELD
                level = logging.WARNING if answered else logging.INFO
                log.log(level, "not connected again yet: %s%s", error, "; is that the right address?" * answered)
        patient = trio.current_time() - self._lost_s > RECONNECT_PATIENT_AFTER_S
        cap_s = RECONNECT_PATIENT_CAP_S if patient else max(RECONNECT_CAP_S, self._pause_s)
        self._pause_s = min(max(2 * self._pause_s, RECONNECT_FIRST_S), cap_s)
        return None

    async def superseded(self) -> None:
        while not self.is_paused():  # nobody but this side connects
            await self._changed.wait()
        raise PeerError(HELD)


class _CallingChannelSet(ChannelSet):
    def __init__(self, peer: Address, side: str, session: Session, version: int) -> None:
        self._peer = peer
        self._side = side
        self._session = session
        self._version = version

    async def channels(self, shards: int, bulk_channels: int) -> dict[ChannelKey, FdHolder]:
        opened: dict[ChannelKey, FdHolder] = {}
        session = self._session
        try:
            with trio.fail_after(CHANNELS_TIMEOUT_S):
                for kind, index in _keys(shards, bulk_channels):
                    hello = Hello(kind, self._side, index, session.migration, session.epoch)
                    stream, _ = await connect(self._peer, hello, token=session.token, version=self._version)
                    opened[kind, index] = detach(stream)
        except BaseException as error:
            for fd in opened.values():
                fd.close()
            if isinstance(error, trio.TooSlowError):
                raise PeerError(f"{self._peer}: the data channels took more than {CHANNELS_TIMEOUT_S:g} s") from None
            raise
        return opened


# ---- The listening side


class Code(enum.StrEnum):
    """What a refusal is about, for programs. Beside these there are those of `Ended`, when they are proven."""

    SAME_SIDE = "same-side"
    BUSY = "busy"
    UNKNOWN = "unknown"
    WRONG_TOKEN = "wrong-token"
    STALE_EPOCH = "stale-epoch"
    NO_CHANNEL = "no-channel"
    HELD = "held"
    TOO_OFTEN = "too-often"
    MALFORMED = "malformed"


class Refusal(Exception):
    """Why a hello is not welcome; the peer is told. With `token` it is proven to come from the peer."""

    def __init__(self, reason: str, code: Code | Ended, token: bytes = b"") -> None:
        super().__init__(reason)
        self.code = code
        self.token = token


class _ListeningChannelSet(ChannelSet):
    def __init__(self, session: Session, peer: Address, version: int) -> None:
        self.session = session
        self._version = version
        self._peer = peer
        self._wanted: set[ChannelKey] | None = None  # unknown until the destination has said how many shards it has
        self._reserved: set[ChannelKey] = set()
        self._arrived: dict[ChannelKey, FdHolder] = {}
        self._changed = trio.Event()

    def reserve(self, hello: Hello, version: int) -> ChannelKey:
        _check_token(self.session, self._version, hello, version)
        if hello.epoch != self.session.epoch:
            raise Refusal(f"stale epoch {hello.epoch}, this is {self.session.epoch}", Code.STALE_EPOCH)
        key = (hello.channel, hello.index)
        if self._wanted is not None and key not in self._wanted:
            raise Refusal(f"this migration has no {hello.channel} channel {hello.index}", Code.NO_CHANNEL)
        if key in self._reserved:
            raise Refusal(f"{hello.channel} channel {hello.index} is connected already", Code.NO_CHANNEL)
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


def _check_token(session: Session, spoken: int, hello: Hello, version: int) -> None:
    """`spoken`: the version of the migration, which its peer does not change."""
    if version != spoken or not hello.is_signed(session.token, version):
        raise Refusal(WRONG_TOKEN, Code.WRONG_TOKEN)


class _ListeningReconnector(Reconnector):
    def __init__(self, session: Session, version: int, endings: Endings) -> None:
        super().__init__()
        self.session = session
        self._version = version
        self._endings = endings
        self._links: list[tuple[Link, Session]] = []
        self._over = False  # for us: see `Endings`
        self._ended: Ended | None = None  # as the peer has come to say
        self._returns = 0  # since it went on
        self._next_s = -math.inf  # from when on it may come again

    def went_on(self) -> None:
        super().went_on()
        # (a little less patient than the side that calls, which has such a pause too)
        self._returns = min(self._returns, FREE_RETURNS + 3)
        self._next_s = -math.inf

    def ended(self, how: Ended) -> None:
        self._endings.remember(self.session, how)
        self._over = True
        self.close()

    def is_over(self) -> bool:
        return self._over

    def reserve(self, hello: Hello, version: int) -> None:
        """`Refusal` unless the peer may come back with this. From here on its epoch is used up."""
        _check_token(self.session, self._version, hello, version)
        token = self.session.token  # which it knows, so that it is told with a proof who refuses
        if hello.epoch <= self.session.epoch:
            raise Refusal(f"stale epoch {hello.epoch}, this is {self.session.epoch}", Code.STALE_EPOCH, token)
        if hello.ended:
            self.session = replace(self.session, epoch=hello.epoch)
            return
        if self._over:
            raise self._endings.refusal(hello, version)
        if self._ended is not None:  # nobody waits for it any more
            raise Refusal(f"you have said that the migration has ended there: {self._ended}", Code.UNKNOWN, token)
        if self.is_paused():
            raise Refusal(HELD, Code.HELD, token)
        if self._has_lasted():
            self._returns = 0
        now_s = trio.current_time()
        if now_s < self._next_s:
            raise Refusal("came back too often without going on", Code.TOO_OFTEN, token)
        self._returns += 1
        if self._returns > FREE_RETURNS:
            pause_s = RECONNECT_FIRST_S * 2 ** min(self._returns - FREE_RETURNS, 20)
            self._next_s = now_s + min(pause_s, RECONNECT_PATIENT_CAP_S) / 2  # as often as we would call ourselves
        self.session = replace(self.session, epoch=hello.epoch)

    def enter(self, link: Link, epoch: int) -> None:
        self.close()
        self._links = [(link, replace(self.session, epoch=epoch))]
        self._notify()

    def heard(self, how: Ended) -> None:
        """The peer has come to say that it is over there."""
        self.close()
        self._ended = how
        self._notify()

    def pause(self) -> None:
        self.close()  # one that has just come may come again
        super().pause()

    async def next_link(self) -> tuple[Link, Session]:
        while not self._links:
            if self._ended is not None:
                raise EndedElsewhere(self._ended)
            await self._changed.wait()
        return self._links.pop()

    async def superseded(self) -> None:
        while not self._links and self._ended is None:
            if self.is_paused():
                raise PeerError(HELD)
            await self._changed.wait()

    def close(self) -> None:
        for link, _ in self._links:
            link.control.socket.close()
        self._links.clear()


class _ListeningLink(Link):
    def __init__(self, control: trio.SocketStream, acceptor: Acceptor, version: int) -> None:
        super().__init__(control, address_of(control), version)
        self._acceptor = acceptor

    @contextlib.contextmanager
    def channel_set(self, session: Session) -> Iterator[ChannelSet]:
        channel_sets = self._acceptor.channel_sets
        if session.migration in channel_sets:
            raise PeerError(f"{self.peer}: the migration {session.migration.hex()} is in use here")
        channel_set = channel_sets[session.migration] = _ListeningChannelSet(session, self.peer, self.version)
        try:
            yield channel_set
        finally:
            del channel_sets[session.migration]  # ours, since nobody else gets it meanwhile
            channel_set.close()

    @contextlib.contextmanager
    def reconnector(self, session: Session) -> Iterator[Reconnector]:
        members, endings = self._acceptor.reconnectors, self._acceptor.endings
        if session.migration in members or endings.find(session.migration) is not None:
            raise PeerError(f"{self.peer}: the migration {session.migration.hex()} is in use here, or was")
        reconnector = members[session.migration] = _ListeningReconnector(session, self.version, endings)
        try:
            yield reconnector
        finally:
            del members[session.migration]
            reconnector.close()


class Acceptor:
    """A listening side: welcomes control connections as long as somebody takes them, and sends data connections to the
    channel_set of their migration.

    Statistics: `accepted`, `refused`, `strangers` count connections by what became of them.
    """

    def __init__(
        self,
        side: str,
        listeners: list[trio.SocketListener],
        why_refused: Callable[[int], str],
        endings: Endings | None = None,
    ) -> None:
        """`why_refused` is asked for each control connection, at its hello and, where it has to offer something, when
        the offer is there; with the number of those that nobody has taken yet. Empty to let it in, else the reason why
        not. Who takes one (`next_link`) has to count it from then on, before anything else happens.

        `endings` is what this process remembers."""
        self.endings = endings if endings is not None else Endings()
        self.channel_sets: dict[bytes, _ListeningChannelSet] = {}
        self.reconnectors: dict[bytes, _ListeningReconnector] = {}
        self.accepted = self.refused = self.bad_handshakes = 0
        # Where it listens, or has: with port 0 the port that the system chose.
        self.addresses = [
            Address(str(name[0]), int(name[1])) for name in (one.socket.getsockname() for one in listeners)
        ]
        self._side = side
        self._listeners = listeners
        self._why_refused = why_refused
        self._waiting = 0
        self._half_open: dict[object, trio.CancelScope] = {}  # oldest first
        self._spare = Sparing()  # whoever can connect could fill the log
        self._send_link, self._links = trio.open_memory_channel[Link](MAX_WAITING)

    @classmethod
    async def open(
        cls, address: Address, side: str, why_refused: Callable[[int], str], endings: Endings | None = None
    ) -> Acceptor:
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
        return cls(side, listeners, why_refused, endings)

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
        spare = Sparing()
        while True:
            try:
                stream = await listener.accept()
            except OSError as error:
                if error.errno not in _NO_ROOM:
                    raise
                if spare.due():
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
                taken = await self._handshake(stream, peer, scope)
            if scope.cancelled_caught:
                raise PeerError("no complete handshake in time")
        except (PeerError, ProtocolError) as error:
            self.bad_handshakes += 1
            if self._spare.due():
                log.warning("%s: %s", peer, error)
        except trio.BrokenResourceError as error:
            self.bad_handshakes += 1
            if self._spare.due():
                log.warning("%s: the connection broke during the handshake%s", peer, _cause(error))
        except Exception:  # a mistake of ours: whoever is here already does not pay for it
            log.exception("%s: cannot be greeted", peer)
        finally:
            self._half_open.pop(key, None)
            if not taken:
                stream.socket.close()

    async def _handshake(self, stream: trio.SocketStream, peer: str, scope: trio.CancelScope) -> bool:
        handshake = ServerHandshake()
        answered = False
        try:
            while wanted := handshake.wanted():
                handshake.receive_data(await stream.receive_some(wanted))
                if handshake.heard and not answered:
                    answered = True
                    await stream.send_all(handshake.send_preamble())
                if handshake.newer:
                    return await self._see_off(stream)
        except ProtocolError as error:
            with contextlib.suppress(trio.BrokenResourceError):
                preamble = b"" if answered else handshake.send_preamble()
                await stream.send_all(preamble + handshake.send_refused(str(error), Code.MALFORMED))
            raise
        hello = handshake.hello
        assert hello is not None
        try:
            if hello.side == self._side:
                sides = "sources" if hello.side == "source" else "destinations"
                raise Refusal(f"both hosts are {sides}", Code.SAME_SIDE)
            if hello.channel == "control":
                if hello.epoch or hello.migration:
                    return await self._greet_again(stream, handshake, hello)
                return await self._greet_first(stream, handshake, scope)
            return await self._greet_data(stream, handshake, hello)
        except Refusal as refusal:
            self.refused += 1
            if refusal.code not in (Code.HELD, Code.TOO_OFTEN) and self._spare.due():  # those ask again and again
                log.warning("%s: refused a %s connection: %s", peer, hello.channel, refusal)
            await stream.send_all(handshake.send_refused(str(refusal), refusal.code, refusal.token))
            return False

    async def _see_off(self, stream: trio.SocketStream) -> bool:
        """Waits until the peer hangs up, for as long as a handshake may take. Closed with something unread in it the
        connection would be reset, and our answer might be lost with it."""
        left = SEE_OFF_BYTES
        while left > 0 and (data := await stream.receive_some(SEE_OFF_BYTES)):
            left -= len(data)
        return False

    async def _greet_data(self, stream: trio.SocketStream, handshake: ServerHandshake, hello: Hello) -> bool:
        channel_set = self.channel_sets.get(hello.migration)
        if channel_set is None:
            raise self.endings.refusal(hello, handshake.version)
        place = channel_set.reserve(hello, handshake.version)
        try:
            await stream.send_all(handshake.send_welcome(channel_set.session.token))
        except BaseException:
            channel_set.release(place)
            raise
        if self.channel_sets.get(hello.migration) is not channel_set:
            return False  # closed while we said welcome
        channel_set.enter(place, stream)
        self.accepted += 1
        return True

    async def _greet_first(
        self, stream: trio.SocketStream, handshake: ServerHandshake, scope: trio.CancelScope
    ) -> bool:
        def find_place() -> str:
            return self._why_refused(self._waiting) or ("too many are waiting" if self._waiting >= MAX_WAITING else "")

        if reason := find_place():
            raise Refusal(reason, Code.BUSY)
        if self._side == "source":  # the destination waits for us now
            self._waiting += 1  # now: while we say welcome, the next one may ask for the same place
            try:
                await stream.send_all(handshake.send_welcome())
                link = _ListeningLink(stream, self, handshake.version)
            except BaseException:
                self._waiting -= 1
                raise
        else:
            await stream.send_all(handshake.send_welcome())
            scope.deadline = trio.current_time() + OFFER_TIMEOUT_S
            await _until_offered(stream, handshake.version)
            link = _ListeningLink(stream, self, handshake.version)
            if reason := find_place():  # somebody was faster
                self.refused += 1
                await stream.send_all(encode(Reject(reason), handshake.version))
                await stream.send_eof()
                return await self._see_off(stream)
            self._waiting += 1
        self._send_link.send_nowait(link)
        self.accepted += 1
        return True

    async def _greet_again(self, stream: trio.SocketStream, handshake: ServerHandshake, hello: Hello) -> bool:
        member = self.reconnectors.get(hello.migration)
        if member is None:
            raise self.endings.refusal(hello, handshake.version)
        member.reserve(hello, handshake.version)
        if hello.ended:
            member.heard(Ended(hello.ended))
            await stream.send_all(handshake.send_welcome(member.session.token))
            return False
        await stream.send_all(handshake.send_welcome(member.session.token))
        # Somebody with a higher epoch may have come while we said welcome, and the migration may have ended or be held.
        gone = self.reconnectors.get(hello.migration) is not member or member.is_over()
        if gone or member.session.epoch != hello.epoch or member.is_paused():
            return False
        member.enter(_ListeningLink(stream, self, handshake.version), hello.epoch)
        self.accepted += 1
        return True


async def _until_offered(stream: trio.SocketStream, version: int) -> None:
    """Until a source has said all of its offer, without taking a byte of it. `PeerError` when it hangs up, or says
    something else first: a sign of life takes no place either."""
    handle = stream.socket
    due = HEADER_BYTES
    try:
        while True:
            # The kernel calls it readable when so much is there, or when no more will come.
            handle.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, due)
            await trio.lowlevel.wait_readable(handle)
            try:
                there = await handle.recv(due, socket.MSG_PEEK)
            except OSError as error:
                raise PeerError(f"the connection broke before anything was offered ({error.strerror})") from error
            if len(there) < due:
                if _hung_up(handle):
                    raise PeerError("hung up before anything was offered")
                await trio.sleep(EARLY_PAUSE_S)  # the kernel is short of memory for sockets, and says so early
                continue
            length = int.from_bytes(there[:4], "big")
            if length > Offer.MAX_BYTES:
                return  # which is the protocol's business
            if due == HEADER_BYTES + length:
                break
            due = HEADER_BYTES + length
    finally:
        handle.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
    with contextlib.suppress(ProtocolError):  # as above
        said = decode(there[HEADER_BYTES:], version)
        if not isinstance(said, Offer):
            raise PeerError(f"began with {said.TYPE}, not with an offer")


def _hung_up(handle: trio.socket.SocketType) -> bool:
    poll = select.poll()
    poll.register(handle.fileno(), select.POLLRDHUP)
    return bool(poll.poll(0))
