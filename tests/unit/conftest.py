# SPDX-License-Identifier: Apache-2.0
"""Fixtures of several rooms' unit tests."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import hypothesis
import pytest

# Hypothesis would fail an example that took more than 200 ms, as any may on a busy host.
hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("untimed")


@pytest.fixture
def no_more_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """From the moment something is put into the list, no thread can be started."""
    limit: list[str] = []
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if limit:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    yield limit
    limit.clear()


@pytest.fixture
def patient_tls(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection waits for a look at its certificates for as long as that takes on a busy host."""
    monkeypatch.setattr("postcopy.tls._credentials.LOOK_TIMEOUT_S", 60.0)
