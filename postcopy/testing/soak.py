# SPDX-License-Identifier: Apache-2.0
"""Migrations of running machines over a network that is cut several times a second, for as long as wanted.

``python -m postcopy.testing.soak --seconds 600`` runs one `postcopy demo` after the other, each with its own seed; each
verifies every page of its machine. The first one that fails ends it, and is named so that it can be run again.
"""

from __future__ import annotations

import argparse
import json
import secrets
import statistics
import subprocess
import sys
import time
from typing import Any

WORKLOADS = ("random", "dirty")
PLAN = "cut:every=0.05..0.25,down=0..0.05,ways=reset+reset+reset+close+truncate"
DEADLINE_S = 300


def command(workload: str, memory: str, seed: int, plan: str) -> list[str]:
    machine = ["--machine", "kvm", "--memory", memory, "--vcpus", "2", "--workload", workload, "--run-for", "0.5"]
    return ["demo", "--json", *machine, "--migrate-after", "0.2", "--chaos", plan, "--seed", str(seed)]


def run_one(arguments: list[str]) -> tuple[dict[str, Any] | None, str]:
    """Its result, or None and what it said last."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "postcopy", *arguments],
            capture_output=True, text=True, timeout=DEADLINE_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None, f"not done within {DEADLINE_S} s"
    lines = done.stdout.strip().splitlines()
    result = json.loads(lines[-1]) if lines else {}
    if done.returncode or result.get("status") != "completed" or result.get("verified") is not True:
        return None, str(result.get("error") or done.stderr.strip()[-500:])
    return result, ""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m postcopy.testing.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600, help="how long (default 600)")
    parser.add_argument("--seed", type=int, default=None, help="of the first migration; the next ones count from it")
    parser.add_argument("--memory", default="32MiB", help="of each machine (default 32MiB)")
    parser.add_argument("--plan", default=PLAN, help=f"what the network does (default {PLAN}; see docs/chaos.md)")
    args = parser.parse_args(argv)
    seed = args.seed if args.seed is not None else secrets.randbits(31)
    began_s = time.monotonic()
    migrations = cuts = recoveries = pages = 0
    longest_ms: list[float] = []
    mean_ms: list[float] = []
    while time.monotonic() - began_s < args.seconds:
        arguments = command(WORKLOADS[migrations % len(WORKLOADS)], args.memory, seed + migrations, args.plan)
        result, reason = run_one(arguments)
        if result is None:
            print(f"soak: FAILED: {reason}\nsoak: again with: postcopy {' '.join(arguments)}", file=sys.stderr)
            return 1
        told = result["recoveries"]
        migrations += 1
        cuts += sum(result["chaos"]["cuts"].values())
        recoveries += told["count"]
        pages += result["ram"]["total"] // result["ram"]["page-size"]
        if told["count"]:
            longest_ms.append(told["max-ms"])
            mean_ms.append(told["total-ms"] / told["count"])
        print(
            f"soak: {time.monotonic() - began_s:6.0f} s  {migrations} migrations, {cuts} cuts,"
            f" {recoveries} recoveries, {pages} pages verified, 0 wrong",
            flush=True,
        )
    if longest_ms:
        print(
            f"soak: all completed and verified; a recovery took {statistics.median(mean_ms):.0f} ms on the average, the"
            f" longest of a migration {statistics.median(longest_ms):.0f} ms (median), {max(longest_ms):.0f} ms at most"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
