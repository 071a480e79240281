# SPDX-License-Identifier: Apache-2.0
"""`postcopy demo --tls`: it makes certificates, refuses strangers, and finds nothing in clear on the network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

MACHINE = ("--machine", "rv64", "--memory", "16MiB", "--migrate-after", "0.2", "--run-for", "0.2")

pytestmark = pytest.mark.needs("uffd-user")


@pytest.mark.parametrize("network", [(), ("--chaos", "cut", "--seed", "3")], ids=["whole", "cut"])
def test_shows_it(side: Callable[..., Any], network: tuple[str, ...]) -> None:
    status, result, errors = side("demo", "--json", "--tls", *MACHINE, *network).end(100)
    assert status == 0, errors
    assert result["verified"] is True
    seen = result["demo-tls"]
    assert [one["let-in"] for one in seen["strangers"]] == [False, False]
    authority, without = (one["said"] for one in seen["strangers"])
    assert "it does not know the CA of the certificate here" in authority  # the destination refuses, not the stranger
    assert "--tls" in without
    assert seen["readable"] == 0
    assert seen["ciphertext"] > 8 << 20
    assert seen["connections"] >= 3  # control, urgent, bulk
    if network:
        assert result["recoveries"]["count"] > 0
