# SPDX-License-Identifier: Apache-2.0
"""Files of certificates: what is needed, what is refused, and that they may be renewed at any moment."""

from __future__ import annotations

import os
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from postcopy.errors import ConfigurationError
from postcopy.tls import Credentials
from postcopy.tls._authority import issue, new_authority

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
    return await Credentials.load(directory, listens=listens, connects=not listens)


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
    with pytest.raises(ConfigurationError, match=str(host)) as caught:
        await load(host)
    assert "\n" not in str(caught.value)
    if content is None or len(content) > 1 << 20:
        assert name in str(caught.value)


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
        await Credentials.load(host, listens=True, connects=False, authz=["send:"])


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
    with pytest.raises(ConfigurationError, match="the private key"):
        await credentials.reload()
    assert await credentials.context(server=listens) is before
    shutil.copy(made / "other" / f"{role}-cert.pem", host)
    after = await credentials.context(server=listens)
    assert after is not before
    await credentials.reload()
    assert await credentials.context(server=listens) is after


async def test_files_that_are_gone_change_nothing(host: Path) -> None:
    credentials = await load(host)
    before = await credentials.context(server=True)
    shutil.rmtree(host)
    assert await credentials.context(server=True) is before
