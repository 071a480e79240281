# SPDX-License-Identifier: Apache-2.0
"""What all tests share: capabilities that a machine may lack, and children that cannot outlive their test.

*Capabilities.* ``@pytest.mark.needs("uffd", "kvm")`` skips a test where the machine lacks one of them, and says what is
missing and what would help. Where the environment variable POSTCOPY_REQUIRE (comma-separated) names the capability,
the test fails instead: CI runs on a machine that is known to have it, so there a skip would hide a defect. A test that
finds out on its way calls the fixture ``require`` with names.

*Children.* ``run_in_child`` and ``spawn_child`` run a module-level function of the test's file, or a command, in a
process of its own, in a session of its own, which is killed at the deadline and when the test ends. Whatever may
block in a page fault for ever belongs there: no Python code can interrupt it, SIGKILL can.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import inspect
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import pytest
from sessions import end_session

CHILD = Path(__file__).with_name("support") / "child.py"
# What is ignored here, as under nohup and in the background of a script, all that is started here would ignore too.
for _number in (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, signal.default_int_handler if _number is signal.SIGINT else lambda *_: None)


# --- capabilities -----------------------------------------------------------------------------------------------------
# Each returns None where the machine has it, else what is missing and the remedy; asked of `postcopy.testbed.probe`.


def _probed(name: str) -> Callable[[], str | None]:
    def ask() -> str | None:
        # Not before it is asked for: the set-up\'s own tests run without the extension.
        from postcopy.testbed import probe

        return probe.find(name).complaint()

    return ask


def _netns() -> str | None:
    # The tests use these commands; the probe needs neither.
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        return "no ip or unshare command: install iproute2 and util-linux"
    return _probed("netns")()


def _qemu() -> str | None:
    from postcopy.errors import ResourceError
    from postcopy.testbed import qemu

    try:
        qemu.check()
    except ResourceError as error:
        return str(error)
    return None


def _linux_guest() -> str | None:
    from postcopy.errors import ResourceError
    from postcopy.testbed.qemu import linux

    if reason := missing("qemu"):
        return reason
    try:
        linux.build()
    except ResourceError as error:
        return str(error)
    return None


def _firecracker() -> str | None:
    from fetch_firecracker import NotFetched, fetch
    from postcopy.errors import ResourceError
    from postcopy.testbed import firecracker

    if reason := missing("kvm") or missing("uffd"):
        return reason
    try:
        try:
            binary = firecracker.find()
        except ResourceError:
            if firecracker.BINARY in os.environ:
                raise
            binary = str(fetch(Path(sys.executable).parent))
        firecracker.version_of(binary)
        firecracker.guest_path()
    except (ResourceError, NotFetched, OSError) as error:
        return str(error)
    return None


def _tls() -> str | None:
    from postcopy._native import lib
    from postcopy.errors import ErrorLine

    line = ErrorLine()
    return str(line) if lib.pc_tls_available(line.buffer, line.size) else None


def _command(name: str, package: str) -> Callable[[], str | None]:
    return lambda: None if shutil.which(name) else f"no {name} command: install {package}"


CAPABILITIES: dict[str, Callable[[], str | None]] = {
    "uffd": _probed("uffd"),  # a userfaultfd that serves faults raised by the kernel too
    "uffd-device": _probed("uffd-device"),
    "uffd-user": _probed("uffd-user"),  # at least one for faults of user code
    "uffd-minor": _probed("uffd-minor"),
    "uffd-poison": _probed("uffd-poison"),
    "uffd-move": _probed("uffd-move"),
    "tls": _tls,  # it was built with OpenSSL's headers, and finds its library
    "tun": _probed("tun"),  # TAPs can be opened
    "kvm": _probed("kvm"),
    "root": _probed("root"),
    "netns": _netns,
    "user-netns": _probed("user-netns"),
    "hugetlb": _probed("hugetlb"),
    "ipv6": _probed("ipv6"),
    "zsh": _command("zsh", "zsh"),
    "fish": _command("fish", "fish"),
    "man": _command("man", "man-db"),
    "chromium": _command("chromium", "chromium"),  # in which a report is looked at
    "openssl": _command("openssl", "openssl"),
    "qemu": _qemu,  # that is moved, and that postcopy is measured beside
    "linux-guest": _linux_guest,  # a kernel of Debian's with our first process, for QEMU; made where it is not here
    "firecracker": _firecracker,  # a real one, with our guest for it; fetched where it is not here
}


# Fetched by the first test that needs it, and so not asked for in the header.
FETCHED = {"firecracker", "linux-guest"}
# What only the C tests can lack (csrc/tests/support/test.h reads the same variable), and the name of all at once.
C_CAPABILITIES = frozenset({"uffd-kernel", "uffd-features", "uffd-syscall", "holes"})
ALL = "all"


@functools.cache
def missing(capability: str) -> str | None:
    return CAPABILITIES[capability]()


def required() -> frozenset[str]:
    """Capabilities that this machine is said to have."""
    names = frozenset(os.environ.get("POSTCOPY_REQUIRE", "").replace(",", " ").split())
    return names | CAPABILITIES.keys() if ALL in names else names


def check(*capabilities: str) -> None:
    """Skips the running test, or fails it, where a capability is missing."""
    for capability in capabilities:
        if reason := missing(capability):
            if capability in required():
                pytest.fail(f"POSTCOPY_REQUIRE names {capability}, but: {reason}", pytrace=False)
            pytest.skip(f"needs {capability}: {reason}")


def pytest_configure(config: pytest.Config) -> None:
    known = {ALL, *CAPABILITIES, *C_CAPABILITIES}
    if unknown := required() - known:
        raise pytest.UsageError(
            f"POSTCOPY_REQUIRE: unknown: {', '.join(sorted(unknown))}; known: {', '.join(sorted(known))}"
        )


HUGE_PAGES = 16
HUGE_POOL = Path("/proc/sys/vm/nr_hugepages")


def _change_huge_pool(by: int) -> None:
    """As csrc/tests/support/huge_pool.h: by so many, not to so many, since others may do this at the same time."""
    with HUGE_POOL.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        pages = max(0, int(file.read()) + by)
        file.seek(0)
        file.write(str(pages))


def pytest_sessionstart(session: pytest.Session) -> None:
    """Root's tests have a pool of huge pages, lent by the host until they have ended."""
    if os.geteuid() == 0 and not hasattr(session.config, "workerinput"):
        with contextlib.suppress(OSError):
            _change_huge_pool(HUGE_PAGES)
            session.config.add_cleanup(functools.partial(_change_huge_pool, -HUGE_PAGES))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for marker in item.iter_markers("needs"):
            if unknown := set(marker.args) - CAPABILITIES.keys():
                raise pytest.UsageError(f"{item.nodeid}: needs: unknown: {', '.join(sorted(unknown))}")


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("needs"):
        check(*marker.args)


