# SPDX-License-Identifier: Apache-2.0
"""``python -m postcopy``, and the command `postcopy`."""

from __future__ import annotations

import sys

from postcopy.errors import MissingPackageError, naming_missing_packages


def main() -> int:
    """The exit status of the command with the arguments of this process."""
    try:
        with naming_missing_packages("the command postcopy"):
            from postcopy.cli import main as run
    except MissingPackageError as error:
        print(f"postcopy: error: {error}", file=sys.stderr)
        return 1
    return run()


if __name__ == "__main__":
    sys.exit(main())
