# SPDX-License-Identifier: Apache-2.0
"""What a process says on its control socket: the greeting, answers, refusals."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import field

from postcopy.records._base import Record, Schema, doc
from postcopy.records.migration import Machine, Name, Process
from postcopy.records.pager import PagerStatus

Id = Annotated[object, doc("What the request had as its id; not there where it had none.")]


class Settings(Record, kw_only=True):
    """What `set` changes."""

    max_bandwidth: Annotated[
        int | None, doc("Limit of what is pushed; 0: none. Not there at a destination.", "bytes/s")
    ] = None
    bulk_channels: Annotated[
        int | None, doc("Connections for background pages, of the next migration. Not there at a destination.")
    ] = None
    mode: Annotated[
        str | None, doc("How the next migrations send the memory, as `--mode`. Not there at a destination.")
    ] = None
    precopy: Annotated[
        float | Literal["auto"] | None,
        doc("For how long memory is sent before the switchover; 0: not at all. Not there at a destination.", "s"),
    ] = None
    max_downtime: Annotated[
        float | None,
        doc("The machine is paused when what is left can be sent in this time. Not there at a destination.", "s"),
    ] = None
    push_after: Annotated[
        float | Literal["forever"] | None,
        doc("How long the push is held back after the switchover. Not there at a destination.", "s"),
    ] = None
    recover_for: Annotated[float | Literal["forever"], doc("How long a peer that was lost is looked for.", "s")]


class Certificate(Record, kw_only=True):
    """One with which this process shows who it is (`--tls`)."""

    role: Annotated[str, doc("Where it is shown: on connections that come, or that are made.", of="server|client")]
    file: Annotated[str, doc("Path of it.")]
    expires_at: Annotated[int, doc("When it ends, counted from the beginning of 1970, UTC.", "s")]


class ProcessStatus(Record, kw_only=True):
    """How the process and its machines are."""

    side: Process
    pid: Annotated[int, doc("Of the process.")]
    listening: Annotated[list[str], doc("Addresses, as HOST:PORT.")]
    settings: Annotated[Settings, doc("What `set` can change.")]
    certificates: Annotated[list[Certificate] | None, doc("Those that are in use; only with `--tls`.")] = None
    machines: Annotated[list[Machine], doc("Those that are here, on their way to here, or on their way from here.")]


class Command(Record, kw_only=True):
    """A request that this process understands."""

    name: Annotated[str, doc("What `execute` has.")]
    help: Annotated[str, doc("What it does.")]
    arguments: Annotated[list[str], doc("Their names.")]


class Commands(Record, kw_only=True):
    """What may be asked of this process."""

    commands: Annotated[list[Command], doc("All of them.")]


class Subscription(Record, kw_only=True):
    """Whether this client is told events from now on."""

    enabled: Annotated[bool, doc("Whether it is.")]


class EndedMachine(Record, kw_only=True):
    """The machine that has ended."""

    machine: Name


class Steered(Record, kw_only=True):
    """A migration that a request was for."""

    machine: Name
    migration_id: Annotated[str, doc("Of the migration; empty as long as it has no connection.")]


class AllSteered(Record, kw_only=True):
    """The migrations that a request was for."""

    migrations: Annotated[list[Steered], doc("All that could do it; at least one.")]


class Reclaimed(Steered, kw_only=True):
    """A machine that goes on here."""

    lost: Annotated[str, doc("What is lost by that, for a person.")]


class Done(Record, forbid_unknown_fields=True):
    """It was done. No more is said, and never will be."""


class Greeted(Record, kw_only=True):
    """The process that was connected to."""

    version: Annotated[str, doc("Of postcopy.")]
    schema: Schema
    side: Annotated[str, doc("What the process is.", of="source|dest|daemon|pager")]
    pid: Annotated[int, doc("Of the process.")]


class Greeting(Record, kw_only=True):
    """The first line of the control socket."""

    postcopy: Annotated[Greeted, doc("Which process this is.")]


class Refused(Record, kw_only=True):
    """Why a request was not done."""

    class_: Annotated[
        str,
        doc("BadRequest: no request at all. BadArguments: wrong ones. NotNow: the state does not allow it. Failed:"
            " tried, and failed.", of="BadRequest|CommandNotFound|BadArguments|NotNow|Failed"),
    ] = field(name="class")  # fmt: skip
    desc: Annotated[str, doc("One line for a person.")]


class Refusal(Record, kw_only=True):
    """The answer to a request that was not done."""

    error: Annotated[Refused, doc("Why.")]
    id: Id = None


class Timestamp(Record, kw_only=True):
    """Since the beginning of 1970, UTC."""

    seconds: Annotated[int, doc("Whole ones.", "s")]
    microseconds: Annotated[int, doc("... and the rest.", "us")]


ANSWERS: dict[str, tuple[type[Record], ...]] = {
    "commands": (Commands,),
    "status": (ProcessStatus, PagerStatus),
    "events": (Subscription,),
    "start": (Machine,),
    "end": (EndedMachine,),
    "migrate": (Steered,),
    "migrate-pause": (AllSteered,),
    "migrate-recover": (AllSteered,),
    "switchover": (AllSteered,),
    "set": (Settings,),
    "migrate-cancel": (AllSteered,),
    "reclaim": (Reclaimed,),
    "upgrade": (Done,),
    "quit": (Done,),
}
"""What `return` has, by request: one of these."""
