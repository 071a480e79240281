# SPDX-License-Identifier: Apache-2.0
"""`postcopy` commands out of a process that has imported the package already: each of them is a fork of it.

For commands that are run very often and that nothing but their output and status is looked at: a start of Python with
all that `postcopy` imports takes a quarter of a second of processor time, a fork some milliseconds. It is a process of
its own, since one with threads must not fork; it has none, and ends with the one that has started it.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

_INT = struct.Struct("=i")


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


@functools.cache
def _server() -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen([sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()])

    def end() -> None:  # it does when nobody has the other end any more
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


def run(arguments: Sequence[str], *, deadline_s: float) -> Done:
    """What ``postcopy ARGUMENT...`` says, with this process's environment; killed at the deadline, which is an
    AssertionError."""
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        ours, theirs = os.pipe()
        try:
            request = json.dumps({"arguments": arguments, "environment": dict(os.environ)}).encode()
            socket.send_fds(_server(), [request], [stdout.fileno(), stderr.fileno(), theirs])
        finally:
            os.close(theirs)
        with open(ours, "rb", buffering=0) as answers:
            pid = _number(answers)
            if not select.select([answers], [], [], deadline_s)[0]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                raise AssertionError(f"postcopy {' '.join(arguments)}: not done after {deadline_s:g} s")
            status = _number(answers)
        output, errors = (
            os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode(errors="replace")
            for file in (stdout, stderr)
        )
    return Done(os.waitstatus_to_exitcode(status), output, errors)


def _number(answers: io.FileIO) -> int:
    data = answers.read(_INT.size) or b""
    assert len(data) == _INT.size, "the process that runs commands for the tests has ended, or could not fork"
    return int(_INT.unpack(data)[0])


# ---- in the process


def _serve(fd: int) -> None:
    import postcopy.cli.ctl  # noqa: F401
    from postcopy.__main__ import main

    sock = socket.socket(fileno=fd)
    while True:
        request, fds, _, _ = socket.recv_fds(sock, 1 << 20, 3)
        if not request:
            return
        if os.fork() == 0:
            sock.close()
            command = os.fork()
            if command == 0:
                os._exit(_become(json.loads(request), fds, main))
            os.write(fds[2], _INT.pack(command))
            os.write(fds[2], _INT.pack(os.waitpid(command, 0)[1]))
            os._exit(0)
        for each in fds:
            os.close(each)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _become(request: dict[str, object], fds: list[int], main: object) -> int:
    assert callable(main)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(fds[0], 1)
    os.dup2(fds[1], 2)
    for each in fds:
        os.close(each)
    os.environ.clear()
    os.environ.update(request["environment"])  # type: ignore[call-overload]
    sys.argv = ["postcopy", *request["arguments"]]  # type: ignore[misc]
    try:
        return int(main())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
