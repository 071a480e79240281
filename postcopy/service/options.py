# SPDX-License-Identifier: Apache-2.0
"""The options of `source`, `dest`, `daemon` and `pager`, and of the control socket's requests, each described once.

From this table are made the parsers of the command line (`postcopy.cli`), the records that say what a command is to do
(`record`), the arguments of the requests on the control socket (`schema`), and the command lines of the two sides that
`demo` starts (`to_arguments`).

A value that was not given is nowhere: its default is that of the record. So no default is written twice.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from functools import partial
from typing import Any, Literal, TypeVar

from postcopy._files import absolute, explain_bad_name
from postcopy.dataplane.ahead import Prefetch
from postcopy.errors import ConfigurationError
from postcopy.machines.firecracker.opened import parse_allowed
from postcopy.machines.kinds import BACKINGS, KINDS, is_live, parse_pairs
from postcopy.machines.toy.machine import WORKLOADS, ToyOptions
from postcopy.machines.toy.tap import format_ipv4, format_mac, parse_ipv4, parse_mac, parse_net
from postcopy.migration.connection import MISSED_HEARTBEATS
from postcopy.migration.precopy import Mode
from postcopy.migration.source import SourceOptions, bulk_channels_for_host
from postcopy.net import parse_address
from postcopy.service.config import PLACED, ArrivalOptions, DaemonConfig, DestinationConfig, PagerConfig, SourceConfig
from postcopy.tls import parse_pattern
from postcopy.units import (
    FOREVER,
    MAX_SECONDS,
    check_word,
    did_you_mean,
    format_exact_size,
    format_rate,
    format_seconds,
    parse_microseconds,
    parse_rate,
    parse_seconds,
    parse_size,
    parse_whole,
)
from postcopy.wire import MAX_BULK_CHANNELS

T = TypeVar("T")

LOG_LEVEL = "warning"
DEFAULTS = SourceOptions()

_MAX_TEXT_CHARS = 4096
_MAX_REPEATS = 256
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
    repeats: bool = False  # it may be given several times; the record has a tuple of all values
    words: tuple[str, ...] = ()  # of which the value is one
    json_unit: str = ""  # of a number in JSON, which has no unit of its own

    @property
    def key(self) -> str:
        return self.field or self.name.replace("-", "_")

    def to_arguments(self, value: Any) -> list[str]:
        """What is to be written for this value."""
        if self.flag:
            return [f"--{self.name}"] if value else [f"--no-{self.name}"] if self.flag == "set or not" else []
        return [word for one in (value if self.repeats else (value,)) for word in (f"--{self.name}", self.format(one))]

    def to_json(self, value: Any) -> Any:
        """What `from_json` reads: a value as JSON has it, which knows no infinity. For another process, whose current
        directory is not ours."""
        if self.repeats:
            return [replace(self, repeats=False).to_json(one) for one in value]
        if self.parse is parse_path:
            return absolute(value)
        return self.format(value) if isinstance(value, float) and math.isinf(value) else value

    def from_json(self, value: object) -> Any:
        """The value of one in JSON: true or false, a number, or the text that a user would write; a list of those where
        the option repeats."""
        if self.repeats:
            if not isinstance(value, list) or len(value) > _MAX_REPEATS:
                raise ConfigurationError(f"must be a list of at most {_MAX_REPEATS}")
            return tuple(replace(self, repeats=False).from_json(one) for one in value)
        if self.flag:
            if not isinstance(value, bool):
                raise ConfigurationError("must be true or false")
            return value
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ConfigurationError("must be a number or a text")
        text = value if isinstance(value, str) else f"{value}{self.json_unit}"
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


def sending(given: Mapping[str, Any], base: SourceOptions = DEFAULTS) -> SourceOptions:
    """How machines are sent: as `base` says, but for what was given. Of mode and precopy each follows the other one
    where only that was given; `ConfigurationError` where both were, and contradict each other."""
    names = {item.name for item in fields(SourceOptions)} - {"name"}  # of the machine
    options = replace(base, **{name: value for name, value in given.items() if name in names})
    mode, precopy_s = options.mode, options.precopy_s
    if "mode" not in given and mode.has_rounds is not (precopy_s > 0):
        return replace(options, mode=Mode.HYBRID if precopy_s else Mode.POSTCOPY)
    if "precopy_s" not in given and mode.has_rounds is not (precopy_s > 0):
        return replace(options, precopy_s=math.inf if mode.has_rounds else 0.0)
    if precopy_s and not mode.has_rounds:
        raise ConfigurationError(
            f"--precopy {PRECOPY.format(precopy_s)}: --mode {mode} sends nothing before the switchover; say --mode"
            " hybrid or precopy, or leave --precopy out"
        )
    if mode.has_rounds and not precopy_s:
        raise ConfigurationError(
            f"--precopy off: --mode {mode} sends memory before the switchover; say --precopy SECONDS or auto, or --mode"
            f" {Mode.POSTCOPY if mode is Mode.HYBRID else Mode.STOP_AND_COPY}"
        )
    return options


def check_sending(given: Mapping[str, Any], options: SourceOptions, kind: str = "") -> None:
    """`ConfigurationError` for what was given for one migration and says nothing there; `kind`: of its machine."""
    if kind and options.mode.has_rounds and not is_live(kind):
        raise ConfigurationError(
            f"--mode {options.mode}, --precopy: nothing writes to an {kind} while it is sent; leave them out, or say"
            " --mode stop-and-copy"
        )
    if MAX_DOWNTIME.key in given and not options.mode.has_rounds:
        raise ConfigurationError("--max-downtime goes with --precopy")
    if PRECOPY_ROUNDS.key in given and not math.isinf(options.precopy_s):
        raise ConfigurationError("--precopy-rounds goes with --precopy auto")


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


def parse_program(text: str) -> str:
    """The absolute path of a program, which is looked for in PATH as a shell does."""
    if (found := shutil.which(parse_path(text))) is None:
        raise ConfigurationError(f"{text!r}: there is no program of this name that this user may run")
    return absolute(found)


def _parse_command(text: str) -> tuple[str, ...]:
    """A command line, as a shell reads it that expands nothing."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigurationError(f"{text[:80]!r}: not a command line: {error}") from error
    if not words:
        raise ConfigurationError("the command line is empty")
    return (parse_program(words[0]), *words[1:])


