# SPDX-License-Identifier: Apache-2.0
"""The side that listens: who may open a connection, and what becomes of it.

A listening port will be found by port scanners, browsers and other versions of postcopy. Until a peer has said a proper
hello it gets `HANDSHAKE_TIMEOUT_S` and 16 KiB; at most `MAX_HALF_OPEN` may be in that state. One more costs the oldest
its place, of the host that has the most of them: an honest peer needs few round trips only, and no host may take the
places of the others. A source that calls is in that state until its offer is there (`OFFER_TIMEOUT_S`): a hello alone
takes no place. A data connection has to prove the token of a migration that is going on. Whatever a peer does, the
listener goes on.

With TLS nothing is said before both sides know each other's certificate, and what a hello asks for must be allowed to
the peer by its name. A peer that speaks without TLS is told so.

Resource handling: a stream belongs to the one that got it last: the acceptor, a channel set, a reconnector, or the
caller of `next_link`. `close` ends the listeners; a control connection that was not taken is closed when `serve` ends.

Error handling: `ResourceError` for an address that cannot be listened on. What a peer does wrong is counted and logged.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import trio

from postcopy.errors import PeerError, PostcopyError, ProtocolError
from postcopy.net.addresses import Address
from postcopy.net.backoff import LogLimit
from postcopy.net.connecting import DOES, HANDSHAKE_TIMEOUT_S, broken
from postcopy.net.endings import Code, Endings, Refusal, Session
from postcopy.net.link import Link, OpenChannels, Reconnector, Stream, identity
from postcopy.net.listening import ListeningChannelSet, ListeningReconnector
from postcopy.net.protection import LOCAL, Protection
from postcopy.net.sockets import accept_from, address_of, listening_addresses, open_listeners
from postcopy.tls import Action, TlsError, TlsStream
from postcopy.wire import HEADER_BYTES, Ended, Hello, Offer, Reject, ServerHandshake, decode, encode, one_line

log = logging.getLogger(__name__)

OFFER_TIMEOUT_S = 10.0
MAX_HALF_OPEN = 256
MAX_WAITING = 16  # control connections that were not taken yet
UNREAD_BYTES = 64 * 1024
TLS_RECORD = b"\x16"  # what a TLS client begins with
NO_TLS = "this host takes connections under TLS only: give --tls DIR on both hosts"


@dataclass(frozen=True)
class Asking:
    """Of a peer that would open a control connection."""

    identity: str  # see `Link.identity`
    waiting: Sequence[str]  # the identities of those that were let in, and not taken yet


class ListeningLink(Link):
    def __init__(self, control: Stream, acceptor: Acceptor, version: int, received: bytes = b"") -> None:
        super().__init__(control, address_of(control), version, received)
        self._acceptor = acceptor

    @contextlib.contextmanager
    def channel_set(self, session: Session) -> Iterator[OpenChannels]:
        channel_sets = self._acceptor.channel_sets
        if session.migration in channel_sets:
            raise PeerError(f"{self.peer}: the migration {session.migration.hex()} is in use here")
        channel_set = channel_sets[session.migration] = ListeningChannelSet(session, self.peer, self.version)
        try:
            yield channel_set.channels
        finally:
            del channel_sets[session.migration]  # ours, since the id was in use meanwhile
            channel_set.close()

    @contextlib.contextmanager
    def reconnector(self, session: Session) -> Iterator[Reconnector]:
        reconnectors, endings = self._acceptor.reconnectors, self._acceptor.endings
        if session.migration in reconnectors or endings.find(session.migration) is not None:
            raise PeerError(f"{self.peer}: the migration {session.migration.hex()} is in use here, or was")
        reconnector = reconnectors[session.migration] = ListeningReconnector(session, self.version, endings)
        try:
            yield reconnector
        finally:
            del reconnectors[session.migration]
            reconnector.close()


class Acceptor:
    """A listening side: welcomes control connections as long as they are taken, and sends data connections to the
    channel set of their migration.

    Statistics: `accepted`, `refused`, `bad_handshakes` count connections by what became of them; `unauthorised`, of
    those that were refused, the ones whose certificate is not that of a peer which may do this here.
    """

    def __init__(
        self,
        side: str,
        listeners: list[trio.SocketListener],
        why_refused: Callable[[Asking], str],
        endings: Endings | None = None,
        instance: bytes = b"",
        protection: Protection = LOCAL,
    ) -> None:
        """`why_refused` is asked for each control connection, at its hello and, where it has to offer something, when
        the offer is there. Empty to let it in, else the reason why not. The caller of `next_link` has to count what it
        takes from then on, before anything else happens.

        `endings` is what this process remembers. `instance`: the random number by which a process that calls, too
        (`CallingLink.open`), knows that it has called itself."""
        self.endings = endings if endings is not None else Endings()
        self.channel_sets: dict[bytes, ListeningChannelSet] = {}
        self.reconnectors: dict[bytes, ListeningReconnector] = {}
        self.accepted = self.refused = self.bad_handshakes = self.unauthorised = 0
        # Where it listens, or has: with port 0 the port that the system chose.
        self.addresses = listening_addresses(listeners)
        self._side = side
        self._instance = instance
        self._listeners = listeners
        self._why_refused = why_refused
        self._credentials = protection.credentials
        self._waiting: list[str] = []  # identities
        self._half_open: dict[trio.CancelScope, str] = {}  # oldest first, and the host of each
        self._silent: set[trio.CancelScope] = set()  # those of them that have said nothing yet since TLS was agreed on
        self._log_limit = LogLimit()  # any host that can connect could fill the log
        self._refusal_log_limit = LogLimit()  # of peers with a certificate, which no others keep out of the log
        self._send_link, self._links = trio.open_memory_channel[Link](MAX_WAITING)

    @classmethod
    async def open(
        cls,
        address: Address,
        side: str,
        why_refused: Callable[[Asking], str],
        endings: Endings | None = None,
        instance: bytes = b"",
        protection: Protection = LOCAL,
    ) -> Acceptor:
        """Listens on every address that the host name has. `ResourceError` when that is not possible,
        `ConfigurationError` for an address that `protection` does not allow, and for its certificates."""
        await protection.load(listens=True)
        return cls(side, await open_listeners(address, protection), why_refused, endings, instance, protection)

    async def next_link(self) -> Link:
        """The next control connection, the caller's from then on."""
        link = await self._links.receive()
        self._waiting.remove(link.identity)
        return link

    async def serve(self) -> None:
        """Accepts connections until cancelled, then closes those that were not taken."""
        try:
            async with trio.open_nursery() as nursery:
                await accept_from(
                    self._listeners, "a connection", lambda stream: nursery.start_soon(self._greet, stream)
                )
        finally:
            while True:  # control connections that were not taken
                try:
                    link = self._links.receive_nowait()
                except trio.WouldBlock:
                    break
                link.control.socket.close()
                self._waiting.remove(link.identity)

    async def close(self) -> None:
        """Stops listening. `serve` must have ended."""
        for listener in self._listeners:
            await listener.aclose()

    async def _greet(self, stream: trio.SocketStream) -> None:
        """One connection from its first byte until it is taken. Never raises, whatever the peer does."""
        peer = "a peer that left at once"
        taken = False
        scope = trio.CancelScope()
        try:
            address = address_of(stream)
            peer = str(address)
            if len(self._half_open) >= MAX_HALF_OPEN:
                self._give_up_one()
            self._half_open[scope] = address.network
            scope.deadline = trio.current_time() + HANDSHAKE_TIMEOUT_S
            with scope:
                taken = await self._secure(stream, peer, scope)
            if scope.cancelled_caught:
                raise PeerError("no complete handshake in time")
        except (PeerError, ProtocolError, trio.BrokenResourceError) as error:
            self.bad_handshakes += 1
            if self._log_limit.due():
                log.warning("%s: %s", peer, broken(error) if isinstance(error, trio.BrokenResourceError) else error)
        except PostcopyError as error:  # of this host: it has no memory, for instance
            if self._log_limit.due():
                log.error("%s: cannot be greeted: %s", peer, error)
        except Exception:  # a mistake of ours, which must not end other connections
            log.exception("%s: cannot be greeted", peer)
        finally:
            self._half_open.pop(scope, None)
            self._silent.discard(scope)
            if not taken:
                stream.socket.close()

    def _give_up_one(self) -> None:
        """Of the host that has the most: first one that its peer has begun before it needs it, and begins again. A host
        whose machines all recover at once has many of these, and no attempt is lost with one."""
        [(greedy, _)] = Counter(self._half_open.values()).most_common(1)
        its = [scope for scope, host in self._half_open.items() if host == greedy]
        oldest = next((scope for scope in its if scope in self._silent), its[0])
        del self._half_open[oldest]
        oldest.cancel()

    async def _secure(self, plain: trio.SocketStream, peer: str, scope: trio.CancelScope) -> bool:
        """TLS, where that is what is spoken here; then the handshake."""
        if self._credentials is None:
            return await self._handshake(plain, peer, scope)
        first = TLS_RECORD
        with contextlib.suppress(OSError):  # a connection that is broken: see below
            first = await plain.socket.recv(1, trio.socket.MSG_PEEK) or TLS_RECORD
        if first != TLS_RECORD:
            return await self._handshake(plain, peer, scope)  # which tells it, and no more
        try:
            stream = await self._credentials.accept(plain)
        except TlsError:
            # Its end is waited for, so that it gets our alert; but what was wrong is logged also where none comes.
            deadline, scope.deadline = scope.deadline, math.inf
            with trio.move_on_at(deadline), contextlib.suppress(trio.BrokenResourceError):
                await self._wait_for_end(plain)
            raise
        self._silent.add(scope)
        return await self._handshake(stream, peer, scope)

    def _check_authorised(self, stream: Stream, hello: Hello) -> None:
        """`Refusal` unless the peer may do this here, by its certificate."""
        if self._credentials is None:
            return
        if not isinstance(stream, TlsStream):
            raise Refusal(NO_TLS, Code.TLS_NEEDED)
        action: Action = "send" if hello.side == "source" else "take"
        if not self._credentials.authorisation.allows(action, stream.peer):
            self.unauthorised += 1
            known_as = one_line(stream.peer.known_as, 300)
            raise Refusal(f"{known_as} may not {DOES[action]}: --tls-authz does not name it", Code.UNAUTHORISED)

    async def _handshake(self, stream: Stream, peer: str, scope: trio.CancelScope) -> bool:
        handshake = ServerHandshake()
        answered = False
        try:
            while wanted := handshake.wanted():
                handshake.receive_data(await stream.receive_some(wanted))
                self._silent.discard(scope)
                if handshake.has_preamble and not answered:
                    answered = True
                    await stream.send_all(handshake.send_preamble())
                if handshake.newer:
                    return await self._wait_for_end(stream)
        except ProtocolError as error:
            with contextlib.suppress(trio.BrokenResourceError):
                preamble = b"" if answered else handshake.send_preamble()
                await stream.send_all(preamble + handshake.send_refused(str(error), Code.MALFORMED))
            raise
        hello = handshake.hello
        assert hello is not None
        try:
            self._check_authorised(stream, hello)
            if hello.side == self._side:
                sides = "sources" if hello.side == "source" else "destinations"
                raise Refusal(f"both hosts are {sides}", Code.SAME_SIDE)
            if hello.channel == "control":
                if hello.epoch or hello.migration:
                    return await self._greet_returning(stream, handshake, hello)
                if self._instance and hello.instance == self._instance:
                    raise Refusal("this address is this daemon itself", Code.ITSELF)
                return await self._greet_first(stream, handshake, scope)
            return await self._greet_data(stream, handshake, hello)
        except Refusal as refusal:
            self.refused += 1
            # (The first two ask again and again; the last one is reported by the caller.)
            limit = self._refusal_log_limit if isinstance(stream, TlsStream) else self._log_limit
            if refusal.code not in (Code.PAUSED, Code.TOO_OFTEN, Code.ITSELF) and limit.due():
                log.warning("%s: %s connection refused: %s", peer, hello.channel, refusal)
            await stream.send_all(handshake.send_refused(str(refusal), refusal.code, refusal.token))
            if isinstance(refusal.code, Ended):  # proven to a peer that has proven itself
                await self._wait_for_end(stream)
                self.endings.note_told(hello.migration)
            return False

    async def _wait_for_end(self, stream: Stream) -> bool:
        """Waits until the peer hangs up, for as long as a handshake may take. Closed with something unread in it the
        connection would be reset, and our answer might be lost with it."""
        left = UNREAD_BYTES
        while left > 0 and (data := await stream.receive_some(UNREAD_BYTES)):
            left -= len(data)
        return False

    async def _greet_data(self, stream: Stream, handshake: ServerHandshake, hello: Hello) -> bool:
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

    async def _greet_first(self, stream: Stream, handshake: ServerHandshake, scope: trio.CancelScope) -> bool:
        who = identity(stream.peer if isinstance(stream, TlsStream) else None, address_of(stream))

        def why_refused() -> str:
            reason = self._why_refused(Asking(who, self._waiting))
            return reason or ("too many are waiting" if len(self._waiting) >= MAX_WAITING else "")

        if reason := why_refused():
            raise Refusal(reason, Code.BUSY)
        if self._side == "source":  # the destination waits for us now
            self._waiting.append(who)  # now: while we say welcome, the next one may ask for the same place
            try:
                await stream.send_all(handshake.send_welcome())
                link = ListeningLink(stream, self, handshake.version)
            except BaseException:
                self._waiting.remove(who)
                raise
        else:
            await stream.send_all(handshake.send_welcome())
            scope.deadline = trio.current_time() + OFFER_TIMEOUT_S
            offer = await _receive_offer(stream, handshake.version)
            link = ListeningLink(stream, self, handshake.version, offer)
            if reason := why_refused():  # another one was faster
                self.refused += 1
                await stream.send_all(encode(Reject(reason), handshake.version))
                await stream.send_eof()
                return await self._wait_for_end(stream)
            self._waiting.append(who)
        self._send_link.send_nowait(link)
        self.accepted += 1
        return True

    async def _greet_returning(self, stream: Stream, handshake: ServerHandshake, hello: Hello) -> bool:
        reconnector = self.reconnectors.get(hello.migration)
        if reconnector is None:
            raise self.endings.refusal(hello, handshake.version)
        reconnector.reserve(hello, handshake.version)
        if hello.ended:
            reconnector.peer_ended(Ended(hello.ended))
        await stream.send_all(handshake.send_welcome(reconnector.session.token))
        # While we said welcome a peer with a higher epoch may have come, and the migration may have ended or paused.
        current = self.reconnectors.get(hello.migration) is reconnector and reconnector.session.epoch == hello.epoch
        if hello.ended or not current or reconnector.over or reconnector.paused:
            return False
        reconnector.enter(ListeningLink(stream, self, handshake.version))
        self.accepted += 1
        return True


async def _receive_offer(stream: Stream, version: int) -> bytes:
    """What a source says first, and not a byte more: all of its offer. `PeerError` when it hangs up, or says something
    else first: a sign of life takes no place either."""
    said = bytearray()
    due = HEADER_BYTES
    while len(said) < due:
        data = await stream.receive_some(due - len(said))
        if not data:
            raise PeerError("hung up before anything was offered")
        said += data
        if len(said) == HEADER_BYTES:
            due += int.from_bytes(said[:4], "big")
            if due > HEADER_BYTES + Offer.MAX_BYTES:
                return bytes(said)  # the protocol refuses it
    with contextlib.suppress(ProtocolError):  # as above
        message = decode(bytes(said[HEADER_BYTES:]), version)
        if not isinstance(message, Offer):
            raise PeerError(f"began with {message.TYPE}, not with an offer")
    return bytes(said)
