# SPDX-License-Identifier: Apache-2.0
"""Moves a running virtual machine from one QEMU to another one, on this machine.

    python examples/qemu_move.py [--memory MIB]

Needs this package, QEMU (qemu-system-x86), /dev/userfaultfd, and nothing else: the guest comes with the package. It
writes a count into every page it works on, and looks for it again in each pass; a page that was lost, old or another
one would be an error in its lines.

Both QEMUs are started by `postcopy run`; the two sides are the commands that one would type on two hosts. They, and
QEMU's serial port, are all that is used here.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from postcopy.errors import PostcopyError
from postcopy.testbed.qemu import Qemu

POSTCOPY = (sys.executable, "-m", "postcopy")
RUN = (*POSTCOPY, "run", "--")


@contextmanager
def side(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([*POSTCOPY, *arguments, "--json"], stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()  # harmless when it has ended
        process.wait()


def lines_until(process: subprocess.Popen[str], event: str) -> dict[str, object]:
    """The first line of JSON with this event."""
    assert process.stdout is not None
    for line in process.stdout:
        record = json.loads(line)
        if record["event"] == event:
            return dict(record)
    raise SystemExit(f"a side ended before it said {event}: its error is above")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--memory", type=int, default=128, metavar="MIB", help="of the virtual machine (default: 128)")
    options = parser.parse_args(arguments)
    with (
        Qemu.start(options.memory, prefix=RUN) as here,
        Qemu.start(options.memory, prefix=RUN, incoming=True) as there,
    ):
        here.wait_ready()
        before = here.wait_passes(2)[-1].values
        print(f"here:  pass {before['pass']}, {before['errors']} errors", flush=True)

        machine = ("--machine", "qemu", "--qmp")
        with side("dest", *machine, there.qmp_path, "--listen", "127.0.0.1:0") as dest:
            address = str(lines_until(dest, "listening")["address"])
            # What else it says has to be read too: a pipe that is full would stop it.
            threading.Thread(target=lambda: list(dest.stdout or ())).start()
            with side("source", *machine, here.qmp_path, "--connect", address) as source:
                result = lines_until(source, "result")
                if source.wait() or dest.wait():
                    return 1
        after = there.wait_passes(2)[-1].values
        print(f"moved: {result['status']}, it stood still for {result['downtime-ms']} ms")
        print(f"there: pass {after['pass']}, {after['errors']} errors")
        return 1 if after["errors"] or after["pass"] <= before["pass"] else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PostcopyError as error:
        sys.exit(f"qemu_move: {error}")
