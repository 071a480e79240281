# SPDX-License-Identifier: Apache-2.0
"""Runs the fuzz targets, those in C and those in Python, one after the other, and says what came of it.

What it finds worth keeping goes into build/fuzz/TARGET, from which the next run goes on; an input at which something
is wrong into build/fuzz/TARGET-crash-*. What was tried is added up over runs (build/fuzz/totals.json): the table at the
end has all of it. `--keep` then puts the smallest set of inputs that reach the same code into the repository's corpus.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "fuzz"
TOTALS = WORK / "totals.json"
PYTHON_TARGETS = ROOT / "tests" / "fuzz" / "run.py"
MAX_KEPT_BYTES = 2048
"""Longer inputs are not kept: they reach what shorter ones do, and make the repository larger."""
END_S = 60
"""How long a target may take beyond its time."""


def targets(build: Path) -> dict[str, tuple[list[str], Path]]:
    """By name: the command, and where its corpus is."""
    found = {}
    for program in sorted((build / "csrc" / "tests").glob("fuzz_*")):
        if program.is_file():
            name = program.name.removeprefix("fuzz_")
            found[name] = ([str(program)], ROOT / "csrc" / "tests" / "corpus" / name)
    names = subprocess.run([sys.executable, PYTHON_TARGETS, "-list"], check=True, capture_output=True, text=True)
    for name in names.stdout.split():
        found[name] = ([sys.executable, str(PYTHON_TARGETS), name], ROOT / "tests" / "fuzz" / "corpus" / name)
    return found


def run(name: str, command: list[str], corpus: Path, seconds: int, seed: int) -> tuple[int, str]:
    """How many inputs were tried, and what was wrong."""
    new = WORK / name
    new.mkdir(parents=True, exist_ok=True)
    options = [f"-max_total_time={seconds}", f"-artifact_prefix={new}-", "-print_final_stats=1", "-timeout=30"]
    options += [
        "-len_control=0",
        "-max_len=2048",
        f"-seed={seed}",
        str(new),
        *([str(corpus)] if corpus.is_dir() else []),
    ]
    log = WORK / f"{name}.log"
    with log.open("wb") as output:
        try:
            done = subprocess.run(
                [*command, *options], stdout=output, stderr=output, timeout=seconds + END_S, check=False
            )
            status = f"status {done.returncode}" if done.returncode else ""
        except subprocess.TimeoutExpired:
            status = f"has not ended {END_S} s after its time"
    text = log.read_text(errors="replace")
    tried = re.findall(r"number_of_executed_units: *(\d+)", text)
    return int(tried[-1]) if tried else 0, status and f"{status}, see {log}"


def keep(name: str, command: list[str], corpus: Path) -> None:
    """The corpus becomes the smallest set of inputs that reaches all that is reached by it and by what was found."""
    with tempfile.TemporaryDirectory() as merged:
        sources = [str(path) for path in (corpus, WORK / name) if path.is_dir()]
        options = ["-merge=1", "-use_counters=0", f"-max_len={MAX_KEPT_BYTES}", merged, *sources]
        subprocess.run([*command, *options], check=True, capture_output=True)
        corpus.mkdir(parents=True, exist_ok=True)
        seeds = WORK / f"{name}.seeds"  # that the target makes itself
        known = {file.read_bytes() for place in (corpus, seeds) if place.is_dir() for file in place.iterdir()}
        for file in Path(merged).iterdir():
            if file.stat().st_size <= MAX_KEPT_BYTES and file.read_bytes() not in known:
                (corpus / file.name[:12]).write_bytes(file.read_bytes())


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the fuzz targets.")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "gcc-asan", help="where the C targets are")
    parser.add_argument("--seconds", type=int, default=60, help="for each target (default: 60; 0: none is run)")
    parser.add_argument("--keep", action="store_true", help="then put what was found worth keeping into the corpus")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="default: all")
    arguments = parser.parse_args()
    known = targets(arguments.build)
    if unknown := set(arguments.targets) - set(known):
        parser.error(f"no target {sorted(unknown)[0]!r}; there are {', '.join(known)}")
    WORK.mkdir(parents=True, exist_ok=True)
    totals: dict[str, list[int]] = {}
    failed = False
    for name in arguments.targets or known:
        command, corpus = known[name]
        if arguments.seconds:
            began_s, seed = time.monotonic(), time.time_ns() % 2**31
            tried, wrong = run(name, command, corpus, arguments.seconds, seed)
            took_s = round(time.monotonic() - began_s)
            totals = json.loads(TOTALS.read_text()) if TOTALS.exists() else {}
            before = totals.get(name, [0, 0])
            totals[name] = [before[0] + tried, before[1] + took_s]
            TOTALS.write_text(json.dumps(totals))
            print(
                f"{name}: {tried} inputs in {took_s} s, {totals[name][0]} in all; {wrong or 'nothing found'}",
                flush=True,
            )
            failed |= bool(wrong)
        if arguments.keep:
            keep(name, command, corpus)
    print("| target | inputs | seconds |\n|---|---|---|")
    for name, (tried, took_s) in sorted(totals.items()):
        print(f"| `{name}` | {tried:,} | {took_s:,} |")
    print(f"| all | {sum(each[0] for each in totals.values()):,} | {sum(each[1] for each in totals.values()):,} |")
    return failed


if __name__ == "__main__":
    sys.exit(main())
