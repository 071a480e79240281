# SPDX-License-Identifier: Apache-2.0
"""What a laboratory is to look like: names, addresses, sizes; and the words of the command line for them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from postcopy import units
from postcopy.errors import ConfigurationError

MAX_HOSTS = 64
MIN_MTU, MAX_MTU = 1280, 65535  # IPv6 needs the least (RFC 8200), veth(4) takes the most
MIN_RATE = 1000  # bytes a second
MAX_RATE = (1 << 32) - 1  # what tc-tbf(8) has room for
MAX_DELAY_US = 60_000_000
DEFAULT_NAME = "lab"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,39}")


@dataclass(frozen=True)
class HostPlan:
    """One host: `name` is also its port's on the switch. Both addresses are on the laboratory's own network."""

    name: str
    ipv4: str
    ipv6: str
    mac: str


@dataclass(frozen=True)
class LabPlan:
    """`ConfigurationError` when it makes no sense. The addresses are the same in every laboratory: no two meet."""

    name: str = DEFAULT_NAME
    hosts: int = 2
    mtu: int = 1500
    rate: int | None = None  # bytes a second, of every cable and direction; None: as fast as it goes

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigurationError(
                f"{self.name!r} is no name for a laboratory: up to 40 of a-z, 0-9, '.', '_', '-', beginning with one"
                " of the first two"
            )
        if not 1 <= self.hosts <= MAX_HOSTS:
            raise ConfigurationError(f"a laboratory has 1 to {MAX_HOSTS} hosts, not {self.hosts}")
        if not MIN_MTU <= self.mtu <= MAX_MTU:
            raise ConfigurationError(f"an MTU is from {MIN_MTU} to {MAX_MTU}, not {self.mtu}")

    @property
    def host_plans(self) -> tuple[HostPlan, ...]:
        # Unique local addresses (RFC 4193) and locally administered MACs, with "pc" in both.
        return tuple(
            HostPlan(f"h{n}", f"10.77.0.{n}", f"fd70:6300::{n:x}", f"02:70:63:00:00:{n:02x}")
            for n in range(1, self.hosts + 1)
        )


PREFIX4, PREFIX6 = 24, 64


def parse_rate(text: str) -> int | None:
    """Bytes a second of every cable; None for ``off``. See `units.parse_rate`."""
    return units.parse_rate(text, MIN_RATE, MAX_RATE) or None


def format_rate(rate: int | None) -> str:
    """What `parse_rate` reads, of the same value."""
    return "off" if rate is None else units.format_rate(rate)


def parse_delay_us(text: str) -> int:
    """Microseconds, of ``5ms`` or ``0.005s``; 0 for ``off``. A number alone could be any of them."""
    if text == "off":
        return 0
    delay_us = round(units.parse_seconds(text, high=MAX_DELAY_US / 1e6) * 1e6)
    if delay_us and text[-1].isdigit():
        raise ConfigurationError(f"{text!r} has no unit; write {text}ms or {text}s")
    return delay_us
