# SPDX-License-Identifier: Apache-2.0
"""TCP sockets before anything is said on them: listening on an address, taking what comes, connecting.

To listen *everywhere* (no host, or ``[::]``) is one socket that takes both families, so that a port, chosen or not, is
the same one for both. Peers of IPv4 are shown with their IPv4 address there.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import os
import socket
from collections.abc import Callable, Sequence

import trio

from postcopy.errors import NO_FILES, PeerError, ResourceError, out_of_files
from postcopy.net.addresses import Address
from postcopy.net.backoff import LogLimit
from postcopy.net.protection import LOCAL, Protection
from postcopy.tls import TlsStream
from postcopy.wire import one_line

NO_ROOM = NO_FILES | {errno.ENOMEM, errno.ENOBUFS}
ACCEPT_PAUSE_S = 0.1
NEXT_ATTEMPT_S = 0.25
"""So long an address has before the next one of the same name is tried beside it (RFC 8305)."""
BACKLOG = 1024  # at most; the system has a limit of its own
SAME_PORT_TRIES = 8
_NOT_HERE = frozenset({errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL})

log = logging.getLogger(__name__)


# ---- listening


async def open_listeners(address: Address, protection: Protection = LOCAL) -> list[trio.SocketListener]:
    """Listens on every address that the host has by that name, at one port; without a host on every address of this
    host, in both families where it has both. `ResourceError` when that is not possible, `ConfigurationError` for what
    `protection` does not allow."""
    families: list[str] = []
    try:
        return await _listeners(address, families, protection)
    except socket.gaierror as error:
        raise ResourceError(
            f"cannot listen on {address}: the name cannot be resolved ({error.strerror})",
            "name an address of this host, or leave it out: :PORT",
        ) from error
    except (OSError, UnicodeError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in NO_FILES:
            raise out_of_files(error.errno, f"cannot listen on {address}") from error
        number = error.errno if isinstance(error, OSError) else None
        reason = os.strerror(number) if number else str(error)
        if number == errno.EAFNOSUPPORT:
            reason = "this host has no IPv6"
        remedy = {
            errno.EADDRINUSE: "choose another port, or end the process that has it: ss -ltnp",
            errno.EADDRNOTAVAIL: "name an address of this host: ip address",
            errno.EACCES: "choose a port from 1024 on",
            errno.EAFNOSUPPORT: f"leave the host out: :{address.port}, or name an address of IPv4",
        }.get(number or 0, "")
        where = f" ({families[-1]})" if families and number != errno.EAFNOSUPPORT else ""
        raise ResourceError(f"cannot listen on {address}{where}: {one_line(reason, 200)}", remedy) from error


async def _listeners(address: Address, families: list[str], protection: Protection) -> list[trio.SocketListener]:
    """`families`: what was tried, where the address does not say it."""
    if _is_everywhere(address.host):
        protection.check(address, ["::"])
        families.append("IPv4 and IPv6")
        try:
            return [await _listener(socket.AF_INET6, "::", address.port, both=True)]
        except OSError as error:
            if address.host or error.errno != errno.EAFNOSUPPORT:
                raise
        families.append("IPv4")
        return [await _listener(socket.AF_INET, "0.0.0.0", address.port)]
    found = await trio.socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    targets = list(dict.fromkeys((family, _numeric(name)) for family, _, _, _, name in found))
    protection.check(address, [host for _, host in targets])
    for attempt in range(SAME_PORT_TRIES):
        try:
            return await _listen_on_each(targets, address.port)
        except OSError as error:
            # A port that was chosen in one family, and is taken in the other one: choose again.
            if error.errno != errno.EADDRINUSE or address.port or attempt == SAME_PORT_TRIES - 1:
                raise
    raise AssertionError


async def _listen_on_each(targets: Sequence[tuple[int, str]], port: int) -> list[trio.SocketListener]:
    """At one port. A name may have addresses that this host does not have, as ``localhost`` without IPv6: one is
    enough."""
    listeners: list[trio.SocketListener] = []
    try:
        for family, host in targets:
            try:
                listeners.append(await _listener(family, host, port))
                port = int(listeners[0].socket.getsockname()[1])
            except OSError as error:
                if error.errno not in _NOT_HERE or (not listeners and (family, host) == targets[-1]):
                    raise
    except BaseException:
        for listener in listeners:
            listener.socket.close()
        raise
    return listeners


async def _listener(family: int, host: str, port: int, *, both: bool = False) -> trio.SocketListener:
    sock = trio.socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not both)
        await sock.bind((host, port))
        sock.listen(BACKLOG)
        return trio.SocketListener(sock)
    except BaseException:
        sock.close()
        raise


def listening_addresses(listeners: Sequence[trio.SocketListener]) -> list[Address]:
    """Where they listen: with port 0 the port that the system chose. A socket for both families has two addresses."""
    addresses = []
    for listener in listeners:
        name = listener.socket.getsockname()
        host, port = _numeric(name), int(name[1])
        if host == "::" and not listener.socket.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY):
            addresses.append(Address("0.0.0.0", port))
        addresses.append(Address(host, port))
    return addresses


def everywhere(addresses: Sequence[Address]) -> str:
    """For people, to whom ``[::]`` is nothing that they could connect to: the families, where these addresses of
    `listening_addresses` are all that this host has; empty for addresses that name it."""
    families = [{"0.0.0.0": "IPv4", "::": "IPv6"}.get(address.host, "") for address in addresses]
    return " and ".join(families) if all(families) else ""


def _is_everywhere(host: str) -> bool:
    try:
        return not host or ipaddress.IPv6Address(host).is_unspecified
    except ValueError:
        return False


async def accept_from(
    listeners: Sequence[trio.SocketListener], what: str, take: Callable[[trio.SocketStream], None]
) -> None:
    """Takes connections until cancelled; the listeners stay the caller's. While none can be taken (descriptors or
    memory are short) it tries again and again, and logs that it cannot accept `what`."""
    # Not trio.serve_listeners: that closes a listener when it ends, and a daemon serves again after a mistake. It
    # would also log each attempt with a traceback, ten times a second while descriptors are short.
    log_limit = LogLimit()

    async def accept(listener: trio.SocketListener) -> None:
        while True:
            try:
                stream = await listener.accept()
            except OSError as error:
                if log_limit.due():
                    log.error("cannot accept %s: %s", what, error.strerror)
                await trio.sleep(ACCEPT_PAUSE_S)  # descriptors may become free
                continue
            take(stream)

    async with trio.open_nursery() as nursery:
        for listener in listeners:
            nursery.start_soon(accept, listener)


# ---- connecting


async def open_stream(address: Address, timeout_s: float, protection: Protection = LOCAL) -> trio.SocketStream:
    """Connects to the first address of that name that answers. `PeerError` when none does, with all that were tried;
    `ResourceError` where this host has no room for a connection, `ConfigurationError` for what `protection` does not
    allow."""
    tried: dict[str, OSError | None] = {}
    try:
        with trio.fail_after(timeout_s):
            hosts = await _resolve(address)
            protection.check(address, hosts)
            stream = await _first_stream(hosts, address.port, tried)
    except trio.TooSlowError:
        raise PeerError(f"{address}: no answer within {timeout_s:g} s{_tried(address, tried)}") from None
    except socket.gaierror as error:
        raise PeerError(f"{address}: the name {address.host!r} cannot be resolved ({error.strerror})") from error
    except (OSError, UnicodeError, ValueError) as error:  # ValueError: a name that IDNA cannot encode
        if isinstance(error, OSError) and error.errno in NO_FILES:
            raise out_of_files(error.errno, f"cannot connect to {address}") from error
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        raise PeerError(f"{address}: {one_line(reason, 200)}") from error
    if stream is None:
        raise _none_answers(address, tried)
    return stream


async def check_reachable(address: Address, protection: Protection) -> None:
    """`ConfigurationError` for an address to connect to that `protection` does not allow. Whether anything answers
    there, and what is wrong with its name, is seen when it is called."""
    with contextlib.suppress(OSError, UnicodeError, ValueError):
        protection.check(address, await _resolve(address))


async def _resolve(address: Address) -> list[str]:
    found = await trio.socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    return [_numeric(name) for *_, name in found]


async def _first_stream(hosts: list[str], port: int, tried: dict[str, OSError | None]) -> trio.SocketStream | None:
    """`tried`: what each host has failed of; None as long as it has not."""
    streams: list[trio.SocketStream] = []

    async def attempt(host: str, failed: trio.Event) -> None:
        try:
            streams.append(await trio.open_tcp_stream(host, port))
            nursery.cancel_scope.cancel()
        except OSError as error:
            tried[host] = _cause(error)
            failed.set()

    try:
        async with trio.open_nursery() as nursery:
            for host in dict.fromkeys(hosts):
                tried[host], failed = None, trio.Event()
                nursery.start_soon(attempt, host, failed)
                with trio.move_on_after(NEXT_ATTEMPT_S):
                    await failed.wait()
    except BaseException:
        for stream in streams:
            stream.socket.close()
        raise
    for stream in streams[1:]:  # which came in the same moment
        stream.socket.close()
    return streams[0] if streams else None


def _cause(error: OSError) -> OSError:
    """What the system said: `open_tcp_stream` wraps it."""
    cause: BaseException | None = error.__cause__
    while isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    return cause if isinstance(cause, OSError) else error


def _none_answers(address: Address, tried: dict[str, OSError | None]) -> PeerError | ResourceError:
    errors = {host: error for host, error in tried.items() if error is not None}
    numbers = {error.errno or 0 for error in errors.values()}
    for number in NO_ROOM & numbers:
        what = f"cannot connect to {address}"
        return out_of_files(number, what) if number in NO_FILES else ResourceError(f"{what}: {os.strerror(number)}")
    hosts: dict[str, list[str]] = {}  # by reason
    for host, error in errors.items():
        reason = os.strerror(error.errno) if error.errno else one_line(str(error), 200)
        hosts.setdefault("connection refused" if error.errno == errno.ECONNREFUSED else reason, []).append(host)
    if len(hosts) == 1:
        text = f"{next(iter(hosts))}{_tried(address, tried)}"
    else:
        text = ", ".join(f"{reason} ({' and '.join(those)})" for reason, those in hosts.items())
    hint = "; start the other side first, with --listen" if errno.ECONNREFUSED in numbers else ""
    return PeerError(f"{address}: {text}{hint}")


def _tried(address: Address, tried: dict[str, OSError | None]) -> str:
    """What the name stood for."""
    return f" (tried {' and '.join(tried)})" if tried and list(tried) != [address.host] else ""


def _numeric(name: tuple[object, ...]) -> str:
    """The host of a socket address. A link-local one means nothing without its interface (``%2``)."""
    host = str(name[0])
    return f"{host}%{name[3]}" if len(name) == 4 and name[3] and "%" not in host else host


def address_of(stream: trio.SocketStream | TlsStream) -> Address:
    """Where the other end is. `PeerError` when it is already gone."""
    try:
        name = stream.socket.getpeername()
    except OSError as error:
        raise PeerError("the connection was closed") from error
    if not isinstance(name, tuple):
        return Address("local", 0)
    host = _numeric(name)
    return Address(host.removeprefix("::ffff:") if "." in host else host, int(name[1]))
