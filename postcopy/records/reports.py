# SPDX-License-Identifier: Apache-2.0
"""What commands print with `--json` as one object, without events: `probe` and `lab`."""

from __future__ import annotations

from typing import Annotated, Any

from postcopy.records._base import Record, Schema, doc


class Use(Record, kw_only=True):
    """A use of postcopy."""

    name: Annotated[str, doc("What it is.")]
    needs: Annotated[str, doc("What it needs.")]
    here: Annotated[bool, doc("Whether that is here.")]


class Finding(Record, kw_only=True):
    """Something that was tried."""

    name: Annotated[str, doc("What it is; docs/probe.md has them all.")]
    state: Annotated[str, doc("Whether it works here.", of="yes|no|unknown")]
    detail: Annotated[str, doc("What was seen.")]
    remedy: Annotated[str, doc("The command that would make it work, or a sentence; empty when it does.")]
    needed_for: Annotated[str, doc("What needs it.")]
    facts: Annotated[dict[str, Any], doc("What else was seen, by name; docs/probe.md has the names and units.")]


class Findings(Record, kw_only=True):
    """What `probe --require` prints."""

    schema: Schema
    findings: Annotated[list[Finding], doc("What was asked for.")]


class System(Record, kw_only=True):
    """Kernel, user, limits and settings of a host."""

    kernel: Annotated[str, doc("Its release.")]
    architecture: Annotated[str, doc("Of this host.")]
    user: Annotated[int, doc("Number (uid) of the user.")]
    container: Annotated[str | None, doc("What kind of container this is; null: none was detected.")]
    seccomp: Annotated[str | None, doc("How this process is confined; null where the kernel does not say.")]
    capabilities: Annotated[list[str], doc("Those that matter here and that this process has.")]
    capability_mask: Annotated[str, doc("All that it has, in hexadecimal.")]
    memlock_soft_bytes: Annotated[int | None, doc("Limit of locked memory; null: none.", "bytes")]
    memlock_hard_bytes: Annotated[int | None, doc("What that limit may be raised to; null: no limit.", "bytes")]
    cgroup_memory_limit_bytes: Annotated[int | None, doc("Of this process's control groups; null: none.", "bytes")]
    sysctl: Annotated[dict[str, int | None], doc("Settings of the kernel, by name; null where there is none.")]
    thp: Annotated[str | None, doc("Transparent huge pages: always, madvise or never.")]
    thp_shmem: Annotated[str | None, doc("... of shared memory.")]


class Probe(System, kw_only=True):
    """What `probe` prints."""

    schema: Schema
    receivable: Annotated[dict[str, bool], doc("Kinds of machines, and whether they can be received here.")]
    uses: Annotated[list[Use], doc("What each use needs.")]
    findings: Annotated[list[Finding], doc("What was tried.")]


class LabHostStatus(Record, kw_only=True):
    """A host of a laboratory that is up."""

    ipv4: Annotated[str, doc("Its IPv4 address.")]
    ipv6: Annotated[str | None, doc("Its IPv6 address; null: the kernel has none.")]
    network_namespace: Annotated[str, doc("As a file, for `nsenter --net=FILE`.")]
    cable: Annotated[str, doc("Of the host.", of="whole|cut")]
    rate: Annotated[str, doc("Of the cable, each way, for a person; off: no limit.")]
    rate_bytes_per_s: Annotated[int | None, doc("The same; null: no limit.", "bytes/s")]
    delay_us: Annotated[int, doc("Of the cable, each way.", "us")]


class Lab(Record, kw_only=True):
    """A laboratory. One that is gone has an error, and no hosts."""

    name: Annotated[str, doc("Of the laboratory.")]
    state: Annotated[str, doc("Whether it is up.", of="up|gone")]
    error: Annotated[str | None, doc("What became of it.")] = None
    holder: Annotated[int | None, doc("Number (pid) of the process that keeps it up.")] = None
    kept: Annotated[bool | None, doc("Whether it stays when the command that made it has ended.")] = None
    user_namespace: Annotated[str | None, doc("own, or the caller's.")] = None
    mtu: Annotated[int | None, doc("Of its cables.", "bytes")] = None
    netem: Annotated[bool | None, doc("Whether the kernel can delay packets.")] = None
    hosts: Annotated[dict[str, LabHostStatus], doc("By name.")]


class Labs(Record, kw_only=True):
    """What `lab status` and `lab up` print."""

    schema: Schema
    labs: Annotated[list[Lab], doc("Of this user.")]


REPORTS: tuple[type[Record], ...] = (Probe, Findings, Labs)
