# SPDX-License-Identifier: Apache-2.0
"""How a child process is started that runs this package."""

from __future__ import annotations

import sys


def python(*arguments: str) -> list[str]:
    """A command of this interpreter, as ``python("-m", "postcopy", "dest")``.

    Always with -P: with ``-m`` and ``-c`` Python otherwise looks for modules in the current directory first. In /tmp
    another user may have put them there, to be run with the rights of this one; in a checkout of the sources they have
    no core.
    """
    return [sys.executable, "-P", *arguments]
