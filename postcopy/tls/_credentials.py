# SPDX-License-Identifier: Apache-2.0
"""A directory of certificates, as QEMU and libvirt have them, and what OpenSSL makes of it.

``ca-cert.pem``: who signs peers. ``server-cert.pem`` and ``server-key.pem``: of a host that listens.
``client-cert.pem`` and ``client-key.pem``: of one that connects. Only the files of a role that is taken are needed.

Before each connection the files are looked at (device, inode, size, time of the last change), and read again when they
are others: certificates can be renewed while a migration is paused. Those that cannot be used, as in the middle of a
renewal, are logged, and the ones that were read last stay in use; at the start they are an error. Connections that are
made at the same time share a look: it waits for a worker thread, on a busy host for longer than a handshake takes.

A private key must belong to this user or to root, and nobody else may read it, but for a group that root lets. No file
may be one that everybody can write: who writes ``ca-cert.pem`` says who is let in.

The directory may be on a file system that is slow, or hangs. Where something was read before, a connection waits for
it `LOOK_TIMEOUT_S`, less than a peer waits for a handshake, and goes on with that: what such a look finds is used by
the next connection. A look that takes more than `READ_TIMEOUT_S` is said to hang. One thread at most is left behind in
the kernel.
"""

from __future__ import annotations

import logging
import math
import os
import shlex
import stat
import time
from collections.abc import Sequence

import outcome
import trio

from postcopy._blocking import no_thread
from postcopy._files import absolute, explain_bad_name, open_regular
from postcopy.errors import ConfigurationError, PostcopyError, ResourceError
from postcopy.tls._connection import Context, TlsStream
from postcopy.tls._names import Authorisation

CA = "ca-cert.pem"
ROLES = {True: "server", False: "client"}  # by whether it listens
HOW_TO_ISSUE = "`postcopy tls new-ca CA` and `postcopy tls issue CA --host NAME --out DIR` make what is needed"
MAX_FILE_BYTES = 1 << 20  # the certificates that a distribution trusts are a fourth of it
READ_TIMEOUT_S = 5.0
LOOK_TIMEOUT_S = 0.25

log = logging.getLogger(__name__)

Identity = tuple[tuple[int, ...], ...]
_Found = tuple[Context, Identity]


class Credentials:
    """Trio thread only."""

    def __init__(self, directory: str | os.PathLike[str], authz: Sequence[str] = ()) -> None:
        """Nothing is read yet. `ConfigurationError` for a pattern of `authz` that makes no sense."""
        if reason := explain_bad_name(os.fspath(directory)):
            raise ConfigurationError(f"tls: {reason}")
        self.directory = absolute(os.fspath(directory))
        self.authorisation = Authorisation(authz)
        self._read: dict[bool, _Found] = {}  # by role
        self._problems: dict[bool, str] = {}  # that were logged
        self._looks = 0  # at the files, that have begun
        self._looked: dict[bool, int] = {}  # by role: the number of the last one that is done
        self._reading = trio.Lock()
        self._thread = trio.CapacityLimiter(1)
        self._turns = trio.Lock()  # of handshakes with those who connect
        self._found: dict[bool, outcome.Maybe[_Found]] = {}  # by role: by a look, and not yet used
        self._began_s = math.inf  # the look that is under way, where there is one; by time.monotonic

    def not_after_s(self, *, server: bool) -> int | None:
        """When the certificate of this role ends, in seconds since 1970; None for a role that has not been taken."""
        return self._read[server][0].not_after_s if server in self._read else None

    async def reload(self) -> None:
        """Reads again what is in use, as after SIGHUP. What cannot be used of it is logged, also where that was done
        before; connections are then made with what was read last."""
        for server in list(self._read):
            async with self._reading:
                self._found.pop(server, None)  # before it was asked for
                self._problems.pop(server, None)
                try:
                    await self._look(server)
                except PostcopyError as error:
                    self._warn(server, error)

    async def context(self, *, server: bool) -> Context:
        """For the next connection; `server`: of the side that listens. `ConfigurationError` for files that are not
        there or cannot be used; `ResourceError` for a host without OpenSSL, and for a file system that does not answer.
        None of them where there are certificates that were good before."""
        asked = self._looks
        with trio.move_on_after(LOOK_TIMEOUT_S if server in self._read else math.inf):
            async with self._reading:
                if server not in self._read or self._looked.get(server, 0) <= asked:  # none has begun since
                    look = self._looks = self._looks + 1
                    try:
                        if server in self._read:
                            try:
                                self._use_found(server)
                            except PostcopyError as error:  # of a look some time ago: the files may be good by now
                                self._warn(server, error)
                        await self._look(server)
                        self._problems.pop(server, None)
                    except PostcopyError as error:
                        if server not in self._read:
                            raise
                        self._warn(server, error)
                    self._looked[server] = look
        return self._read[server][0]

    def _warn(self, server: bool, error: PostcopyError) -> None:
        """Once of each problem."""
        if self._problems.get(server) != str(error):
            log.warning("%s; the certificates that were read before stay in use", error)
        self._problems[server] = str(error)

    async def accept(self, stream: trio.SocketStream) -> TlsStream:
        """A connection that was accepted, with its handshake done. `TlsError`, `trio.BrokenResourceError`; those of
        `context`. Unless it succeeds the stream is the caller's to close. Cancellable; wants a deadline.

        Anybody may begin one, which makes this host sign: milliseconds with an RSA key of 4096 bits. They take turns,
        so that no other task waits for more than one."""
        tls = TlsStream(stream.socket, await self.context(server=True))
        await tls.handshake(self._turns)
        return tls

    async def _look(self, server: bool) -> None:
        """Uses what the files are now, with `_reading`. Cancelled, it leaves what it finds in `_found`."""

        def look() -> None:
            self._began_s = time.monotonic()
            self._found[server] = outcome.capture(_read, self.directory, server, self._read.get(server))
            self._began_s = math.inf

        if time.monotonic() - self._began_s < READ_TIMEOUT_S:
            with trio.move_on_after(READ_TIMEOUT_S):
                try:
                    # Not on a thread of a migration, which has few: what hangs here must end no machine.
                    await trio.to_thread.run_sync(look, limiter=self._thread, abandon_on_cancel=True)
                except (RuntimeError, MemoryError) as error:
                    raise no_thread("reading certificates") from error
                self._use_found(server)
                return
        raise ResourceError(
            f"{self.directory}: its file system has not answered within {READ_TIMEOUT_S:g} s",
            "see why (a network file system whose server is gone?), or keep the certificates on a disk of this host"
            " and name their directory with --tls",
        )

    def _use_found(self, server: bool) -> None:
        if server not in self._found:
            return
        try:
            found = self._found.pop(server).unwrap()
        except (RuntimeError, MemoryError) as error:
            raise ResourceError(f"{self.directory}: cannot be read: {error!r}") from error
        renewed = server in self._read
        if renewed and found[1] == self._read[server][1]:
            return  # two looks may bring the same; sessions go with a context
        self._read[server] = found
        if found[0].not_after_s <= time.time():
            log.warning("%s: the %s's certificate has expired: issue it again", self.directory, ROLES[server])
        if renewed:
            log.info("%s: the certificates for the %s were read again", self.directory, ROLES[server])


