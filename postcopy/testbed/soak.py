# SPDX-License-Identifier: Apache-2.0
"""Migrations of running machines over a network that is cut several times a second, for as long as wanted.

``python -m postcopy.testbed.soak --seconds 600`` runs one `postcopy demo` after the other, each with its own seed; each
verifies every page of its machine. Every other one has its pager in a process of its own, which is killed a few times;
half of either kind have a source that gives its memory back as it goes. The seed chooses the mode. Of three, one asks
for no page ahead, one along strides, one around each fault. The first one that fails ends it, and is named so that it
can be run again.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import random
import secrets
import signal
import statistics
import sys
import tempfile
import time

import trio

from postcopy._child import python
from postcopy.testbed import _processes
from postcopy.testbed._processes import Json, open_child, parse
from postcopy.testbed.chaos import ChaosPlan
from postcopy.units import argument, format_exact_size, parse_seconds, parse_size, parse_whole

WORKLOADS = ("random", "dirty")
MODES = ("postcopy", "hybrid", "hybrid", "precopy", "stop-and-copy")  # chosen by the seed
PAGERS = ("thread", "process")
AHEAD = ("none", "adaptive", "both:16")
PLAN = "cut:every=0.05..0.25,down=0..0.05,ways=reset+reset+reset+close+truncate"
DEADLINE_S = 300
PAGER_LIVES_S = (0.2, 1.0)


def _check_plan(text: str) -> str:
    ChaosPlan.parse(text)
    return text


def command(
    workload: str, memory_bytes: int, seed: int, plan: str, pager: str, ahead: str, release: bool, tls: bool
) -> list[str]:
    machine = [
        "--machine",
        "kvm",
        "--memory",
        format_exact_size(memory_bytes),
        "--vcpus",
        "2",
        "--workload",
        workload,
        "--run-for",
        "0.5",
    ]
    network = ["--migrate-after", "0.2", "--chaos", plan, "--seed", str(seed)]
    network += ["--mode", MODES[seed % len(MODES)]]
    more = [*(["--release-ram"] if release else []), *(["--tls"] if tls else [])]
    return ["demo", "--json", *machine, *network, "--pager", pager, "--prefetch", ahead, *more]


async def run_one(arguments: list[str], seed: int) -> tuple[Json | None, str]:
    """Its result, or None and what it said last. A pager that is a process is killed again and again meanwhile."""
    message: Json = {}
    choose = random.Random(seed)
    spared: tuple[int, float] = (0, 0.0)  # a process, and until when it may live
    with tempfile.TemporaryFile("w+") as errors, trio.move_on_after(DEADLINE_S):
        async with open_child(python("-m", "postcopy", *arguments), stderr=errors.fileno()) as child:
            async for line in child.stdout:
                message = parse(line)
                pid = (message.get("pager") or {}).get("pid")
                if message.get("event") != "progress" or not pid or message.get("status") != "postcopy-active":
                    continue
                if pid != spared[0]:
                    spared = (pid, time.monotonic() + choose.uniform(*PAGER_LIVES_S))
                elif time.monotonic() > spared[1]:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                    spared = (pid, math.inf)
            status = await child.process.wait()
        if status or message.get("status") != "completed" or message.get("verified") is not True:
            errors.seek(0)
            return None, str(message.get("error") or errors.read().strip()[-500:] or f"ended with status {status}")
        return message, ""
    return None, f"not done after {DEADLINE_S} s"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m postcopy.testbed.soak", description=__doc__)
    parser.add_argument("--seconds", type=argument(parse_seconds), default=600, help="how long (default: 600)")
    parser.add_argument(
        "--seed",
        type=argument(parse_whole, 0, 2**32 - 1),
        default=None,
        help="of the first migration; the next ones count from it",
    )
    parser.add_argument(
        "--memory", type=argument(parse_size), default=32 << 20, metavar="SIZE", help="of each machine (default: 32MiB)"
    )
    parser.add_argument(
        "--plan",
        type=argument(_check_plan),
        default=PLAN,
        help=f"what the network does, see docs/chaos.md (default: {PLAN})",
    )
    parser.add_argument("--tls", action="store_true", help="under TLS, all of them")
    args = parser.parse_args(argv)
    seed = args.seed if args.seed is not None else secrets.randbits(31)
    began_s = time.monotonic()
    migrations = cuts = recoveries = deaths = pages = released = 0
    longest_ms: list[float] = []
    mean_ms: list[float] = []
    while time.monotonic() - began_s < args.seconds:
        workload, pager = WORKLOADS[migrations % 2], PAGERS[migrations // 2 % 2]
        release = migrations // 4 % 2 == 1
        ahead = AHEAD[migrations % len(AHEAD)]
        arguments = command(workload, args.memory, seed + migrations, args.plan, pager, ahead, release, args.tls)
        result, reason = _processes.run(run_one, arguments, seed + migrations)
        if result is None:
            print(f"soak: FAILED: {reason}\nsoak: again with: postcopy {' '.join(arguments)}", file=sys.stderr)
            return 1
        recovered = result["recoveries"]
        migrations += 1
        cuts += sum(result["chaos"]["cuts"].values())
        recoveries += recovered["count"]
        deaths += result["pager"].get("deaths", 0)
        pages += result["ram"]["total"] // result["ram"]["page-size"]
        released += result["source"]["ram"]["released"]
        if recovered["count"]:
            longest_ms.append(recovered["max-ms"])
            mean_ms.append(recovered["total-ms"] / recovered["count"])
        print(
            f"soak: {time.monotonic() - began_s:6.0f} s  {migrations} migrations, {cuts} cuts,"
            f" {recoveries} recoveries, {deaths} pagers killed, {released >> 20} MiB given back,"
            f" {pages} pages verified, 0 wrong",
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
