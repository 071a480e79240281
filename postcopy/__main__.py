# SPDX-License-Identifier: Apache-2.0
"""``python -m postcopy``, and the command `postcopy`."""

from __future__ import annotations

import signal
import sys

from postcopy.errors import MissingPackageError, naming_missing_packages


def main() -> int:
    """The exit status of the command with the arguments of this process."""
    interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if interruptible:
        # While modules are imported: a KeyboardInterrupt in one of the import system's callbacks would be lost.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        with naming_missing_packages("the command postcopy"):
            from postcopy.cli import main as run
    except MissingPackageError as error:
        print(f"postcopy: error: {error}", file=sys.stderr)
        return 1
    try:
        if interruptible:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return run()
    except KeyboardInterrupt:  # before that could take it
        return 1


if __name__ == "__main__":
    sys.exit(main())
