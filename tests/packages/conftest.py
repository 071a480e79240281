# SPDX-License-Identifier: Apache-2.0
"""The packages that `make wheel` has written into dist/: `make check-packages` writes them, then runs these tests."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _only(pattern: str) -> Path:
    found = sorted((ROOT / "dist").glob(pattern))
    if len(found) != 1:
        pytest.skip(f"dist/ has {len(found)} of {pattern}: `make check-packages` makes one and runs this")
    return found[0]


@pytest.fixture(scope="session")
def wheel() -> Path:
    return _only("*.whl")


@pytest.fixture(scope="session")
def sdist() -> Path:
    return _only("*.tar.gz")