def default_control() -> str:
    """The control socket of a process that this user has started without ``--control``, and where `ctl` looks for it.
    Root's does not depend on XDG_RUNTIME_DIR, which a shell has and a system service has not."""
    if os.geteuid() == 0:
        return _ROOT_CONTROL
    if not (runtime := os.environ.get("XDG_RUNTIME_DIR")):
        raise ConfigurationError(
            "XDG_RUNTIME_DIR is not set, so there is no default control socket: say --control PATH"
        )
    return check_control_path(os.path.join(runtime, "postcopy", "control.sock"), "the default control socket")


def check_control_path(path: str, what: str = "--control") -> str:
    """The path, when a socket can have it. `ConfigurationError` otherwise; `what` is what the user calls it, where the
    caller does not say it."""
    size_bytes = len(os.fsencode(path))
    shown = path if len(path) <= 120 else f"{path[:100]}..."
    reason = ""
    if not path:
        reason = "the path is empty; name a socket in a directory of yours"
    elif "\0" in path:
        reason = f"{shown!r}: a path has no NUL in it"
    elif size_bytes > MAX_SOCKET_PATH_BYTES:
        reason = f"{shown}: the path of a socket has at most {MAX_SOCKET_PATH_BYTES} bytes, this one has {size_bytes}"
    if reason:
        raise ConfigurationError(f"{what}: {reason}" if what else reason)
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


def _check_nets(text: str) -> str:
    """Of any kind of machine."""
    if "=" not in text:
        return _check_net(text)
    for tap in parse_pairs(text, "tap:NAME, or IFACE=TAP").values():
        parse_net(f"tap:{tap}")
    return text


def _check_drives(text: str) -> str:
    for path in parse_pairs(text, "ID=PATH").values():
        parse_path(path)
    return text


def _check_allowed(text: str) -> str:
    parse_allowed(text)
    return text


def check_address(text: str, *, listening: bool = False) -> str:
    """It is looked up when it is needed."""
    parse_address(text, listening=listening)
    return text


