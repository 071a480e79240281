# SPDX-License-Identifier: Apache-2.0
"""The options of `source`, `dest` and `daemon` and of the control socket's requests, each described once.

From this table are made the parsers of the command line (`postcopy.cli`), the records that say what a command is to do
(`record`), the arguments of the requests on the control socket (`schema`), and the command lines of the two sides that
`demo` starts (`to_arguments`).

A value that was not given is nowhere: its default is that of the record. So no default is written twice.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal, TypeVar

from postcopy._files import explain_bad_name
from postcopy.errors import ConfigurationError
from postcopy.machines.kinds import BACKINGS, KINDS
from postcopy.machines.toy.machine import WORKLOADS
from postcopy.machines.toy.tap import format_ipv4, format_mac, parse_ipv4, parse_mac, parse_net
from postcopy.migration.connection import HEARTBEAT_S, MISSED_HEARTBEATS
from postcopy.migration.source import DEFAULT_BULK_CHANNELS
from postcopy.net import parse_address
from postcopy.units import FOREVER, MAX_SECONDS, format_seconds, parse_rate, parse_seconds, parse_size, parse_whole
from postcopy.wire import MAX_BULK_CHANNELS

T = TypeVar("T")

_MAX_TEXT_CHARS = 4096
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z")
"""Of a machine: a word that needs no quoting in a shell, a metric's label or a log line."""


@dataclass(frozen=True)
class Option:
    """`parse` makes its value of text, or raises `ConfigurationError`; `format` makes text of its value."""

    name: str  # as it is written, without dashes
    help: str = ""
    metavar: str | None = None
    parse: Callable[[str], Any] = str
    format: Callable[[Any], str] = str
    field: str = ""  # of the record that it is for; made of `name` where it is not said
    flag: Literal["", "set", "set or not"] = ""  # it has no value: True, or with --no-NAME also False
    nargs: str | None = None  # as argparse's
    positional: bool = False
    required: bool = False

    @property
    def key(self) -> str:
        return self.field or self.name.replace("-", "_")

    def to_arguments(self, value: Any) -> list[str]:
        """What is to be written for this value."""
        if self.flag:
            return [f"--{self.name}"] if value else [f"--no-{self.name}"] if self.flag == "set or not" else []
        return [f"--{self.name}", self.format(value)]

    def from_json(self, value: object) -> Any:
        """The value of one in JSON: true or false, a number, or the text that a user would write."""
        if self.flag:
            if not isinstance(value, bool):
                raise ConfigurationError("must be true or false")
            return value
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ConfigurationError("must be a number or a text")
        text = str(value)
        if not 0 < len(text) <= _MAX_TEXT_CHARS or "\0" in text:
            raise ConfigurationError(f"must be a text of 1 to {_MAX_TEXT_CHARS} characters")
        parsed = self.parse(text)
        if isinstance(parsed, str) and not isinstance(value, str):
            raise ConfigurationError("must be a text")
        return parsed


class OneOf:
    """Options of which one must be given, and only one."""

    def __init__(self, *options: Option) -> None:
        self.options = options


class Group:
    """Options under a title of their own in ``--help``, where there is one."""

    def __init__(self, title: str, *items: Option | OneOf) -> None:
        self.title = title
        self.items = items

    def __iter__(self) -> Iterator[Option]:
        for item in self.items:
            yield from item.options if isinstance(item, OneOf) else (item,)


def record(kind: Callable[..., T], given: Mapping[str, Any], **more: Any) -> T:
    """A record (a dataclass) of what was given, and of `more`; the rest is the record's own default."""
    names = [item.name for item in fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: given[name] for name in names if name in given} | more)


def to_arguments(groups: tuple[Group, ...], values: Mapping[str, Any]) -> list[str]:
    """The command line on which a command with these options has these values. Values that it has no option for are
    left out."""
    options = [option for group in groups for option in group if option.key in values]
    return [word for option in options for word in option.to_arguments(values[option.key])]


# ---- Values

MAX_SOCKET_PATH_BYTES = 107  # sun_path, and its null (unix(7))


def parse_path(text: str) -> str:
    """The name of a file or a directory; what else there is to say of it, its own command says."""
    if reason := explain_bad_name(text):
        raise ConfigurationError(reason)
    return text


def default_control() -> str:
    """The control socket of a process that this user has started without ``--control``, and where `ctl` looks for it.
    Root's does not depend on XDG_RUNTIME_DIR, which a shell has and a system service has not."""
    if os.geteuid() == 0:
        return "/run/postcopy/control.sock"
    if not (runtime := os.environ.get("XDG_RUNTIME_DIR")):
        raise ConfigurationError(
            "XDG_RUNTIME_DIR is not set, so there is no default control socket: say --control PATH"
        )
    return check_control_path(os.path.join(runtime, "postcopy", "control.sock"), "the default control socket")


