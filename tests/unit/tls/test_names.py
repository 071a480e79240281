# SPDX-License-Identifier: Apache-2.0
"""Which peers a pattern names, and what they may do."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopy.errors import ConfigurationError
from postcopy.tls import Authorisation, PeerCertificate, parse_pattern

PEER = PeerCertificate(
    "CN=host1,OU=lab,O=Example",
    (("dns", "host1.lab.example"), ("ip", "192.0.2.7"), ("ip", "2001:db8::7"), ("uri", "spiffe://example/ns/a")),
    2_000_000_000,
)


@pytest.mark.parametrize(
    "pattern",
    [
        "*",
        "host1.lab.example",
        "HOST1.Lab.example.",
        "*.lab.example",
        "host*.*.example",
        "192.0.2.7",
        "2001:0db8::0:7",
        "spiffe://example/ns/*",
        "CN=host1,OU=lab,O=Example",
        "CN=*,O=Example",
        "*O=Example",
    ],
)
def test_named(pattern: str) -> None:
    assert Authorisation([pattern]).allows("send", PEER)
    assert Authorisation([pattern]).allows("take", PEER)
    assert Authorisation(["nobody", f"take:{pattern}"]).allows("take", PEER)
    assert not Authorisation([f"take:{pattern}"]).allows("send", PEER)


@pytest.mark.parametrize(
    "pattern",
    [
        "host1",
        "*.example",  # a star is no dot
        "host1*lab.example",
        "host1.lab.example.org",
        "xhost1.lab.example",
        "host1.lab.exampl?",
        "host1.lab.exampl.",
        "192.0.2.*7",
        "192.0.2",
        "spiffe://example/*",  # nor a slash
        "spiffe://EXAMPLE/ns/a",
        "CN=host1",  # a subject is all of it
        "CN=host1,OU=lab,O=example",
        "O=Example*",
        "CN=host1.*",
        "**host1",
    ],
)
def test_not_named(pattern: str) -> None:
    assert not Authorisation([pattern]).allows("send", PEER)


def test_whoever_has_a_certificate_without_any_pattern() -> None:
    assert Authorisation().allows("send", PEER)
    assert Authorisation().allows("take", PEERLESS)


def test_one_pattern_that_is_no_list() -> None:
    assert Authorisation("send:*.other.example").allows("send", PEER) is False
    assert Authorisation("*").allows("send", PEER)


PEERLESS = PeerCertificate("", (), 0)


def test_a_certificate_without_names() -> None:
    assert not Authorisation(["*.example", "CN=*", "send:host1"]).allows("send", PEERLESS)
    assert Authorisation(["*"]).allows("send", PEERLESS)
    assert PEERLESS.known_as == "a peer without a name"


def test_a_subject_that_pretends_to_be_another_one() -> None:
    """RFC 2253 escapes what a value may not look like."""
    liar = PeerCertificate(r"CN=host1\,O=Example,O=Other", (), 0)
    for pattern in ("CN=host1,O=Example", "CN=host1,*", "*,O=Example", "CN=*,O=Example,*"):
        assert not Authorisation([pattern]).allows("send", liar)
    for subject in (r"CN=host1\,O=Example", r"CN=host1\+O=Example", r"CN=a\\\,O=Example"):
        for pattern in ("CN=*,O=Example", "*,O=Example", "CN=host*+O=Example"):
            assert not Authorisation([pattern]).allows("send", PeerCertificate(subject, (), 0))
    assert Authorisation(["CN=*"]).allows("send", liar)
    honest = PeerCertificate(r"CN=a\\,O=Example", (), 0)  # its name ends with a backslash
    assert Authorisation(["CN=*,O=Example"]).allows("send", honest)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("dns", "192.0.2.7"), ("uri", "192.0.2.7"), ("dns", "spiffe://example/ns/a"), ("uri", "host1.lab")],
)
def test_a_name_of_another_kind(kind: str, name: str) -> None:
    """An authority that lets a host choose its DNS names has not said that it has this address."""
    assert not Authorisation([name]).allows("send", PeerCertificate("", ((kind, name),), 0))


@pytest.mark.parametrize(
    "text", ["", "send:", "take: ", "send: host1", "host1 ", "send:take:host1", "a\nb", "x" * 2000]
)
def test_no_pattern(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"write \[send:\|take:\]PATTERN"):
        parse_pattern(text)


def test_what_to_call_a_peer() -> None:
    assert PEER.name == "host1.lab.example"
    assert PeerCertificate("CN=a", (("ip", "192.0.2.7"), ("uri", "u:x")), 0).name == "u:x"
    assert PeerCertificate("CN=a", (), 0).name == "CN=a"
    assert "192.0.2.7" in PEER.known_as
    assert PeerCertificate("", (), 0, "0a1b").name == "certificate 0a1b"  # a subject that does not fit


@given(st.text("ab.*", min_size=1, max_size=12), st.text("ab.", min_size=1, max_size=12))
def test_stars_in_names(pattern: str, name: str) -> None:
    """Against an independent description of the same."""
    peer = PeerCertificate("", (("uri", f"u:{name}"),), 0)
    expected = re.fullmatch(pattern.replace(".", r"\.").replace("*", r"[^./]*"), name) is not None
    assert Authorisation([f"u:{pattern}"]).allows("send", peer) == expected