def _check_hostname(text: str) -> str:
    """A name or a number, as a certificate has it."""
    if not re.fullmatch(r"[A-Za-z0-9._:-]{1,253}", text):
        raise ConfigurationError(f"{text[:80]!r} is no name of a host: write it as in its certificate, without a port")
    return text


def _check_authorisation(text: str) -> str:
    parse_pattern(text)
    return text


def _check_metrics(text: str) -> str:
    check_address(f"*{text}" if text.startswith(":") else text, listening=True)
    return text


def _parse_precopy(text: str) -> float:
    if text in _PRECOPY:
        return _PRECOPY[text]
    try:
        return parse_seconds(text)
    except ConfigurationError as error:
        raise ConfigurationError(f"off, seconds or auto: {error}{did_you_mean(text, _PRECOPY)}") from None


def _format_precopy(precopy_s: float) -> str:
    return next((word for word, meaning in _PRECOPY.items() if meaning == precopy_s), "") or format_seconds(precopy_s)


_PRECOPY = {"off": 0.0, "auto": math.inf}


def _parse_bulk_channels(text: str) -> int:
    if text == "auto":
        return bulk_channels_for_host()
    try:
        return parse_whole(text, 1, MAX_BULK_CHANNELS)
    except ConfigurationError as error:
        raise ConfigurationError(f"{error}, or auto") from None


def _parse_uids(text: str) -> tuple[int, ...]:
    return tuple(parse_whole(part.strip(), 0, 2**32 - 2) for part in text.split(","))


def _format_uids(uids: tuple[int, ...]) -> str:
    return ",".join(map(str, uids))


def _parse_serve(text: str) -> float:
    return math.inf if text == FOREVER else parse_whole(text, 1, 1_000_000)


def _parse_pager_prefetch(text: str) -> str:
    """Checked, as it was written."""
    check_word(text.partition(":")[0], (*PLACED, "forward", "both", "adaptive"))
    if text not in PLACED:
        Prefetch.parse(text)
    return text


def choice(name: str, values: Mapping[str, Any] | tuple[str, ...], help: str = "", field: str = "") -> Option:
    """An option that has one of these words, each of which may mean something else to the record."""
    table = dict(values) if isinstance(values, Mapping) else {word: word for word in values}
    words = {meaning: word for word, meaning in table.items()}

    def parse(text: str) -> Any:
        check_word(text, table)
        return table[text]

    return Option(name, help, f"{{{','.join(table)}}}", parse, words.__getitem__, field, words=tuple(table))


def seconds(name: str, help: str, low: float = 0.0, high: float = MAX_SECONDS, *, forever: bool = False) -> Option:
    """An option that is a time, in seconds."""
    parse = partial(parse_seconds, low=low, high=high, forever=forever)
    metavar = f"SECONDS|{FOREVER}" if forever else "SECONDS"
    return Option(name, help, metavar, parse, format_seconds, f"{name.replace('-', '_')}_s")


def path(name: str, help: str, metavar: str = "FILE", field: str = "") -> Option:
    return Option(name, help, metavar, parse_path, field=field)


def size(name: str, help: str) -> Option:
    field = f"{name.replace('-', '_')}_bytes"
    return Option(name, help, "SIZE", parse_size, format_exact_size, field, json_unit="B")


def whole(name: str, help: str, low: int, high: int, metavar: str = "N", field: str = "") -> Option:
    return Option(name, help, metavar, partial(parse_whole, low=low, high=high), field=field)


def flag(name: str, help: str) -> Option:
    return Option(name, help, flag="set")


# ---- The options
# fmt: off

KIND = choice("machine", KINDS, "kind of machine to migrate", "kind")
LIVE_KIND = choice("machine", tuple(filter(is_live, KINDS)), "kind of the machine (default: none)", "kind")
MEMORY = size("memory", "kvm, rv64: size of its memory, as 1GiB")
VCPUS = whole("vcpus", "kvm, rv64: number of virtual CPUs", 0, 1000)
WORKLOAD = choice("workload", tuple(WORKLOADS), "kvm, rv64: program that the guest runs")
USED_MEMORY = size("used-memory", "kvm, rv64: how much of the memory that program uses (default: all)")
SEED = whole("seed", "kvm, rv64: makes the content of the memory the same in each run (default: random)", 0, 2**64 - 1)
DISK = path("disk", "workload disk: file of the guest's disk, which both hosts must have (default: a temporary file)")
IMAGE = path("image", "image: memory image to serve")
NET = Option("net", "workload echo: TAP device of the guest's network device", "tap:NAME", _check_net)
API_SOCKET = path("api-socket", "firecracker: its API socket", "PATH")
QMP = path("qmp", "qemu: a QMP monitor of it that no other client uses", "PATH")
PRELOAD = path("preload", "program, qemu: socket of the preload library in it (default for qemu: as `postcopy run` has"
               " told it)", "PATH")
