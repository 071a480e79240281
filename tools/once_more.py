# SPDX-License-Identifier: Apache-2.0
"""Runs pytest, and those tests that failed once more, one after the other, when they are few.

    once_more.py --log FILE -- PYTEST [ARGUMENT...]

Some three thousand tests of processes, networks and races share a machine with whatever else runs there. A test that
fails beside all of them and passes alone has met a chance that its author did not think of: that is a defect, of the
test or of what it tests, and is to be mended; its name is added to the log, which `make test` shows last. It says
nothing about the change that is being tested, though, which is why it does not fail the run. One that fails twice does,
and so do more than `MOST` at a time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

MOST = 2
TESTS_FAILED = 1  # pytest's exit status; the others are those of a run that went wrong


def main(log: Path, command: list[str]) -> int:
    with tempfile.TemporaryDirectory(prefix="postcopy-pytest-") as cache:  # another run may be going on beside this one
        status = subprocess.call([*command, "-o", f"cache_dir={cache}"])
        last_failed = Path(cache, "v/cache/lastfailed")
        failed = sorted(json.loads(last_failed.read_text())) if last_failed.exists() else []
        if status != TESTS_FAILED or not 0 < len(failed) <= MOST:
            return status
        print(f"==> once more, alone: {' '.join(failed)}", flush=True)
        status = subprocess.call([command[0], "-o", f"cache_dir={cache}", *failed])
    if status == 0:
        said = f"==> UNSTABLE: failed beside the others, passed alone; to be mended: {' '.join(failed)}"
        print(said, flush=True)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            file.write(said + "\n")
    return status


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("command", nargs="+")
    arguments = parser.parse_args()
    sys.exit(main(arguments.log, arguments.command))
