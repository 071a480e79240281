# SPDX-License-Identifier: Apache-2.0
"""What a process answers on its control socket, for people: aligned as `virsh domjobinfo` has it."""

from __future__ import annotations

import time
from typing import Any

from postcopy.output.words import AT_DESTINATION, AT_SOURCE, format_count, format_duration, format_parts, in_round
from postcopy.records import Json, Record
from postcopy.records.figures import figures
from postcopy.records.migration import LOST
from postcopy.records.migration import Migration as MigrationRecord
from postcopy.records.pager import Vm
from postcopy.units import format_size
from postcopy.wire import one_line

_LABEL_WIDTH = 18
_OF_PRECOPY = ("iteration", "dirty-sync-count", "dirty-pages-rate", "precopy-bytes", "compressed-bytes",
               "uncompressed-bytes")  # fmt: skip
"""Not shown where they are 0: there is none, or no compression."""


def render_answer(request: str, answer: Json) -> str:
    """What a person wants to know of an answer; nothing where that it was done says it all."""
    if request == "status":
        return render(answer)
    if request == "set":
        return _rows(_setting_rows(answer))
    if request == "commands":
        return _rows([(command["name"], command["help"]) for command in answer["commands"]])
    if request == "reclaim":
        return f"{answer['machine']} runs here again: {answer['lost']}"
    if request == "migrate":
        return f"{answer['machine']} is on its way: migration {answer['migration-id']}"
    return f"{answer['name']} runs" if request == "start" else ""


def render(status: Json) -> str:
    """A process's status as lines; an empty line between machines."""
    if "vms" in status:
        return "\n\n".join([_rows(_pager_rows(status)), *(_rows(_vm_rows(vm)) for vm in status["vms"])])
    parts = [_rows(_process_rows(status))]
    parts += [_rows(_machine_rows(machine)) for machine in status.get("machines", [])]
    return "\n\n".join(parts)


def _rows(rows: list[tuple[str, str]]) -> str:
    width = max(_LABEL_WIDTH, *(len(label) + 1 for label, _ in rows))
    return "\n".join(f"{label + ':':<{width}} {value}" for label, value in rows)


def _process_rows(status: Json) -> list[tuple[str, str]]:
    rows = [("Side", str(status.get("side"))), ("Process", str(status.get("pid")))]
    rows += [("Listening on", str(address)) for address in status.get("listening", [])]
    rows += [
        ("Certificate", f"{certificate['file']}, until {_day(certificate['expires-at'])}")
        for certificate in status.get("certificates", [])
    ]
    rows += _setting_rows(status.get("settings", {}))
    rows.append(("Machines", str(len(status.get("machines", [])))))
    return rows


def _pager_rows(status: Json) -> list[tuple[str, str]]:
    keeper = status["keeper"]
    kept = "none: nothing outlives this process" if keeper["store"] == "none" else str(keeper["store"])
    if keeper["deaths"]:
        kept += f", {format_count(keeper['deaths'], 'death')} before this process"
    rows = [("Side", str(status["side"])), ("Process", str(status["pid"]))]
    rows += [("Listening on", path) for path in status["listening"]]
    return [*rows, ("Keeper", kept), ("Virtual machines", str(len(status["vms"])))]


def _vm_rows(vm: Json) -> list[tuple[str, str]]:
    rows = [("Virtual machine", f"{vm['name']}, process {vm['pid']}"), ("Status", str(vm["status"]))]
    if vm.get("error"):
        rows.append(("Error", str(vm["error"])))
    if vm.get("image"):
        rows.append(("Image", str(vm["image"])))
    rows += _figure_rows(Vm, vm)
    if vm["fault-latency-us"]["count"]:
        median, most = (format_duration(vm["fault-latency-us"][key] / 1e6) for key in ("p50", "p99"))
        rows.append(("Fault latency", f"median {median}, 99 % within {most}"))
    return rows


