# SPDX-License-Identifier: Apache-2.0
"""The language of the control socket, sans-IO: lines in, requests out, and the other way round.

One JSON object a line, UTF-8, in both directions, after QEMU's QMP. The server greets, then answers each request in
its order::

    <- {"postcopy": {"version": "0.1.0", "schema": 3, "side": "source", "pid": 4711}}
    -> {"execute": "set", "arguments": {"max-bandwidth": 104857600}, "id": 7}
    <- {"return": {"max-bandwidth": 104857600}, "id": 7}
    -> {"execute": "sit"}
    <- {"error": {"class": "CommandNotFound", "desc": "there is no command 'sit'; there are ..."}}
    <- {"event": "progress", "timestamp": {"seconds": 1700000000, "microseconds": 1}, "data": {...}}

A client that sends nonsense gets an error and may go on. One whose line is longer than `MAX_LINE_BYTES` gets an error
and is disconnected, since it is unknown where its next line begins. What the lines mean, and which version of that it
is (`schema`), is in `postcopy.records`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from postcopy import __version__
from postcopy.errors import ConfigurationError, PostcopyError
from postcopy.records import VERSION, Json, Record, as_json
from postcopy.service import options
from postcopy.service.options import Option, check_address, flag, parse_name
from postcopy.wire import one_line

MAX_LINE_BYTES = 64 * 1024
"""Of a request. Answers may be longer: a daemon may have many machines."""
MAX_ANSWER_BYTES = 16 << 20


class ControlError(PostcopyError):
    """A request that was not done. `kind` is the error's class on the wire: ``BadRequest`` (no request at all),
    ``CommandNotFound``, ``BadArguments``, ``NotNow`` (the state does not allow it), ``Failed`` (tried, and failed)."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


def _bad(text: str) -> NoReturn:
    raise ControlError("BadArguments", text)


# ---- Commands


@dataclass(frozen=True)
class Command:
    """What may be asked. `ctl` takes the option `bare` without its name, and the others as options."""

    help: str
    options: tuple[Option, ...] = ()
    required: str = ""  # the option that must be given
    bare: str = ""
    example: str = ""  # of `ctl`

    @property
    def arguments(self) -> Mapping[str, Option]:
        return {option.name: option for option in self.options}


_MACHINE = Option("machine", "name of the machine, where there are several", "NAME", parse_name)
_FORCE = flag("force", "even if data is lost")
_TO = Option("to", "where the other host takes machines", "HOST:PORT", check_address)
_TO_NOW = replace(_TO, help="new address of the other side (default: as before)")
_TLS_HOSTNAME = replace(
    options.TLS_HOSTNAME, help="name that the certificate of the other host must have (default: HOST)"
)
_NEW_MACHINE = (
    replace(options.NAME, help="name of the machine (default: its kind and random digits)"),
    replace(options.LIVE_KIND, name="kind", help="kvm, rv64, firecracker, qemu or program", metavar="KIND"),
    *(options.MEMORY, options.VCPUS, options.WORKLOAD, options.USED_MEMORY, options.SEED, options.BACKING),
    options.DISK,
    replace(options.API_SOCKET, help="firecracker: API socket of the one that runs it, which is taken over"),
    replace(options.QMP, help="qemu: a QMP monitor, which no other client uses, of the one that is taken over"),
    options.PRELOAD,
)
SETTINGS = (  # each is a field of `SourceOptions`
    options.MAX_BANDWIDTH,
    replace(options.BULK_CHANNELS, help="number of connections for the background push of the next migration"),
    replace(
        options.PRECOPY,
        help="for how long memory is sent in rounds before the switchover, in this migration and the next ones",
    ),
    options.MAX_DOWNTIME,
    replace(options.PUSH_AFTER, help="hold the background push back for SECONDS after the switchover; 0: push now"),
    replace(options.RECOVER_FOR, help="how long to try to reach a lost peer, from its loss on"),
)

COMMANDS: Mapping[str, Command] = {
    "commands": Command("list the requests that this process takes", example="postcopy ctl commands"),
    "status": Command(
        "show state and progress",
        (replace(_MACHINE, help="show this machine only"),),
        example="postcopy ctl status --machine vm1",
    ),
    "events": Command(
        "report events to this client from now on",
        (flag("enable", "false: no more"),),
        example="postcopy ctl events --json",
    ),
    "start": Command(
        "make a machine and run it",
        _NEW_MACHINE,
        required="kind",
        bare="kind",
        example="postcopy ctl start kvm --name vm1 --memory 1GiB",
    ),
    "end": Command(
        "stop a machine and remove it; pager: kill the process of a virtual machine",
        (_MACHINE, _FORCE),
        example="postcopy ctl end --machine vm1",
    ),
    "migrate": Command(
        "migrate a machine to another host",
        (_MACHINE, _TO, _TLS_HOSTNAME, *options.ONE_WAY),
        required="to",
        bare="to",
        example="postcopy ctl migrate host-b:7777 --machine vm1 --precopy auto",
    ),
    "switchover": Command(
        "end the precopy of a migration: switch over now, and send the rest after it",
        (_MACHINE,),
        example="postcopy ctl switchover --machine vm1",
    ),
    "migrate-cancel": Command(
        "cancel a migration before its point of no return; the machine stays",
        (_MACHINE,),
        example="postcopy ctl migrate-cancel --machine vm1",
    ),
    "migrate-pause": Command(
        "pause a migration past its point of no return: close its connections",
        (_MACHINE,),
        example="postcopy ctl migrate-pause --machine vm1",
    ),
    "migrate-recover": Command(
        "resume a paused migration: connect again",
        (_MACHINE, _TO_NOW, replace(_TLS_HOSTNAME, help="name that the certificate of the other side must have there")),
        bare="to",
        example="postcopy ctl migrate-recover host-c:7777",
    ),
    "set": Command(
        "change settings of the running process, or of one migration",
        (
            replace(_MACHINE, help="change precopy, max-downtime or push-after of this machine's migration only"),
            *SETTINGS,
        ),
        example="postcopy ctl set --max-bandwidth 100MiB/s",
    ),
    "reclaim": Command(
        "run a machine here again whose destination is dead for good",
        (_MACHINE, _FORCE),
        example="postcopy ctl reclaim --machine vm1",
    ),
    "upgrade": Command(
        "pager: have another process go on with the virtual machines, of this or of another installation",
        (
            options.path(
                "program",
                "what to start in place of `postcopy`, as the program of another installation"
                " (default: what this one was started with)",
                "PROGRAM",
            ),
        ),
        bare="program",
        example="postcopy ctl --control ./pager.ctl upgrade /opt/postcopy-0.2/bin/postcopy",
    ),
    "quit": Command("shut down cleanly", (_FORCE,), example="postcopy ctl quit"),
}


