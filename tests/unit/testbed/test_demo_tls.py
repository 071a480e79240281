# SPDX-License-Identifier: Apache-2.0
"""What the relay of `demo --tls` calls encrypted, and what not."""

from __future__ import annotations

import contextlib
import ssl
from pathlib import Path

import pytest

from postcopy.testbed.demo._tls import Watch, as_record, checks, make_certificates


@pytest.fixture
def wire(tmp_path: Path) -> dict[bool, bytes]:
    """What goes over a connection under TLS, by direction: a handshake, and 100 kB each way."""
    made = make_certificates(tmp_path, None, None)
    server, client = (
        ssl.create_default_context(purpose, cafile=str(Path(made[side], "ca-cert.pem")))
        for side, purpose in (("dest", ssl.Purpose.CLIENT_AUTH), ("source", ssl.Purpose.SERVER_AUTH))
    )
    server.load_cert_chain(Path(made["dest"], "server-cert.pem"), Path(made["dest"], "server-key.pem"))
    client.load_cert_chain(Path(made["source"], "client-cert.pem"), Path(made["source"], "client-key.pem"))
    server.verify_mode = ssl.CERT_REQUIRED
    pipes = {True: ssl.MemoryBIO(), False: ssl.MemoryBIO()}
    inputs = {True: ssl.MemoryBIO(), False: ssl.MemoryBIO()}
    listener = server.wrap_bio(inputs[True], pipes[False], server_side=True)
    caller = client.wrap_bio(inputs[False], pipes[True], server_hostname="127.0.0.1")
    carried = {True: b"", False: b""}

    def carry() -> None:
        for out, pipe in pipes.items():
            data = pipe.read()
            carried[out] += data
            inputs[out].write(data)

    for step in (caller, listener, caller, listener):
        with contextlib.suppress(ssl.SSLWantReadError):
            step.do_handshake()
        carry()
    for one, other in ((caller, listener), (listener, caller)):
        one.write(bytes(100_000))
        carry()
        assert sum(len(other.read(1 << 14)) for _ in range(7)) == 100_000
    return carried


@pytest.mark.parametrize("piece", [1, 4, 5, 1000, 1 << 20])
def test_tls(wire: dict[bool, bytes], piece: int) -> None:
    """However it is cut: all of it is records, and the content is in encrypted ones."""
    watch = Watch()
    for out, data in wire.items():
        for start in range(0, len(data), piece):
            watch.see(1, out, data[start : start + piece])
    assert watch.connections == 1
    assert watch.readable_bytes == 0
    assert watch.encrypted_bytes + watch.opening_bytes == sum(map(len, wire.values()))
    assert 200_000 < watch.encrypted_bytes < 210_000
    assert all(check.ok for check in checks(as_record([], watch)))


@pytest.mark.parametrize("plain", [b"\x17", b"\x17\x03", b"", b"hello"])
def test_in_clear(wire: dict[bool, bytes], plain: bytes) -> None:
    """What begins as a record does, and is none; and what comes after good ones."""
    watch = Watch()
    watch.see(1, True, plain + bytes(100))
    watch.see(2, False, wire[False] + plain + bytes(100))
    assert watch.readable_bytes == 2 * (len(plain) + 100)
    assert watch.connections == 2
    assert not all(check.ok for check in checks(as_record([], watch)))


def test_nothing_at_all_is_not_good() -> None:
    assert not all(check.ok for check in checks(as_record([], Watch())))
