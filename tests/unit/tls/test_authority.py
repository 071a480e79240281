# SPDX-License-Identifier: Apache-2.0
"""An authority and what it issues: as OpenSSL and QEMU read it, renewed in place, and what is refused."""

from __future__ import annotations

import errno
import os
import shutil
import ssl
import stat
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from postcopy._files import locked_directory
from postcopy.cli._main import main
from postcopy.errors import ConfigurationError
from postcopy.tls import _authority
from postcopy.tls._authority import issue, new_authority, parse_host, show

FILES = {"ca-cert.pem", "server-cert.pem", "server-key.pem", "client-cert.pem", "client-key.pem"}
HOSTS = ["host-a", "10.0.0.1", "fd00::1"]


@pytest.fixture
def ca(tmp_path: Path) -> Path:
    new_authority(tmp_path / "ca")
    return tmp_path / "ca"


@pytest.fixture
def host(ca: Path, tmp_path: Path) -> Path:
    issue(ca, HOSTS, tmp_path / "tls")
    return tmp_path / "tls"


def modes(directory: Path) -> dict[str, int]:
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()}


def problems(directory: Path, now: datetime | None = None) -> str:
    return "\n".join(show(directory, now=now)[1])


def talk(listener: Path, caller: Path, name: str) -> None:
    """A handshake of Python's own TLS in memory, each side with the files of its role; SSLError says what is wrong."""
    contexts = []
    for role, directory, purpose in (
        ("server", listener, ssl.Purpose.CLIENT_AUTH),
        ("client", caller, ssl.Purpose.SERVER_AUTH),
    ):
        context = ssl.create_default_context(purpose, cafile=str(directory / "ca-cert.pem"))
        context.load_cert_chain(directory / f"{role}-cert.pem", directory / f"{role}-key.pem")
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_STRICT
        contexts.append(context)
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = contexts[0].wrap_bio(there, back, server_side=True)
    client = contexts[1].wrap_bio(back, there, server_hostname=name)
    for step in (client, server, client, server):
        try:
            step.do_handshake()
        except ssl.SSLWantReadError:
            continue
    server.write(b"there")
    assert client.read() == b"there"


class TestIssued:
    def test_files_and_who_can_read_them(self, ca: Path, host: Path) -> None:
        assert modes(ca) == {"ca-cert.pem": 0o644, "ca-key.pem": 0o600}
        assert modes(host) == {name: 0o600 if "key" in name else 0o644 for name in FILES}

    @pytest.mark.parametrize("name", HOSTS)
    def test_both_sides_accept_each_other(self, host: Path, name: str) -> None:
        talk(host, host, name)

    def test_not_by_another_name(self, host: Path) -> None:
        with pytest.raises(ssl.SSLCertVerificationError, match="host-b"):
            talk(host, host, "host-b")

    def test_not_by_another_authority(self, host: Path, tmp_path: Path) -> None:
        new_authority(tmp_path / "other")
        issue(tmp_path / "other", HOSTS, tmp_path / "stranger")
        for listener, caller in ((host, tmp_path / "stranger"), (tmp_path / "stranger", host)):
            with pytest.raises(ssl.SSLError, match="verify failed"):
                talk(listener, caller, "host-a")

    def test_not_in_the_other_role(self, host: Path, tmp_path: Path) -> None:
        """The certificate of a caller is no listener's: who has stolen it cannot be one."""
        turned = Path(shutil.copytree(host, tmp_path / "turned"))
        for kind in ("cert", "key"):
            (turned / f"client-{kind}.pem").rename(turned / f"server-{kind}.pem")
        with pytest.raises(ssl.SSLCertVerificationError, match="purpose"):
            talk(turned, host, "host-a")
        assert "server-cert.pem: its extended key usage does not allow" in problems(turned)

    def test_not_before_and_not_after_its_time(self, ca: Path, tmp_path: Path) -> None:
        for days in (-2, 2):
            issue(ca, ["host-a"], tmp_path / "tls", days=1, now=datetime.now(UTC) + timedelta(days=days))
            with pytest.raises(ssl.SSLCertVerificationError, match=r"expired|not yet valid"):
                talk(tmp_path / "tls", tmp_path / "tls", "host-a")

    def test_what_it_is_valid_for(self, ca: Path, tmp_path: Path) -> None:
        """Not longer than the authority; from a little before now on, for hosts whose clocks are slow."""
        now = datetime.now(UTC).replace(microsecond=0)
        server, client = issue(ca, ["Host-A.example.org.", "::1", "::1"], tmp_path / "tls", days=3000, now=now)
        assert server.names == client.names == ("host-a.example.org", "::1")
        assert server.subject == client.subject == "CN=host-a.example.org"
        assert server.begins == now - timedelta(minutes=10)
        assert server.ends == show(ca)[0][0].ends < now + timedelta(days=366)

    def test_a_name_too_long_for_a_subject(self, ca: Path, tmp_path: Path) -> None:
        name = ".".join(["a" * 40] * 3)
        assert issue(ca, [name], tmp_path / "tls")[0].subject == ""
        talk(tmp_path / "tls", tmp_path / "tls", name)

    @pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the command openssl")
    @pytest.mark.parametrize("role", ["server", "client"])
    def test_openssl_verifies_it(self, host: Path, role: str) -> None:
        words = ["openssl", "verify", "-x509_strict", "-purpose", f"ssl{role}", "-CAfile", str(host / "ca-cert.pem")]
        done = subprocess.run([*words, str(host / f"{role}-cert.pem")], capture_output=True, text=True, timeout=20)
        assert done.returncode == 0, done.stderr

    @pytest.mark.needs("qemu")
    @pytest.mark.parametrize("endpoint", ["server", "client"])
    def test_qemu_takes_it(self, host: Path, endpoint: str) -> None:
        """It loads and checks them when it starts."""
        made = f"tls-creds-x509,id=tls0,dir={host},endpoint={endpoint},verify-peer=on"
        command = ["qemu-system-x86_64", "-machine", "none", "-display", "none", "-object", made, "-monitor", "stdio"]
        ended = [subprocess.run(command, input="quit\n", capture_output=True, text=True, timeout=60)]
        (host / "ca-cert.pem").unlink()
        ended.append(subprocess.run(command, input="quit\n", capture_output=True, text=True, timeout=60))
        assert [one.returncode for one in ended] == [0, 1], ended


