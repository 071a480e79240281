# SPDX-License-Identifier: Apache-2.0
"""Runs one fuzz target: ``run.py TARGET [-option=value...] [DIRECTORY-OR-FILE...]``, with the options of libFuzzer.

Atheris does it, which is libFuzzer guided by the coverage of Python code, where it is installed (the extra ``fuzz``).
Without it, or with ``-plain=1``, the driver here does, as csrc/tests/support/fuzz_main.c does for C: it replays all
inputs, then tries mutations of them that depend on ``-seed`` alone. It finds less, and needs nothing.
"""

from __future__ import annotations

import gc
import random
import sys
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MAX_INPUT_BYTES = 4096
"""As libFuzzer has it by default."""
EDGES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)


def mutated(data: bytes, other: bytes, choose: random.Random) -> bytes:
    """A few things in it are not as they were."""
    made = bytearray(data)
    for _ in range(choose.randint(1, 5)):
        at = choose.randrange(len(made) + 1)
        how = choose.randrange(8)
        if how == 0 and at < len(made):
            made[at] ^= 1 << choose.randrange(8)
        elif how == 1 and at < len(made):
            made[at] = choose.randrange(256)
        elif how == 2:
            width = choose.choice((1, 2, 4, 8))
            value = choose.choice(EDGES) & (256**width - 1)
            made[at : at + width] = value.to_bytes(width, choose.choice(("big", "little")))
        elif how == 3:
            del made[at : at + choose.randint(1, 20)]
        elif how == 4:
            made[at:at] = choose.randbytes(choose.randint(1, 12))
        elif how == 5:
            made[at:at] = made[at : at + choose.randint(1, 64)] * choose.choice((1, 1, 2, 40))
        elif how == 6:
            begin = choose.randrange(len(other) + 1)
            made[at:at] = other[begin : begin + choose.randint(1, 64)]
        elif at < len(made):
            made[at] = (made[at] + choose.randint(-4, 4)) % 256
    return bytes(made[:MAX_INPUT_BYTES])


def read_inputs(paths: Sequence[Path]) -> list[bytes]:
    """Of files, and of the files in directories, in an order that is the same everywhere."""
    files = [file for path in paths for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
    return [file.read_bytes() for file in files]


def run_plain(
    run: Callable[[bytes], object], inputs: Sequence[bytes], runs: int, seconds: float, seed: int, artifact: Path
) -> int:
    """How many were tried. What raises is left in the file `artifact`."""
    choose, began_s, done = random.Random(seed), time.monotonic(), 0
    corpus = [b"", *inputs]
    data = b""
    try:
        for data in corpus:
            run(data)
        while done < runs and time.monotonic() - began_s < seconds:
            data = mutated(choose.choice(corpus), choose.choice(corpus), choose)
            run(data)
            done += 1
    except BaseException:
        artifact.write_bytes(data)
        print(f"the input lies in {artifact}", file=sys.stderr)
        raise
    return done + len(corpus)


def _option(name: str, default: str) -> str:
    values = [word.partition("=")[2] for word in sys.argv[2:] if word.startswith(f"-{name}=")]
    return values[-1] if values else default


def main() -> None:
    sys.path[:0] = [str(ROOT)]
    name, options = sys.argv[1], [word for word in sys.argv[2:] if not word.startswith("-plain=")]
    try:
        import atheris
    except ModuleNotFoundError:
        atheris = None
    if _option("plain", "0") == "1":
        atheris = None
    from tests.fuzz.targets import TARGETS

    if name == "-list":
        print(*TARGETS, sep="\n")
        return
    if atheris is not None:
        # Here, and not while they are imported: Atheris's hook does not get on with that of an editable installation.
        for function in filter(lambda each: isinstance(each, types.FunctionType), gc.get_objects()):
            if str(function.__module__).partition(".")[0] in ("postcopy", "h11"):
                atheris.instrument_func(function)
        seeds = ROOT / "build" / "fuzz" / f"{name}.seeds"
        seeds.mkdir(parents=True, exist_ok=True)
        for number, seed in enumerate(TARGETS[name].seeds()):
            (seeds / f"{number:03}").write_bytes(seed)
        itself = " ".join([sys.executable, *sys.argv[:2]])  # how libFuzzer starts another one, to merge
        atheris.Setup([itself, *options, str(seeds)], TARGETS[name].run)
        atheris.Fuzz()
        return
    paths = [Path(word) for word in options if not word.startswith("-")]
    tried = run_plain(
        TARGETS[name].run,
        [*TARGETS[name].seeds(), *read_inputs(paths)],
        int(_option("runs", str(2**63))),
        float(_option("max_total_time", "inf")),
        int(_option("seed", "1")),
        Path(_option("artifact_prefix", "./") + "crash"),
    )
    print(f"stat::number_of_executed_units: {tried}")


if __name__ == "__main__":
    main()