def _read(directory: str, server: bool, known: _Found | None) -> _Found:
    """In a worker thread. What is known where the files are those of that."""
    role = ROLES[server]
    paths = [os.path.join(directory, name) for name in (CA, f"{role}-cert.pem", f"{role}-key.pem")]
    ca, certificate, key = paths
    identity = tuple(map(_identity, paths))
    if known is not None and identity == known[1]:
        return known
    pem = [_read_file(ca), _read_file(certificate), _read_file(key, private=True)]
    for path, what, data in zip(paths, ("CERTIFICATE", "CERTIFICATE", "PRIVATE KEY"), pem, strict=True):
        if f"{what}-----".encode() not in data:  # OpenSSL says "unsupported" of a key, and not of which file
            raise ConfigurationError(f"{path} has no {what.lower()} in PEM")
    if b"ENCRYPTED" in pem[2]:
        raise ConfigurationError(
            f"{key}: the key is encrypted, and nobody is here who could type its passphrase; decrypt it: openssl pkey"
            f" -in {shlex.quote(key)} -out NEW"
        )
    # (of a file that was replaced since, the next connection reads again)
    return Context(server, *pem, names=(ca, certificate, key)), identity


def _identity(path: str) -> tuple[int, ...]:
    try:
        found = os.stat(path)
    except OSError:
        return ()  # reading it says why
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_mode, found.st_uid


def _read_file(path: str, *, private: bool = False) -> bytes:
    try:
        fd = open_regular(path)
        with os.fdopen(fd, "rb") as file:
            (_check_private if private else _check_public)(path, os.fstat(fd))
            data = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError as error:
        raise ConfigurationError(f"{path} is not there; {HOW_TO_ISSUE}") from error
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}") from error
    if len(data) > MAX_FILE_BYTES:
        raise ConfigurationError(f"{path}: more than {MAX_FILE_BYTES} bytes are no certificate")
    return data


def _check_private(path: str, found: os.stat_result) -> None:
    user, name = os.geteuid(), shlex.quote(path)
    if found.st_uid not in (0, user):
        raise ConfigurationError(
            f"{path}: the key belongs to user {found.st_uid}, who can change it: chown {user} {name}"
        )
    allowed, mode = (0o640, "0640") if found.st_uid == 0 else (0o600, "0600")
    if extra := stat.S_IMODE(found.st_mode) & 0o177 & ~allowed:
        why = "others can read the key" if extra & 0o044 else "others can use the key's file"
        raise ConfigurationError(f"{path}: {why}: chmod {mode} {name}")


def _check_public(path: str, found: os.stat_result) -> None:
    if found.st_mode & stat.S_IWOTH:
        raise ConfigurationError(f"{path}: everybody can change it: chmod o-w {shlex.quote(path)}")
