# SPDX-License-Identifier: Apache-2.0
"""Device states that a hostile source could have sent, loaded by a real destination's machine.

A child process makes them: it saves the state of a machine that computes, damages it by its structure (sections, words,
counts, additional MSRs), makes length and checksum right, and loads it as a destination does, into a machine all of
whose memory is missing and never comes. What is refused is refused by name. What is accepted runs for a moment
over the memory of the machine that was saved, where it may do whatever it likes but to end or to hang the process. The
parent is the supervisor: a child that is late is killed, and what it was at is in its output.

POSTCOPY_SEED says which states, POSTCOPY_FUZZ_SECONDS for how long. csrc/tests/machine/fuzz_state.c does the same to
the core alone, many times as fast and under sanitizers.
"""

from __future__ import annotations

import contextlib
import os
import random
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import pytest
import trio

from postcopy._native import lib
from postcopy.dataplane.pager import Pager
from postcopy.errors import MigrationError, PostcopyError
from postcopy.machines import Machine, MachineState
from postcopy.machines.kinds import MachineOptions, create_destination, create_source

MIB = 1 << 20
HEADER = struct.Struct("<8sIIQII")  # magic, version, CRC32C, bytes, sections, zero
SECTION = struct.Struct("<4sIQ")  # tag, vCPU, bytes
SECONDS = float(os.environ.get("POSTCOPY_FUZZ_SECONDS", "6"))
END_S = 60.0
"""How long a child may go on beyond its time: one state may wait for a deadline of the machine's."""
LATE_S = 20.0
"""Beyond any deadline that a machine has."""
EDGES = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x1000, 0x1001, 0x100001, 1 << 31, (1 << 32) - 1, 1 << 63, (1 << 64) - 1)
MSRS = (0x11, 0x12, *range(0x4B564D00, 0x4B564D09), 0x1B, 0x1A0, 0x40000000, 0x40000001, 0x40000021, 0x40000073)
TAGS = (b"HART", b"NETD", b"REGS", b"MACH", b"\0\xff%s")


