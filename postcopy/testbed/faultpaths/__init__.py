# SPDX-License-Identifier: Apache-2.0
"""Which kernel paths wait for a missing page, and which do not: `postcopy faultpaths` (docs/faultpaths.md).

The operations, and the children in which they run, are C (csrc/faultpaths; `_core` calls it). Here are the choice of
what to run (`_select`), the process that runs it (`_runner`) under a supervisor (`_supervise`), the engine that brings
pages from another host (`_remote`), what is to be expected of a kernel (`_expect`, expectations.toml, `_system`), the
reports (`_report`, from the tables of `_sections`), the comparison of two (`_compare`), the
matrix over kernels (`_merge`, community.jsonl), and the `command`. `_model` has
the values that all of them speak of. Nothing is imported here: the runner needs little.
"""
