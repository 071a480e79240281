# SPDX-License-Identifier: Apache-2.0
"""Every fuzz target in Python with all that is in its corpus, and some mutations of it, the same in each run. `make
fuzz` runs them for longer, guided by coverage."""

from __future__ import annotations

from pathlib import Path

import pytest

from postcopy.wire.messages import MESSAGES
from tests.fuzz.run import read_inputs, run_plain
from tests.fuzz.targets import TARGETS, message_seeds

CORPUS = Path(__file__).with_name("corpus")
MUTATIONS, MUTATIONS_WHERE_SLOW = 1000, 100


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.needs("tls") if name == "acceptor_tls" else ()) for name in TARGETS]
)
def test_target(name: str, tmp_path: Path) -> None:
    target = TARGETS[name]
    corpus = CORPUS / name
    inputs = [*target.seeds(), *(read_inputs([corpus]) if corpus.is_dir() else [])]
    runs = MUTATIONS_WHERE_SLOW if target.slow else MUTATIONS
    tried = run_plain(target.run, inputs, runs, float("inf"), 1, tmp_path / "input")
    assert tried > runs


def test_each_corpus_has_a_target() -> None:
    assert {each.name for each in CORPUS.iterdir()} <= set(TARGETS)


def test_a_message_of_each_type_is_a_seed() -> None:
    seeds = b"".join(message_seeds())
    assert [name for name in MESSAGES if b"\xa4type" + bytes([0xA0 + len(name)]) + name.encode() not in seeds] == []


def test_what_fails_is_kept(tmp_path: Path) -> None:
    """A target that dislikes a byte: the driver finds it, and leaves the input where it says."""

    def dislike(data: bytes) -> None:
        assert b"\xff" not in data

    with pytest.raises(AssertionError):
        run_plain(dislike, [b"abc" * 10], 100_000, float("inf"), 1, tmp_path / "input")
    assert b"\xff" in (tmp_path / "input").read_bytes()
