# SPDX-License-Identifier: Apache-2.0
"""What this host is, and the line that says so at the beginning of every `--json`. Reads files, tries nothing; a
millisecond at most, also where there are hundreds of processors."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from postcopy.records import VERSION, Json, as_json

if TYPE_CHECKING:
    from postcopy.records.results import Host

_INIT_PID_NS, _INIT_USER_NS = 0xEFFFFFFC, 0xEFFFFFFD  # inodes of the first namespaces, fixed in the kernel
_MAX_OPTIONS, _MAX_OPTION_CHARACTERS = 100, 200
_NOT_TOLD = (
    "tls", "peer_file", "control", "user", "protection", "command", "qemu", "listen", "connect",
    "json", "log_", "output", "report", "hdr", "html", "svg",
)  # fmt: skip
"""How the names of options begin whose values say where secrets are, may be secrets (in a command line of QEMU), or say
nothing of what was measured."""


def read(path: str, at_most: int = -1) -> str:
    """A file, or its beginning; empty where there is none. (The kernel makes /proc/cpuinfo as it is read: the
    whole of it takes a millisecond for each ten processors.)"""
    try:
        with open(path, "rb", buffering=0) as file:
            return (file.read(at_most) or b"").decode(errors="replace").replace("\0", "\n").strip()
    except OSError:
        return ""


def chosen(path: str) -> str | None:
    """The bracketed word of a setting such as ``always [madvise] never``."""
    _, bracket, rest = read(path).partition("[")
    return rest.partition("]")[0] if bracket else None


def container() -> str | None:
    """In what kind of container this process is, None for none that shows."""
    for path, kind in (("/.dockerenv", "docker"), ("/run/.containerenv", "podman")):
        if os.path.exists(path):
            return kind
    for line in read("/proc/1/environ").splitlines():
        if line.startswith("container="):
            return line.partition("=")[2] or "unnamed"
    for what, inode in (("pid", _INIT_PID_NS), ("user", _INIT_USER_NS)):
        with contextlib.suppress(OSError):
            if os.stat(f"/proc/self/ns/{what}").st_ino != inode:
                return f"{what} namespace"
    return None


def run_record(command: str, options: Mapping[str, object]) -> Json:
    """The fields of a `run` event of `postcopy COMMAND` with these options, by their names in a record or as argparse
    has them. Those that say where secrets are do not go into it, whatever is given; nor what was not given (None)."""
    from postcopy import __version__
    from postcopy.records.results import Run  # milliseconds at every start

    now_s = time.time()
    return as_json(
        Run(
            command=command,
            version=__version__,
            started=f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now_s))}.{int(now_s * 1e3) % 1000:03}Z",
            options=_told(options),
            host=_this_host(),
        )
    )


def run_line(command: str, options: Mapping[str, object]) -> str:
    """The same as the first line of a command that has no `Output`, without its end."""
    return json.dumps({"schema": VERSION, "event": "run", "elapsed-ms": 0.0} | run_record(command, options))


def _this_host() -> Host:
    from postcopy.records.results import Host

    system, processor = os.uname(), _first_processor()
    flags = processor.get("flags")
    return Host(
        cpu=processor.get("model name") or processor.get("cpu model") or processor.get("cpu") or None,
        cpus=os.cpu_count() or 1,
        usable_cpus=len(os.sched_getaffinity(0)),
        memory=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        page_size=os.sysconf("SC_PAGE_SIZE"),
        kernel=system.release,
        architecture=system.machine,
        virtual=None if flags is None else "hypervisor" in flags.split(),
        container=container(),
        thp=chosen("/sys/kernel/mm/transparent_hugepage/enabled"),
        governor=read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or None,
        load=os.getloadavg()[0],
    )


def _first_processor() -> dict[str, str]:
    """The first paragraph of /proc/cpuinfo."""
    lines = read("/proc/cpuinfo", 4096).partition("\n\n")[0].splitlines()
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _told(options: Mapping[str, object]) -> dict[str, str]:
    told: dict[str, str] = {}
    for name, value in options.items():
        words = value if isinstance(value, (list, tuple)) else [value]
        secret = name.replace("-", "_").startswith(_NOT_TOLD)
        if secret or not all(isinstance(word, (str, int, float)) for word in words):
            continue
        text = "yes" if value is True else ",".join(map(str, words))
        if text and value is not False and len(told) < _MAX_OPTIONS:
            told[name.replace("_", "-")] = text[:_MAX_OPTION_CHARACTERS]
    return told
