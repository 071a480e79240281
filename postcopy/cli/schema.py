# SPDX-License-Identifier: Apache-2.0
"""`postcopy schema`: what the lines of `--json`, `--log-json` and the control socket have in them."""

from __future__ import annotations

import argparse
import json

from postcopy import __version__
from postcopy.service.options import Group, flag

OPTIONS = (Group("", flag("markdown", "print a page for people instead of JSON Schema")),)


def run(args: argparse.Namespace) -> int:
    """Prints it."""
    from postcopy.records.document import document, markdown  # some megabytes that nothing else needs

    print(markdown() if "markdown" in args else json.dumps(document(__version__), indent=2))
    return 0