LIVE_MACHINE = (
    MEMORY, VCPUS, WORKLOAD, USED_MEMORY, SEED, DISK, NET,
    Option("net-mac", "workload echo: MAC address of the guest (default: made from the seed)", "MAC",
           parse_mac, format_mac),
    Option("net-address", "workload echo: IPv4 address of the guest (default: made from the seed)", "IPV4",
           parse_ipv4, format_ipv4),
    API_SOCKET, QMP, PRELOAD,
)
MACHINE = (*LIVE_MACHINE, IMAGE)
FIRECRACKER = Option("firecracker", "firecracker: start this binary for a machine that comes", "BINARY", parse_program)
QEMU = Option("qemu", "qemu: start it for a machine that comes, with this command line of the same virtual machine;"
              " a monitor, -incoming and the preload library are added", "COMMAND", _parse_command, shlex.join)
DRIVE = Option("drive", "firecracker: where a disk is on this host, if not under the name that it has at the source",
               "ID=PATH[,...]", _check_drives)
ALLOW = Option("allow", "firecracker: what a machine that comes may use here under the name that its source gives: an"
               " absolute path, DIRECTORY/ for all below it, or tap:NAME; * stands for any characters but /",
               "PATTERN[,...]", _check_allowed)
MACHINES_OF_ONE = whole("max-machines-per-peer", "number of machines that one peer (the name in its certificate, or its"
                        " host without TLS) may have sent here", 1, 256)
MEMORY_OF_ONE = size("max-memory-per-peer", "memory of these machines together (default: no limit)")
NAME = Option("name", "name of that machine (default: its kind and random digits)", "NAME", parse_name)
FROM = path("from", "start the machine that DIR holds, which --salvage or `postcopy merge --into` has written", "DIR",
            "path")

LISTEN = Option("listen", "wait for the other side at this address; without HOST, as [::], at every address of this"
                " host; port 0: any free port", "[HOST]:PORT", partial(parse_address, listening=True))
CONNECT = Option("connect", "connect to the other side, which listens at this address", "HOST:PORT", parse_address)
PEER_FILE = path("peer-file", "connect to the HOST:PORT in FILE, which is read again when the connection is lost and"
                 " at SIGHUP")
TLS = path("tls", "encrypt and authenticate all connections with other hosts; DIR has ca-cert.pem, server-cert.pem and"
           " server-key.pem to listen, client-cert.pem and client-key.pem to connect, as `postcopy tls issue` makes"
           " them", "DIR")
TLS_HOSTNAME = Option("tls-hostname", "name that the certificate of the other side must have (default: the host that is"
                      " connected to)", "NAME", _check_hostname)
TLS_AUTHZ = Option("tls-authz", "who may send machines to here (send:), take them from here (take:), or both, by a name"
                   " in its certificate or, with =, its subject; * stands for a part of a name; repeatable (default:"
                   " everyone whom the CA has signed)", "[send:|take:]PATTERN", _check_authorisation, repeats=True)
INSECURE = flag("insecure", "allow connections beyond this host without TLS: everyone on the network can then read the"
                " memory, change it, and send machines")
HOLD = flag("hold", "keep the machine running here until `postcopy ctl migrate`")

BACKING = choice("backing", BACKINGS, "kind of memory that the machine gets")
BUSY_POLL = Option("busy-poll", "busy-wait up to N us on an urgent channel before sleeping on it", "N",
                   partial(parse_microseconds, high=1_000_000), field="busy_poll_us")
PAGER = choice("pager", {"thread": False, "process": True},
               "fetch missing pages in threads of the machine's process, or in a process of its own, whose crash the"
               " machine survives", "pager_process")
