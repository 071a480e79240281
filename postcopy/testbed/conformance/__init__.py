# SPDX-License-Identifier: Apache-2.0
"""`postcopy conformance`: is a userfaultfd handler for Firecracker right? For any handler, whoever wrote it.

A *client* (`_client`, csrc/conformance/client.c) is to the handler what a restored Firecracker is. A *case* (`_cases`)
is an async function that gives orders to clients and looks at what they meet; it raises `Failed`, or `NotApplicable`.
The *handler* (`_handler`) is a socket, or a command that is started, stopped, killed and started again; `_slow` gives
it an image that answers when it is told to. `command` chooses and runs cases, a bounded number at a time, and writes
the report.

What it owns: child processes, mounts and a temporary directory; all of it is gone when the command ends. No memory that
may be missing is ever touched in this process.
"""
