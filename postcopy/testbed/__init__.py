# SPDX-License-Identifier: Apache-2.0
"""All that only tests, shows or measures, and that no machine needs in order to move.

- `chaos`: a TCP proxy that is a bad network; also for the tests of others. `postcopy chaos`.
- `lab`: hosts as network namespaces, with cables between them. `postcopy lab`.
- `probe`: what this kernel, this user and this container allow. `postcopy probe`.
- `faultpaths`: which ways of the kernel wait for a missing page. `postcopy faultpaths`.
- `conformance`: is a page-fault handler for Firecracker right? `postcopy conformance`.
- `bench`: the figures that the documentation quotes. `postcopy bench`.
- `demo`: both sides of a migration on this host, verified. `postcopy demo`.
- `pinger`, `soak`: a stream of echoes to a machine; migration after migration over a bad network.

They share `_processes` (children), `_linux` (/proc, namespaces) and `_report` (tables and JSON). This room may import
every other one but `cli`; none may import it. Nothing is imported here: some of its processes stay for long.
"""
