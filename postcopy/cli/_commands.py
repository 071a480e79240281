# SPDX-License-Identifier: Apache-2.0
"""The commands: what each is for, and the module that does it. Their parsers, ``--help``, completion and man pages are
made of this table and of the tables of options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    help: str
    module: str
    description: str
    examples: tuple[tuple[str, str], ...] = ()  # what it does, and the command line


COMMANDS: Mapping[str, Command] = {
    "source": Command(
        "run a machine, or serve a memory image, and migrate it",
        "postcopy.cli.sides",
        "Runs a machine, or serves a memory image, and migrates it to a destination: at once, after --migrate-after, or"
        " with --hold when `postcopy ctl migrate` says so. It ends when all of the memory has arrived there.",
        (
            (
                "Run a machine for 5 seconds, then migrate it to host-b:",
                "postcopy source --machine kvm --memory 1GiB --migrate-after 5 \\\n"
                "  --connect host-b:7777 --tls host-a.tls",
            ),
            (
                "Serve a memory image to one destination:",
                "postcopy source --machine image --image a.img --listen :7777 \\\n  --tls host-a.tls",
            ),
            (
                "Run a machine until `postcopy ctl migrate host-b:7777`:",
                "postcopy source --machine rv64 --hold --tls host-a.tls",
            ),
        ),
    ),
    "dest": Command(
        "receive a machine and run it",
        "postcopy.cli.sides",
        "Receives a machine from a source and runs it. A page that it touches before the page has arrived is fetched at"
        " that moment; all other pages arrive meanwhile.",
        (
            ("Receive a machine, run it until interrupted:", "postcopy dest --listen :7777 --tls host-b.tls"),
            (
                "Receive a memory image into a file:",
                "postcopy dest --connect host-a:7777 --tls host-b.tls \\\n  --dump copy.img",
            ),
        ),
    ),
    "daemon": Command(
        "run machines, migrate them on request, receive others",
        "postcopy.cli.sides",
        "Runs any number of machines. `postcopy ctl` starts and ends them and migrates them to other daemons; with"
        " --listen it receives machines from those. It ends at `postcopy ctl quit`, Ctrl-C or SIGTERM.",
        (
            (
                "Run a machine that can be migrated away and back:",
                "postcopy daemon --listen :7777 --tls host-a.tls \\\n  --machine kvm --memory 1GiB --name vm1",
            ),
            ("Wait for machines of other hosts:", "postcopy daemon --listen :7777 --tls host-b.tls"),
        ),
    ),
    "pager": Command(
        "serve the page faults of Firecracker's virtual machines",
        "postcopy.cli.pager",
        "Serves the page faults of virtual machines that are restored from a snapshot: Firecracker connects to --socket"
        " when it loads one with mem_backend Uffd, and each page comes when it is touched. Any number of virtual"
        " machines share one page cache. The process may be killed or upgraded while they run.",
        (
            ("Serve a snapshot's memory file:", "postcopy pager --socket /run/vm.sock --image vm.mem"),
            (
                "Place what an earlier run has touched first, and kill what cannot be served:",
                "postcopy pager --socket vm.sock --image vm.mem --working-set vm.ws \\\n  --on-lost kill",
            ),
            (
                "From a process on another host:",
                "postcopy pager --socket vm.sock --connect host-a:7777 \\\n  --tls host-b.tls",
            ),
        ),
    ),
    "run": Command(
        "start a program, such as QEMU, so that its memory can be moved",
        "postcopy.cli.run",
        "Becomes a program, with a small library in it that lets postcopy guard the program's memory, where that is in"
        " files in memory (tmpfs, hugetlbfs, memfd). Nothing else of the program changes (docs/programs.md).",
        (
            (
                "A QEMU that can be moved:",
                "postcopy run -- qemu-system-x86_64 \\\n  -object memory-backend-file,id=ram0,size=1G,share=on,\\\n"
                "mem-path=/dev/shm/vm1 ...",
            ),
            ("The command of its twin, for the other host:", "postcopy run --twin 1234"),
            ("A program that waits for another one's memory:", "postcopy run --lazy -- ./arena /dev/shm/a 64"),
        ),
    ),
    "ctl": Command(
        "control a running daemon, source, destination or pager",
        "postcopy.cli.ctl",
        "Sends one request to a running process, through its control socket, and shows the answer."
        " `postcopy ctl REQUEST --help` describes a request.",
        (
            ("Show the machines of this user's daemon:", "postcopy ctl status"),
            ("Migrate its machine vm1 to another daemon:", "postcopy ctl migrate host-b:7777 --machine vm1"),
            ("Ask the process with another control socket:", "postcopy ctl --control ./a.sock status --json"),
        ),
    ),
    "demo": Command(
        "migrate a machine between two processes here, and verify it",
        "postcopy.testbed.demo",
        "Starts a source and a destination on this host, migrates a running machine between them, and verifies the"
        " machine afterwards.",
        (
            ("A machine with two virtual CPUs:", "postcopy demo --machine kvm --memory 256MiB --vcpus 2"),
            ("As any user, over a network that is cut:", "postcopy demo --machine rv64 --chaos cut --seed 7"),
        ),
    ),
    "tls": Command(
        "make and show the certificates that --tls needs",
        "postcopy.cli.tls",
        "Makes an authority, and certificates for hosts that it signs: what a site needs for --tls that has no"
        " authority of its own (docs/tls.md).",
        (
            ("An authority, once, at a safe place:", "postcopy tls new-ca ca"),
            (
                "What the host host-a needs, for 30 days:",
                "postcopy tls issue ca --host host-a --host 192.0.2.1 --out host-a.tls",
            ),
            ("For whom, until when, what is wrong:", "postcopy tls show host-a.tls"),
        ),
    ),
    "report": Command(
        "draw a report of migrations from their --json lines",
        "postcopy.cli.report",
        "Reads what `source`, `dest`, `daemon`, `pager`, `demo` or `bench migrate` has written with --json, of one side"
        " or of both, and writes a page with pictures: what happened, and where the time went. The page is one file"
        " that needs no network. Needs matplotlib: pip install 'postcopy[report]'.",
        (
            ("Both sides of a migration:", "postcopy report source.jsonl dest.jsonl --output migration.html"),
            ("A demonstration:", "postcopy demo --json | postcopy report -"),
            ("The latencies for the tools of HdrHistogram:", "postcopy report dest.jsonl --hdr faults.hlog"),
        ),
    ),
    "merge": Command(
        "join what both sides of a lost migration have salvaged",
        "postcopy.cli.merge",
        "Joins the directories that --salvage has written on both sides of a migration that was lost, and counts the"
        " pages that are in neither of them (in doubt); --verbose lists these. The exit status is 0 when no page is in"
        " doubt.",
        (
            ("Into a memory image:", "postcopy merge source.salvage dest.salvage --output memory.img"),
            ("Into a directory for `postcopy source --from`:", "postcopy merge source.salvage dest.salvage --into vm1"),
        ),
    ),
    "probe": Command(
        "show what this host allows, and what would help",
        "postcopy.testbed.probe",
        "Tries what postcopy needs of this host, its kernel and this user. For what is missing it says how to get it.",
        (
            ("Everything:", "postcopy probe"),
            ("In a script, for two things only:", "postcopy probe --require kvm,uffd"),
        ),
    ),
    "chaos": Command(
        "run a TCP proxy that is a bad network",
        "postcopy.testbed.chaos.command",
        "Carries TCP connections, and delays, slows down and cuts them as PLAN says (docs/chaos.md).",
        (
            (
                "Cut all connections to port 7777 twice a second:",
                "postcopy chaos cut:every=500ms --listen :7000 --to 127.0.0.1:7777",
            ),
        ),
    ),
    "lab": Command(
        "make hosts with a network between them on this machine",
        "postcopy.testbed.lab.command",
        "Makes hosts on this machine, joined by a switch and cables, which can be cut and slowed down, and otherwise"
        " isolated from each other (docs/lab.md).",
        (
            ("Two hosts, h1 and h2:", "postcopy lab up"),
            ("A command in one of them:", "postcopy lab exec h1 -- ip address"),
            ("Cut its cable, and end it all:", "postcopy lab link h2 cut && postcopy lab down"),
        ),
    ),
    "faultpaths": Command(
        "test which kernel paths wait for a missing page",
        "postcopy.testbed.faultpaths.command",
        "Touches a missing page in every way that the kernel has, and says which of these ways wait until the page is"
        " there (docs/faultpaths.md).",
        (
            ("A choice of all, in three minutes at most:", "postcopy faultpaths"),
            ("Some, with the page on another host:", "postcopy faultpaths --remote --only pin,futex"),
        ),
    ),
    "conformance": Command(
        "test a userfaultfd handler for Firecracker",
        "postcopy.testbed.conformance.command",
        "Does to a handler what a restored Firecracker does, and all that has gone wrong in one somewhere, and says"
        " what the handler made of it (docs/conformance.md).",
        (
            ("Make an image of memory, of 128 MiB:", "postcopy conformance --image mem.img --make-image"),
            (
                "Test a handler that is started for each case:",
                "postcopy conformance --image mem.img \\\n  --handler-cmd 'my-handler {socket} {image}'",
            ),
            ("One that runs already:", "postcopy conformance --image mem.img --handler-socket /run/h.sock"),
        ),
    ),
    "bench": Command(
        "measure how fast postcopy is, against what this host can do",
        "postcopy.testbed.bench",
        "Measures the figures of docs/performance.md. Most are ratios to the best that is possible on this host, which"
        " the same run measures; the others have fixed targets.",
        (
            ("Two of them:", "postcopy bench fault bulk"),
            (
                "What has changed between two runs, as a check:",
                "postcopy bench quick --output a.jsonl\n"
                "postcopy bench quick --output b.jsonl\n"
                "postcopy bench compare a.jsonl b.jsonl --fail-above 10",
            ),
        ),
    ),
    "schema": Command(
        "print the schema of all JSON output",
        "postcopy.cli.schema",
        "Prints the schema of what postcopy writes as JSON: the lines of --json and --log-json, the answers and events"
        " of the control socket. JSON Schema 2020-12, with units.",
        (
            ("Into a file:", "postcopy schema > postcopy.schema.json"),
            ("As a page for people:", "postcopy schema --markdown > schema.md"),
        ),
    ),
    "completion": Command(
        "print a completion script for bash, zsh or fish",
        "postcopy.cli.completion",
        "Prints a script that makes a shell complete the commands, options and values of postcopy.",
        (
            ("bash, for this session:", "source <(postcopy completion bash)"),
            ("zsh, into a directory of $fpath:", "postcopy completion zsh > ~/.zfunc/_postcopy"),
            ("fish:", "postcopy completion fish > ~/.config/fish/completions/postcopy.fish"),
        ),
    ),
    "man": Command(
        "write the manual pages to a directory",
        "postcopy.cli.man",
        "Writes postcopy(1) and a page for each command, as --help has it. An installation has them already.",
        (("Read one of them:", "postcopy man /tmp && man /tmp/postcopy-ctl.1"),),
    ),
}