class TestRenewal:
    @pytest.mark.needs("tls")
    def test_in_place(self, ca: Path, host: Path) -> None:
        before = {path.name: path.read_bytes() for path in host.iterdir()}
        issue(ca, HOSTS, host)
        after = {path.name: path.read_bytes() for path in host.iterdir()}
        assert after.keys() == FILES
        assert [name for name in FILES if before[name] == after[name]] == ["ca-cert.pem"]
        assert problems(host) == ""

    def test_owner_and_mode_of_a_key_stay(self, ca: Path, host: Path) -> None:
        """A daemon of another user reads it by its group."""
        key = host / "server-key.pem"
        key.chmod(0o640)
        (host / "client-key.pem").chmod(0o644)  # but this nobody may have wanted
        if os.geteuid() == 0:
            os.chown(key, 0, 65010)
        issue(ca, HOSTS, host)
        assert (modes(host)["server-key.pem"], modes(host)["client-key.pem"]) == (0o640, 0o640)
        assert key.stat().st_gid == (65010 if os.geteuid() == 0 else os.getegid())
        key.chmod(0o400)
        (host / "server-cert.pem").chmod(0o640)
        issue(ca, HOSTS, host)
        assert (modes(host)["server-key.pem"], modes(host)["server-cert.pem"]) == (0o400, 0o640)

    @pytest.mark.needs("tls")
    def test_change_of_the_authority(self, ca: Path, host: Path, tmp_path: Path) -> None:
        """Whom a host trusts is changed by hand; then hosts of both trust each other."""
        other, new = tmp_path / "other", tmp_path / "new"
        new_authority(other)
        before = {path.name: path.read_bytes() for path in host.iterdir()}
        with pytest.raises(ConfigurationError, match="does not trust this authority"):
            issue(other, HOSTS, host)
        assert before == {path.name: path.read_bytes() for path in host.iterdir()}
        shutil.copytree(host, new)
        for directory in (host, new):
            with (directory / "ca-cert.pem").open("ab") as bundle:
                bundle.write((other / "ca-cert.pem").read_bytes())
        issue(other, HOSTS, new)
        talk(new, host, "host-a")
        talk(host, new, "host-a")
        assert len(show(new)[0]) == 4
        assert problems(new) == ""

    def test_two_at_once(self, ca: Path, host: Path) -> None:
        before = (host / "server-key.pem").read_bytes()
        with locked_directory(host), pytest.raises(ConfigurationError, match="another process issues"):
            issue(ca, HOSTS, host)
        assert (host / "server-key.pem").read_bytes() == before

    def test_nothing_is_left_of_one_that_failed(self, ca: Path, host: Path) -> None:
        (host / "server-cert.pem").unlink()
        (host / "server-cert.pem").mkdir()
        with pytest.raises(ConfigurationError, match="a directory"):
            issue(ca, HOSTS, host)
        assert {path.name for path in host.iterdir()} == FILES

    def test_a_disk_that_is_full(self, ca: Path, host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """In the middle of it: no pair is left that does not belong together."""
        before = {path.name: path.read_bytes() for path in host.iterdir()}
        calls = 0

        def write(fd: int, data: bytes) -> None:
            nonlocal calls
            calls += 1
            if calls == 4:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.write(fd, data)

        monkeypatch.setattr(_authority, "write_all", write)
        with pytest.raises(ConfigurationError, match="No space left"):
            issue(ca, HOSTS, host)
        assert before == {path.name: path.read_bytes() for path in host.iterdir()}
        calls = 0
        with pytest.raises(ConfigurationError, match="No space left"):
            issue(ca, HOSTS, host.with_name("new"))
        assert not host.with_name("new").exists()


class TestAuthority:
    def test_it_is_never_overwritten(self, ca: Path) -> None:
        before = (ca / "ca-key.pem").read_bytes()
        with pytest.raises(ConfigurationError, match="never overwritten"):
            new_authority(ca)
        assert (ca / "ca-key.pem").read_bytes() == before

    def test_it_signs_no_other_authority(self, ca: Path) -> None:
        made = x509.load_pem_x509_certificate((ca / "ca-cert.pem").read_bytes())
        constraints = made.extensions.get_extension_for_class(x509.BasicConstraints)
        assert constraints.critical
        assert constraints.value == x509.BasicConstraints(ca=True, path_length=0)

    @pytest.mark.needs("tls")
    @pytest.mark.parametrize("key", [ed25519.Ed25519PrivateKey.generate(), rsa.generate_private_key(65537, 2048)])
    def test_keys_of_other_kinds(self, tmp_path: Path, key: ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey) -> None:
        """As an authority has them that was made by another program."""
        ca, name, now = tmp_path / "ca", x509.Name.from_rfc4514_string("CN=theirs"), datetime.now(UTC)
        made = (
            x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
            .not_valid_before(now)
            .not_valid_after(now + timedelta(days=9))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(key, None if isinstance(key, ed25519.Ed25519PrivateKey) else SHA256())
        )
        ca.mkdir()
        (ca / "ca-cert.pem").write_bytes(made.public_bytes(Encoding.PEM))
        (ca / "ca-key.pem").touch(mode=0o600)
        (ca / "ca-key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        issue(ca, ["host-a"], tmp_path / "tls")
        assert problems(tmp_path / "tls") == ""

    def test_what_cannot_sign(self, ca: Path, host: Path, tmp_path: Path) -> None:
        def refused(why: str, authority: Path = ca, now: datetime | None = None) -> None:
            with pytest.raises(ConfigurationError, match=why):
                issue(authority, ["host-a"], tmp_path / "out", now=now)
            assert not (tmp_path / "out").exists()

        refused("is not there", tmp_path)
        refused("has expired", now=datetime.now(UTC) + timedelta(days=366))
        with pytest.raises(ConfigurationError, match="no host needs"):
            issue(ca, ["host-a"], ca)
        key = ca / "ca-key.pem"
        good = key.read_bytes()
        key.write_bytes((host / "server-key.pem").read_bytes())
        refused("is not the key of the certificate beside it")
        key.write_bytes(
            load_pem_private_key(good, None).private_bytes(
                Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")
            )
        )
        refused("is encrypted")
        key.write_bytes(b"nothing")
        refused("no private key in PEM")
        key.write_bytes(good)
        key.chmod(0o644)
        refused(f"others can read the key: chmod 0640 {key}")
        shutil.copy(host / "server-cert.pem", host / "server-ca")
        for kind in ("cert", "key"):
            shutil.copy(host / f"server-{kind}.pem", host / f"ca-{kind}.pem")
        refused("may not sign others", host)


class TestNames:
    @pytest.mark.parametrize(
        ("text", "why"),
        [
            ("host-a:7777", "a certificate has no port; write host-a"),
            ("*.example.org", "name each of them"),
            ("fe80::1%eth0", "with a scope"),
            ("10.0.0.300", "neither a host name"),
            ("", "neither a host name"),
            ("-a", "neither a host name"),
            ("host a", "neither a host name"),
            ("höst", "neither a host name"),
            ("a" * 64, "neither a host name"),
            (".".join(["a" * 60] * 5), "neither a host name"),
        ],
    )
    def test_what_is_none(self, text: str, why: str) -> None:
        with pytest.raises(ConfigurationError, match=why.replace("*", r"\*")):
            parse_host(text)

    def test_as_they_are_written(self) -> None:
        assert [str(parse_host(text)) for text in ("[fd00:0::1]", "10.0.0.1", "A_b.c")] == [
            "fd00::1",
            "10.0.0.1",
            "a_b.c",
        ]


@pytest.mark.needs("tls")
class TestShow:
    def test_what_is_wrong(self, ca: Path, host: Path, tmp_path: Path) -> None:
        assert problems(host) == problems(ca) == ""
        now = datetime.now(UTC)
        assert problems(host, now + timedelta(days=20)) == ""
        assert "server-cert.pem: CN=host-a ends in 5 days; issue it again" in problems(host, now + timedelta(days=24.5))
        assert "make another authority" in problems(ca, now + timedelta(days=300))
        assert "server-cert.pem: CN=host-a expired 3 days ago" in problems(host, now + timedelta(days=33, hours=2))
        assert "look at this host's clock" in problems(host, now - timedelta(days=1))
        new_authority(tmp_path / "other")
        shutil.copy(tmp_path / "other" / "ca-cert.pem", host)
        (host / "server-key.pem").unlink()
        shutil.copy(host / "client-cert.pem", host / "client-key.pem")
        (host / "client-key.pem").chmod(0o604)
        said = problems(host)
        assert "server-cert.pem: signed by CN=postcopy CA" in said
        assert f"{host}/server-key.pem is not there" in said
        assert "client-key.pem: others can read the key: chmod 0640" in said
        (host / "ca-cert.pem").unlink()
        assert "ca-cert.pem is not there" in problems(host)
        with pytest.raises(ConfigurationError, match="has no certificate"):
            show(tmp_path)

    def test_half_of_a_pair(self, ca: Path, host: Path) -> None:
        key = (host / "server-key.pem").read_bytes()
        issue(ca, HOSTS, host)
        (host / "server-key.pem").write_bytes(key)
        assert problems(host).startswith(f"{host}/server-key.pem cannot be used: ")


class TestCommand:
    @pytest.mark.needs("tls")
    def test_from_nothing_to_certificates(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        ca, out = str(tmp_path / "ca"), str(tmp_path / "tls")
        assert main(["tls", "new-ca", ca, "--name", "our CA", "--days", "60"]) == 0
        assert "authority CN=our CA, until" in capsys.readouterr().out
        assert main(["tls", "issue", ca, "--host", "host-a", "--host", "10.0.0.1", "--out", out]) == 0
        assert f"{out}: host-a, 10.0.0.1, until" in capsys.readouterr().out
        assert main(["tls", "show", out]) == 0
        said, errors = capsys.readouterr()
        assert ("Signed by: CN=our CA" in said, "Names:     host-a, 10.0.0.1" in said, errors) == (True, True, "")
        Path(out, "server-key.pem").chmod(0o666)
        assert main(["tls", "show", out]) == 1
        assert "postcopy: problem: " in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("arguments", "status", "why"),
        [
            (("new-ca", "{}"), 2, "exists already"),
            (("new-ca", "{}/a/b"), 2, "directory {}/a does not exist"),
            (("new-ca", "{}/ca", "--days", "0"), 2, "--days"),
            (("new-ca", "{}/ca", "--name", ""), 2, "1 to 64 characters"),
            (("issue", "{}", "--out", "{}/tls"), 2, "--host"),
            (("issue", "{}", "--host", "a", "--out", "{}/tls"), 2, "ca-cert.pem is not there"),
            (("issue", "{}", "--host", "a", "--out", ""), 2, "an empty name is no file's"),
            (("new-ca", ""), 2, "an empty name is no file's"),
            (("show", "{}"), 2, "has no certificate"),
            (("show", "{}/none"), 2, "No such file"),
            (("shwo", "{}"), 2, "did you mean show?"),
        ],
    )
    def test_mistakes(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], status: int, why: str
    ) -> None:
        assert main(["tls", *(word.format(tmp_path) for word in arguments)]) == status
        said = capsys.readouterr().err
        assert why.format(tmp_path) in said
        assert "Traceback" not in said
