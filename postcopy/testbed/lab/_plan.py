# SPDX-License-Identifier: Apache-2.0
"""What a laboratory is to look like: names, addresses, sizes; and the words of the command line for them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal

from postcopy.errors import ConfigurationError
from postcopy.memory import parse_size

MAX_HOSTS = 64
MIN_MTU, MAX_MTU = 1280, 65535  # IPv6 needs the least (RFC 8200), veth(4) takes the most
MIN_RATE = 1000  # bytes a second
MAX_RATE = (1 << 32) - 1  # what tc-tbf(8) has room for
MAX_DELAY_US = 60_000_000
DEFAULT_NAME = "lab"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,39}")
_RATE = re.compile(r"([0-9]+(?:\.[0-9]+)?)(k|m|g|t)?bit(?:/s)?")
_BITS = {None: 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


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
    """Bytes a second, of ``100mbit`` (bits, as tc(8) has it) or ``10MiB/s`` (bytes); None for ``off``."""
    if text == "off":
        return None
    if match := _RATE.fullmatch(text.lower()):
        value = int(Decimal(match[1]) * _BITS[match[2]] / 8)
    elif text.endswith("/s"):
        value = parse_size(text.removesuffix("/s"))
    else:
        raise ConfigurationError(f"{text!r} is not a rate; write for instance 100mbit, 10MiB/s, or off")
    if not MIN_RATE <= value <= MAX_RATE:
        raise ConfigurationError(f"{text!r} is not a rate from 8kbit to 34gbit")
    return value


def format_rate(rate: int | None) -> str:
    """What `parse_rate` reads, of the same value."""
    if rate is None:
        return "off"
    bits = rate * 8
    unit = next((unit for unit in ("t", "g", "m", "k") if bits >= _BITS[unit]), None)
    return f"{(Decimal(bits) / _BITS[unit]).normalize():f}{unit or ''}bit"


def parse_delay_us(text: str) -> int:
    """Microseconds, of ``5ms``, ``0.005`` or ``0.005s``; 0 for ``off``."""
    if text == "off":
        return 0
    number, factor = (text[:-2], 1e3) if text.endswith("ms") else (text.removesuffix("s"), 1e6)
    try:
        value = float(number) * factor
    except ValueError:
        value = -1.0
    if not 0 <= value <= MAX_DELAY_US:
        raise ConfigurationError(f"{text!r} is not a delay of up to 60 seconds; write for instance 5ms, 0.005s, or off")
    return round(value)