def pytest_report_header() -> str:
    states = (
        f"{name} {'no' if missing(name) else 'yes'}{'!' if name in required() else ''}"
        for name in CAPABILITIES
        if name not in FETCHED
    )
    return f"capabilities (! required): {', '.join(states)}"


@pytest.fixture
def require() -> Callable[..., None]:
    """``require("kvm", ...)``: skips, or fails, the running test where a capability is missing."""
    return check


# --- children ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChildResult:
    """How a child ended."""

    returncode: int
    """As `subprocess` has it: negative for a signal."""
    stdout: str
    stderr: str
    value: Any = None
    """What the function returned; None for a command, or when the function did not return."""


class DeadlineExpired(AssertionError):
    """A child was not done at its deadline and has been killed; the message has its output."""


class Child:
    """A running child in a session of its own; leaving the ``with`` block kills all that runs in it.

    Standard output and error go to files, so that the child never blocks on a pipe that nobody reads and whatever it
    leaves behind holds nothing up.
    """

    def __init__(
        self, what: Callable[..., Any] | Sequence[str | os.PathLike[str]], *args: Any, **keywords: Any
    ) -> None:
        self._files = contextlib.ExitStack()
        self._stdout = self._open()
        self._stderr = self._open()
        self._result = self._open()
        with tempfile.TemporaryFile() as stdin:
            if callable(what):
                path = inspect.getsourcefile(what)
                if path is None or "." in what.__qualname__:
                    raise TypeError(f"{what!r} is not a function at the top of a file: no other process could find it")
                stdin.write(pickle.dumps((args, keywords)))
                stdin.seek(0)
                argv = ["call", path, what.__name__, str(self._result.fileno())]
            else:
                if args or keywords:
                    raise TypeError("a command takes its arguments in its own list")
                argv = ["exec", *(os.fspath(part) for part in what)]
            self.process = subprocess.Popen(
                [sys.executable, "-X", "faulthandler", str(CHILD), *argv],
                stdin=stdin,
                stdout=self._stdout,
                stderr=self._stderr,
                pass_fds=[self._result.fileno()] if callable(what) else [],
                start_new_session=True,
            )

    def _open(self) -> IO[bytes]:
        return self._files.enter_context(tempfile.TemporaryFile())  # closed with the others

    @property
    def pid(self) -> int:
        return self.process.pid

    def send_signal(self, signum: int) -> None:
        self.process.send_signal(signum)

    def output(self) -> str:
        """What it has written to standard output so far."""
        return self._read(self._stdout)

    def errors(self) -> str:
        """What it has written to standard error so far."""
        return self._read(self._stderr)

    def wait(self, deadline_s: float) -> ChildResult:
        """Waits for the end; `DeadlineExpired`, with the child killed, when there is none. Blocks this thread."""
        try:
            returncode = self.process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise DeadlineExpired(
                f"not done after {deadline_s:g} s\nstdout:\n{self.output()}\nstderr:\n{self.errors()}"
            ) from None
        size = os.fstat(self._result.fileno()).st_size
        value = pickle.loads(os.pread(self._result.fileno(), size, 0)) if size else None
        return ChildResult(returncode, self.output(), self.errors(), value)

    def kill(self) -> None:
        """Kills all that it has started, too, and waits until it is gone. Harmless when it has ended."""
        end_session(self.process)

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._files:
            self.kill()

    @staticmethod
    def _read(file: IO[bytes]) -> str:
        # pread: the offset is the child's own
        return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode(errors="replace")


