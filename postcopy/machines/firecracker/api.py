# SPDX-License-Identifier: Apache-2.0
"""Firecracker's API: HTTP/1.1 with JSON over an AF_UNIX socket.

Each request has a connection of its own, so that no answer is ever taken for that of another request, and nothing is
sent twice. What Firecracker says is bounded in length and in time. Every way in which a request can fail has a name:

| error | what it means |
|---|---|
| `FirecrackerUnreachable` | nothing was asked: nobody listens there, or this user may not connect |
| `FirecrackerRefused` | it answered that it will not; `refusal` says why, `fault_message` is its own text |
| `FirecrackerInDoubt` | it was asked and has not answered: whether it did it has to be found out |
| `FirecrackerAnswer` | it answered what no Firecracker answers |

One thread of Firecracker serves its API, its devices and its balloon: a request waits while that thread waits for a
page of guest memory.
"""

from __future__ import annotations

import enum
import os
import re
from typing import Any

import h11
import msgspec
import trio

from postcopy.errors import MigrationError
from postcopy.machines._peer import Process, Unreachable, connect, one_line, process_of

REQUEST_TIMEOUT_S = 10.0
"""How long Firecracker has for a request that does little."""
MAX_ANSWER_BYTES = 1 << 20
_READ_BYTES = 64 << 10


class Refusal(enum.StrEnum):
    """Why Firecracker refuses a request."""

    NOT_STARTED = "not started"
    ALREADY_STARTED = "already started"
    CONFIGURED = "already configured"
    RUNNING = "running"
    NO_MEMORY_FILE = "memory file cannot be opened"
    VERSION = "state of another version"
    ARCHITECTURE = "state of another architecture"
    DAMAGED = "damaged state"
    CPU = "another CPU"
    PAGER = "page fault handler"
    NETWORK = "network interface"
    DRIVE = "drive"
    VSOCK = "vsock"
    STATE_FILE = "state file cannot be opened"
    VCPU = "vCPU"
    INACTIVE = "device not active"
    DIRTY_TRACKING = "dirty page tracking"
    UNKNOWN_REQUEST = "unknown request"
    OTHER = "other"


# The first that matches the text: what is more special comes first. Firecracker 1.1 to 1.16.
_REFUSALS = (
    (Refusal.NO_MEMORY_FILE, r"on the memory backing file"),
    (Refusal.RUNNING, r"save/restore unavailable while running"),
    (Refusal.NOT_STARTED, r"not supported before starting|not supported pre-boot"),
    (Refusal.CONFIGURED, r"not allowed after configuring boot-specific"),
    (Refusal.ALREADY_STARTED, r"not supported after starting|not supported post-boot"),
    (Refusal.VERSION, r"[Ii]nvalid (data |format )?version|[Uu]nsupported.* version|snapshot version"),
    (Refusal.ARCHITECTURE, r"[Mm]agic value does not match"),
    (Refusal.DAMAGED, r"CRC64|CRC validation|smaller than CRC|serialization/deserialization|[Ss]erialization error"),
    (Refusal.PAGER, r"connect to UDS|UFFD|[Uu]serfault|page fault handler"),
    (Refusal.CPU, r"CPU vendor|[Tt]sc|TSC|cpuid|CPUID|MSR"),
    (Refusal.NETWORK, r"\btap\b|[Nn]etwork|\bTAP\b|[Nn]et:"),
    (Refusal.VSOCK, r"[Vv]sock"),
    (Refusal.INACTIVE, r"not activated|is inactive"),
    (Refusal.DIRTY_TRACKING, r"[Dd]irty (page )?tracking|diff snapshot.*not"),
    (Refusal.STATE_FILE, r"(the|on) snapshot (state )?(backing )?file|snapshot file"),
    (Refusal.DRIVE, r"[Bb]lock|[Bb]acking file|[Dd]rive|[Dd]isk"),
    (Refusal.VCPU, r"vCPU|[Vv]cpu"),
    (Refusal.UNKNOWN_REQUEST, r"Invalid request method|Unrecognized|unknown (field|variant)|deserializing the json"),
)


class FirecrackerError(MigrationError):
    """A request that failed. `status` is that of HTTP and `fault_message` Firecracker's own text, where it answered."""

    status: int | None = None
    fault_message: str = ""


class FirecrackerUnreachable(FirecrackerError, Unreachable):
    """Nobody takes connections there: nothing was asked."""


class FirecrackerInDoubt(FirecrackerError):
    """It was asked and has not answered: whether it has done it is not known."""


class FirecrackerAnswer(FirecrackerError):
    """It answered what no Firecracker answers."""


class FirecrackerRefused(FirecrackerError):
    """It answered that it will not."""

    def __init__(self, request: str, status: int, fault_message: str) -> None:
        super().__init__(f"Firecracker refuses {request}: {fault_message or 'it does not say why'} (status {status})")
        self.status = status
        self.fault_message = fault_message
        self.refusal = refusal_of(fault_message)


