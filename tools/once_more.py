# SPDX-License-Identifier: Apache-2.0
"""Runs pytest or ctest, and those tests that failed once more, one after the other, when they are few.

    once_more.py --log FILE -- PYTEST [ARGUMENT...]
    once_more.py --log FILE -- ctest --test-dir DIRECTORY [ARGUMENT...]

Some four thousand tests of processes, networks and races share a machine with whatever else runs there. A test that
fails beside all of them and passes alone has met a chance that its author did not think of: that is a defect, of the
test or of what it tests, and is to be mended; its name is added to the log, which `make test` shows last. It says
nothing about the change that is being tested, though, which is why it does not fail the run. One that fails twice does,
and so do more than `MOST` at a time.

What a sanitizer has reported in a C test is never a chance, however seldom it happens: there is no second run then. A
leak in a case that had ended at a failed CHECK is no report: nothing was freed and no thread was joined after that.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

MOST = 3
TESTS_FAILED = {"pytest": 1, "ctest": 8}  # exit status; the others are those of a run that went wrong

# What a C test program writes (csrc/tests/support/test.h): the end of a case, and a CHECK that failed.
CASE_ENDED = re.compile(r"(ok  |skip|FAIL) \w")
CHECK_FAILED = re.compile(r"\S+\.[ch]:\d+: ")
REPORT = re.compile(r"\w+Sanitizer\b|\S+:\d+:\d+: runtime error: ")  # with a column


def reports(output: str) -> Iterator[str]:
    """What sanitizers have written, except for leaks that a failed CHECK of the same case explains."""
    check_failed = False
    for line in output.splitlines():
        if CASE_ENDED.match(line):
            check_failed = False
        elif CHECK_FAILED.match(line):
            check_failed = True
        elif REPORT.search(line) and not (check_failed and "leak" in line):
            yield line.strip()


def run_pytest(command: list[str], scratch: Path) -> tuple[int, dict[str, list[str]]]:
    """The exit status; the tests that failed, and for each the command that runs it alone."""
    cache = ["-o", f"cache_dir={scratch}"]  # another run may be going on beside this one
    status = subprocess.call([*command, *cache])
    last_failed = scratch / "v/cache/lastfailed"
    failed = sorted(json.loads(last_failed.read_text())) if last_failed.exists() else []
    return status, {name: [command[0], *cache, name] for name in failed}


def run_ctest(command: list[str], scratch: Path) -> tuple[int, dict[str, list[str]]]:
    """The same; no test may run again when a sanitizer has reported something in one."""
    junit = scratch / "tests.xml"
    whole = ["--test-output-size-failed", str(1 << 30)]
    status = subprocess.call([*command, "--output-junit", str(junit), *whole])
    cases = ElementTree.parse(junit).iter("testcase") if junit.exists() else iter(())
    failed = {
        case.get("name", ""): case.findtext("system-out", "") for case in cases if case.find("failure") is not None
    }
    for name, output in failed.items():
        if found := next(reports(output), None):
            print(f"==> {name}: not run once more: a sanitizer's report is never a chance: {found}", flush=True)
            return status, {}
    return status, {name: [*command, "--no-tests=error", "--tests-regex", f"^{re.escape(name)}$"] for name in failed}


def main(log: Path, command: list[str]) -> int:
    kind = Path(command[0]).name
    with tempfile.TemporaryDirectory(prefix=f"postcopy-{kind}-") as scratch:
        status, failed = (run_ctest if kind == "ctest" else run_pytest)(command, Path(scratch))
        if status != TESTS_FAILED.get(kind, 1) or not 0 < len(failed) <= MOST:
            return status
        names = " ".join(failed)
        print(f"==> once more, alone: {names}", flush=True)
        if again := [code for code in map(subprocess.call, failed.values()) if code]:
            return again[0]
    said = f"==> UNSTABLE: failed beside the others, passed alone; to be mended: {names}"
    print(said, flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        file.write(said + "\n")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("command", nargs="+")
    arguments = parser.parse_args()
    sys.exit(main(arguments.log, arguments.command))
