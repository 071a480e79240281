# SPDX-License-Identifier: Apache-2.0
"""Memory of a program that runs, as its preload library (csrc/preload, `postcopy run`) lets others guard it.

`client` asks the library; `start` puts it into a program. Neither keeps anything open."""

from __future__ import annotations