MODE = choice("mode", {mode.value: mode for mode in Mode}, "when the memory is sent: all while the machine is paused;"
              " in rounds before that, and the rest while it is paused; all after the switchover; or in rounds, and"
              " what then does not fit --max-downtime after it (default: hybrid with --precopy, else postcopy)")
PRECOPY = Option("precopy", "before the switchover, send the memory in rounds, each what was written since the last"
                 " one: for SECONDS, or as long as it makes sense", "off|SECONDS|auto", _parse_precopy, _format_precopy,
                 "precopy_s")
MAX_DOWNTIME = seconds("max-downtime", "with --precopy: pause the machine when what is left can be sent in this time,"
                       " as 300ms", 0.001, 3600)
PRECOPY_ROUNDS = whole("precopy-rounds", "with --precopy auto: so many rounds at most", 1, 10_000)
COMPRESS = choice("compress", ("off", "lz4", "zstd", "auto"), "compress pages that are pushed; auto: where that is"
                  " faster")
BULK_CHANNELS = Option("bulk-channels", "number of connections for the background push, or auto: by the processors of"
                       " this host", "N|auto", _parse_bulk_channels)
MAX_BANDWIDTH = Option("max-bandwidth", "limit of the background push, as 100MiB/s or 800mbit; pages that the machine"
                       " waits for are not limited", "RATE|none", parse_rate, format_rate,
                       field="max_bandwidth_bytes_per_s", json_unit="B/s")
RELEASE_RAM = flag("release-ram", "kvm, rv64: past the point of no return, give memory back to this host as the"
                   " destination acknowledges its pages")
PUSH_AFTER = seconds("push-after", "hold the background push back for SECONDS after the switchover: before that only"
                     " pages go out that the destination asks for", forever=True)
ONE_WAY = (MODE, PRECOPY, MAX_DOWNTIME, PRECOPY_ROUNDS, COMPRESS, BULK_CHANNELS, PUSH_AFTER)  # of one migration
SENDING = (*ONE_WAY, MAX_BANDWIDTH, RELEASE_RAM)

PREFETCH = Option("prefetch", "ask for pages before the machine touches them: the PAGES behind each fault, or half of"
                  " them on either side of it (8 where no number is given); or, adaptive, along the strides that faults"
                  " show",
                  "none|forward[:PAGES]|both[:PAGES]|adaptive", Prefetch.parse)
SET_FILE = path("working-set", "ask for these pages first, in their order, which --record-working-set has written")
RECORD_SET = path("record-working-set", "write which pages the machine waits for, and in what order, to FILE when the"
                  " last page is here")
AHEAD = (PREFETCH, SET_FILE, RECORD_SET)

HEARTBEAT = seconds("heartbeat", f"interval of signs of life; a peer that is silent for {MISSED_HEARTBEATS} intervals"
                    " is lost", 0.05, 3600)
RECOVER_FOR = seconds("recover-for", "how long to try to reach a peer that was lost past the point of no return",
                      forever=True)
SALVAGE = path("salvage", "when this side ends while the other one is lost, write what is here of the machine to DIR,"
               " a new directory, for `postcopy merge`", "DIR", "salvage_to")

MIGRATE_AFTER = seconds("migrate-after", "run the machine for SECONDS before it is migrated")
SERVE = Option("serve", "image with --listen: number of destinations to serve, also at the same time",
               f"N|{FOREVER}", _parse_serve, format_seconds)
ON_FAILURE = choice("on-failure", {"keep": True, "exit": False},
                    "when a migration fails before the point of no return: keep the machine running here, or exit",
                    "keep")
ON_LOST = choice("on-lost", {"hold": False, "kill": True},
                 "when the source is lost for good and pages are missing: hold the machine, blocked where it needs"
                 " them, or kill it", "kill_when_lost")
RUN_FOR = seconds("run-for", "run for SECONDS, at least until the last page has arrived, then stop"
                  " (default: until interrupted)")
DUMP = path("dump", "at the end, write the machine's memory to FILE (sparse)")
VERIFY = Option("verify", "at the end, verify all of the machine's memory", flag="set or not")
USER = Option("user", "as root: open the devices, then become this user and give up all rights, before anything is"
              " received", "NAME[:GROUP]")

