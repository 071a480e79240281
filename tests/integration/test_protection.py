# SPDX-License-Identifier: Apache-2.0
"""What a user who sets up TLS says and sees: options, refusals, SIGHUP, status, metrics."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tls
import warm

BEYOND = "192.0.2.7:7777"
RV64 = ("--machine", "rv64", "--memory", "16MiB", "--workload", "idle", "--name", "vm1")
COMMANDS = (
    "`postcopy tls new-ca CA`, and for each host `postcopy tls issue CA --host NAME --out DIR`, then say --tls DIR on"
    " both hosts"
)


@pytest.mark.parametrize(
    "arguments",
    [
        ("dest", "--listen", ":0"),
        ("dest", "--connect", BEYOND),
        ("dest", "--listen", "127.0.0.1:0", "--metrics", "*:0"),
        ("source", "--machine", "image", "--image", "IMAGE", "--listen", "[::]:0"),
        ("source", "--machine", "image", "--image", "IMAGE", "--connect", BEYOND),
        ("daemon", "--listen", "0.0.0.0:0", "--control", "SOCKET"),
        ("pager", "--socket", "SOCKET", "--connect", BEYOND, "--no-keeper"),
    ],
    ids=" ".join,
)
def test_beyond_this_host_it_is_refused(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(4096))
    places = {"IMAGE": str(image), "SOCKET": str(tmp_path / "s")}
    done = warm.run([places.get(word, word) for word in arguments], deadline_s=60)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("postcopy: error:")]
    assert COMMANDS in line
    assert "; or --insecure" in line


def test_a_peer_that_is_beyond_this_host(tmp_path: Path, daemon: Callable[..., Any], operator: Any) -> None:
    """`ctl` is told what its daemon may not do, as what makes no sense; the machine runs on."""
    here = daemon("a", *RV64)
    here.wait_for("the machine", lambda line: line["event"] == "machine-started")
    assert COMMANDS in operator("a").ask("migrate", BEYOND, status=2)[1]
    assert operator("a").machines()["vm1"]["guest"]["state"] == "running"


@pytest.mark.needs("tls", "uffd-user")
def test_two_daemons(tmp_path: Path, daemon: Callable[..., Any], operator: Any) -> None:
    site = tls.site()
    a, b = site.issue("a", "host-a.example"), site.issue("b", "host-b.example")
    here = daemon("a", *RV64, "--tls", a)
    there = daemon("b", "--tls", b, "--tls-authz", "send:host-a.example", "--metrics", "127.0.0.1:0", "-v")
    assert there.wait_for("address", lambda line: line["event"] == "listening")["encrypted"]
    assert not there.wait_for("metrics", lambda line: line["event"] == "metrics")["encrypted"]
    here.wait_for("the machine", lambda line: line["event"] == "machine-started")

    said = operator("a").ask("migrate", there.address, status=1)[1]
    assert "not for 127.0.0.1, but for dns:host-b.example" in said
    ended = operator("a").tell("migrate", there.address, "--tls-hostname", "host-b.example")
    assert ended["encrypted"]
    assert ended["tls"]["peer-name"] == "host-b.example"
    job = operator("b").machines()["vm1"]["migration"]
    assert (job["encrypted"], job["tls"]["peer-name"]) == (True, "host-a.example")
    assert "TLS with host-a.example" in operator("b").ask("status")[0]
    # It may send to there, and not take from there.
    said = operator("b").ask("migrate", here.address, "--tls-hostname", "host-a.example", status=1)[1]
    assert "may not take" in said

    key = b / "server-key.pem"
    key.chmod(0o644)
    there.signal(signal.SIGHUP)
    there.wait_for_errors(f"chmod 0640 {key}; the certificates that were read before stay in use")
    before = _expiry(operator("b"))
    site.issue("b", "host-b.example", days=2)
    key.chmod(0o600)
    there.signal(signal.SIGHUP)
    deadline = time.monotonic() + 60
    while _expiry(operator("b")) == before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert _expiry(operator("b")) > before


@pytest.mark.needs("tls", "uffd-user")
def test_a_peer_that_is_looked_for_elsewhere(side: Callable[..., Any], operator: Any, tmp_path: Path) -> None:
    """A new address is refused where it would need TLS; under TLS the certificate there may have another name."""
    image = tmp_path / "image"
    image.write_bytes(os.urandom(4 << 20))
    site = tls.site()

    def pair(name: str, source_tls: tuple[object, ...], dest_tls: tuple[object, ...]) -> tuple[Any, Any]:
        slow = ("--machine", "image", "--image", image, "--listen", "127.0.0.1:0", "--max-bandwidth", "64KiB/s")
        source = side("source", "--json", *slow, "--control", tmp_path / f"{name}-source", *source_tls)
        control = ("--control", tmp_path / f"{name}-dest")
        dest = side("dest", "--json", "--connect", source.address, *control, *dest_tls)
        dest.wait_status("postcopy-active")
        operator(f"{name}-dest").ask("migrate-pause")
        _until(operator(f"{name}-dest"), "postcopy-paused")
        return source, dest

    pair("plain", (), ())
    assert COMMANDS in operator("plain-dest").ask("migrate-recover", BEYOND, status=2)[1]
    assert _until(operator("plain-dest"), "postcopy-paused")["encrypted"] is False

    names = site.issue("moves", "host-a.example", "host-b.example")
    here = ("--tls", tls.directory(), "--tls-hostname", "host-a.example")
    source, dest = pair("tls", ("--tls", names), here)
    at = operator("tls-dest")
    at.ask("migrate-recover", source.address, "--tls-hostname", "host-c.example")
    dest.wait_for_errors("not for host-c.example")
    at.ask("migrate-recover", source.address, "--tls-hostname", "host-b.example")
    assert _until(at, "postcopy-active")["tls"]["peer-name"] == "host-a.example"
    operator("tls-source").ask("set", "--max-bandwidth", "none")
    assert dest.end()[0] == source.end()[0] == 0


def _until(operator: Any, status: str) -> Any:
    """The migration of its image."""
    return operator.wait(status, lambda here: here["image"]["migration"]["status"] == status)["image"]["migration"]


def _expiry(operator: Any) -> int:
    """Of the certificate that it shows to those who connect."""
    (certificate,) = [one for one in operator.tell("status")["certificates"] if one["role"] == "server"]
    return int(certificate["expires-at"])
