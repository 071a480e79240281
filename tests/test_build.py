# SPDX-License-Identifier: Apache-2.0
"""Header, extension and type stub agree; the set-up says what is missing; the tools do as told."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import pytest
from sessions import end_session

from postcopy._native import ffi, lib

ROOT = Path(__file__).resolve().parent.parent
HEADER = ROOT / "csrc" / "include" / "postcopy.h"
HEADERS = sorted(HEADER.with_suffix("").glob("*.h"))
STUB = ROOT / "postcopy" / "_native.pyi"


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def cdef() -> Any:
    return _load(ROOT / "csrc" / "cdef.py")


@pytest.fixture(scope="module")
def declared(cdef: Any) -> str:
    return str(cdef.declarations(HEADER))


# --- header, extension, stub ------------------------------------------------------------------------------------------


def test_the_extension_has_every_function_of_the_header_and_nothing_else(cdef: Any, declared: str) -> None:
    names = cdef.functions(declared)
    assert len(names) == len(set(names))
    assert {name for name in dir(lib) if name.startswith("pc_")} == set(names)


def test_no_prototype_of_the_header_is_overlooked(cdef: Any, declared: str) -> None:
    # Counted in another way than by the pattern that finds them: statements with a parenthesis, outside of braces.
    depth = 0
    statements = 0
    for line in declared.splitlines():
        if depth == 0 and "(" in line and not line.startswith((" ", "#")):
            statements += 1
        depth += line.count("{") - line.count("}")
    assert statements == len(cdef.functions(declared))


def test_the_extension_has_every_constant_with_its_value(cdef: Any, declared: str) -> None:
    constants = cdef.constants(declared)
    assert {name for name in dir(lib) if name.startswith("PC_")} == constants.keys()
    assert {name: getattr(lib, name) for name in constants} == constants


def test_the_stub_names_what_the_extension_has() -> None:
    classes = [node for node in ast.parse(STUB.read_text()).body if isinstance(node, ast.ClassDef)]
    (body,) = (node.body for node in classes if node.name == "_Lib")
    functions = {node.name for node in body if isinstance(node, ast.FunctionDef)}
    constants = {
        node.target.id for node in body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    assert functions | constants == set(dir(lib))


def test_the_stub_is_what_make_stub_writes(cdef: Any, declared: str) -> None:
    assert STUB.read_text() == cdef.stub(declared)


@pytest.mark.parametrize("header", ["postcopy.h", *(f"postcopy/{file.name}" for file in HEADERS)])
def test_every_header_can_be_used_alone(tmp_path: Path, header: str) -> None:
    (tmp_path / "a.c").write_text(f'#include "{header}"\n#include "{header}"\n')
    flags = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
    subprocess.run(["gcc", *flags, "-I", HEADER.parent, tmp_path / "a.c"], check=True)


def test_the_umbrella_names_every_header(cdef: Any, declared: str) -> None:
    assert sorted(cdef.functions(declared)) == sorted(
        name for file in HEADERS for name in cdef.functions(cdef.declarations(file))
    )


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert ffi.string(lib.pc_version()).decode() == project["version"]
    assert importlib.metadata.version("postcopy") == project["version"]


def test_the_extension_uses_the_limited_api_only() -> None:
    import postcopy._native

    path = postcopy._native.__file__
    assert path is not None
    assert path.endswith(".abi3.so")
    out = subprocess.run(["nm", "-D", "--undefined-only", path], check=True, capture_output=True, text=True).stdout
    names = {line.split()[-1].partition("@")[0] for line in out.splitlines()}
    # These two stand behind macros of the limited API (Py_DECREF, Py_None); any other _Py* is private to a version.
    assert {name for name in names if name.startswith("_Py")} <= {"_Py_Dealloc", "_Py_NoneStruct"}
    assert not {name for name in names if name.startswith("pc_")}, "ours, and defined nowhere"


# --- cdef.py ----------------------------------------------------------------------------------------------------------

SMALL = """
/* ==== begin cffi ==== */
#define PC_A 3 /* why */
enum pc_e { PC_X, PC_Y = 0x10, PC_Z };
struct pc_s {
    int a; // one
    uint64_t b[PC_A];
};
const char *pc_name(void);
int pc_two(const void *data, size_t bytes,
           struct pc_s *from); /* over two lines; with (parentheses) and { braces } */
