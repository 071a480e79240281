# SPDX-License-Identifier: Apache-2.0
"""What a small site needs to have TLS: an authority of its own, and certificates for its hosts.

An authority is a directory with ``ca-cert.pem`` and ``ca-key.pem``. What it issues for a host is a directory that
``--tls`` takes, and libvirt and QEMU too: ``ca-cert.pem``, and a certificate and a key for each of both roles,
``server-*`` (who listens) and ``client-*`` (who connects). Serial numbers are random, so that there is no state but
these files.

To issue again into the same directory is how certificates are renewed. That replaces two pairs of files, when all of
them have been written; between the two renames of a pair a reader finds a certificate and a key that do not belong
together, and has to read again. The owner, the group and the mode of each file stay. Whom a host trusts stays too:
``ca-cert.pem`` may have several authorities in it, and is written only where there is none.

This is the only module that imports ``cryptography``. Everything here blocks on I/O, for milliseconds.
"""

from __future__ import annotations

import os
import re
import secrets
import shlex
import stat
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from socket import gethostname
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import dsa, ec, rsa
from cryptography.hazmat.primitives.asymmetric.types import (
    CertificateIssuerPrivateKeyTypes,
    CertificateIssuerPublicKeyTypes,
)
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from postcopy._files import explain_unwritable, locked_directory, new_directory, replacing, write_all, write_new
from postcopy.errors import ConfigurationError, PostcopyError
from postcopy.tls._credentials import CA as CA_CERT
from postcopy.tls._credentials import _read, _read_file

CA_KEY: Final = "ca-key.pem"
ROLES: Final = {"server": ExtendedKeyUsageOID.SERVER_AUTH, "client": ExtendedKeyUsageOID.CLIENT_AUTH}

CA_DAYS: Final = 365
HOST_DAYS: Final = 30
CLOCK_SKEW: Final = timedelta(minutes=10)
"""A certificate is valid from so long before it was made, for hosts whose clocks are slow."""
SOON: Final = 0.2
"""When no more than this part of its time is left, `show` says that a certificate is to be made anew."""

_MAX_COMMON_NAME = 64  # ub-common-name of RFC 5280
_MAX_HOSTS = 100
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?", re.ASCII)

HostName = str | IPv4Address | IPv6Address


@dataclass(frozen=True)
class Certificate:
    """What a certificate says, for people."""

    path: str
    subject: str  # as RFC 4514 (which has replaced 2253) writes it
    issuer: str
    names: tuple[str, ...]  # DNS names, addresses and URIs
    begins: datetime
    ends: datetime
    sha256: str


def parse_host(text: str) -> HostName:
    """A DNS name or an address, as a certificate can have it. `ConfigurationError` for anything else."""
    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    try:
        address = ip_address(bare)
    except ValueError:
        pass
    else:
        if isinstance(address, IPv6Address) and address.scope_id is not None:
            raise ConfigurationError(f"{text!r}: an address with a scope means another host elsewhere; name the host")
        return address
    name = bare.lower().removesuffix(".")
    labels = name.split(".")
    if len(name) <= 253 and all(map(_LABEL.fullmatch, labels)) and not labels[-1].isdigit():
        return name
    if re.fullmatch(r".+:\d+", bare):
        raise ConfigurationError(f"{text!r}: a certificate has no port; write {bare.rpartition(':')[0]}")
    if "*" in bare:
        raise ConfigurationError(f"{text!r}: a certificate is for hosts with a name; name each of them")
    raise ConfigurationError(f"{text!r} is neither a host name, as vm1.example.org, nor an address")


def new_authority(
    directory: str | Path, name: str | None = None, days: int = CA_DAYS, *, now: datetime | None = None
) -> Certificate:
    """Makes an authority in a new directory, from `now` on. `ConfigurationError`: it is there already, or cannot be
    made."""
    now = _whole_seconds(now)
    if name is None:  # of which there is no second one: a chain is followed by names
        name = f"postcopy CA {gethostname()[:30]} {now:%Y-%m-%d} {secrets.token_hex(3)}"
    if not (name.isprintable() and 0 < len(name) <= _MAX_COMMON_NAME):
        raise ConfigurationError(f"the name of an authority has 1 to {_MAX_COMMON_NAME} characters: {name[:80]!r}")
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    certificate = (
        _certificate(subject, subject, key.public_key(), key.public_key(), now, now + timedelta(days=days))
        # It signs hosts only: no other authority.
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(authority=True), critical=True)
        .sign(key, SHA256())
    )
    try:
        with new_directory(str(directory)) as part:
            for file, data, mode in (
                (CA_KEY, _key_pem(key), 0o600),
                (CA_CERT, certificate.public_bytes(Encoding.PEM), 0o644),
            ):
                with write_new(part / file) as fd:
                    write_all(fd, data)
                    os.fchmod(fd, mode)
    except FileExistsError as error:
        raise ConfigurationError(
            f"{directory} exists already: an authority is never overwritten; name a directory that does not exist"
        ) from error
    except OSError as error:
        raise ConfigurationError(f"{directory}: {explain_unwritable(error, str(Path(directory).parent))}") from error
    return _describe(Path(directory, CA_CERT), certificate)