@dataclass(frozen=True)
class Request:
    command: str
    arguments: Json
    id: object = None  # whatever the client said; sent back


class RequestError(Exception):
    """What a line was not. `id` where it had one."""

    def __init__(self, error: ControlError, id: object = None) -> None:
        super().__init__(str(error))
        self.error = error
        self.id = id


def _unique(pairs: list[tuple[str, Any]]) -> Json:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key is there twice")
    return table


def _no_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def parse_json(line: bytes) -> Json:
    """A line's object. `ControlError` for anything else."""
    try:
        value = json.loads(line.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ControlError("BadRequest", f"not a line of JSON: {one_line(str(error), 200)}") from None
    if not isinstance(value, dict):
        raise ControlError("BadRequest", "not a JSON object")
    return value


def parse_request(line: bytes) -> Request:
    """`RequestError` unless it is a request that makes sense, with arguments that the command has."""
    try:
        table = parse_json(line)
    except ControlError as error:
        raise RequestError(error) from None
    id = table.get("id")
    unusable = isinstance(id, dict | list) or (isinstance(id, float) and not math.isfinite(id))  # as 1e999 is
    if unusable or (isinstance(id, str) and len(id) > 1000):
        raise RequestError(ControlError("BadRequest", "id must be a number or a short text"))
    try:
        command, arguments = table.get("execute"), table.get("arguments", {})
        if unknown := sorted(table.keys() - {"execute", "arguments", "id"}):
            raise ControlError("BadRequest", f"a request has no {one_line(unknown[0], 60)!r}")
        if not isinstance(command, str):
            raise ControlError("BadRequest", 'a request must have "execute", a command\'s name')
        if command not in COMMANDS:
            raise ControlError(
                "CommandNotFound", f"there is no command {one_line(command, 60)!r}; there are {', '.join(COMMANDS)}"
            )
        if not isinstance(arguments, dict):
            raise ControlError("BadArguments", "arguments must be an object")
        return Request(command, parse_arguments(command, arguments), id)
    except ControlError as error:
        raise RequestError(error, id) from None


def parse_arguments(command: str, given: Json) -> Json:
    """The values that a command takes. `ControlError` for what it does not."""
    known = COMMANDS[command].arguments
    if unknown := sorted(given.keys() - known.keys()):
        takes = f"it takes {', '.join(known)}" if known else "it takes none"
        _bad(f"{command} has no argument {one_line(unknown[0], 60)!r}; {takes}")
    values: Json = {}
    for key, option in known.items():
        if given.get(key) is None:
            if key == COMMANDS[command].required:
                _bad(f"{command} needs the argument {key!r}")
            continue
        try:
            values[key] = option.from_json(given[key])
        except ConfigurationError as error:
            _bad(f"{command}: {key}: {error}")
    return values


# ---- What the server says


def _line(value: object) -> bytes:
    return json.dumps(as_json(value), allow_nan=False).encode() + b"\n"


def greeting(side: str, pid: int) -> bytes:
    from postcopy.records.control import Greeted, Greeting  # which no parser needs

    return _line(Greeting(postcopy=Greeted(version=__version__, schema=VERSION, side=side, pid=pid)))


def answer(value: Record, id: object = None) -> bytes:
    return _line({"return": value} if id is None else {"return": value, "id": id})


def refusal(error: ControlError, id: object = None) -> bytes:
    from postcopy.records.control import Refusal, Refused

    return _line(Refusal(error=Refused(class_=error.kind, desc=one_line(str(error), 2000)), id=id))


def event(what: str, data: Json) -> bytes:
    now_us = time.time_ns() // 1000
    timestamp = {"seconds": now_us // 1_000_000, "microseconds": now_us % 1_000_000}
    return _line({"event": what, "timestamp": timestamp, "data": data})


class LineSplitter:
    """Bytes in, whole lines out; never keeps more than one line. Empty lines are left out."""

    def __init__(self, max_line_bytes: int = MAX_LINE_BYTES) -> None:
        self._max_line_bytes = max_line_bytes
        self._rest = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that this completes. `ControlError` for one that is too long: nothing after it can be read; the
        lines before it are lost with it."""
        self._rest += data
        lines = []
        while (end := self._rest.find(b"\n")) >= 0:
            self._check(end)
            line = bytes(self._rest[:end]).strip()
            del self._rest[: end + 1]
            if line:
                lines.append(line)
        self._check(len(self._rest))
        return lines

    def _check(self, length: int) -> None:
        if length > self._max_line_bytes:
            raise ControlError("BadRequest", f"a line has at most {self._max_line_bytes} bytes")
