# SPDX-License-Identifier: Apache-2.0
"""Files of certificates: what is needed, what is refused, and that they may be renewed at any moment."""

from __future__ import annotations

import logging
import os
import shutil
import threading
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import outcome
import pytest
import trio
from cryptography.hazmat.primitives import serialization
from trio.testing import wait_all_tasks_blocked

from postcopy.errors import ConfigurationError, ResourceError
from postcopy.tls import Credentials, _credentials
from postcopy.tls._authority import issue, new_authority

pytestmark = [pytest.mark.needs("tls"), pytest.mark.usefixtures("patient_tls")]

ROLES = [("server", True), ("client", False)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, and the files of a host."""
    where = tmp_path_factory.mktemp("tls")
    new_authority(where / "ca")
    issue(where / "ca", ["host-a"], where / "host")
    issue(where / "ca", ["host-b"], where / "other")
    return where


@pytest.fixture
def host(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "host", tmp_path / "host"))


async def load(directory: Path, *, listens: bool = True) -> Credentials:
    credentials = Credentials(directory)
    await credentials.context(server=listens)
    return credentials


@pytest.mark.parametrize(("role", "listens"), ROLES)
async def test_only_the_files_of_a_role_are_needed(host: Path, role: str, listens: bool) -> None:
    other = "client" if role == "server" else "server"
    (host / f"{other}-cert.pem").unlink()
    credentials = await load(host, listens=listens)
    assert await credentials.context(server=listens) is await credentials.context(server=listens)
    with pytest.raises(ConfigurationError, match=rf"{other}-cert.pem is not there; .*postcopy tls issue"):
        await credentials.context(server=not listens)


@pytest.mark.parametrize("name", ["ca-cert.pem", "server-cert.pem", "server-key.pem"])
@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "not there; .*postcopy tls new-ca"), (b"", "server"), (b"no pem\n", "server"), (b"x" * (2 << 20), "bytes")],
)
async def test_files_that_cannot_be_used(host: Path, name: str, content: bytes | None, reason: str) -> None:
    (host / name).unlink()
    if content is not None:
        (host / name).write_bytes(content)
        (host / name).chmod(0o600)
    with pytest.raises(ConfigurationError, match=str(host / name)) as caught:
        await load(host)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["ca-cert.pem", "server-cert.pem", "server-key.pem"])
async def test_a_file_that_is_cut_off(host: Path, name: str) -> None:
    (host / name).write_bytes((host / name).read_bytes()[:-40])
    with pytest.raises(ConfigurationError, match=f"^{host}/{name} cannot be (read|used): ."):
        await load(host)


async def test_a_key_of_another_certificate(made: Path, host: Path) -> None:
    shutil.copy(made / "other" / "server-key.pem", host)
    with pytest.raises(ConfigurationError, match=f"^{host}/server-key.pem cannot be used: .*mismatch$"):
        await load(host)


async def test_what_is_no_file(host: Path) -> None:
    (host / "ca-cert.pem").unlink()
    os.mkfifo(host / "ca-cert.pem")
    with pytest.raises(ConfigurationError, match="a FIFO, not a regular file"):
        await load(host)


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o660, 0o666, 0o620, 0o602, 0o601])
async def test_a_key_that_others_can_read(host: Path, mode: int) -> None:
    (host / "server-key.pem").chmod(mode)
    with pytest.raises(ConfigurationError, match=r"server-key.pem: others can .*: chmod 06[04]0 .*server-key.pem"):
        await load(host)


@pytest.mark.parametrize("name", ["ca-cert.pem", "server-cert.pem"])
async def test_a_certificate_that_everybody_can_change(host: Path, name: str) -> None:
    (host / name).chmod(0o666)
    with pytest.raises(ConfigurationError, match=rf"{name}: everybody can change it: chmod o-w .*{name}"):
        await load(host)
    (host / name).chmod(0o664)
    await load(host)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
async def test_whose_a_key_may_be(host: Path) -> None:
    key = host / "server-key.pem"
    key.chmod(0o640)  # root's: root says who may
    await load(host)
    os.chown(key, 12345, -1)
    with pytest.raises(ConfigurationError, match=r"belongs to user 12345.*chown 0 "):
        await load(host)


async def test_an_encrypted_key(host: Path) -> None:
    key = host / "server-key.pem"
    private = serialization.load_pem_private_key(key.read_bytes(), None)
    encryption = serialization.BestAvailableEncryption(b"secret")
    key.write_bytes(private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption))
    with pytest.raises(ConfigurationError, match=r"the key is encrypted, .*: openssl pkey -in .* -out NEW"):
        await load(host)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("ca-cert.pem", "has no certificate in PEM"),
        ("server-cert.pem", "has no certificate in PEM"),
        ("server-key.pem", "has no private key in PEM"),
    ],
)
async def test_files_that_were_mixed_up(host: Path, name: str, reason: str) -> None:
    other = "server-key.pem" if name != "server-key.pem" else "server-cert.pem"
    content = (host / other).read_bytes()
    (host / name).write_bytes(content)
    with pytest.raises(ConfigurationError, match=f"/{name} {reason}"):
        await load(host)


async def test_a_certificate_that_has_expired_is_said(
    made: Path, host: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where nobody can connect with it: at the start, and when a good one is replaced by it."""
    credentials = await load(host)
    assert not caplog.text
    issue(made / "ca", ["host-a"], host, days=1, now=datetime.now(UTC) - timedelta(days=2))
    for again in (credentials.reload(), load(host)):
        caplog.clear()
        await again
        assert "the server's certificate has expired: issue it again" in caplog.text


@pytest.fixture
def links(host: Path, tmp_path: Path) -> Path:
    where = tmp_path / "links"
    where.mkdir()
    for file in host.iterdir():
        (where / file.name).symlink_to(file)
    return where


async def test_links_are_followed(links: Path) -> None:
    """As those of certbot, and of a secret in Kubernetes."""
    await load(links)


async def test_an_empty_name_is_not_the_current_directory(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(host)
    with pytest.raises(ConfigurationError, match="an empty name"):
        Credentials("")


async def test_a_pattern_that_makes_no_sense(host: Path) -> None:
    with pytest.raises(ConfigurationError, match="names no peer"):
        Credentials(host, ["send:"])


@pytest.mark.parametrize(("role", "listens"), ROLES)
async def test_renewed_files_are_read_before_the_next_connection(
    made: Path, host: Path, role: str, listens: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A pair that does not belong together, as in the middle of a renewal, changes nothing, and is logged once."""
    credentials = await load(host, listens=listens)
    before = await credentials.context(server=listens)
    shutil.copy(made / "other" / f"{role}-key.pem", host)
    for _ in range(3):
        assert await credentials.context(server=listens) is before
    assert caplog.text.count("the certificates that were read before stay in use") == 1
    assert await credentials.context(server=listens) is before
    shutil.copy(made / "other" / f"{role}-cert.pem", host)
    after = await credentials.context(server=listens)
    assert after is not before
    await credentials.reload()
    assert await credentials.context(server=listens) is after


async def test_each_role_is_read_again_on_request(made: Path, host: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever is wrong with the other one, which is said each time."""
    credentials = await load(host)
    before = await credentials.context(server=False)
    (host / "server-key.pem").unlink()
    for role in ("cert", "key"):
        shutil.copy(made / "other" / f"client-{role}.pem", host)
    for count in (1, 2):
        await credentials.reload()
        assert caplog.text.count("server-key.pem is not there") == count
    assert credentials._read[False][0] is not before


async def test_two_looks_that_bring_the_same(host: Path) -> None:
    """As when the first was not waited for: the sessions of a context go with it."""
    credentials = await load(host)
    before = await credentials.context(server=True)
    credentials._found[True] = outcome.capture(_credentials._read, str(host), True, None)
    assert await credentials.context(server=True) is before


async def test_files_that_are_gone_change_nothing(host: Path) -> None:
    credentials = await load(host)
    before = await credentials.context(server=True)
    shutil.rmtree(host)
    assert await credentials.context(server=True) is before


async def test_a_file_system_that_hangs(
    made: Path, host: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Connections are made with what was read before; one thread hangs, and the next ones do not wait for it."""
    credentials, read, answers, hanging = await load(host), _credentials._read, threading.Event(), 0
    before = await credentials.context(server=True)

    def hang(*arguments: Any) -> Any:
        nonlocal hanging
        hanging += 1
        answers.wait(60)
        return read(*arguments)

    with monkeypatch.context() as disk:
        disk.setattr(_credentials, "_read", hang)
        disk.setattr(_credentials, "READ_TIMEOUT_S", 0.01)
        for _ in range(3):
            assert await credentials.context(server=True) is before
        assert caplog.text.count("its file system has not answered") == 1
        with pytest.raises(ResourceError, match=r"its file system has not answered within .* s .*remedy: .* --tls"):
            await credentials.context(server=False)  # not read before
        await credentials.reload()
        assert caplog.text.count("its file system has not answered") == 2  # on request it is said again
        assert hanging <= 1
    answers.set()
    for name in ("server-key.pem", "server-cert.pem"):
        shutil.copy(made / "other" / name, host)
    with trio.fail_after(60):
        while await credentials.context(server=True) is before:  # noqa: ASYNC110  (until the thread has ended)
            await trio.sleep(0.01)


@pytest.mark.parametrize("usable", [True, False])
async def test_a_directory_that_is_slow(
    made: Path, host: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, usable: bool
) -> None:
    """No connection waits for it, nor for one who reads it again on request; what a look finds when nobody waits any
    more is used by the next one, and it is told when that is of no use."""
    caplog.set_level(logging.INFO, _credentials.__name__)
    credentials, read = await load(host), _credentials._read
    before = await credentials.context(server=True)
    begun, answers = threading.Event(), threading.Event()

    def slow(*arguments: Any) -> Any:
        begun.set()
        answers.wait(60)
        return read(*arguments)

    for name in ("server-key.pem", "server-cert.pem")[: 2 if usable else 1]:
        shutil.copy(made / "other" / name, host)
    with monkeypatch.context() as disk:
        disk.setattr(_credentials, "_read", slow)
        disk.setattr(_credentials, "LOOK_TIMEOUT_S", 0.01)
        disk.setattr(_credentials, "READ_TIMEOUT_S", 1e9)  # so that what waits for that waits for ever
        async with trio.open_nursery() as nursery:
            nursery.start_soon(credentials.reload)
            await wait_all_tasks_blocked()
            assert await credentials.context(server=True) is before
            nursery.cancel_scope.cancel()
        for _ in range(3):
            assert await credentials.context(server=True) is before
        assert begun.is_set()
        disk.setattr(_credentials, "_read", lambda *arguments: pytest.fail("it was looked at again"))
        answers.set()
        with trio.fail_after(60):
            while not credentials._found:  # noqa: ASYNC110  (until the thread has ended)
                await trio.sleep(0.001)
        disk.setattr(_credentials, "_read", read)
        disk.setattr(_credentials, "LOOK_TIMEOUT_S", 60.0)
        await credentials.context(server=True)
        assert (credentials._read[True][0] is not before) == usable
        assert ("were read again" in caplog.text) == usable
        assert ("stay in use" in caplog.text) != usable


async def test_a_thread_that_is_never_free_does_not_hang(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of its looks is slow, and the next one is asked for before it is over."""
    credentials, read, now = await load(host), _credentials._read, 1e6
    begun, answers = threading.Semaphore(0), threading.Semaphore(0)

    def slow(*arguments: Any) -> Any:
        begun.release()
        assert answers.acquire(timeout=60)
        return read(*arguments)

    async def begins() -> None:
        assert await trio.to_thread.run_sync(begun.acquire, True, 60)

    monkeypatch.setattr(_credentials, "_read", slow)
    monkeypatch.setattr(_credentials, "READ_TIMEOUT_S", 60.0)
    monkeypatch.setattr("postcopy.tls._credentials.time.monotonic", lambda: now)
    async with trio.open_nursery() as nursery:
        for ended in range(4):
            nursery.start_soon(partial(credentials._look, True))
            if ended:
                await wait_all_tasks_blocked()  # it waits for the thread
                answers.release()
            await begins()
            now += 0.6 * _credentials.READ_TIMEOUT_S
        answers.release()


async def test_no_memory_to_read_them_again(
    host: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Ends no process: it is an error like others."""
    credentials = await load(host)
    before = await credentials.context(server=True)

    def fails(*arguments: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(_credentials, "_read", fails)
    assert await credentials.context(server=True) is before
    assert "cannot be read" in caplog.text


async def test_an_error_of_an_earlier_look_is_not_that_of_the_next(host: Path) -> None:
    credentials = await load(host)
    before = await credentials.context(server=True)
    credentials._found[True] = outcome.capture(_credentials._read, str(host / "nowhere"), True, None)
    (host / "server-key.pem").touch()
    assert await credentials.context(server=True) is not before


async def test_a_call_that_was_cancelled_while_it_read(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is no reason for others to believe that the file system hangs."""
    credentials, read = Credentials(host), _credentials._read
    begun, answers = trio.Event(), threading.Event()

    def slow(*arguments: Any) -> Any:
        trio.from_thread.run_sync(begun.set)
        answers.wait(60)
        return read(*arguments)

    monkeypatch.setattr(_credentials, "_read", slow)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(credentials.context, server=True))
        await begun.wait()
        nursery.cancel_scope.cancel()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(credentials.context, server=True))
        await wait_all_tasks_blocked()
        answers.set()
    assert credentials.not_after_s(server=True) is not None


@pytest.mark.parametrize("usable", [True, False])
async def test_connections_that_are_made_together_share_a_look_at_the_files(
    host: Path, monkeypatch: pytest.MonkeyPatch, usable: bool
) -> None:
    """But none that had begun before they asked."""
    credentials = await load(host)
    looks, read = 0, _credentials._read

    def counted(*arguments: Any) -> Any:
        nonlocal looks
        looks += 1
        if looks == 1:
            trio.from_thread.run_sync(begin_others)
        return read(*arguments)

    def begin_others() -> None:
        for _ in range(20):
            nursery.start_soon(ask)

    async def ask() -> None:
        await credentials.context(server=True)

    monkeypatch.setattr(_credentials, "_read", counted)
    if not usable:
        (host / "server-key.pem").unlink()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
    assert looks == 2
    await ask()
    assert looks == 3