PAGER_SOCKET = path("socket", "listen on this Unix socket, for Firecracker's mem_backend; with --images: on NAME.sock"
                    " in this directory for each NAME.mem (default: as systemd gives it)", "PATH")
PAGER_SOURCE = OneOf(
    path("image", "memory file of a snapshot: all virtual machines have its pages"),
    path("images", "directory of memory files NAME.mem, each with a socket of its own; new ones are found while it"
         " runs", "DIR"),
    replace(CONNECT, help="get the pages from a `postcopy source --machine image --listen` or `postcopy.serve`, which"
            " listens at this address"),
)
PAGER_PREFETCH = Option("prefetch", "place pages behind those that are waited for: none, the working set, or that and"
                        " then all (default: working-set where there is one, else none); with --connect also what is"
                        " asked for because of faults, as by `postcopy dest --prefetch`",
                        "none|all|working-set|forward[:PAGES]|both[:PAGES]|adaptive", _parse_pager_prefetch)
PAGER_SET = replace(SET_FILE, help="place these pages first, which --record-working-set has written; with --images:"
                    " NAME.ws in this directory")
RECORD_PAGER_SET = replace(RECORD_SET, help="write which pages a virtual machine touches, and in what order, to FILE"
                           " when it ends; with --images: to NAME.ws in this directory")
RECORD_FOR = seconds("record-for", "how long that is recorded; the file is written then", forever=True)
PAGER_LOST = choice("on-lost", {"hold": False, "kill": True}, "when pages cannot be had any more: hold the virtual"
                    " machine where it needs them, or kill its process", "kill_when_lost")
ALLOW_UID = Option("allow-uid", "take virtual machines of these users too, beside those of this user and root",
                   "UID[,UID]...", _parse_uids, _format_uids)
MAX_VMS = whole("max-vms", "number of virtual machines at the same time", 1, 100_000)
MAX_MEMORY = size("max-memory", "memory of all virtual machines together (default: no limit)")
READERS = whole("readers", "threads for each virtual machine that read its image from disk, and again as many that"
                " prefetch", 1, 16)
RESTART_BURST = whole("restart-burst", "how many deaths of this process in short order are followed by the next one at"
                      " once; one is forgotten every 2 s", 1, 1_000_000)
KEEPER = Option("keeper", "have a small process hold the virtual machines, so that they survive the death and the"
                " upgrade of this one", flag="set or not")

# ---- The commands

_ROOT_CONTROL = "/run/postcopy/control.sock"
DEFAULT_CONTROL = f"$XDG_RUNTIME_DIR/postcopy/control.sock, root: {_ROOT_CONTROL}"
CONTROL = Option("control", f"control socket of the process (default: {DEFAULT_CONTROL})", "PATH",
                 partial(check_control_path, what=""))

FROM_OPTIONS = Group(
    "with --from",
    flag("reclaim", "DIR is of a source whose destination is dead for good: go on from the switchover, even if what the"
         " machine has done since is lost. If that host is alive, the machine then runs twice"),
    flag("force", "even if data is lost (missing pages become zeros), or a machine was started from DIR before"),
)


def _operating(control_default: str) -> Group:
    return Group(
        "operation",
        replace(CONTROL, help="control socket for `postcopy ctl`, accessible to this user and root only"
                f" (default: {control_default})"),
        Option("metrics", "serve Prometheus metrics at http://HOST:PORT/metrics; without HOST to this host only; beyond"
               " it https, with --tls", "[HOST]:PORT", _check_metrics),
        path("metrics-file", "write the metrics to this file when a migration has ended", "FILE.prom"),
        USER,
    )


REPORT = path("report", "when a migration has ended, write a report of it, with pictures, to FILE.html; `postcopy"
              " report` makes one of the --json lines of both sides", "FILE.html")
LOGGING = Group(
    "output",
    flag("json", "print one JSON object per line on stdout, the result last"),
    choice("log-level", ("debug", "info", "warning", "error"), f"lowest severity to log (default: {LOG_LEVEL})"),
    flag("log-json", "log one JSON object per line on stderr, with the id of the migration"),
)
OUTPUT = Group("output", REPORT, *LOGGING)
_NETS = replace(NET, help="workload echo: TAP device on this host; firecracker: that of each interface, where it is"
                " another one than at the source", metavar="tap:NAME|IFACE=TAP[,...]", parse=_check_nets)
