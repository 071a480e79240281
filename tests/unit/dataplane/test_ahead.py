# SPDX-License-Identifier: Apache-2.0
"""The words of ``--prefetch``."""

from __future__ import annotations

import pytest

from postcopy.dataplane.ahead import DEFAULT_PAGES, NO_PREFETCH, Prefetch, Way
from postcopy.errors import ConfigurationError


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("none", NO_PREFETCH),
        ("adaptive", Prefetch(Way.ADAPTIVE)),
        ("forward", Prefetch(Way.FORWARD, DEFAULT_PAGES)),
        ("forward:1", Prefetch(Way.FORWARD, 1)),
        ("both:64", Prefetch(Way.BOTH, 64)),
    ],
)
def test_policies(text: str, policy: Prefetch) -> None:
    assert Prefetch.parse(text) == policy
    assert Prefetch.parse(str(policy)) == policy


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "none, forward, both or adaptive"),
        ("foward", "did you mean forward"),
        ("adaptive:4", "adaptive has no number"),
        ("none:", "none has no number"),
        ("both:0", "1 to 64"),
        ("both:65", "1 to 64"),
        ("forward:x", "whole number"),
        ("forward:", "whole number"),
    ],
)
def test_what_is_none(text: str, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        Prefetch.parse(text)
