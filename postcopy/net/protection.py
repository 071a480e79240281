# SPDX-License-Identifier: Apache-2.0
"""What protects the connections with other hosts: TLS, or that there is no other host.

On loopback a connection may be plain. Beyond it one without TLS is refused, unless the user has said that it is meant:
before anything listens or connects, at every address that a name stands for, and again at each connection, since an
address may change while a migration lasts.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from postcopy.errors import ConfigurationError
from postcopy.net.addresses import Address
from postcopy.tls import Credentials

HOW_TO_PROTECT = (
    "make certificates with `postcopy tls new-ca CA`, and for each host `postcopy tls issue CA --host NAME --out DIR`,"
    " then say --tls DIR on both hosts (in Python: tls=DIR); or --insecure (insecure=True) on a network that you trust"
)


@dataclass(frozen=True)
class Protection:
    """Without any: of connections within this host."""

    credentials: Credentials | None = None  # for TLS; None: connections are plain
    insecure: bool = False  # ... also beyond this host

    @classmethod
    def of(
        cls, tls: str | None = None, hostname: str | None = None, authz: Sequence[str] = (), insecure: bool = False
    ) -> Protection:
        """What a user has asked for. `tls`: the directory of certificates, of which nothing is read yet; `hostname` is
        the route's. `ConfigurationError` for what does not go together, and for a pattern that makes no sense."""
        if tls is None:
            for given, name in ((authz, "--tls-authz"), (hostname, "--tls-hostname")):
                if given:
                    raise ConfigurationError(f"{name} goes with --tls")
            return cls(insecure=insecure)
        if insecure:
            raise ConfigurationError(
                "--insecure does not go with --tls, which protects all connections: say one of both"
            )
        return cls(Credentials(tls, authz))

    async def load(self, *, listens: bool = False, connects: bool = False) -> None:
        """Reads what these roles need, to find at the start what is wrong with it. Errors as `Credentials.context`."""
        if self.credentials is not None:
            for server, wanted in ((True, listens), (False, connects)):
                if wanted:
                    await self.credentials.context(server=server)

    async def reload(self) -> None:
        """See `Credentials.reload`."""
        if self.credentials is not None:
            await self.credentials.reload()

    def check(self, address: Address, hosts: Iterable[str]) -> None:
        """`ConfigurationError` where a connection would be plain that leaves this host. `hosts`: what the address
        stands for, as numbers."""
        if self.credentials is not None or self.insecure:
            return
        if beyond := [host for host in hosts if not is_loopback(host)]:
            meant = f" ({beyond[0]})" if beyond[0] != address.host and address.host else ""
            raise ConfigurationError(
                f"{address}{meant}: refused without TLS: whoever is on the network could read the memory, change it,"
                f" and send machines; {HOW_TO_PROTECT}"
            )


LOCAL = Protection()


def is_loopback(host: str) -> bool:
    """Whether this address, a number, leads to this host only."""
    number = ipaddress.ip_address(host.partition("%")[0])
    mapped = number.ipv4_mapped if isinstance(number, ipaddress.IPv6Address) else None
    return (mapped or number).is_loopback
