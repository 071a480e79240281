# SPDX-License-Identifier: Apache-2.0
"""A picture of a command as a terminal shows it, for the documentation: runs it, for real, and writes an SVG.

    python tools/picture.py docs/pictures/demo.svg postcopy demo --memory 256MiB --max-bandwidth 40MiB/s
    python tools/picture.py docs/pictures/top.svg timeout --preserve-status --signal=INT 8 postcopy ctl top

The picture has the command, one moment of its live view (where most of the memory has arrived), and what it prints at
its end, in the colours that it has there. Whoever changes the output runs this again; nothing in it is made up.
"""

from __future__ import annotations

import io
import os
import pty
import re
import struct
import sys
from fcntl import ioctl
from pathlib import Path
from termios import TIOCSWINSZ

from rich.console import Console
from rich.text import Text

COLUMNS, LINES = 80, 20
_DRAWING = re.compile(r"\x1b\[\?7l(.*?)\x1b\[\?7h", re.DOTALL)  # as `postcopy.output` writes each
_CONTROLS = re.compile(r"\x1b\[[?0-9;]*[A-Za-ln-z]|\r")
_SHARE = re.compile(r"^memory +(\d+) %", re.MULTILINE)
WANTED_SHARE = 60


def run(command: list[str]) -> str:
    """What the command writes to a terminal of its own. Ends this program with its status when it fails."""
    pid, fd = pty.fork()
    if pid == 0:
        os.environ |= {"TERM": "xterm-256color", "COLUMNS": str(COLUMNS), "LINES": str(LINES), "LC_ALL": "C.UTF-8"}
        os.execvp(command[0], command)
    ioctl(fd, TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    written = bytearray()
    while True:
        try:
            more = os.read(fd, 65536)
        except OSError:  # EIO: it has ended
            break
        if not more:
            break
        written += more
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status:
        sys.exit(f"{written.decode(errors='replace')}\npicture: {' '.join(command)} ended with status {status}")
    return written.decode()


def moments(written: str) -> tuple[list[str], str]:
    """Each drawing of the live view, and what was written after the last one."""
    drawn = (_CONTROLS.sub("", part).strip("\n") for part in _DRAWING.findall(written))
    *_, end = _DRAWING.split(written)
    return [part for part in drawn if _SHARE.search(Text.from_ansi(part).plain)], _CONTROLS.sub("", end).strip("\n")


def main(target: str, *command: str) -> None:
    drawn, end = moments(run(list(command)))
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), color_system="truecolor", highlight=False)
    shown = command[command.index("postcopy") :] if command[0] == "timeout" else command
    console.print(Text("$", "bold green"), Text(" ".join(shown)))
    if drawn:
        best = min(drawn, key=lambda part: abs(int(_SHARE.search(Text.from_ansi(part).plain)[1]) - WANTED_SHARE))  # type: ignore[index]
        console.print(Text.from_ansi(best), "", sep="\n")
    if end:
        console.print(Text.from_ansi(end))
    svg = console.export_svg(title="", unique_id="postcopy")
    # No font from the network: the page that has the picture needs nothing beside it.
    svg = re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL)
    Path(target).write_text("\n".join(line.rstrip() for line in svg.splitlines()) + "\n")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("picture: name the SVG to be written, and the command")
    main(*sys.argv[1:])