def _setting_rows(settings: Json) -> list[tuple[str, str]]:
    rows = []
    if "max-bandwidth" in settings:
        limit = settings["max-bandwidth"]
        rows.append(("Max bandwidth", f"{_size(limit)}/s" if limit else "unlimited"))
    if "bulk-channels" in settings:
        rows.append(("Bulk channels", str(settings["bulk-channels"])))
    if settings.get("mode"):
        precopy = settings["precopy"]
        rounds = f", precopy {precopy if isinstance(precopy, str) else f'for {precopy:g} s'}" if precopy else ""
        rows.append(("Default mode", settings["mode"] + rounds))
        if precopy:
            rows.append(("Max downtime", format_duration(settings["max-downtime"])))
    if after := settings.get("push-after"):
        rows.append(("Push after", after if isinstance(after, str) else f"{after:g} s"))
    if "recover-for" in settings:
        patience = settings["recover-for"]
        rows.append(("Recover for", patience if isinstance(patience, str) else f"{patience:g} s"))
    return rows


def _machine_rows(machine: Json) -> list[tuple[str, str]]:
    rows = [("Machine", str(machine["name"]))]
    if machine.get("kind"):
        rows.append(("Kind", f"{machine['kind']}, {_size(machine.get('memory', 0))}"))
    guest = machine.get("guest") or {}
    if guest:
        rows.append(("State", str(guest.get("state"))))
    if "operations" in guest:
        rows.append(("Operations", str(guest["operations"])))
        if guest.get("failures"):
            rows.append(("Guest failures", f"{guest['failures']}: {guest.get('failure')}"))
    job = machine.get("migration")
    return rows + (_job_rows(job) if job else [("Job type", "None")])


def _job_rows(job: Json) -> list[tuple[str, str]]:
    rows = [
        ("Job type", f"{str(job['status']).capitalize()}, {job.get('direction')}"),
        ("Migration", str(job.get("migration-id") or "-")),
        ("Peer", _peer(job)),
        *_encryption_rows(job),
        ("Time elapsed", format_duration(job.get("elapsed-ms", 0) / 1e3)),
    ]
    ram, parts = job.get("ram") or {}, job.get("downtime-breakdown-us") or {}
    if (job.get("attempts") or 1) > 1:
        rows.append(("Attempts", str(job["attempts"])))
    if job.get("mode"):
        rows.append(("Mode", str(job["mode"])))
    if copying := in_round(str(job["status"]), ram):
        rows.append(("Precopy", copying))
    of_precopy = {key for key in _OF_PRECOPY if not ram.get(key)}
    rows += _figure_rows(MigrationRecord, job | {"ram": {key: ram[key] for key in ram if key not in of_precopy}})
    for label, names in (("At source, us", AT_SOURCE), ("At dest, us", AT_DESTINATION)):
        if shown := format_parts(parts, names):
            rows.append((label, shown))
    if (job.get("fault-latency-us") or {}).get("count"):
        median, most = (format_duration(job["fault-latency-us"][key] / 1e6) for key in ("p50", "p99"))
        rows.append(("Fault latency", f"median {median}, 99 % within {most}"))
    if (job.get("recoveries") or {}).get("count"):
        rows.append(("Recoveries", str(job["recoveries"]["count"])))
    if job.get("error"):
        rows.append(("Error", str(job["error"])))
    return rows


def _encryption_rows(job: Json) -> list[tuple[str, str]]:
    if "encrypted" not in job:
        return []
    if not (tls := job.get("tls")):
        return [("Encrypted", "no")]
    resumed = ", session resumed" if tls["resumed"] else ""
    name = one_line(tls["peer-name"])  # a subject may have characters that a terminal obeys
    return [("Encrypted", f"TLS with {name}{resumed}, its certificate until {_day(tls['expires-at'])}")]


def _day(at_s: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(at_s))


def _figure_rows(record: type[Record], values: Json) -> list[tuple[str, str]]:
    """What has a label, in the order of the fields."""
    rows = []
    for figure in figures(record):
        value = values.get(figure.key)
        if figure.record is not None and isinstance(value, dict):
            rows += _figure_rows(figure.record, value)
        elif figure.label and value is not None and (value or record is not MigrationRecord):  # its own only if not 0
            rows.append((figure.label, _number(figure.unit, value)))
    return rows


def _peer(job: Json) -> str:
    if job["status"] in LOST and job.get("looking-for-peer") is False:
        return f"{job.get('peer')} (disconnected, and not looked for any more: `migrate-recover` connects again)"
    return str(job.get("peer"))


def _number(unit: str, value: Any) -> str:
    if unit == "ms":
        return format_duration(value / 1e3)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return _size(value) if unit == "bytes" else str(value)


def _size(value: Any) -> str:
    return format_size(value) if isinstance(value, int) else str(value)