_CALLING_TLS = Group("TLS", TLS, TLS_HOSTNAME, TLS_AUTHZ, INSECURE)
_LOST = Group("when the network fails", HEARTBEAT, RECOVER_FOR, SALVAGE)
COMMANDS: Mapping[str, tuple[Group, ...]] = {
    "source": (
        Group("machine", OneOf(KIND, FROM), *MACHINE),
        FROM_OPTIONS,
        Group("destination", OneOf(HOLD, LISTEN, CONNECT, PEER_FILE)),
        _CALLING_TLS,
        Group("migration", MIGRATE_AFTER, SERVE, ON_FAILURE, BACKING, BUSY_POLL, *SENDING),
        _LOST,
        _operating(f"none; with --hold {DEFAULT_CONTROL}"), OUTPUT,
    ),
    "dest": (
        Group("source", OneOf(LISTEN, CONNECT, PEER_FILE)),
        _CALLING_TLS,
        Group("machine",
              replace(KIND, help="take a machine of this kind only (default: any)", field="takes"),
              replace(DISK, help="workload disk: file of the guest's disk on this host"),
              _NETS,
              replace(API_SOCKET, help="firecracker: API socket of one that was started and told nothing yet"),
              FIRECRACKER, DRIVE, ALLOW,
              replace(QMP, help="qemu: a QMP monitor of one that `postcopy run` has started with -incoming defer -S"),
              QEMU, PRELOAD, RUN_FOR, DUMP, VERIFY),
        Group("migration", BACKING, BUSY_POLL, PAGER, *AHEAD),
        Group("when the network fails", HEARTBEAT, RECOVER_FOR, ON_LOST, SALVAGE),
        _operating("none"), OUTPUT,
    ),
    "daemon": (
        Group("other hosts", replace(LISTEN, help="receive machines at this address; without HOST, as [::], at every"
                                     " address of this host; port 0: any free port")),
        Group("TLS", TLS, TLS_AUTHZ, INSECURE),
        Group("machine to begin with", LIVE_KIND, NAME, *(_NETS if each is NET else each for each in LIVE_MACHINE)),
        Group("machines that come", FIRECRACKER, DRIVE, ALLOW, QEMU, MACHINES_OF_ONE, MEMORY_OF_ONE),
        Group("migration", BACKING, BUSY_POLL, PAGER, PREFETCH,
              replace(SET_FILE, help="ask for the pages in NAME.ws in this directory first, for a machine NAME",
                      metavar="DIR"),
              replace(RECORD_SET, help="write which pages a machine NAME waits for when it comes, and in what order, to"
                      " NAME.ws in this directory", metavar="DIR"),
              *SENDING),
        Group("when the network fails", HEARTBEAT, RECOVER_FOR),
        _operating(DEFAULT_CONTROL), OUTPUT,
    ),
    "pager": (
        Group("virtual machines", PAGER_SOCKET, PAGER_SOURCE, ALLOW_UID, MAX_VMS, MAX_MEMORY),
        _CALLING_TLS,
        Group("pages", PAGER_PREFETCH, PAGER_SET, RECORD_PAGER_SET, RECORD_FOR, READERS, BUSY_POLL),
        Group("when something fails", PAGER_LOST, RECOVER_FOR, KEEPER, RESTART_BURST),
        _operating("none"), OUTPUT,
    ),
}
_RECORDS: Mapping[str, tuple[Callable[..., Any], ...]] = {
    "source": (SourceConfig, ToyOptions, SourceOptions),
    "dest": (DestinationConfig, ArrivalOptions),
    "daemon": (DaemonConfig, ToyOptions, SourceOptions, ArrivalOptions),
    "pager": (PagerConfig,),
}


def defaults(command: str) -> dict[str, Any]:
    """What the records that a command fills have where nothing was given, by their fields' names."""
    return {
        item.name: item.default
        for kind in _RECORDS.get(command, ())
        for item in fields(kind)  # type: ignore[arg-type]
        if item.default is not MISSING
    }