void pc_three(double value);
/* ==== end cffi ==== */
"""


def test_extraction_of_a_small_header(cdef: Any) -> None:
    text = cdef.extract(SMALL)
    assert "/*" not in text
    assert "//" not in text
    assert "cffi" not in text
    assert cdef.functions(text) == ["pc_name", "pc_two", "pc_three"]
    assert cdef.constants(text) == {"PC_A": 3, "PC_X": 0, "PC_Y": 16, "PC_Z": 17}
    stub = cdef.stub(text)
    assert "def pc_name(self) -> CData: ..." in stub
    assert "def pc_two(self, data: CData | bytes, bytes: int, from_: CData, /) -> int: ..." in stub
    assert "def pc_three(self, value: float, /) -> None: ..." in stub


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ("int pc_a(void);", "exactly one"),
        (SMALL + SMALL, "exactly one"),
        (SMALL.replace("#define PC_A 3", "#define PC_A (1 << 3)"), "#define PC_A"),
        (SMALL.replace("#define PC_A 3", "#ifdef PC_B"), "#ifdef"),
    ],
)
def test_a_header_that_cffi_would_misread_is_refused(cdef: Any, header: str, reason: str) -> None:
    with pytest.raises(cdef.HeaderError, match=reason.replace("(", r"\(")):
        cdef.extract(header)


@pytest.mark.parametrize(
    ("printed", "lacking"),
    [
        ("memcpy@GLIBC_2.14 U\n__umodti3@GCC_3.0 U\nPyList_New U\n__gmon_start__ w\n", []),
        ("memcpy@GLIBC_2.14 U\nPyList_New U\nhelper U\npc_lost U\n", ["helper", "pc_lost"]),
        ("memcpy U\nPyList_New U\n", []),  # musl
        ("memcpy U\nPyList_New U\npc_lost U\n", ["pc_lost"]),
    ],
)
def test_what_a_built_extension_lacks(cdef: Any, tmp_path: Path, printed: str, lacking: list[str]) -> None:
    nm = tmp_path / "nm"
    nm.write_text(f"#!/bin/sh\ncat <<'END'\n{printed}END\n")
    nm.chmod(0o755)
    assert cdef.unresolved(str(nm), tmp_path / "module.so") == lacking


def test_a_function_that_no_c_file_defines_fails_the_build(tmp_path: Path) -> None:
    (tmp_path / "a.h").write_text(SMALL)
    (tmp_path / "a.c").write_text(
        "#include <stddef.h>\nconst char *pc_name(void); const char *pc_name(void) { return NULL; }"
    )
    subprocess.run(["gcc", "-c", "a.c", "-o", "a.o"], check=True, cwd=tmp_path)
    subprocess.run(["ar", "rcs", "liba.a", "a.o"], check=True, cwd=tmp_path)
    command = [
        sys.executable,
        str(ROOT / "csrc" / "cdef.py"),
        "glue",
        "--header",
        "a.h",
        "--library",
        "liba.a",
        "--output",
        "g.c",
    ]
    made = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert made.returncode == 1
    assert "defined in no C file: pc_two, pc_three" in made.stderr
    assert not (tmp_path / "g.c").exists()


# --- setup ------------------------------------------------------------------------------------------------------------


def _bin_without(tmp_path: Path, *absent: str) -> Path:
    """A directory that serves as PATH, with what setup.sh looks for except `absent`."""
    directory = tmp_path / "bin"
    directory.mkdir()
    for command in ("gcc", "make", "ar", "nm", "objcopy", "as", "ld", "sh", "dirname", "id", "sed"):
        if command not in absent and (found := shutil.which(command)):
            (directory / command).symlink_to(found)
    if "python3" not in absent:
        (directory / "python3").symlink_to(sys.executable)
    return directory


def _setup_check(path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["/bin/sh", ROOT / "tools" / "setup.sh", "check"],
        env={"PATH": str(path), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_setup_finds_everything_here(tmp_path: Path) -> None:
    done = _setup_check(_bin_without(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("absent", "named", "packages"),
    [
        ("gcc", "a C compiler (gcc)", ["gcc", "libc6-dev"]),
        ("python3", "python3, 3.11 or newer", ["python3", "python3-venv", "python3-dev"]),
        ("objcopy", "objcopy", ["binutils"]),
        ("make", "make", ["make"]),
    ],
)
def test_setup_names_the_package_of_what_is_missing(
    tmp_path: Path, absent: str, named: str, packages: list[str]
) -> None:
    done = _setup_check(_bin_without(tmp_path, absent))
    assert done.returncode == 1
    assert f"- {named}" in done.stderr
    install = done.stderr.splitlines()[-1]
    assert "apt-get install" in install
    assert install.split()[-len(packages) :] == packages


def test_setup_refuses_an_old_python(tmp_path: Path) -> None:
    old = tmp_path / "old-python"
    old.write_text('#!/bin/sh\n[ "$1" = -V ] && echo Python 3.9.2 && exit 0\nexit 1\n')
    old.chmod(0o755)
    done = _setup_check(_bin_without(tmp_path), PYTHON=str(old))
    assert done.returncode == 1
    assert "Python 3.9.2" in done.stderr
    assert "PYTHON=" in done.stderr


def test_setup_names_missing_headers(tmp_path: Path) -> None:
    directory = _bin_without(tmp_path, "gcc")
    (directory / "gcc").write_text("#!/bin/sh\nexit 1\n")
    (directory / "gcc").chmod(0o755)
    done = _setup_check(directory)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].split()[-2:] == ["libc6-dev", "linux-libc-dev"]


def test_packages_that_tests_need_are_named_and_not_installed_unasked(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "debian.py"), "install", "man", "zsh"]
    environment = {"PATH": str(_bin_without(tmp_path)), "POSTCOPY_INSTALL": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0  # their tests will skip
    assert "Debian's man-db zsh is missing: `apt-get install --no-install-recommends man-db zsh`" in done.stdout


# --- run_step.py ------------------------------------------------------------------------------------------------------


def _step(*command: str, timeout_s: float = 30) -> subprocess.CompletedProcess[str]:
    step = [sys.executable, str(ROOT / "tools" / "run_step.py"), "--timeout", str(timeout_s), "name", *command]
    return subprocess.run(step, capture_output=True, text=True, timeout=90)


def _alive(pid: int) -> bool:
    try:
        return "(zombie)" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_a_step_passes_on_the_exit_status() -> None:
    assert _step("true").returncode == 0
    failed = _step("sh", "-c", "exit 3")
    assert failed.returncode == 3
    assert "FAILED" in failed.stdout
    assert _step("sh", "-c", "kill -9 $$").returncode == 1
    assert _step("/no/such/command").returncode == 1


def test_a_step_is_killed_at_its_time_limit_with_all_it_started() -> None:
    begin = time.monotonic()
    done = _step("sh", "-c", "setsid sleep 60 & echo $!; trap '' TERM; sleep 60", timeout_s=2)
    assert time.monotonic() - begin < 30
    assert done.returncode == 1
    assert "not done after 2 s" in done.stdout
    pid = next(int(line) for line in done.stdout.splitlines() if line.isdigit())
    assert not _alive(pid)


def test_a_step_that_leaves_a_process_behind_has_failed() -> None:
    done = _step("sh", "-c", "setsid sleep 60 >/dev/null 2>&1 & echo $!")
    assert done.returncode == 1
    assert "left running" in done.stdout
    assert "sleep 60" in done.stdout
    pid = next(int(line) for line in done.stdout.splitlines() if line.isdigit())
    assert not _alive(pid)


# --- what tests are run with ------------------------------------------------------------------------------------------


def _double(value: int) -> int:
    print("doubling")
    return 2 * value


def _hang_with_a_child_of_its_own(path: str) -> None:
    child = subprocess.Popen(["sleep", "60"], process_group=0)  # as a shell's job, or a keeper's engine
    Path(path).write_text(str(child.pid))
    child.wait()


def _fail() -> None:
    raise RuntimeError("as told")


def test_a_function_in_a_child_returns_its_value(run_in_child: Callable[..., Any]) -> None:
    result = run_in_child(_double, 21)
    assert (result.returncode, result.value, result.stdout) == (0, 42, "doubling\n")


def test_a_function_in_a_child_that_raises(run_in_child: Callable[..., Any]) -> None:
    result = run_in_child(_fail)
    assert (result.returncode, result.value) == (1, None)
    assert "RuntimeError: as told" in result.stderr


def test_a_command_in_a_child(run_in_child: Callable[..., Any]) -> None:
    result = run_in_child(["sh", "-c", "echo out; echo err >&2; exit 5"])
    assert (result.returncode, result.stdout, result.stderr) == (5, "out\n", "err\n")


def test_a_child_is_killed_at_its_deadline_with_its_session(spawn_child: Callable[..., Any], tmp_path: Path) -> None:
    pid, deadline = tmp_path / "pid", time.monotonic() + 60
    child = spawn_child(_hang_with_a_child_of_its_own, str(pid))
    while not pid.exists() or not pid.read_text():
        assert time.monotonic() < deadline, child.errors()
        time.sleep(0.005)
    with pytest.raises(AssertionError, match=r"not done after 0\.1 s"):
        child.wait(0.1)
    assert not _alive(int(pid.read_text()))


def test_a_session_that_is_gone_is_not_looked_for_in_that_of_another_process() -> None:
    """Where numbers of processes end at 32767, a busy host gives the same ones again within a minute."""

    class Gone:
        """A process that ended long ago, with all of its session."""

        def __init__(self, pid: int) -> None:
            self.pid = pid

        def poll(self, timeout: float = 0) -> int:
            return 0

        wait = poll

    with subprocess.Popen(["sleep", "60"], start_new_session=True) as other:
        try:
            end_session(cast(Any, Gone(other.pid)))
            assert other.poll() is None
        finally:
            other.kill()


def test_what_is_started_ignores_no_signal_that_is_ignored_here(tmp_path: Path) -> None:
    """As under nohup, and in the background of a script."""
    code = "import conftest, subprocess; subprocess.run(['grep', 'SigIgn', '/proc/self/status'])"
    script = "trap '' INT TERM HUP; exec \"$@\""
    paths = os.pathsep.join(str(ROOT / "tests" / name) for name in ("", "support"))
    command = ["sh", "-c", script, "sh", sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    ignored = int(done.stdout.split()[1], 16)
    assert not [number for number in (1, 2, 15) if ignored >> number - 1 & 1]


def test_a_skip_is_a_failure_where_the_capability_is_required(tmp_path: Path) -> None:
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "test_it.py").write_text(
        "import os, pytest\n@pytest.mark.needs('root')\ndef test_it(): pass\n"
        "@pytest.fixture(autouse=True, scope='session')\ndef nothing(): pass\n"
    )
    # Without asking the machine: whatever it has, `root` is missing here.
    with (tmp_path / "conftest.py").open("a") as file:
        file.write("\nCAPABILITIES['root'] = lambda: 'not this time'\n")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-c",
        "/dev/null",
        "-o",
        f"pythonpath={ROOT / 'tests' / 'support'}",
        "--rootdir",
        str(tmp_path),
    ]

    def outcome(require: str) -> tuple[int, str]:
        environment = {**os.environ, "POSTCOPY_REQUIRE": require}
        done = subprocess.run(
            [*command, str(tmp_path)], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        return done.returncode, done.stdout + done.stderr

    status, text = outcome("")
    assert status == 0
    assert "1 skipped" in text
    status, text = outcome("kvm,root")
    assert status == 1
    assert "POSTCOPY_REQUIRE names root, but: not this time" in text
    status, text = outcome("rooot")
    assert status != 0
    assert "unknown: rooot" in text


# --- once_more.py -----------------------------------------------------------------------------------------------------

RACE = "WARNING: ThreadSanitizer: data race (pid=7)"
LEAK = "WARNING: ThreadSanitizer: thread leak (pid=7)"
FAILED_CHECK = "csrc/tests/pager/test_it.c:12: not true: done"


def _once_more(directory: Path, *command: str) -> tuple[int, str, str]:
    """Its status, what it has written, and what `make test` shows last."""
    log = directory / "unstable.log"
    script = [sys.executable, str(ROOT / "tools" / "once_more.py"), "--log", str(log), "--", *command]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # where ctest is
    environment.pop("PYTEST_ADDOPTS", None)
    done = subprocess.run(script, cwd=directory, env=environment, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr, log.read_text() if log.exists() else ""


def _ctest(directory: Path, **tests: str) -> tuple[int, str, str]:
    """The same of tests of ctest, each a script of the shell; `once` in it fails the first time only."""
    (directory / "once").write_text('[ -e "$1.ran" ] && exit 0\ntouch "$1.ran"\nexit 1\n')
    lines = []
    for name, script in tests.items():
        (directory / f"{name}.sh").write_text(script.replace("once", f". ./once {name}"))
        lines.append(f'add_test({name} "sh" "{name}.sh")\n')
    (directory / "CTestTestfile.cmake").write_text("".join(lines))
    return _once_more(directory, "ctest", "--test-dir", str(directory), "--output-on-failure", "-j3")


def test_a_c_test_that_passes_the_second_time_is_unstable(tmp_path: Path) -> None:
    status, said, unstable = _ctest(tmp_path, good="exit 0", **{"bad-1": f"echo '{FAILED_CHECK}'; set -- bad-1; once"})
    assert status == 0, said
    assert "once more, alone: bad-1" in said
    assert unstable.startswith("==> UNSTABLE")
    assert unstable.endswith("to be mended: bad-1\n")


def test_c_tests_that_fail_twice_or_are_many_have_failed(tmp_path: Path) -> None:
    status, said, unstable = _ctest(tmp_path, bad="exit 1", chance="set -- chance; once")
    assert (status, unstable) == (8, ""), said
    assert "once more, alone: bad chance" in said
    status, said, unstable = _ctest(tmp_path, **{f"test{i}": f"set -- test{i}; once" for i in range(4)})
    assert (status, unstable) == (8, ""), said
    assert "once more" not in said


@pytest.mark.parametrize(
    ("output", "is_one"),
    [
        ([RACE], True),
        (["ok   before (3 ms)", "==7==ERROR: AddressSanitizer: heap-use-after-free on address 0x1"], True),
        (["csrc/core/frame.c:12:3: runtime error: shift exponent 64 is too large"], True),
        (["==7==ERROR: LeakSanitizer: detected memory leaks"], True),
        ([FAILED_CHECK, LEAK, "SUMMARY: ThreadSanitizer: thread leak it.c:3 in start"], False),
        ([FAILED_CHECK, RACE], True),
        ([FAILED_CHECK, "FAIL first", LEAK, "FAIL second"], True),
        (["csrc/tests/it.c:12: n is 1 (0x1), should be 2, 2 (0x2)", "FAIL case"], False),
        (["FAIL case: not done after 20 s"], False),
    ],
)
def test_what_a_sanitizer_reports_is_never_a_chance(tmp_path: Path, output: list[str], is_one: bool) -> None:
    (tmp_path / "output").write_text("\n".join(output) + "\n")
    status, said, unstable = _ctest(tmp_path, bad="[ -e bad.ran ] || cat output >&2; set -- bad; once")
    assert (status, bool(unstable)) == ((8, False) if is_one else (0, True)), said
    assert ("a sanitizer's report is never a chance" in said) is is_one


def test_a_pytest_that_passes_the_second_time_is_unstable(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import pathlib\n\ndef test_it():\n    ran = pathlib.Path('ran')\n    before = ran.exists()\n"
        "    ran.touch()\n    assert before\n\ndef test_other():\n    pass\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    pytest_ = str(Path(sys.executable).with_name("pytest"))
    status, said, unstable = _once_more(tmp_path, pytest_, "-q", "test_it.py")
    assert status == 0, said
    assert unstable.endswith("to be mended: test_it.py::test_it\n")
    (tmp_path / "test_it.py").write_text("def test_it():\n    raise OSError('again')\n")
    status, said, unstable = _once_more(tmp_path, pytest_, "-q", "test_it.py")
    assert status == 1, said
    assert unstable.count("UNSTABLE") == 1  # the one from before
