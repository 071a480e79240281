# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# --import-mode=importlib makes no packages of test directories, so what they share is loaded by its path.
_spec = importlib.util.spec_from_file_location("postcopy_sides", Path(__file__).with_name("_sides.py"))
assert _spec is not None
assert _spec.loader is not None
_sides = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = _sides
_spec.loader.exec_module(_sides)


@pytest.fixture
def side(spawn_child: Callable[..., Any]) -> Callable[..., Any]:
    """``side(*arguments)``: a `postcopy` process as a `_sides.Side`; `spawn` starts it elsewhere than here."""

    def start(*arguments: Any, spawn: Callable[..., Any] = spawn_child) -> Any:
        return _sides.Side(spawn, *(str(argument) for argument in arguments))

    return start
