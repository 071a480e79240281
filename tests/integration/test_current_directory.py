# SPDX-License-Identifier: Apache-2.0
"""Whatever lies in the current directory, no process of this package imports it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import postcopy

DEADLINE_S = 120.0
COMMAND = (sys.executable, "-P", "-m", "postcopy")
HOSTILE = "import os\nopen({witness!r}, 'w').write(__name__)\nos._exit(77)\n"


@pytest.fixture(params=["tmp", "checkout"])
def hostile_directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """One in which others have left modules, or one with this package's sources and no core."""
    directory = tmp_path / str(request.param)
    directory.mkdir()
    if request.param == "tmp":
        for module in ("select", "selectors", "json", "signal", "socket", "trio", "msgpack", "cffi", "rich"):
            (directory / f"{module}.py").write_text(HOSTILE.format(witness=str(tmp_path / "witness")))
    else:
        sources = Path(postcopy.__file__).parent
        shutil.copytree(sources, directory / "postcopy", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    return directory


def _run(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    return subprocess.run(
        [*COMMAND, *arguments],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


@pytest.mark.needs("uffd-user")
@pytest.mark.parametrize("pager", ["thread", "process"])
def test_demo(hostile_directory: Path, pager: str) -> None:
    done = _run(hostile_directory, "demo", "--machine", "image", "--memory", "1MiB", "--pager", pager)
    assert done.returncode == 0, done.stderr
    assert not (hostile_directory.parent / "witness").exists()


def test_probe(hostile_directory: Path) -> None:
    done = _run(hostile_directory, "probe", "--json")
    assert done.returncode in (0, 1), done.stderr
    assert not (hostile_directory.parent / "witness").exists()


def test_python_is_started_in_no_other_way() -> None:
    """Every child of the package is started by `_child.python`, or with -P."""
    package = Path(postcopy.__file__).parent
    for path in package.rglob("*.py"):
        text = re.sub(r"\s+", " ", path.read_text())
        text = re.sub(r"os\.posix_spawn\( ?sys\.executable, ", "", text)
        assert not re.search(r'sys\.executable, (?!"-P")', text), path
