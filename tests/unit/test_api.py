# SPDX-License-Identifier: Apache-2.0
"""What a program finds at `postcopy`: names, submodules, and an error that helps where Trio or a package is missing."""

from __future__ import annotations

import ast
import asyncio
import re
import subprocess
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio

import postcopy
from postcopy import Memory, Userfaultfd
from postcopy._child import python
from postcopy.errors import MissingPackageError, ResourceError, missing_package, shortage

ROOT = Path(__file__).parents[2]
PACKAGES = {"trio", "msgspec", "rich", "h11", "prometheus_client", "pyroute2", "cryptography"}


def run(program: str, *without: str) -> subprocess.CompletedProcess[str]:
    """A program in a Python that has none of these modules."""
    head = f"""import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {set(without)!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
"""
    return subprocess.run(python("-c", head + program), capture_output=True, text=True, timeout=60)


# --- names ------------------------------------------------------------------------------------------------------------


def test_dir_shows_the_api() -> None:
    names = dir(postcopy)
    assert {"attach", "serve", "Memory", "Userfaultfd", "uffd", "memory", "lazy", "__version__"} <= set(names)
    assert set(postcopy.__all__) <= set(names)
    assert [name for name in names if name.startswith("_")] == ["__version__"]
    for name in names:
        assert getattr(postcopy, name) is not None


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'atach'"):
        postcopy.atach  # noqa: B018


def test_submodules_are_there_without_an_import_of_their_own() -> None:
    program = (
        "import postcopy; postcopy.uffd.pagemap.pagemap_scan; postcopy.lazy.blocking.attach; postcopy.machines.base"
    )
    assert run(program).stderr == ""
    for room in (postcopy.uffd, postcopy.lazy):
        with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
            room.nothing  # noqa: B018


def test_importing_postcopy_imports_nothing_that_was_not_asked_for() -> None:
    done = run("before = set(sys.modules)\nimport postcopy\nprint(*sorted(set(sys.modules) - before))")
    assert not [name for name in done.stdout.split() if name.partition(".")[0] in PACKAGES], done.stdout
    assert not {name for name in done.stdout.split() if re.match(r"postcopy\.(?!_native)", name)}


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples_use_no_private_names(example: Path) -> None:
    private = []
    for node in ast.walk(ast.parse(example.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module != "__future__":
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id == "self"):
            names = [node.attr]
        else:
            continue
        private += [name for name in names if re.match(r"_(?!_)", name)]
    assert not private


# --- without Trio -----------------------------------------------------------------------------------------------------


async def read_events() -> Any:
    with Userfaultfd.open("user-only") as uffd:
        return await uffd.read_batch()


async def read_memory() -> Any:
    with Memory.create("anon", 1 << 16) as memory:
        return await memory.aread(0, 1)


async def attach() -> Any:
    async with postcopy.attach("127.0.0.1:1"):
        pass


class Nothing:
    blocks = (postcopy.SourceBlock("nothing", 1 << 16),)

    async def fetch(self, block: int, first_page: int, count: int) -> bytes:
        raise NotImplementedError


async def attach_source() -> Any:
    async with postcopy.attach_source(Nothing()):
        pass


async def serve() -> Any:
    await postcopy.serve(bytes(4096))


@pytest.mark.parametrize("call", [read_events, read_memory, attach, attach_source, serve])
def test_asynchronous_calls_say_that_they_need_trio(call: Callable[[], Awaitable[Any]]) -> None:
    with pytest.raises(RuntimeError, match=r"needs a Trio task.*asyncio's: .*trio.run\(main\), or use "):
        asyncio.run(call())  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"needs a Trio task.*Trio does not run here: "):
        call().__await__().send(None)


# --- with cffi alone --------------------------------------------------------------------------------------------------


def test_uffd_and_memory_need_cffi_only() -> None:
    program = (ROOT / "examples" / "per_thread_userfaultfds.py").read_text()
    program = program.replace("from __future__ import annotations\n", "").replace(
        "Userfaultfd.open()", "Userfaultfd.open('user-only')"
    )
    program += """
import os, postcopy
assert postcopy.uffd.probe('user-only').features
memory = Memory.create('memfd', 1 << 16)
memory.close()
memory.close()
uffd = Userfaultfd.open('user-only')
uffd.close()
try:
    uffd.read()
except ValueError as error:
    print(error)
"""
    done = run(program, *PACKAGES, "outcome", "attr", "sniffio")
    assert (done.returncode, done.stderr) == (0, "")
    assert "this userfaultfd is closed" in done.stdout