def refusal_of(fault_message: str) -> Refusal:
    """What a text of Firecracker's means."""
    return next((refusal for refusal, text in _REFUSALS if re.search(text, fault_message)), Refusal.OTHER)


class Api:
    """The API of one Firecracker. Holds nothing open between two requests; any number of tasks may use it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.path.abspath(path)

    async def get(self, path: str, timeout_s: float = REQUEST_TIMEOUT_S) -> Any:
        return await self.request("GET", path, None, timeout_s)

    async def instance(self, timeout_s: float = REQUEST_TIMEOUT_S) -> tuple[str, str]:
        """The state of its microVM, as "Not started", "Running" or "Paused", and the version of Firecracker."""
        said = await self.get("/", timeout_s)
        if not isinstance(said, dict) or not isinstance(said.get("state"), str):
            raise FirecrackerAnswer(f"what answers GET / at {self.path} is no Firecracker")
        return one_line(said["state"]), one_line(said.get("vmm_version", ""))

    async def put(self, path: str, body: object, timeout_s: float = REQUEST_TIMEOUT_S) -> Any:
        return await self.request("PUT", path, body, timeout_s)

    async def patch(self, path: str, body: object, timeout_s: float = REQUEST_TIMEOUT_S) -> Any:
        return await self.request("PATCH", path, body, timeout_s)

    async def request(self, method: str, path: str, body: object, timeout_s: float) -> Any:
        """What it answers, decoded; None for an answer without content. `body`: what JSON can say, or None for none.
        Raises a `FirecrackerError`. Cancelled, it is in doubt whether it was done."""
        request = f"{method} {path}"
        deadline = trio.current_time() + timeout_s
        stream = await self._connect(deadline)
        try:
            with trio.fail_at(deadline):
                status, content = await _exchange(stream, method, path, body)
        except trio.TooSlowError:
            raise FirecrackerInDoubt(
                f"Firecracker ({self.path}) has not answered {request} within {timeout_s:g} s; its one thread may wait"
                " for a page of the guest's memory, or for a device"
            ) from None
        except (trio.BrokenResourceError, _ClosedEarly) as error:
            raise FirecrackerInDoubt(
                f"Firecracker ({self.path}) has closed the connection and not answered {request}: it may have ended"
            ) from error
        except h11.RemoteProtocolError as error:
            raise FirecrackerAnswer(f"what answers {request} at {self.path} does not speak HTTP/1.1") from error
        finally:
            stream.socket.close()
        answer = _decoded(request, content)
        if 200 <= status < 300:
            return answer
        fault_message = answer.get("fault_message", "") if isinstance(answer, dict) else ""
        raise FirecrackerRefused(request, status, one_line(fault_message))

    async def process(self, timeout_s: float = REQUEST_TIMEOUT_S) -> Process:
        """The process that listens there, as the kernel says. The pidfd is the caller's."""
        stream = await self._connect(trio.current_time() + timeout_s)
        try:
            return process_of(stream.socket, self.path, "Firecracker")
        except Unreachable as error:
            raise FirecrackerUnreachable(str(error)) from error
        finally:
            stream.socket.close()

    async def _connect(self, deadline: float) -> trio.SocketStream:
        try:
            return await connect(self.path, deadline, "Firecracker", "start one with --api-sock")
        except Unreachable as error:
            raise FirecrackerUnreachable(str(error)) from error


class _ClosedEarly(Exception):
    """The connection ended within the answer."""


async def _exchange(stream: trio.SocketStream, method: str, path: str, body: object) -> tuple[int, bytes]:
    connection = h11.Connection(h11.CLIENT)
    content = msgspec.json.encode(body) if body is not None else b""
    headers = [("Host", "localhost"), ("Accept", "application/json"), ("Content-Length", str(len(content)))]
    if content:
        headers.append(("Content-Type", "application/json"))
    request = connection.send(h11.Request(method=method, target=path, headers=headers)) or b""
    request += connection.send(h11.Data(data=content)) or b""
    request += connection.send(h11.EndOfMessage()) or b""
    await stream.send_all(request)
    status, answer = 0, bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            data = bytes(await stream.receive_some(_READ_BYTES))
            if not data:  # Firecracker always says how long its answer is
                raise _ClosedEarly
            connection.receive_data(data)
        elif isinstance(event, h11.Response):
            status = event.status_code
        elif isinstance(event, h11.Data):
            answer += event.data
            if len(answer) > MAX_ANSWER_BYTES:
                raise FirecrackerAnswer(f"Firecracker's answer to {method} {path} is too long")
        elif isinstance(event, h11.EndOfMessage):
            return status, bytes(answer)
        elif isinstance(event, h11.ConnectionClosed) or event is h11.PAUSED:
            raise _ClosedEarly


def _decoded(request: str, content: bytes) -> Any:
    if not content:
        return None
    try:
        return msgspec.json.decode(content)
    except (ValueError, RecursionError) as error:
        raise FirecrackerAnswer(f"Firecracker's answer to {request} is not JSON") from error
