# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import postcopy
import sides
from postcopy import _native


@pytest.fixture
def side(spawn_child: Callable[..., Any]) -> Callable[..., Any]:
    """``side(*arguments)``: a `postcopy` process as a `sides.Side`; `spawn` starts it elsewhere than here, ``command``
    by another command."""

    def start(*arguments: Any, spawn: Callable[..., Any] = spawn_child, **keywords: Any) -> Any:
        return sides.Side(spawn, *(str(argument) for argument in arguments), **keywords)

    return start


@pytest.fixture
def operator(tmp_path: Path) -> Callable[[str], Any]:
    """``operator("a")``: of the process with ``--control`` `tmp_path`/a."""
    return lambda name: sides.Operator(tmp_path / name)


@pytest.fixture
def daemon(side: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """``daemon("a", *arguments)``: a daemon with a control socket of that name, that listens."""

    def start(name: str, *arguments: object) -> Any:
        return side("daemon", "--json", "--control", tmp_path / name, "--listen", "127.0.0.1:0", *arguments)

    return start


@pytest.fixture
def slow_way(side: Callable[..., Any]) -> Callable[[str], str]:
    """``slow_way(address)``: another address for it, behind a network on which 16 MiB take at least 5 s. A limit of the
    push alone promises no such time, since the guest may ask for all of its memory."""
    plan = "slow:rate=1MiB/s"  # of each connection: one urgent, two bulk
    return lambda address: str(side("chaos", plan, "--json", "--listen", "127.0.0.1:0", "--to", address).address)


@pytest.fixture
def readable_package() -> Iterator[list[str]]:
    """The start of a command that runs python with the package, and that an ordinary user can run too.

    The package is copied where anybody may read it, and run by an interpreter that anybody may run.
    """
    if shutil.which("setpriv") is None:
        pytest.skip("no setpriv: install util-linux")
    as_nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    with tempfile.TemporaryDirectory(prefix="postcopy-nobody-") as directory:
        target = Path(directory, "lib", "postcopy")
        shutil.copytree(Path(postcopy.__file__).parent, target)
        shutil.copy(_native.__file__, target)
        for pattern in ("postcopy-*", "libpostcopy-*"):
            for program in Path(_native.__file__).parent.glob(pattern):
                shutil.copy(program, target)
        for name in ("lib", "tmp"):
            Path(directory, name).mkdir(exist_ok=True)
        os.chmod(directory, 0o755)
        os.chmod(Path(directory, "tmp"), 0o777)
        libraries = os.pathsep.join([str(target.parent), *(path for path in sys.path if path.endswith("-packages"))])
        # env --chdir: from the checkout, python -m would take the package there.
        environment = [
            "--chdir=/",
            f"PYTHONPATH={libraries}",
            f"TMPDIR={directory}/tmp",
            "PYTHONDONTWRITEBYTECODE=1",
            "HOME=/",
        ]
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        for python in (sys.executable, shutil.which(version, path="/usr/local/bin:/usr/bin")):
            if python is None:
                continue
            command = ["env", *environment, python]
            probe = subprocess.run(
                [*as_nobody, *command, "-c", "import postcopy.cli"], capture_output=True, cwd="/", timeout=60
            )
            if probe.returncode == 0:
                yield command
                return
        pytest.skip(f"nobody can run no {version} with this package: {probe.stderr.decode(errors='replace')[-200:]}")
