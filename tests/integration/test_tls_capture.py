# SPDX-License-Identifier: Apache-2.0
"""What can be read on the network: with TLS no page, no token, and not even which protocol is spoken."""

from __future__ import annotations

import hashlib
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sniffer
import tls

Start = Callable[..., Any]
Spawn = Callable[..., Any]
ADDRESS = "10.99.0.1"  # beyond loopback as `postcopy` sees it, though its packets do not leave the interface lo
DEADLINE_S = 60.0
NETWORK = f"ip link set lo up && ip addr add {ADDRESS}/24 dev lo && echo there && exec sleep 1000"
PAGES = 512
SECRETS = [hashlib.sha256(b"secret %d" % number).digest()[:16] for number in range(16)]
# A source whose random numbers are known: its migrations' ids and tokens are among SECRETS.
KNOWN_SECRETS = """
import hashlib, itertools, secrets
numbers = itertools.count()
secrets.token_bytes = lambda size=32: hashlib.sha256(b"secret %d" % next(numbers)).digest()[:size]
from postcopy.__main__ import main
raise SystemExit(main())
"""
CLEAR = [b"postcpy", b"PCPF\x02\x00\x00\x00", b"bulk-channels", b"prepared", b"migration"]
"""What the protocol of postcopy says of itself: preamble, frames, messages. Each so long that it is not there by chance
in some MB of ciphertext."""

pytestmark = pytest.mark.needs("root", "netns", "uffd-user")


@pytest.fixture
def inside(spawn_child: Spawn) -> Spawn:
    """``inside(command)``: starts it in a network namespace of this test."""
    holder = spawn_child(["unshare", "--net", "sh", "-c", NETWORK])
    wait_for(holder, "there")
    return lambda command: spawn_child(["nsenter", f"--net=/proc/{holder.pid}/ns/net", *command])


def wait_for(child: Any, text: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while text not in child.output():
        assert child.process.poll() is None, child.errors()
        assert time.monotonic() < deadline, f"no {text!r}: {child.output()}{child.errors()}"
        time.sleep(0.005)


def page(number: int) -> bytes:
    """32 bytes of its own, again and again: any 64 bytes of it are enough to know it."""
    return hashlib.sha256(b"page %d" % number).digest() * 128


def captured(
    side: Start, inside: Spawn, directory: Path, listens: tuple[Any, ...], connects: tuple[Any, ...]
) -> dict[sniffer.Way, bytes]:
    """All that is seen of a migration of an image, which has arrived as it was."""
    image, copy, seen = directory / "image", directory / "copy", directory / "seen"
    image.write_bytes(b"".join(map(page, range(PAGES))))
    listener = inside([sys.executable, sniffer.__file__, "lo", seen])
    wait_for(listener, "ready")
    dest = side("dest", "--json", "--listen", f"{ADDRESS}:0", "--dump", copy, *listens, spawn=inside)
    source = side(
        "source", "--json", "--machine", "image", "--image", image, "--bulk-channels", 2,
        "--connect", dest.address, *connects, spawn=inside, command=(sys.executable, "-c", KNOWN_SECRETS),
    )  # fmt: skip
    for one in (source, dest):
        status, _, errors = one.end()
        assert status == 0, errors
    assert copy.read_bytes() == image.read_bytes()
    listener.send_signal(signal.SIGTERM)
    done = listener.wait(DEADLINE_S)
    assert done.stdout.endswith(" 0 lost\n"), done.stdout + done.stderr
    return sniffer.read(seen)


def found(streams: dict[sniffer.Way, bytes]) -> tuple[int, int, list[bytes]]:
    """How many pages, how many ids and tokens, and which words of the protocol were readable."""
    everything = b"|".join(streams.values())
    pages = sum(page(number)[:32] in everything for number in range(PAGES))
    return pages, sum(secret in everything for secret in SECRETS), [word for word in CLEAR if word in everything]


def test_without_tls_all_is_readable(side: Start, inside: Spawn, tmp_path: Path) -> None:
    """What the next test looks for would be found."""
    pages, secrets, words = found(captured(side, inside, tmp_path, ("--insecure",), ("--insecure",)))
    assert pages == PAGES
    assert secrets >= 2
    assert words == CLEAR


def test_with_tls_nothing_is(side: Start, inside: Spawn, tmp_path: Path) -> None:
    here = tls.site().issue("captured", ADDRESS)
    streams = captured(side, inside, tmp_path, ("--tls", here), ("--tls", here))
    assert len(streams) >= 8, "control, urgent and two bulk connections, both ways"
    assert sum(map(len, streams.values())) > PAGES * 4096
    assert found(streams) == (0, 0, [])
    for way, stream in streams.items():
        kinds = [kind for kind, _ in tls.records(stream)]
        assert len(kinds) > 2, way
        # Each begins with one message of a handshake in clear (ClientHello, ServerHello); what follows is encrypted.
        assert kinds.count(0x16) == 1, way
        assert set(kinds[1:]) <= {0x14, tls.APPLICATION_DATA}, way
