# SPDX-License-Identifier: Apache-2.0
"""A laboratory: hosts as network namespaces, joined by cables and a switch, on one machine.

Each host is a network namespace with a bridge ``br0``, which has the host's addresses, and on it a port ``eth0``: the
cable, a veth pair whose other end is a port, named like the host, of the bridge ``switch`` in a namespace of its own.
The network of the machine itself is not touched: nothing of the laboratory is ever in it.

`_lab` has `Lab` and `Host`, which block, and `open_lab` for Trio; `_plan` what they are made from. `command` is
``postcopy lab``; see docs/lab.md. Nothing is imported here: the holder, which stays for long, needs little.
"""