class State:
    """A device state in parts."""

    def __init__(self, data: bytes) -> None:
        self.magic, self.version, *_ = HEADER.unpack_from(data)
        self.sections: list[tuple[bytes, int, bytearray]] = []
        at = HEADER.size
        while at < len(data):
            tag, vcpu, size = SECTION.unpack_from(data, at)
            at += SECTION.size
            self.sections.append((tag, vcpu, bytearray(data[at : at + size])))
            at += -(-size // 8) * 8

    def damage(self, chance: random.Random) -> str:
        """One change; what it was."""
        number = chance.randrange(len(self.sections))
        tag, vcpu, payload = self.sections[number]
        where = f"{tag!r}/{vcpu}"
        kind = chance.choice(("word", "word", "word", "half", "bit", "length", "drop", "twice", "vcpu", "tag", "msr"))
        if kind in ("word", "half") and len(payload) >= 8:
            width = 8 if kind == "word" else 4
            at = chance.randrange(len(payload) // width) * width
            value = chance.choice(EDGES) if chance.random() < 0.7 else chance.getrandbits(64)
            payload[at : at + width] = (value & (1 << 8 * width) - 1).to_bytes(width, "little")
            return f"{where} +{at} = {value:#x}"
        if kind == "bit" and payload:
            at = chance.randrange(len(payload))
            payload[at] ^= 1 << chance.randrange(8)
            return f"{where} +{at} one bit"
        if kind == "msr":
            for tag, _, payload in self.sections:
                if tag == b"MSRS":
                    index, value = chance.choice(MSRS), chance.choice(EDGES)
                    payload += struct.pack("<IIQ", index, 0, value)
                    return f"MSR {index:#x} = {value:#x}"
        if kind == "length":
            self.sections[number] = (tag, vcpu, payload[: chance.randrange(len(payload) + 1)])
        elif kind == "drop":
            del self.sections[number]
        elif kind == "twice":
            self.sections.append((tag, vcpu, bytearray(payload)))
        elif kind == "vcpu":
            self.sections[number] = (tag, chance.choice((0, 1, 7, 8, 0xFFFFFFFF)), payload)
        elif kind == "tag":
            self.sections[number] = (chance.choice(TAGS), vcpu, payload)
        return f"{where} {kind}"

    def seal(self) -> bytes:
        body = b"".join(
            SECTION.pack(tag, vcpu, len(payload)) + payload + bytes(-len(payload) % 8)
            for tag, vcpu, payload in self.sections
        )
        crc = lib.pc_crc32c(0, body, len(body))
        return HEADER.pack(self.magic, self.version, crc, HEADER.size + len(body), len(self.sections), 0) + body


async def saved_machine(kind: str, seed: int) -> tuple[Machine, bytes]:
    """One that computes, paused."""
    options = MachineOptions(memory_bytes=16 * MIB, vcpus=2, workload="random", seed=seed, used_memory_bytes=MIB)
    source = create_source(kind, options)
    await source.boot()
    await source.resume()
    with trio.fail_after(END_S):
        await source.wait_ready()
    await source.pause()
    return source, await source.save_state()


async def load_over_missing_memory(source: Machine, state: bytes) -> str | None:
    """As a destination does before PREPARED, with a source that never answers. Why it was refused, or None."""
    twin = create_destination(source.kind, source.config(), source.layout)
    async with Pager() as pager:
        for block in twin.blocks:
            pager.add_block(block.memory)
        for _ in range(twin.shards):
            pager.add_shard()
        for number, block in enumerate(twin.blocks):
            pager.arm(block.shard, number, 0, block.memory.pages)
        refusal = None
        try:
            with trio.fail_after(LATE_S):
                await twin.load_state(state)
        except PostcopyError as error:
            refusal = str(error)
        finally:
            await twin.close()  # nothing of it waits: no page was touched
    assert refusal is None or (refusal and "hangs in the kernel" not in refusal), refusal
    return refusal


async def run_for_a_moment(source: Machine, state: bytes) -> MachineState:
    """Over the memory that it was saved with, all of it there."""
    twin = create_destination(source.kind, source.config(), source.layout)
    try:
        with tempfile.TemporaryFile() as file:
            for here, there in zip(source.blocks, twin.blocks, strict=True):
                here.memory.dump(file.fileno())
                there.memory.load(file.fileno())
        await twin.load_state(state)
        await twin.resume()
        await trio.sleep(0.002)
        with contextlib.suppress(MigrationError):  # the guest failed
            await twin.pause()
            with trio.move_on_after(1):  # how much there is to verify, it says itself
                await twin.verify()
                await twin.save_state()
        return twin.statistics().state
    finally:
        await twin.close()


async def attack(kind: str, seed: int, seconds: float) -> dict[str, int]:
    source, state = await saved_machine(kind, seed % (1 << 32))
    counts = {"refused": 0, "ran": 0, "failed": 0}
    end = time.monotonic() + seconds
    number = 0
    while time.monotonic() < end:
        chance = random.Random(f"{seed} {number}")
        damaged = State(state)
        changes = [damaged.damage(chance) for _ in range(chance.choice((1, 1, 1, 2, 4)))]
        print(f"{kind} seed {seed} number {number}: {'; '.join(changes)}", flush=True)
        if await load_over_missing_memory(source, damaged.seal()) is not None:
            counts["refused"] += 1
        elif await run_for_a_moment(source, damaged.seal()) is MachineState.FAILED:
            counts["failed"] += 1
        else:
            counts["ran"] += 1
        number += 1
    await source.close()
    return counts


def child(kind: str, seed: int, seconds: float) -> dict[str, int]:
    return trio.run(attack, kind, seed, seconds)


@pytest.mark.needs("uffd")
@pytest.mark.timeout(SECONDS + 3 * END_S)
@pytest.mark.parametrize("kind", [pytest.param("kvm", marks=pytest.mark.needs("kvm")), "rv64"])
def test_device_states(kind: str, run_in_child: Callable[..., Any]) -> None:
    seed = int(os.environ.get("POSTCOPY_SEED") or random.SystemRandom().getrandbits(32))
    print(f"POSTCOPY_SEED={seed}", file=sys.stderr)
    result = run_in_child(child, kind, seed, SECONDS, deadline_s=SECONDS + END_S)
    last = "\n".join(result.stdout.splitlines()[-3:])
    assert result.returncode == 0, f"POSTCOPY_SEED={seed}: ended by {result.returncode} at\n{last}\n{result.stderr}"
    print(f"{kind}: {result.value}")
    assert result.value["refused"] > 10, result.value  # it did something
    assert result.value["ran"] + result.value["failed"] > 3, result.value
