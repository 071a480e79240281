# SPDX-License-Identifier: Apache-2.0
"""Where hosts are: addresses, the file that names a peer, and the route to a peer that may move."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
from collections.abc import Callable
from dataclasses import dataclass

import trio

from postcopy._files import read_regular
from postcopy.errors import ConfigurationError
from postcopy.wire import one_line

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Address:
    host: str  # name or number, without brackets; empty to listen everywhere
    port: int

    @property
    def network(self) -> str:
        """What is counted as one host, of a number: for IPv6 its /64, in which one host may have as many addresses as
        it likes."""
        with contextlib.suppress(ValueError):
            number = ipaddress.IPv6Address(self.host.partition("%")[0])
            return str(ipaddress.IPv6Network((int(number) >> 64 << 64, 64)))
        return self.host

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host or '*'}:{self.port}"


def parse_address(text: str, *, listening: bool = False) -> Address:
    """``HOST:PORT`` or ``[IPV6]:PORT``. To listen, HOST may be empty or ``*`` and PORT 0 (the system chooses)."""

    def unusable(reason: str) -> ConfigurationError:
        return ConfigurationError(
            f"{one_line(text, 80)!r} is not an address: {reason};"
            " write HOST:PORT, as in 192.0.2.7:7777 or [2001:db8::7]:7777"
        )

    host, colon, port_text = text.rpartition(":")
    if listening and text.isascii() and text.isdigit():
        raise unusable(f"a port alone is :{text}")
    if not colon or text.endswith("]"):
        raise unusable("it has no port")
    if host.startswith("["):
        if not host.endswith("]"):
            raise unusable("the bracket is not closed")
        host = host[1:-1]
        number, _, interface = host.partition("%")
        try:
            lacks_interface = ipaddress.IPv6Address(number).is_link_local and not interface
        except ValueError:
            raise unusable(f"{host!r} is not an IPv6 address") from None
        if lacks_interface:
            raise ConfigurationError(
                f"{number} is a link-local address, which needs the interface that leads there: [{number}%eth0]:PORT"
            )
    elif ":" in host:
        raise unusable("an IPv6 address needs brackets")
    if not (port_text.isascii() and port_text.isdigit()):
        raise unusable(f"the port {port_text!r} is not a number")
    port = int(port_text) if len(port_text) < 6 else 65536
    if port > 65535:
        raise unusable("a port is at most 65535")
    if listening:
        return Address("" if host == "*" else host, port)
    if not port:
        raise unusable("port 0 cannot be connected to")
    if host in ("", "*"):
        raise unusable("it has no host")
    if not host.isprintable() or " " in host:
        raise unusable("the host has characters that no host name has")
    return Address(host, port)


MAX_PEER_FILE_BYTES = 4096


def read_peer_file(path: str) -> Address:
    """The HOST:PORT that is all a file holds. `ConfigurationError` when it cannot be read or says something else."""
    try:
        return parse_address(read_regular(path, MAX_PEER_FILE_BYTES).decode("utf-8", "replace").strip())
    except (OSError, ValueError, ConfigurationError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigurationError(f"--peer-file {path}: {reason}") from error


class Route:
    """Where the peer listens, for a side that connects. It may change while a migration lasts: that disturbs no
    connection, the next attempt to come back goes there. Trio thread only."""

    def __init__(
        self, address: Address, look_up: Callable[[], Address] | None = None, tls_hostname: str | None = None
    ) -> None:
        """`look_up` says where the peer is now, or raises `ConfigurationError`. `tls_hostname`: the name in the peer's
        certificate, where it is not the host of the address."""
        self.address = address
        self._tls_hostname = tls_hostname
        self._named = address  # as the user has written it; `address` may be what that resolved to
        self._look_up = look_up
        self._changed = trio.Event()

    @property
    def tls_name(self) -> str:
        """What the peer's certificate must name: a host as the user has written it, not what that resolved to."""
        return self._tls_hostname or self._named.host.partition("%")[0]

    def change(self, address: Address, tls_hostname: str | None = None) -> None:
        """From the next attempt on, which is made at once."""
        self._named = address
        self._tls_hostname = tls_hostname or self._tls_hostname
        if address != self.address:
            log.warning("the peer is now looked for at %s", address)
            self.address = address
        self.wake()

    def wake(self) -> None:
        """Has the next attempt made at once."""
        self._changed.set()
        self._changed = trio.Event()

    def refresh(self, *, by_user: bool = False) -> None:
        """Looks up where the peer is. What cannot be understood is logged, and the old address stays. `by_user`: the
        user has asked for it, so a name is resolved anew even if it is the same one."""
        if self._look_up is None:
            return
        try:
            address = self._look_up()
        except ConfigurationError as error:
            log.warning("%s; the peer is looked for at %s as before", error, self.address)
            return
        if by_user or address != self._named:
            self.change(address)

    def answered(self, asked: Address, address: Address) -> None:
        """The peer is there: this very address from now on, not the name, which might mean another host next time.
        Unless another one was named while it was asked."""
        if asked == self.address:
            self.address = address

    async def pause(self, seconds: float) -> bool:
        """Sleeps, but not longer than the address stays the same. True when it has changed."""
        with trio.move_on_after(seconds):
            await self._changed.wait()
            return True
        return False
