# SPDX-License-Identifier: Apache-2.0
"""The installed program, attacked from outside. `make hostile` runs all of it; without the tests marked `slow` it is a
step of `make test`.

What a peer says in the modules of `THROUGH_TLS` it also says under TLS, with a certificate that is good. `make test`
has `SAMPLE` of these, by chance: others each time."""

from __future__ import annotations

import contextlib
import inspect
import os
import random
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hostile import _peer, _program, _tls

Start = Callable[..., _program.Program]


QUICK = frozenset(Path(__file__).with_name("quick.txt").read_text().split("\n")) - {""}
"""What of all this `make test` runs, too: one of each kind. The rest is marked `slow`."""


THROUGH_TLS = ("test_lies", "test_fuzz")
SAMPLE = 3


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.definition.path.stem in THROUGH_TLS and "version" in inspect.signature(metafunc.function).parameters:
        carriers = ["plain", pytest.param("tls", marks=pytest.mark.needs("tls"))]
        metafunc.parametrize("carrier", carriers, indirect=True)


def name_of(item: pytest.Item) -> str:
    """As in `quick.txt`, however it is carried."""
    return item.name.replace("[plain]", "").replace("[plain-", "[").replace("[tls]", "").replace("[tls-", "[")


def is_under_tls(item: pytest.Item) -> bool:
    return item.path.stem in THROUGH_TLS and "[tls" in item.name


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A name in `quick.txt` that is no test would be one test less, unnoticed."""
    here = Path(__file__).parent
    if any(Path(argument).resolve() == here for argument in config.args):  # all of them have been collected
        missing = QUICK - {name_of(item) for item in items if item.path.parent == here}
        if missing:
            raise pytest.UsageError(f"quick.txt names what is no test: {', '.join(sorted(missing))}")
    # The same in each worker of a run.
    seed = os.environ.get("POSTCOPY_SEED") or os.environ.get("PYTEST_XDIST_TESTRUNUID") or os.getpid()
    under_tls = [item for item in items if item.path.parent == here and is_under_tls(item) and name_of(item) in QUICK]
    sample = set(random.Random(seed).sample(under_tls, min(SAMPLE, len(under_tls))))
    for item in items:
        if item.path.parent != Path(__file__).parent or item.path.name == "test_device_states.py":
            continue
        item.add_marker(pytest.mark.needs("uffd-user"))  # the machines here are rv64's, and images
        if name_of(item) not in QUICK or (is_under_tls(item) and item not in sample):
            item.add_marker("slow")


@pytest.fixture(autouse=True)
def carrier(request: pytest.FixtureRequest) -> Iterator[str]:
    """What carries all that is said: "plain" or "tls"."""
    carrier = getattr(request, "param", "plain")
    with _peer.under_tls() if carrier == "tls" else contextlib.nullcontext():
        yield carrier


@pytest.fixture
def start(carrier: str) -> Iterator[Start]:
    """``start(*arguments)``: the program, as a `_program.Program` that is killed when the test ends."""
    with _program.starter() as start:

        def start_under_tls(command: str, *arguments: object, **keywords: Any) -> _program.Program:
            given = ("--tls", _tls.directory()) if command in ("source", "dest", "daemon") else ()
            return start(command, *given, *arguments, **keywords)

        yield start_under_tls if carrier == "tls" else start


@pytest.fixture
def daemon(start: Start, tmp_path: Path) -> Callable[..., tuple[_program.Program, _program.Control]]:
    """``daemon("a", *arguments)``: one that listens, and its control socket."""

    def run(name: str = "d", *arguments: object, **keywords: Any) -> tuple[_program.Program, _program.Control]:
        path = tmp_path / name
        program = start("daemon", "--json", "--control", path, "--listen", "127.0.0.1:0", *arguments, **keywords)
        assert program.where
        return program, _program.Control(path)

    return run


@pytest.fixture
def node(tmp_path: Path, require: Callable[..., None]) -> Callable[[str, int], Path]:
    """``node("null", 3)``: a device node of our own (1:3 is null, 1:7 full). The host's are left alone: a mistake
    in the program would replace them."""

    def make(name: str, minor: int) -> Path:
        require("root")
        os.mknod(tmp_path / name, stat.S_IFCHR | 0o666, os.makedev(1, minor))
        return tmp_path / name

    return make


@pytest.fixture(autouse=True)
def _connections() -> Iterator[None]:
    yield
    _peer.close_all()


@pytest.fixture(scope="session")
def version() -> int:
    """The newest version of the protocol that the program and the peer here speak."""
    with _program.starter() as start:
        return _peer.spoken_version(start("dest", "--json", "--listen", "127.0.0.1:0").address)


@pytest.fixture(scope="session")
def rv64(version: int) -> _peer.Machine:
    """A machine that computes, taken from a real source with all its pages: any daemon would run it."""
    with _program.starter() as start:
        source = start("source", "--json", *_program.RV64, "--listen", "127.0.0.1:0")
        machine = _peer.Destination.connect(source.address, version).until("run").take_all()
        assert source.end() == 0
        return machine


@pytest.fixture
def neighbour(version: int, rv64: _peer.Machine) -> Callable[[_program.Program, _program.Control], _peer.Neighbour]:
    """``neighbour(daemon, control)``: a machine that is on its way there."""
    return lambda daemon, control: _peer.Neighbour(daemon, control, rv64, version)


@pytest.fixture
def seeded(request: pytest.FixtureRequest) -> random.Random:
    """Chance that can be had again: POSTCOPY_SEED."""
    seed = int(os.environ.get("POSTCOPY_SEED") or random.SystemRandom().getrandbits(32))
    print(f"{request.node.name}: POSTCOPY_SEED={seed}")
    return random.Random(seed)