def test_each_package_is_named_with_what_installs_it() -> None:
    for module in sorted(PACKAGES):
        error = missing_package(ModuleNotFoundError(f"No module named {module!r}", name=f"{module}.sub"), "all this")
        assert isinstance(error, MissingPackageError)
        assert isinstance(error, ResourceError)
        assert isinstance(error, ImportError)
        name = module.replace("_", "-")
        assert str(error) == (
            f"all this needs the Python package {name}, which is not installed (remedy: python -m pip install {name};"
            " `python -m pip install postcopy` installs all that postcopy needs)"
        )
    assert missing_package(ModuleNotFoundError("", name="numpy")) is None
    assert missing_package(ImportError("", name="trio")) is None
    assert shortage(ExceptionGroup("", [ModuleNotFoundError("", name="rich")])) is not None


def test_no_room_for_temporary_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose file systems are read-only: no traceback."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc/none"])
    with pytest.raises(FileNotFoundError) as caught:
        tempfile.gettempdir()
    found = shortage(ExceptionGroup("", [caught.value]))
    assert str(found).startswith("temporary files cannot be written: No usable temporary directory found in")
    assert "TMPDIR" in str(found)
    assert shortage(FileNotFoundError(2, "No such file or directory", "x")) is None


def test_trio_itself_may_run_out_of_memory() -> None:
    """It has a buffer for each time it is woken; without, it ends with that and with assertions of its own."""

    def internal(*errors: Exception) -> trio.TrioInternalError:
        error = trio.TrioInternalError("internal error in Trio")
        error.__cause__ = ExceptionGroup("", errors)
        return error

    found = shortage(internal(MemoryError(), AssertionError()))
    assert found is not None
    assert "run out of memory" in str(found)
    assert shortage(internal(AssertionError())) is None
    assert shortage(trio.TrioInternalError()) is None


def test_all_that_pyproject_names_is_known() -> None:
    import tomllib

    with (ROOT / "pyproject.toml").open("rb") as file:
        needs = tomllib.load(file)["project"]["dependencies"]
    packages = {re.split(r"[^\w-]", need)[0] for need in needs} - {"cffi"}
    for package in packages:
        error = missing_package(ModuleNotFoundError(name=package.replace("-", "_")))
        assert f"needs the Python package {package}," in str(error)


@pytest.mark.parametrize(
    ("program", "without", "said"),
    [
        ("import postcopy; postcopy.attach", "trio", "postcopy.lazy (attach, attach_source, serve)"),
        ("import postcopy; postcopy.net", "trio", "postcopy.net"),
        ("import postcopy.lazy", "msgspec", "postcopy.lazy (attach, attach_source, serve)"),
    ],
)
def test_a_name_that_needs_a_missing_package(program: str, without: str, said: str) -> None:
    done = run(program, without)
    line = done.stderr.splitlines()[-1]
    assert line.startswith(
        f"postcopy.errors.MissingPackageError: {said} needs the Python package {without}, which is not "
    )


@pytest.mark.parametrize(
    ("arguments", "without", "named"),
    [
        (["demo"], "trio", "trio"),
        (["ctl", "status"], "msgspec", "msgspec"),
        (["demo", "--machine", "rv64", "--memory", "16MiB"], "rich", "rich"),
        (["tls", "show", "/"], "cryptography", "cryptography"),
        (["dest", "--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0"], "h11", "h11"),
        (["dest", "--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0"], "prometheus_client", "prometheus-client"),
    ],
)
def test_a_command_that_needs_a_missing_package(arguments: list[str], without: str, named: str) -> None:
    program = f"sys.argv = ['postcopy', *{arguments!r}]\nfrom postcopy.__main__ import main\nsys.exit(main())"
    done = run(program, without)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("postcopy: error: ")]
    assert f"needs the Python package {named}, which is not installed" in line
