# SPDX-License-Identifier: Apache-2.0
"""What the tests of both engines stand on, under the name by which they import it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

# --import-mode=importlib makes no packages of test directories, so what they share is loaded by its path, once.
_NAME = "tests.unit.migration._engines"
_spec = importlib.util.spec_from_file_location(_NAME, Path(__file__).with_name("_engines.py"))
assert _spec is not None
assert _spec.loader is not None
sys.modules[_NAME] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules[_NAME])
