# SPDX-License-Identifier: Apache-2.0
"""Who is at the other end, by its certificate, and what it may do here.

A *pattern* is one that an operator writes: ``[send:|take:]PATTERN``, without a prefix for both. ``*`` alone is anybody.
With a ``=`` in it, it is matched against the certificate's subject (RFC 2253: ``CN=host1,O=Example``); any other one
against its names (subject alternative names) of one kind: an IP address, a URI (with a ``:``), else a DNS name. So no
name of one kind is taken for one of another kind, whatever its text. ``*`` stands for any characters, in a name for
any but ``.`` and ``/``; in a subject it never separates a ``\\`` from what that escapes, so that a comma inside a value
does not begin the next attribute. Where there is any pattern, what none allows is refused.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from postcopy._patterns import matches
from postcopy.errors import ConfigurationError

Action = Literal["send", "take"]
"""What the peer does: it sends a machine to here, or takes one from here."""
ACTIONS: tuple[Action, ...] = ("send", "take")
MAX_PATTERN = 1024
_IN_SUBJECT = r"(?:\\.|[^\\])"  # regular expressions of what a star stands for, any number of times
_IN_NAME = "[^./]"


@dataclass(frozen=True)
class PeerCertificate:
    """Of the other end of a connection; a certificate authority of ours has signed it."""

    subject: str  # RFC 2253
    names: tuple[tuple[str, str], ...]  # kind (``dns``, ``ip``, ``uri``) and text, in the certificate's order
    not_after_s: int  # when it ends, in seconds since 1970
    fingerprint: str = ""  # SHA-256, hexadecimal
    cipher: str = ""  # of the connection
    resumed: bool = False  # the connection is that of an earlier session: no certificate was sent for it

    @property
    def name(self) -> str:
        """What to call the peer: its first name, else its subject; never empty. It is what limits for one peer count
        by: the same for all connections with the same certificate."""
        for kind in ("dns", "uri", "ip"):
            for text in self.of_kind(kind):
                return text
        return self.subject or f"certificate {self.fingerprint}"

    def of_kind(self, kind: str) -> list[str]:
        return [text for this, text in self.names if this == kind]

    @property
    def known_as(self) -> str:
        """All its names, for messages."""
        return ", ".join([text for _, text in (*self.names, ("", self.subject)) if text]) or "a peer without a name"


@dataclass(frozen=True)
class Pattern:
    actions: tuple[Action, ...]
    text: str

    def allows(self, action: Action, peer: PeerCertificate) -> bool:
        return action in self.actions and (self.text == "*" or self._means(peer))

    def _means(self, peer: PeerCertificate) -> bool:
        if "=" in self.text:
            return matches(self.text, peer.subject, _IN_SUBJECT)
        if (address := _address(self.text)) is not None:
            return any(_address(name) == address for name in peer.of_kind("ip"))
        if ":" in self.text:
            return any(matches(self.text, name, _IN_NAME) for name in peer.of_kind("uri"))
        folded = _folded(self.text)
        return any(matches(folded, _folded(name), _IN_NAME) for name in peer.of_kind("dns"))


def parse_pattern(text: str) -> Pattern:
    """``[send:|take:]PATTERN``; `ConfigurationError` for what is none."""
    actions, pattern = ACTIONS, text
    for action in ACTIONS:
        if text.startswith(f"{action}:"):
            actions, pattern = (action,), text[len(action) + 1 :]
    wrong = pattern != pattern.strip() or pattern.startswith(tuple(f"{action}:" for action in ACTIONS))
    if not pattern or wrong or len(pattern) > MAX_PATTERN or not pattern.isprintable():
        raise ConfigurationError(
            f"{text[:80]!r} names no peer: write [send:|take:]PATTERN, as in send:*.example.org or CN=host1,O=Example"
        )
    return Pattern(actions, pattern)


class Authorisation:
    """Which peers may do what."""

    def __init__(self, patterns: Sequence[str] = ()) -> None:
        """`ConfigurationError` for one that makes no sense. A single text is one pattern: as a list of characters its
        ``*`` would be anybody."""
        self._patterns = [parse_pattern(text) for text in ([patterns] if isinstance(patterns, str) else patterns)]

    def allows(self, action: Action, peer: PeerCertificate) -> bool:
        """Without any pattern: whoever has a certificate that is good here."""
        return not self._patterns or any(pattern.allows(action, peer) for pattern in self._patterns)


def _folded(name: str) -> str:
    """Of a DNS name, whose case means nothing."""
    return name.lower().removesuffix(".")


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None
