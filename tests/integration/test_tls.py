# SPDX-License-Identifier: Apache-2.0
"""Who comes in over TLS and who does not, with processes as a user starts them; each refusal says at both ends what is
wrong, and harms nobody else."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import tls
import warm

Start = Callable[..., Any]
Arguments = tuple[object, ...]
MIB = 1 << 20
DEADLINE_S = 60.0

pytestmark = pytest.mark.needs("tls", "uffd-user")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(os.urandom(MIB))
    return path


def source_of(image: Path, *arguments: object) -> list[str]:
    return [
        str(one)
        for one in ("source", "--json", "--machine", "image", "--image", image, "--on-failure", "exit", *arguments)
    ]


def refused(arguments: list[str]) -> str:
    """What a source says that does not get its machine away."""
    done = warm.run(arguments, deadline_s=DEADLINE_S)
    assert done.returncode != 0, done.stdout
    assert "Traceback" not in done.stderr
    return done.stderr


def expired(name: str) -> Path:
    return tls.site().issue(name, days=1, now=datetime.now(UTC) - timedelta(days=2))


def named(name: str, *hosts: str) -> Path:
    return tls.site().issue(name, *hosts)


def of_another_ca() -> Path:
    """One that trusts ours, and whose own certificates are of another one."""
    directory = tls.other_site().issue("half")
    shutil.copy(tls.directory() / "ca-cert.pem", directory)
    return directory


@pytest.mark.parametrize("listens", ["dest", "source"])
def test_both_ends_know_each_other(side: Start, image: Path, listens: str) -> None:
    """Nothing depends on which end listens: who sends is authorised to send, who takes to take."""
    copy = image.with_name("copy")
    secured = ("--tls", named("both", "127.0.0.1", "vm1.example"))
    arguments = {
        "dest": ("dest", "--json", "--dump", copy, *secured, "--tls-authz", "send:vm1.example"),
        "source": (*source_of(image), *secured, "--tls-authz", "take:vm1.*"),
    }
    listener = side(*arguments[listens], "--listen", "127.0.0.1:0")
    caller = side(*arguments["source" if listens == "dest" else "dest"], "--connect", listener.address)
    for one in (caller, listener):
        status, result, errors = one.end()
        assert status == 0, errors
        assert result["status"] == "completed"
    assert copy.read_bytes() == image.read_bytes()


# What the destination and the source have, and what each of them says about it.
CASES: dict[str, tuple[Callable[[], Arguments], Callable[[], Arguments], str, str]] = {
    "a plain source": (
        lambda: ("--tls", tls.directory()),
        lambda: (),
        "this host takes connections under TLS only: give --tls DIR on both hosts",
        "this host takes connections under TLS only: give --tls DIR on both hosts",
    ),
    "a plain destination": (
        lambda: (),
        lambda: ("--tls", tls.directory()),
        "the other end does not use TLS",
        "this is a TLS client, not a postcopy peer; if that is postcopy, give --tls DIR on both hosts",
    ),
    "a destination of another CA": (
        lambda: ("--tls", tls.other_site().issue("stranger")),
        lambda: ("--tls", tls.directory()),
        "was not signed by the CA that is trusted here: both hosts need certificates of one CA",
        "it does not know the CA of the certificate here",
    ),
    "a source of another CA": (
        lambda: ("--tls", tls.directory()),
        lambda: ("--tls", of_another_ca()),
        "it does not know the CA of the certificate here",
        "was not signed by the CA that is trusted here: both hosts need certificates of one CA",
    ),
    "an expired destination": (
        lambda: ("--tls", expired("expired-server")),
        lambda: ("--tls", tls.directory()),
        "the peer's certificate (CN=127.0.0.1) has expired",
        "the certificate here has expired: renew it",
    ),
    "an expired source": (
        lambda: ("--tls", tls.directory()),
        lambda: ("--tls", expired("expired-client")),
        "the certificate here has expired: renew it",
        "the peer's certificate (CN=127.0.0.1) has expired",
    ),
    "a destination of another name": (
        lambda: ("--tls", named("elsewhere", "elsewhere.example")),
        lambda: ("--tls", tls.directory()),
        "is not for 127.0.0.1, but for dns:elsewhere.example",
        "the peer has ended the TLS connection: it does not accept the certificate here",
    ),
    "a source that may not send": (
        lambda: ("--tls", tls.directory(), "--tls-authz", "take:*", "--tls-authz", "send:*.example"),
        lambda: ("--tls", tls.directory()),
        "may not send a machine to here: --tls-authz does not name it",
        "CN=127.0.0.1 may not send a machine to here: --tls-authz does not name it",
    ),
    "a destination that may not take": (
        lambda: ("--tls", tls.directory()),
        lambda: ("--tls", tls.directory(), "--tls-authz", "send:127.0.0.1"),
        "may not take a machine from here, as far as --tls-authz of this host says",
        "",  # the source hangs up without a reason: what it allows is its own configuration
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_who_may_not_come_in(side: Start, image: Path, case: str) -> None:
    """The destination waits on, for one that may."""
    of_dest, of_source, at_source, at_dest = CASES[case]
    copy = image.with_name("copy")
    dest = side("dest", "--json", "--dump", copy, "--listen", "127.0.0.1:0", *of_dest())
    assert at_source in refused(source_of(image, "--connect", dest.address, *of_source()))
    dest.wait_for_errors(at_dest)
    assert not copy.exists()
    if case in ("a plain source", "a source of another CA"):
        good = side(*source_of(image, "--connect", dest.address, "--tls", tls.directory()))
        for one in (good, dest):
            assert one.end()[0] == 0
        assert copy.read_bytes() == image.read_bytes()


def test_a_name_that_is_not_the_address(side: Start, image: Path) -> None:
    dest = side("dest", "--json", "--listen", "127.0.0.1:0", "--tls", named("elsewhere", "elsewhere.example"))
    hostname = ("--tls", tls.directory(), "--tls-hostname", "elsewhere.example")
    source = side(*source_of(image, "--connect", dest.address, *hostname))
    for one in (source, dest):
        assert one.end()[0] == 0


# ---- a program of others


def s_client(address: str, *arguments: object, says: bytes = b"GET / HTTP/1.0\r\n\r\n") -> tuple[bytes, str]:
    """What it gets from the peer, and what it says of the connection."""
    command = ["openssl", "s_client", "-brief", "-ign_eof", "-connect", address, *map(str, arguments)]
    done = subprocess.run(command, input=says, capture_output=True, timeout=DEADLINE_S, check=False)
    return done.stdout, done.stderr.decode()


def as_client(directory: Path) -> tuple[object, ...]:
    return ("-cert", directory / "client-cert.pem", "-key", directory / "client-key.pem")


@pytest.mark.needs("openssl")
def test_openssl_gets_in_with_a_certificate_only(side: Start) -> None:
    """Without one it gets no byte of the protocol: no preamble, no name of a machine."""
    dest = side("dest", "--json", "--listen", "127.0.0.1:0", "--tls", tls.directory())
    trusting = ("-verify_return_error", "-verify_ip", "127.0.0.1", "-CAfile", tls.directory() / "ca-cert.pem")
    for arguments, reason in (
        (trusting, "certificate required"),
        ((*trusting, *as_client(tls.other_site().issue("stranger"))), "unknown ca"),
        ((*trusting, *as_client(expired("expired-client"))), "certificate expired"),
        ((*trusting, *as_client(tls.directory()), "-tls1_2"), "protocol version"),
    ):
        got, said = s_client(dest.address, *arguments)
        assert got == b"", reason
        assert reason in said
    got, said = s_client(dest.address, *trusting, *as_client(tls.directory()))
    assert "Protocol version: TLSv1.3" in said
    assert "Verification: OK" in said
    assert got.startswith(b"postcpy")