def check_control_path(path: str, what: str = "--control") -> str:
    """The path, when a socket can have it. `ConfigurationError` otherwise; `what` is what the user calls it."""
    size_bytes = len(os.fsencode(path))
    shown = path if len(path) <= 120 else f"{path[:100]}..."
    if not path:
        raise ConfigurationError(f"{what}: the path is empty; name a socket in a directory of yours")
    if "\0" in path:
        raise ConfigurationError(f"{what} {shown!r}: a path has no NUL in it")
    if size_bytes > MAX_SOCKET_PATH_BYTES:
        raise ConfigurationError(
            f"{what} {shown}: the path of a socket has at most {MAX_SOCKET_PATH_BYTES} bytes, this one has {size_bytes}"
        )
    return path


def is_name(value: object) -> bool:
    """Whether a machine may be called so."""
    return isinstance(value, str) and _NAME.match(value) is not None


def parse_name(text: str) -> str:
    if not is_name(text):
        raise ConfigurationError(
            "a machine's name is 1 to 63 letters, digits, '.', '_' or '-', and begins with a letter or digit"
        )
    return text


def _check_net(text: str) -> str:
    """The machine looks the name up when it is made."""
    parse_net(text)
    return text


def _parse_serve(text: str) -> float:
    return math.inf if text == FOREVER else parse_whole(text, 1, 1_000_000)


def choice(name: str, values: Mapping[str, Any] | tuple[str, ...], help: str = "", field: str = "") -> Option:
    """An option that has one of these words, each of which may mean something else to the record."""
    table = dict(values) if isinstance(values, Mapping) else {word: word for word in values}
    words = {meaning: word for word, meaning in table.items()}

    def parse(text: str) -> Any:
        if text not in table:
            raise ConfigurationError(f"invalid choice: {text!r} (choose from {', '.join(map(repr, table))})")
        return table[text]

    return Option(name, help, f"{{{','.join(table)}}}", parse, words.__getitem__, field)


def seconds(name: str, help: str, low: float = 0.0, high: float = MAX_SECONDS, *, forever: bool = False) -> Option:
    """An option that is a time, in seconds."""
    parse = partial(parse_seconds, low=low, high=high, forever=forever)
    metavar = f"SECONDS|{FOREVER}" if forever else "SECONDS"
    return Option(name, help, metavar, parse, format_seconds, f"{name.replace('-', '_')}_s")


def path(name: str, help: str, metavar: str = "FILE", field: str = "") -> Option:
    return Option(name, help, metavar, parse_path, field=field)


def size(name: str, help: str) -> Option:
    return Option(name, help, "SIZE", parse_size, field=f"{name.replace('-', '_')}_bytes")


def whole(name: str, help: str, low: int, high: int, metavar: str = "N", field: str = "") -> Option:
    return Option(name, help, metavar, partial(parse_whole, low=low, high=high), field=field)


def flag(name: str, help: str) -> Option:
    return Option(name, help, flag="set")


# ---- The options
# fmt: off

KIND = choice("machine", KINDS, "what to migrate", "kind")
MEMORY = size("memory", "kvm, rv64: its memory, as 1GiB")
VCPUS = whole("vcpus", "kvm, rv64: its virtual CPUs", 0, 1000)
WORKLOAD = choice("workload", tuple(WORKLOADS), "kvm, rv64: what it computes")
WORKING_SET = size("working-set", "kvm, rv64: how much memory it uses")
SEED = whole("seed", "kvm, rv64: makes its pages reproducible", 0, 2**64 - 1)
DISK = path("disk", "workload disk: backing file, which both hosts must have")
IMAGE = path("image", "image: the file")
NET = Option("net", "workload echo: the TAP of its network device", "tap:NAME", _check_net)
MACHINE = (
    MEMORY, VCPUS, WORKLOAD, WORKING_SET, SEED, DISK, IMAGE, NET,
    Option("net-mac", "its MAC address (default: from the seed)", "MAC", parse_mac, format_mac),
    Option("net-address", "its address (default: from the seed)", "IPV4", parse_ipv4, format_ipv4),
)
NAME = Option("name", "of the machine that it begins with", "NAME", parse_name)
FROM = path("from", "a machine whose migration was lost: DIR was written by --salvage, or by `postcopy merge --into`",
            "DIR", "path")

LISTEN = Option("listen", "wait for the other side here; port 0: any", "HOST:PORT",
                partial(parse_address, listening=True))
CONNECT = Option("connect", "the other side listens there", "HOST:PORT", parse_address)
PEER_FILE = path("peer-file", "as --connect, with the HOST:PORT in a file, read again when the connection is lost and"
                 " at SIGHUP")
HOLD = flag("hold", "run the machine until `postcopy ctl` says where it is to go")

BACKING = choice("backing", BACKINGS, "what memory is made of")
BUSY_POLL = whole("busy-poll", "how long to poll an urgent channel before sleeping on it (default 0)", 0, 1_000_000,
                  "MICROSECONDS", "busy_poll_us")
PAGER = choice("pager", {"thread": False, "process": True},
               "where missing pages are fetched: in threads of the machine's process (default), or in a process of its"
               " own, which the machine survives", "pager_process")
