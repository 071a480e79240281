# SPDX-License-Identifier: Apache-2.0
"""Refusals, and what is remembered of migrations that have ended.

Ids are no secret (they are in logs), tokens are. A hello proves that it knows the token of the migration that it names,
and a refusal that says how that has ended proves it too: otherwise any host at the peer's address could say so.
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from dataclasses import dataclass

import trio

from postcopy.wire import Ended, Hello

MAX_ENDINGS = 1024


@dataclass(frozen=True)
class Session:
    """What a data connection must know."""

    migration: bytes
    token: bytes
    epoch: int


class Code(enum.StrEnum):
    """What a refusal is about, for programs. Beside these there are those of `Ended`, when they are proven."""

    SAME_SIDE = "same-side"
    BUSY = "busy"
    UNKNOWN = "unknown"
    WRONG_TOKEN = "wrong-token"
    STALE_EPOCH = "stale-epoch"
    NO_CHANNEL = "no-channel"
    PAUSED = "held"
    TOO_OFTEN = "too-often"
    MALFORMED = "malformed"
    ITSELF = "itself"
    UNAUTHORISED = "unauthorised"
    TLS_NEEDED = "tls-needed"


class Refusal(Exception):
    """Why a hello is not welcome, sent to the peer. With `token` it is proven to come from the peer."""

    def __init__(self, reason: str, code: Code | Ended, token: bytes = b"") -> None:
        super().__init__(reason)
        self.code = code
        self.token = token


class Endings:
    """How the migrations have ended that were here: for peers that come back later and do not know it. The last
    `MAX_ENDINGS` of them; one for a process. Trio thread only."""

    def __init__(self, limit: int = MAX_ENDINGS) -> None:
        self._limit = limit
        self._ended: OrderedDict[bytes, tuple[bytes, Ended]] = OrderedDict()
        self._told: dict[bytes, trio.Event] = {}  # of the migrations that are remembered

    def remember(self, session: Session, how: Ended) -> None:
        self._ended[session.migration] = (session.token, how)
        self._told.setdefault(session.migration, trio.Event())
        self._ended.move_to_end(session.migration)
        while len(self._ended) > self._limit:
            migration, _ = self._ended.popitem(last=False)
            del self._told[migration]

    def find(self, migration: bytes) -> tuple[bytes, Ended] | None:
        """Its token, and how it has ended; None for one that is not known."""
        return self._ended.get(migration)

    async def told(self, migration: bytes) -> None:
        """Waits until the peer of a migration that is remembered has come back for it, and learned how it ended."""
        if (told := self._told.get(migration)) is not None:
            await told.wait()

    def note_told(self, migration: bytes) -> None:
        if migration in self._told:  # not forgotten meanwhile
            self._told[migration].set()

    def refusal(self, hello: Hello, version: int) -> Refusal:
        """The answer to a hello for a migration that is not going on here (any more)."""
        known = self.find(hello.migration)
        if known is None or version < 3:
            return Refusal("no such migration here", Code.UNKNOWN)
        token, how = known
        if not hello.is_signed(token, version):
            return Refusal("wrong token", Code.WRONG_TOKEN)
        return Refusal(f"the migration has ended here: {how}", how, token)


def check_token(session: Session, spoken: int, hello: Hello, version: int) -> None:
    """`Refusal` unless the hello proves the token. `spoken`: the version of the migration, which no peer changes."""
    if version != spoken or not hello.is_signed(session.token, version):
        raise Refusal("wrong token", Code.WRONG_TOKEN)


def stale(hello: Hello, session: Session, token: bytes = b"") -> Refusal:
    return Refusal(f"stale epoch {hello.epoch}, this is {session.epoch}", Code.STALE_EPOCH, token)