def issue(
    authority: str | Path,
    hosts: Iterable[str],
    out: str | Path,
    days: int = HOST_DAYS,
    *,
    now: datetime | None = None,
) -> list[Certificate]:
    """Makes, or renews, what a host with these names needs, in the directory `out`, which may be there: a certificate
    for each role, valid from `now` on but not longer than the authority. `ConfigurationError` says what cannot be."""
    now = _whole_seconds(now)
    names = list(dict.fromkeys(map(parse_host, hosts)))
    if not 0 < len(names) <= _MAX_HOSTS:
        raise ConfigurationError(f"a certificate has 1 to {_MAX_HOSTS} names, not {len(names)}")
    ca, ca_key = _load_authority(Path(authority), now)
    directory = Path(out)
    if directory.resolve() == Path(authority).resolve():
        raise ConfigurationError(f"{out} is the authority's own directory, whose key no host needs; name another one")
    subject = x509.Name(
        [x509.NameAttribute(NameOID.COMMON_NAME, str(names[0]))] if len(str(names[0])) <= _MAX_COMMON_NAME else []
    )
    alternatives = x509.SubjectAlternativeName(
        [x509.DNSName(name) if isinstance(name, str) else x509.IPAddress(name) for name in names]
    )
    files, issued = [], []
    for role, purpose in ROLES.items():
        key = ec.generate_private_key(ec.SECP256R1())
        ends = min(now + timedelta(days=days), ca.not_valid_after_utc)
        certificate = (
            _certificate(subject, ca.subject, key.public_key(), ca_key.public_key(), now, ends)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(authority=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(alternatives, critical=not subject.rdns)  # RFC 5280, 4.2.1.6
            # (the other kinds have a hash of their own)
            .sign(
                ca_key,
                SHA256()
                if isinstance(ca_key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | dsa.DSAPrivateKey)
                else None,
            )
        )
        files += [
            (f"{role}-key.pem", _key_pem(key), 0o600),
            (f"{role}-cert.pem", certificate.public_bytes(Encoding.PEM), 0o644),
        ]
        issued.append(_describe(directory / f"{role}-cert.pem", certificate))
    made = not directory.exists()
    try:
        directory.mkdir(mode=0o755, exist_ok=True)
        if not _trusts(directory / CA_CERT, ca):
            files.append((CA_CERT, ca.public_bytes(Encoding.PEM), 0o644))  # (the last one is there first)
        # Two that issue at once, or a full disk, would leave pairs that do not belong together.
        with locked_directory(directory), ExitStack() as written:
            for file, data, mode in files:
                written.enter_context(_replacing(directory / file, data, mode))
    except BlockingIOError as error:
        raise ConfigurationError(f"{out}: another process issues certificates into this directory") from error
    except OSError as error:
        if made:
            with suppress(OSError):  # it was not, or another process has something there by now
                directory.rmdir()
        raise ConfigurationError(f"{out}: {explain_unwritable(error, str(out))}") from error
    return issued


def show(directory: str | Path, *, now: datetime | None = None) -> tuple[list[Certificate], list[str]]:
    """The certificates in a directory for ``--tls``, and what is wrong with them or their keys. `ConfigurationError`
    when there is none."""
    now = _whole_seconds(now)
    directory = Path(directory)
    try:
        os.stat(directory / ".")  # for which it must be one that this user may look into
    except OSError as error:
        raise ConfigurationError(f"{directory}: {error.strerror}") from error
    loaded = {
        name: _load_certificates(directory / f"{name}-cert.pem")
        for name in ("ca", *ROLES)
        if os.path.lexists(directory / f"{name}-cert.pem")
    }
    if not loaded:
        raise ConfigurationError(f"{directory} has no certificate, as {CA_CERT} or server-cert.pem")
    # Of a host's file the first one is the host's; others may be between that and the authority.
    own = [(name, chain if name == "ca" else chain[:1]) for name, chain in loaded.items()]
    certificates = [_describe(directory / f"{name}-cert.pem", one) for name, some in own for one in some]
    return certificates, list(_problems(directory, loaded, now))


# ---- private


def _problems(directory: Path, loaded: dict[str, list[x509.Certificate]], now: datetime) -> Iterator[str]:
    if loaded.keys() == {"ca"} and not (directory / CA_KEY).exists():
        yield "there is no certificate for a host: server-cert.pem to listen, client-cert.pem to connect"
    for name, chain in loaded.items():
        file = f"{name}-cert.pem"
        for one in chain:
            left = one.not_valid_after_utc - now
            if left < (one.not_valid_after_utc - one.not_valid_before_utc) * SOON:
                what = "make another authority (docs/tls.md)" if name == "ca" else "issue it again"
                ends = (
                    f"ends in {_approximately(left)}" if left > timedelta() else f"expired {_approximately(-left)} ago"
                )
                yield f"{file}: {one.subject.rfc4514_string()} {ends}; {what}"
            elif now < one.not_valid_before_utc:
                begins = f"{one.not_valid_before_utc:%Y-%m-%d %H:%M} UTC"
                yield f"{file}: not valid before {begins}; look at this host's clock"
        try:
            if name in ROLES:
                _read(str(directory), name == "server", None)  # as a process does that is given them
            elif os.path.lexists(directory / CA_KEY):
                _load_key(directory / CA_KEY, chain[0])
        except PostcopyError as error:
            yield str(error)
        if name in ROLES:
            yield from _problems_of_host(file, name, chain, loaded.get("ca", []))


def _problems_of_host(
    file: str, role: str, chain: list[x509.Certificate], authorities: list[x509.Certificate]
) -> Iterator[str]:
    if authorities and not any(_signed_by(chain[-1], one) for one in authorities):
        yield f"{file}: signed by {chain[-1].issuer.rfc4514_string()}, of which {CA_CERT} has no such certificate"
    try:
        allowed = chain[0].extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return  # any purpose
    if not {ROLES[role], ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE}.intersection(allowed):
        yield f"{file}: its extended key usage does not allow the role of a TLS {role}"


def _signed_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return certificate == authority
    return True


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    issuer_key: CertificateIssuerPublicKeyTypes,
    now: datetime,
    ends: datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(ends)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
    )


