# SPDX-License-Identifier: Apache-2.0
"""Patterns that an operator writes, and what a peer says that is compared with them."""

from __future__ import annotations

import re


def matches(pattern: str, text: str, star: str) -> bool:
    """Whether the whole text is as the pattern, in which ``*`` stands for any number of characters that are `star`, a
    regular expression for one of them: any, or any but some. No text takes longer than its length."""
    first, *others = map(re.escape, pattern.split("*"))
    if others:  # each part where it comes first: it is looked for nowhere else
        first += "".join(f"(?>{star}*?{part})" for part in others[:-1]) + f"{star}*" + others[-1]
    return re.fullmatch(first, text, re.DOTALL) is not None
