# SPDX-License-Identifier: Apache-2.0
"""Which kernel paths wait for a missing page, and which do not: `postcopy faultpaths` (docs/faultpaths.md).

The operations, and the children in which they run, are C (csrc/faultpaths); here are the choice of what to run
(`_select`), the process that runs it (`_runner`) under a supervisor (`_supervise`), what is to be expected of a kernel
(`_expect`, expectations.toml), the reports (`_report`, from the tables of `_sections`) and the comparison of two.
"""

from __future__ import annotations

import argparse

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `postcopy faultpaths`."""
    from postcopy.testbed.faultpaths._command import (
        add_arguments as add,  # here: the runner imports this package too, and needs none of it
    )

    add(parser)


def run(args: argparse.Namespace) -> int:
    """The exit status; see `_command.run`."""
    from postcopy.testbed.faultpaths._command import run as run_command

    return run_command(args)