def _usage(*, authority: bool) -> x509.KeyUsage:
    """An authority signs certificates (and lists of revoked ones), a host the handshake."""
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _load_authority(directory: Path, now: datetime) -> tuple[x509.Certificate, CertificateIssuerPrivateKeyTypes]:
    certificate = _load_certificates(directory / CA_CERT)[0]
    key = _load_key(directory / CA_KEY, certificate)
    try:
        is_authority = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        is_authority = False
    if not is_authority:
        raise ConfigurationError(f"{directory / CA_CERT} is no authority's certificate: it may not sign others")
    if now >= certificate.not_valid_after_utc:
        raise ConfigurationError(
            f"{directory / CA_CERT} has expired, at {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC;"
            " make another authority (docs/tls.md says how to change to it)"
        )
    return certificate, key


def _load_certificates(path: Path) -> list[x509.Certificate]:
    data = _read_file(str(path))
    try:
        return x509.load_pem_x509_certificates(data)
    except ValueError as error:
        raise ConfigurationError(f"{path} has no certificate in PEM that can be read") from error


def _load_key(path: Path, certificate: x509.Certificate) -> CertificateIssuerPrivateKeyTypes:
    """The key of a certificate, which nobody else can read."""
    data = _read_file(str(path), private=True)
    try:
        key = load_pem_private_key(data, None)
    except TypeError as error:
        raise ConfigurationError(
            f"{path}: the key is encrypted; decrypt it: openssl pkey -in {shlex.quote(str(path))} -out NEW"
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigurationError(f"{path} has no private key in PEM that can be read") from error
    form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if key.public_key().public_bytes(*form) != certificate.public_key().public_bytes(*form):
        raise ConfigurationError(
            f"{path} is not the key of the certificate beside it, {certificate.subject.rfc4514_string()}"
        )
    return key  # type: ignore[return-value]  # one that cannot sign (X25519) is no certificate's


def _trusts(path: Path, ca: x509.Certificate) -> bool:
    """False: there is no such file. `ConfigurationError`: it trusts others, and not this one."""
    if not path.exists():
        return False
    if ca not in _load_certificates(path):
        raise ConfigurationError(
            f"{path} does not trust this authority, {ca.subject.rfc4514_string()}; name another directory, or change"
            " to this authority as docs/tls.md says"
        )
    return True


@contextmanager
def _replacing(path: Path, data: bytes, mode: int) -> Iterator[None]:
    """`path` is this when the block has ended."""
    old = path.stat() if path.exists() else None
    if old is not None:
        mode = stat.S_IMODE(old.st_mode) & (mode | 0o040)
    with replacing(str(path), mode) as fd:
        write_all(fd, data)
        if old is not None and (old.st_uid, old.st_gid) != (os.geteuid(), os.getegid()):
            os.fchown(fd, old.st_uid, old.st_gid)
        yield


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _describe(path: str | Path, certificate: x509.Certificate) -> Certificate:
    try:
        alternatives = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        names: tuple[str, ...] = ()
    else:
        kinds = (x509.DNSName, x509.IPAddress, x509.UniformResourceIdentifier)
        names = tuple(str(name) for kind in kinds for name in alternatives.get_values_for_type(kind))
    return Certificate(
        path=str(path),
        subject=certificate.subject.rfc4514_string(),
        issuer=certificate.issuer.rfc4514_string(),
        names=names,
        begins=certificate.not_valid_before_utc,
        ends=certificate.not_valid_after_utc,
        sha256=certificate.fingerprint(SHA256()).hex(),
    )


def _whole_seconds(now: datetime | None) -> datetime:
    return (now or datetime.now(UTC)).replace(microsecond=0)


def _approximately(time: timedelta) -> str:
    for seconds, unit in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if (count := int(time.total_seconds() // seconds)) >= (2 if seconds > 60 else 1):
            return f"{count} {unit}{'s' * (count != 1)}"
    return "less than a minute"
