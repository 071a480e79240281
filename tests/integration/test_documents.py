# SPDX-License-Identifier: Apache-2.0
"""The examples of README.md and docs/, run as a reader would: every `sh` block of a page, in its order, in one
directory; what is typed on host-a and host-b, in a laboratory of two hosts; and every `python` block that is a program.

A command that serves (`daemon`, `source`, `dest`) goes on in the background, as in a terminal of its own; every other
one has to end with status 0, but for those in `STATUS`. What cannot be run here is in `NOT_RUN`, with the reason."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from sessions import end_session

ROOT = Path(__file__).parents[2]
DEADLINE_S = 120.0
ADDRESSES = {"host-a": "10.77.0.1", "host-b": "10.77.0.2"}

NOT_RUN = [  # page, a command or how it begins, reason
    ("*", r"make |pip(x)? |sudo |apt-get |python3? -m venv|~/postcopy|export PATH", "installs or builds software"),
    ("*", r"systemctl |journalctl |docker ", "needs systemd, or Docker (tests/containers)"),
    ("*", "scp ", "both hosts have one file system here"),
    *([] if shutil.which("openssl") else [("docs/tls.md", "openssl ", "needs the command openssl")]),
    ("README.md", "postcopy demo --lab|postcopy faultpaths", "test_lab and test_faultpaths do it"),
    ("README.md", "postcopy demo --machine qemu", "test_demo_qemu does it"),
    ("docs/howto/daemon.md", "postcopy ctl events", "goes on until Ctrl-C"),
    (
        "docs/howto/recover.md",
        "",
        "nothing is lost here; test_reclaim, test_salvage and test_new_address",
    ),
]
STATUS = {  # page, command: the other status that it ends with
    ("docs/tutorial.md", "postcopy ctl --control a.sock quit            # refused: vm1 is there"): 1,
}
SAYS = {  # page, command: what it says, each time that it is typed; a reader types it again until it does
    ("docs/tutorial.md", "postcopy ctl --control a.sock status"): [
        "vm1",
        "postcopy-active",
        "postcopy-paused",
        "completed",
    ],
    ("docs/tutorial.md", "postcopy ctl --control b.sock status"): ["completed"],
    ("docs/tutorial.md", "host-b$ postcopy ctl status"): ["vm1"],
    ("README.md", "host-b$ postcopy ctl status"): ["vm1"],
    ("docs/howto/daemon.md", "host-b$ postcopy ctl status"): ["vm1"],
    (
        "docs/howto/prometheus.md",
        "host-a$ curl -s --cacert host-a.tls/ca-cert.pem --cert host-a.tls/client-cert.pem"
        " --key host-a.tls/client-key.pem https://host-a:9707/metrics",
    ): ["postcopy_build_info"],
    ("docs/tls.md", "host-b$ postcopy ctl status"): ["vm1"],
}
# Put behind the options of a demo, where they count: test_migration and test_chaos are about larger ones.
QUICK_DEMO = " --memory 16MiB --used-memory 8MiB --migrate-after 0.2 --run-for 0.5"
CERTIFICATES = [
    "host-a$ postcopy tls new-ca ca",
    "host-a$ postcopy tls issue ca --host host-a --out host-a.tls",
    "host-a$ postcopy tls issue ca --host host-b --out host-b.tls",
]
BEFORE = {  # page: what is there already when it is read, and what its systemd units start
    "docs/howto/daemon.md": [
        *CERTIFICATES,
        "host-a$ postcopy daemon --listen :7777 --tls host-a.tls",
        "host-b$ postcopy daemon --listen :7777 --tls host-b.tls",
    ],
    "docs/howto/prometheus.md": CERTIFICATES,
    "docs/howto/restore.md": CERTIFICATES,
}
PAGES = [
    "README.md",
    "docs/tutorial.md",
    "docs/tls.md",
    *(f"docs/howto/{path.name}" for path in sorted((ROOT / "docs/howto").glob("*.md"))),
]
ELSEWHERE = {  # page: the tests that do what it says; that its commands and options are there, test_docs.py tests
    "CONTRIBUTING.md": "make test",
    "docs/chaos.md": "tests/integration/test_chaos.py",
    "docs/conformance.md": "tests/integration/test_conformance.py",
    "docs/containers.md": "tests/containers/test_containers.py",
    "docs/faultpaths.md": "tests/integration/test_faultpaths.py",
    "docs/kernels.md": "tests/unit/testbed/test_faultpaths.py",
    "docs/firecracker.md": "tests/integration/test_firecracker_page.py",
    "docs/qemu.md": "tests/integration/test_qemu_page.py",
    "docs/programs.md": "tests/integration/test_program.py",
    "docs/fuzzing.md": "tests/fuzz/test_targets.py",
    "docs/lab.md": "tests/integration/test_lab.py",
    "docs/lazy-memory.md": "tests/integration/test_lazy.py",
    "docs/machines.md": "tests/integration/test_network.py",
    "docs/performance.md": "tests/unit/testbed/test_bench.py",
    "docs/operating.md": "tests/integration/test_operating.py",
    "docs/privileges.md": "tests/integration/test_privileges.py",
    "docs/probe.md": "tests/unit/testbed/test_probe.py",
    "docs/report.md": "tests/integration/test_report.py",
    "docs/results.md": "tests/unit/testbed/test_bench_compare.py",
    "docs/salvage.md": "tests/integration/test_salvage.py",
    "docs/userfaultfd.md": "tests/packages/test_install.py",
}


@dataclass(frozen=True)
class Command:
    host: str  # "" for one that is typed where the reader sits
    text: str
    line: int
    first: bool = False  # of a block with prompts


def fences(page: str, language: str) -> Iterator[tuple[int, str]]:
    """Line number and text of each block of a language."""
    text = (ROOT / page).read_text()
    if page in BEFORE:
        text = "\n".join(["```sh", *BEFORE[page], "```", text])
    for found in re.finditer(rf"^( *)```{language}\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL):
        yield text[: found.start(2)].count("\n") + 1, textwrap.dedent(found[2])


def commands(page: str) -> list[Command]:
    """What a reader types; other lines of a block with prompts are what is answered."""
    typed = []
    for first, block in fences(page, "sh"):
        prompts = re.search(r"^(host-[ab]|)\$ ", block, re.MULTILINE)
        line, text_before = first, ""
        for joined in re.split(r"(?<!\\)\n", block):
            here, line = line, line + joined.count("\n") + 1
            text = joined.replace("\\\n", " ").strip()
            if prompts:
                found = re.match(r"(host-[ab]|)\$ (.*)", text)
                if found:
                    typed.append(Command(found[1], found[2], here, first=not text_before))
                    text_before = text
            elif text and not text.startswith("#"):
                typed.append(Command("", text, here))
    return typed


def why_not(page: str, command: str) -> str | None:
    for where, beginning, reason in NOT_RUN:
        if where in ("*", page) and re.match(beginning, command):
            return reason
    return None


@dataclass
class Reader:
    """Somebody who types what a page says."""

    directory: Path
    processes: list[tuple[Command, subprocess.Popen[bytes], Path]] = field(default_factory=list)
    hosts: bool = False

    def __post_init__(self) -> None:
        tools = self.directory / "bin"
        tools.mkdir()
        (tools / "postcopy").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m postcopy "$@"\n')
        (tools / "postcopy").chmod(0o755)
        (tools / "python").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
        (tools / "python").chmod(0o755)
        (self.directory / "examples").symlink_to(ROOT / "examples")
        (self.directory / "guest.img").write_bytes(os.urandom(1 << 20) + bytes(7 << 20))

    def environment(self, host: str) -> dict[str, str]:
        runtime = self.directory / f"run-{host or 'here'}"
        runtime.mkdir(mode=0o700, exist_ok=True)
        (self.directory / "lab").mkdir(exist_ok=True)
        return os.environ | {
            "PATH": f"{self.directory / 'bin'}:{os.environ['PATH']}",
            "VIRTUAL_ENV": sys.prefix,
            "XDG_RUNTIME_DIR": str(runtime),
            "POSTCOPY_LAB_DIR": str(self.directory / "lab"),
        }

    def type(self, command: Command, status: int = 0, says: str = "") -> None:
        """Types it, again and again until it says so. (What would be at the default place is named for each host:
        these two have one file system.)"""
        deadline = time.monotonic() + DEADLINE_S
        while says not in (said := self.type_once(command, status).lower()):
            assert time.monotonic() < deadline, f"{command} does not say {says!r}: {said}"
            time.sleep(0.1)

    def type_once(self, command: Command, status: int) -> str:
        text = command.text
        if command.host:
            if not self.hosts:
                self.hosts = True
                self.type(Command("", "postcopy lab up --name two --hosts 2", command.line))
            for name, address in ADDRESSES.items():
                text = text.replace(name, address)
            text = re.sub(
                r"^(\S+=\S+ )?postcopy (daemon|ctl)\b(?!.*--control)",
                rf"\1postcopy \2 --control {command.host}.sock",
                text,
            )
            text = f"postcopy lab exec --name two h{'ab'.index(command.host[-1]) + 1} -- sh -c {shlex.quote(text)}"
        text = re.sub(r"^(postcopy demo[^#]*)", rf"\1{QUICK_DEMO} ", text)
        serves = re.search(r"postcopy (?:daemon|source|dest)\b.* --listen (\S*:\d+)", text)
        if serves and command.first:  # another example: its reader has ended what served before
            for _, process, _ in self.processes:
                self.kill(process)
        output = self.directory / f"output-{len(list(self.directory.glob('output-*')))}"
        with output.open("wb") as stream:
            process = subprocess.Popen(
                ["bash", "-c", text], cwd=self.directory, env=self.environment(command.host), stdout=stream,
                stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        self.processes.append((command, process, output))
        if serves:
            self.wait_listening(command, process, output)
        else:
            self.wait_end(command, process, output, status)
        return output.read_text()

    def wait_listening(self, command: Command, process: subprocess.Popen[bytes], output: Path) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while b"listening" not in output.read_bytes():
            assert process.poll() is None, f"{command}: {output.read_text()}"
            assert time.monotonic() < deadline, f"{command}: {output.read_text()}"
            time.sleep(0.02)

    def wait_end(self, command: Command, process: subprocess.Popen[bytes], output: Path, status: int = 0) -> None:
        try:
            process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            pytest.fail(f"{command} does not end: {output.read_text()}")
        assert process.returncode == status, f"{command}: status {process.returncode}: {output.read_text()}"

    def finish(self) -> None:
        """What serves one machine or one destination has ended by itself."""
        for command, process, output in self.processes:
            if (
                re.search(r"\bpostcopy (?:source|dest)\b(?!.*forever)", command.text)
                and process.poll() != -signal.SIGKILL
            ):
                self.wait_end(command, process, output)

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        end_session(process)

    def leave(self) -> None:
        for _, process, _ in self.processes:
            self.kill(process)
        subprocess.run(
            [sys.executable, "-m", "postcopy", "lab", "down", "--all"], env=self.environment(""), cwd=self.directory,
            capture_output=True, timeout=DEADLINE_S, check=False,
        )  # fmt: skip


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    reader = Reader(tmp_path)
    yield reader
    reader.leave()


@pytest.mark.needs("netns")
@pytest.mark.timeout(400)
@pytest.mark.parametrize("page", PAGES)
def test_commands(page: str, reader: Reader) -> None:
    said = {known: iter(words) for known, words in SAYS.items()}
    for command in commands(page):
        if why_not(page, command.text) is None:
            typed = (page, f"{command.host}$ {command.text}" if command.host else command.text)
            reader.type(command, STATUS.get(typed, 0), next(said.get(typed, iter(())), ""))
    reader.finish()


@pytest.mark.parametrize(("page", "line", "program"), [
    pytest.param(page, line, text, id=f"{page}:{line}")
    for page in PAGES for line, text in fences(page, "python") if "trio.run(" in text
])  # fmt: skip
def test_programs(page: str, line: int, program: str, reader: Reader) -> None:
    if "sys.argv" in program:  # it wants the address of an image
        served = Command("", "postcopy source --machine image --image guest.img --listen 127.0.0.1:7781", line)
        reader.type(served)
    (reader.directory / "program.py").write_text(program)
    reader.type(Command("", "python program.py 127.0.0.1:7781", line))


def test_what_is_expected_is_on_its_page() -> None:
    """A command that a page has no more, or has once more, would not be looked at."""
    for page, typed in [*STATUS, *SAYS]:
        known = [f"{command.host}$ {command.text}" if command.host else command.text for command in commands(page)]
        assert known.count(typed) == len(SAYS.get((page, typed), [""])), f"{page}: {typed}"
    for where, beginning, _ in NOT_RUN:
        typed_there = [command.text for page in PAGES if where in ("*", page) for command in commands(page)]
        assert any(re.match(beginning, text) for text in typed_there), beginning


def test_all_pages_with_commands() -> None:
    documents = [path.relative_to(ROOT) for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"))]
    shown = {str(page) for page in documents if list(fences(str(page), "sh")) or list(fences(str(page), "python"))}
    assert shown <= set(PAGES) | set(ELSEWHERE)
    assert all((ROOT / where).exists() for where in ELSEWHERE.values() if "/" in where)