def _run_in_child(
    what: Callable[..., Any] | Sequence[str | os.PathLike[str]], *args: Any, deadline_s: float = 30.0, **keywords: Any
) -> ChildResult:
    with Child(what, *args, **keywords) as child:
        return child.wait(deadline_s)


@pytest.fixture
def run_in_child() -> Callable[..., ChildResult]:
    """``run_in_child(what, *arguments, deadline_s=30.0)``: runs a function or a command to its `ChildResult`."""
    return _run_in_child


@pytest.fixture
def passes() -> Callable[..., None]:
    """``passes(what, *arguments)``: runs a function to its end in a child, within a minute, with nothing left open."""

    def run(what: Callable[..., Any], *args: Any) -> None:
        result = _run_in_child(what, *args, deadline_s=60)
        assert result.returncode == 0, f"{result.returncode}\n{result.stdout}{result.stderr}"
        assert "ResourceWarning" not in result.stderr

    return run


@pytest.fixture
def spawn_child() -> Iterator[Callable[..., Child]]:
    """``spawn_child(what, *arguments)``: starts a function or a command; the `Child` is killed when the test ends."""
    with contextlib.ExitStack() as stack:

        def spawn(what: Callable[..., Any] | Sequence[str | os.PathLike[str]], *args: Any, **keywords: Any) -> Child:
            return stack.enter_context(Child(what, *args, **keywords))

        yield spawn
