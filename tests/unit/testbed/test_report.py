# SPDX-License-Identifier: Apache-2.0
"""What the commands of the testbed write, where standard output takes nothing."""

from __future__ import annotations

import sys

import pytest

from postcopy.errors import PostcopyError
from postcopy.testbed._report import emit, emit_json, make_console


def test_standard_output_was_closed_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    emit_json({})
    emit(lambda: make_console(sys.stdout).print("text"))


def test_a_full_disk_is_named_and_does_not_fail_again_at_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(PostcopyError, match="standard output: No space left on device"):
            emit_json({})
        monkeypatch.undo()
