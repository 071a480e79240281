# SPDX-License-Identifier: Apache-2.0
"""QEMU, unmodified, as a machine: it moves its devices' state, and we move its memory. `qmp` drives one, `_look` says
what it has, `source` and `destination` are the two sides."""
