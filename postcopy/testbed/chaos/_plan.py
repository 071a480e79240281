# SPDX-License-Identifier: Apache-2.0
"""What a bad network does by itself, and the words for it (docs/chaos.md)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from postcopy.errors import ConfigurationError
from postcopy.units import among, did_you_mean, parse_rate, parse_seconds, parse_seconds_range, parse_size

WAYS = ("reset", "close", "freeze", "truncate", "corrupt")
"""How a cable can be cut: with a reset, with an orderly end, without a word (half open), after a few more bytes, or by
one flipped bit, after which the connection goes on."""


@dataclass(frozen=True)
class ChaosPlan:
    """What the network does by itself. Times in seconds; a range is drawn from uniformly."""

    seed: int = 0
    delay_s: float = 0.0  # of every byte, one way
    jitter_s: float = 0.0  # up to so much more; the order stays
    rate_bytes_per_s: int = 0  # of each connection and direction; 0: no limit
    split_bytes: int = 0  # no write is larger; 0: as they come
    cut_every_s: tuple[float, float] | None = None
    down_s: tuple[float, float] = (0.0, 0.1)  # how long it stays cut
    ways: tuple[str, ...] = ("reset",)

    @classmethod
    def parse(cls, text: str, seed: int = 0) -> ChaosPlan:
        """Of words such as ``cut``, ``cut:every=0.2..0.5,down=0.1``, ``slow:delay=0.005,rate=10MiB``: see `KINDS`.
        `ConfigurationError` says what is wrong."""
        kind, _, rest = text.partition(":")
        if kind not in KINDS:
            raise ConfigurationError(f"no plan begins with {kind!r}{did_you_mean(kind, KINDS) or among(KINDS)}")
        settings = dict(KINDS[kind])
        for item in filter(None, rest.split(",")):
            name, equals, value = item.partition("=")
            if not equals or name not in _SETTINGS:
                why = f"{name!r} has no value" if name in _SETTINGS else f"no setting is called {name!r}"
                hint = "" if name in _SETTINGS else did_you_mean(name, _SETTINGS)
                raise ConfigurationError(
                    f"chaos {text!r}: {why}{hint}; write for instance cut:every=0.2..0.5,down=100ms (settings:"
                    f" {', '.join(_SETTINGS)})"
                )
            attribute, parse = _SETTINGS[name]
            try:
                settings[attribute] = parse(value)
            except ConfigurationError as error:
                raise ConfigurationError(f"chaos {text!r}: {name}: {error}") from None
        return cls(seed=seed, **settings)  # type: ignore[arg-type]


def ways(text: str) -> tuple[str, ...]:
    """Of ``reset+freeze``."""
    words = tuple(text.split("+"))
    for word in words:
        if word not in WAYS:
            known = did_you_mean(word, WAYS) or f"{among(WAYS)}, joined by +"
            raise ConfigurationError(f"{word!r} is no way to cut a connection{known}")
    return words


_SETTINGS: dict[str, tuple[str, Callable[[str], object]]] = {
    "delay": ("delay_s", parse_seconds),
    "jitter": ("jitter_s", parse_seconds),
    "rate": ("rate_bytes_per_s", parse_rate),
    "split": ("split_bytes", parse_size),
    "every": ("cut_every_s", parse_seconds_range),
    "down": ("down_s", parse_seconds_range),
    "ways": ("ways", ways),
}
KINDS: dict[str, dict[str, object]] = {
    "none": {},
    "slow": {"delay_s": 0.005, "jitter_s": 0.002},
    "split": {"split_bytes": 7},
    "cut": {"cut_every_s": (0.1, 0.5)},
    "freeze": {"cut_every_s": (0.5, 1.0), "ways": ("freeze",)},
    "corrupt": {"cut_every_s": (0.1, 0.5), "ways": ("corrupt",), "down_s": (0.0, 0.0)},
    "all": {"cut_every_s": (0.1, 0.5), "ways": WAYS, "delay_s": 0.001, "jitter_s": 0.001},
}
"""Words for the usual kinds of trouble, each the start of a plan."""