BULK_CHANNELS = whole("bulk-channels", f"connections of the background push (default {DEFAULT_BULK_CHANNELS})",
                      1, MAX_BULK_CHANNELS)
MAX_BANDWIDTH = Option("max-bandwidth", "of the background push, as 100MiB/s; requested pages are never held up",
                       "RATE|none", parse_rate, field="max_bandwidth_bytes_per_s")
RELEASE_RAM = flag("release-ram", "kvm, rv64: after the point of no return give memory back to this host as the"
                   " destination acknowledges its pages")
SENDING = (BULK_CHANNELS, MAX_BANDWIDTH, RELEASE_RAM)

HEARTBEAT = seconds("heartbeat", f"how often to give a sign of life; a peer silent for {MISSED_HEARTBEATS} times as"
                    f" long is lost (default {HEARTBEAT_S:g})", 0.05, 3600)
RECOVER_FOR = seconds("recover-for", "how long a peer that was lost after the point of no return is looked for"
                      f" (default {FOREVER})", forever=True)
SALVAGE = path("salvage", "when this side ends while the other one is lost: write what is here into this new directory,"
               " for `postcopy merge`", "DIR", "salvage_to")

MIGRATE_AFTER = seconds("migrate-after", "let the machine compute for so long when it is ready (default 0)")
SERVE = Option("serve", "image with --listen: how many destinations to serve, also at the same time (default 1)",
               f"N|{FOREVER}", _parse_serve, format_seconds)
ON_FAILURE = choice("on-failure", {"keep": True, "exit": False},
                    "when a migration under way fails and the machine is still here: keep running it (default), or end",
                    "keep")
ON_LOST = choice("on-lost", {"hold": False, "kill": True},
                 "when the source is given up (--recover-for, or it knows nothing of us) and pages are missing: keep"
                 " the machine, blocked where it needs them (default), or end it", "kill_when_lost")
RUN_FOR = seconds("run-for", "a live machine runs so long here, and until its last page has come, and is then paused"
                  " and ended (default: until interrupted)")
DUMP = path("dump", "write the memory there at the end, sparse where it is zero")
VERIFY = Option("verify", "check all memory at the end, by what is known of the machine (default: yes)",
                flag="set or not")
USER = Option("user", "as root: open the devices, and then become this user, with no other right, before anything is"
              " received", "NAME[:GROUP]")

# ---- The commands

CONTROL = Option("control", "the control socket of the process that is asked", "PATH",
                 partial(check_control_path, what="a control socket"))

FROM_OPTIONS = Group(
    "with --from",
    flag("reclaim", "DIR is of a source, and its destination is dead for good: go on from the switchover, without what"
         " the machine has done since. If that host lives, the machine then runs twice"),
    flag("force", "also when pages are missing, which are then zeros, or when it was started from DIR before"),
)
OPERATING = Group(
    "operating it",
    replace(CONTROL, help="a control socket for `postcopy ctl`, this user's and root's only"),
    Option("metrics", "Prometheus metrics at http://HOST:PORT/metrics; without HOST on the loopback interface only",
           "[HOST]:PORT"),
    path("metrics-file", "write the metrics there when a migration has ended", "FILE.prom"),
)
OUTPUT = Group(
    "output",
    flag("json", "one JSON object per line on stdout, the result last"),
    choice("log-level", ("debug", "info", "warning", "error")),
    flag("log-json", "one JSON object per line on stderr, with the migration's id"),
)
_LOST = Group("when the network fails", HEARTBEAT, RECOVER_FOR, SALVAGE)
COMMANDS: Mapping[str, tuple[Group, ...]] = {
    "source": (
        Group("the machine", OneOf(KIND, FROM), *MACHINE),
        FROM_OPTIONS,
        Group("", OneOf(HOLD, LISTEN, CONNECT, PEER_FILE)),
        Group("the engine", BACKING, BUSY_POLL, *SENDING),
        _LOST,
        Group("", MIGRATE_AFTER, SERVE, ON_FAILURE, USER),
        OPERATING, OUTPUT,
    ),
    "dest": (
        Group("", OneOf(LISTEN, CONNECT, PEER_FILE)),
        Group("the engine", BACKING, BUSY_POLL, PAGER),
        _LOST,
        Group("", ON_LOST, replace(DISK, help="where the machine's disk is on this host, if not as on the source"),
              replace(NET, help="where the machine's network device is attached on this host"),
              RUN_FOR, DUMP, VERIFY, USER),
        OPERATING, OUTPUT,
    ),
    "daemon": (
        Group("", replace(LISTEN, help="take machines that come here; port 0: any")),
        Group("the machine", replace(KIND, help="what to migrate (default: none to begin with)"), *MACHINE),
        Group("", NAME),
        Group("the engine", BACKING, BUSY_POLL, PAGER, *SENDING),
        Group("when the network fails", HEARTBEAT, RECOVER_FOR),
        Group("", USER),
        OPERATING, OUTPUT,
    ),
}
