# SPDX-License-Identifier: Apache-2.0
"""Runs one step of the test run: with a time limit, an honest exit status and nothing left running behind it.

    run_step.py [--timeout SECONDS] [--log FILE] NAME COMMAND [ARGUMENT...]

The step's processes are adopted when their parents die (child subreaper), so that all of them are found and killed at
the end, whatever sessions and process groups they have made for themselves. A step that leaves processes behind has
failed. With a log its output goes there, so that steps can run side by side; one that fails shows the end of it.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

PR_SET_CHILD_SUBREAPER = 36
KILL_TIMEOUT_S = 20.0
"""How long killed processes may take to go: one that does not answer SIGKILL hangs in the kernel."""
SHOWN_LINES = 200  # of the log of a step that has failed
REAP_GRACE_S = 2.0
"""How long what the step has ended may take to be gone after the step itself."""


class Interrupted(Exception):
    """A signal asked this step to end."""


def become_subreaper() -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "PR_SET_CHILD_SUBREAPER")


def parents() -> dict[int, int]:
    """The parent of every process there is."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                # pid (name, which may hold anything) state parent ...
                fields = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
                if fields[0] not in "ZX":
                    found[int(entry.name)] = int(fields[1])
    return found


def descendants() -> list[int]:
    """Living processes that descend from this one."""
    parent = parents()
    family = {os.getpid()}
    while found := {pid for pid, its in parent.items() if its in family} - family:
        family |= found
    return sorted(family - {os.getpid()})


def name_of(pid: int) -> str:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        command = ""
    return f"{pid} {command[:120]}".strip()


def reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def kill_descendants() -> list[str]:
    """Kills whatever is left; returns what would not die."""
    deadline = time.monotonic() + KILL_TIMEOUT_S
    while left := descendants():
        if time.monotonic() > deadline:
            return [name_of(pid) for pid in left]
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
        reap()
    reap()
    return []


def left_behind() -> list[str]:
    """What the step has left running, after a moment for what is just ending."""
    deadline = time.monotonic() + REAP_GRACE_S
    while left := [name_of(pid) for pid in descendants()]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
        reap()
    return left


def interrupt(signum: int, _frame: FrameType | None) -> None:
    raise Interrupted(signal.Signals(signum).name)


def start(command: list[str], log: Path | None) -> subprocess.Popen[bytes]:
    # (with the descriptors of make's job server, when make has started this)
    if log is None:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, close_fds=False)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as out:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, close_fds=False
        )


def show_end(log: Path) -> None:
    """In one write, since another step may be writing too."""
    with contextlib.suppress(OSError):
        lines = log.read_text(errors="replace").splitlines()[-SHOWN_LINES:]
        print("\n".join(lines), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS")
    parser.add_argument("--log", type=Path, metavar="FILE")
    parser.add_argument("name")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()

    become_subreaper()
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, interrupt)
    print(f"==> {args.name}" + (f" ({args.log})" if args.log else ""), flush=True)
    begin = time.monotonic()
    problems = []
    status = 1
    try:
        process = start(args.command, args.log)
        status = process.wait(args.timeout)
        if status:
            problems.append(f"exit status {status}" if status > 0 else f"killed by {signal.Signals(-status).name}")
        if left := left_behind():
            problems.append("left running: " + "; ".join(left))
    except subprocess.TimeoutExpired:
        problems.append(
            f"not done after {args.timeout:g} s, killed while running: " + "; ".join(map(name_of, descendants()))
        )
    except Interrupted as reason:
        problems.append(f"interrupted by {reason}")
    except OSError as error:
        problems.append(str(error))
    finally:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(signum, signal.SIG_IGN)
        if immortal := kill_descendants():
            problems.append("cannot be killed: " + "; ".join(immortal))
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    took = f"{time.monotonic() - begin:.1f} s ({used.ru_utime + used.ru_stime:.0f} s of processor time)"
    if problems:
        if args.log:
            show_end(args.log)
        print(f"==> {args.name}: FAILED after {took}: {', '.join(problems)}", flush=True)
        return status if 0 < status < 126 else 1
    print(f"==> {args.name}: ok, {took}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
