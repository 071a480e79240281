# SPDX-License-Identifier: Apache-2.0
"""The `postcopy` command.

Exit status: 0 when what was asked has happened, 1 when it has not, 2 when it was asked in a way that makes no
sense. An error meant for a person is one line on stderr, ``postcopy: error: ...``; a traceback is a mistake in this
package.

Ctrl-C, SIGTERM and a closed terminal (SIGHUP) mean: end in order, now. Where a command runs until it is interrupted (a
destination without ``--run-for``, a source that serves for ever), that is how it succeeds. A second signal does not
wait for the order.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import os
import secrets
import signal
import sys
import traceback
from collections.abc import Awaitable, Callable, Sequence
from typing import NoReturn

import trio

from postcopy import __version__
from postcopy._files import explain_bad_name
from postcopy.errors import ConfigurationError, PostcopyError, known_error, want_of
from postcopy.machines.kinds import BACKINGS, KINDS, MachineOptions
from postcopy.machines.toy.kvm import WORKLOADS
from postcopy.migration._session import HEARTBEAT_S, MISSED_HEARTBEATS
from postcopy.migration.source import DEFAULT_BULK_CHANNELS, SourceOptions
from postcopy.net.channels import Route, parse_address, read_peer_file
from postcopy.output import LogHandler, Output, make_output
from postcopy.service.commands import DestinationCommand, MergeCommand, Origin, SourceCommand
from postcopy.units import parse_size
from postcopy.wire.protocol import MAX_BULK_CHANNELS, one_line

EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2


class _Parser(argparse.ArgumentParser):
    """One line instead of a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{one_line(message)} (see `{self.prog} --help`)")


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return value


def _whole(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit() and len(text) < 21 and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
        return int(text)

    return parse


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ConfigurationError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _mac(text: str) -> int:
    from postcopy.machines.toy.tap import parse_mac

    try:
        return parse_mac(text)
    except ConfigurationError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _ipv4(text: str) -> int:
    from postcopy.machines.toy.tap import parse_ipv4

    try:
        return parse_ipv4(text)
    except ConfigurationError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _net(text: str) -> str:
    """Checked only: the machine looks the name up when it is made."""
    from postcopy.machines.toy.tap import parse_net

    try:
        parse_net(text)
    except ConfigurationError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("--net ")) from error
    return text


def _bandwidth(text: str) -> int:
    value = _size(text.removesuffix("/s"))
    if not 0 < value < 1 << 63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a bandwidth; write for instance 100MiB/s")
    return value


def _path(text: str) -> str:
    """The name of a file or a directory; what else there is to say of it, its own command says."""
    if reason := explain_bad_name(text):
        raise argparse.ArgumentTypeError(reason)
    return text


def _control(text: str) -> str:
    """A path that a control socket can have."""
    from postcopy.service.server import check_control_path

    try:
        return check_control_path(text, "a control socket")
    except ConfigurationError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _serve(text: str) -> float:
    return math.inf if text == "forever" else _whole(1, 1_000_000)(text)


def _add_machine_arguments(
    parser: argparse.ArgumentParser, *, origin: bool = False, default: str = "kvm, or rv64 where kvm cannot be used"
) -> None:
    """`origin`: a machine is described, or comes from what is left of one."""
    group = parser.add_argument_group("the machine")
    where = group.add_mutually_exclusive_group(required=origin)
    note = "" if origin else f" (default: {default})"
    where.add_argument("--machine", choices=KINDS, help="what to migrate" + note)
    if origin:
        where.add_argument(
            "--from", type=_path, dest="origin", metavar="DIR",
            help="one whose migration was lost, out of its salvage, or of what `postcopy merge --into` has made",
        )  # fmt: skip
    group.add_argument("--memory", type=_size, metavar="SIZE", help="kvm, rv64: its memory, as 1GiB")
    group.add_argument("--vcpus", type=_whole(0, 1000), metavar="N", help="kvm, rv64: its virtual CPUs")
    group.add_argument("--workload", choices=tuple(WORKLOADS), help="kvm, rv64: what it computes")
    group.add_argument("--working-set", type=_size, metavar="SIZE", help="kvm, rv64: how much memory it uses")
    group.add_argument("--seed", type=_whole(0, 2**64 - 1), metavar="N", help="kvm, rv64: makes its pages reproducible")
    group.add_argument(
        "--disk", type=_path, metavar="FILE", help="workload disk: backing file, which both hosts must have"
    )
    group.add_argument("--image", type=_path, metavar="FILE", help="image: the file")
    group.add_argument("--net", type=_net, metavar="tap:NAME", help="workload echo: the TAP of its network device")
    group.add_argument("--net-mac", type=_mac, metavar="MAC", help="its MAC address (default: from the seed)")
    group.add_argument("--net-address", type=_ipv4, metavar="IPV4", help="its address (default: from the seed)")


def _add_engine_arguments(parser: argparse.ArgumentParser, *, source: bool, dest: bool) -> None:
    group = parser.add_argument_group("the engine")
    group.add_argument("--backing", choices=BACKINGS, default="memfd" if dest else None, help="what memory is made of")
    group.add_argument(
        "--busy-poll", type=_whole(0, 1_000_000), default=0, metavar="MICROSECONDS",
        help="spin so long before sleeping on an urgent channel",
    )  # fmt: skip
    if dest:
        group.add_argument(
            "--pager", choices=("thread", "process"), default="thread",
            help="where missing pages are fetched: in threads of the machine's process (default), or in a process of"
            " its own, which the machine survives",
        )  # fmt: skip
    if source:
        group.add_argument(
            "--bulk-channels", type=_whole(1, MAX_BULK_CHANNELS), default=DEFAULT_BULK_CHANNELS, metavar="N",
            help=f"connections of the background push (default {DEFAULT_BULK_CHANNELS})",
        )  # fmt: skip
        group.add_argument(
            "--max-bandwidth", type=_bandwidth, default=0, metavar="RATE",
            help="of the background push, as 100MiB/s; requested pages are never held up",
        )  # fmt: skip
        group.add_argument(
            "--release-ram", action="store_true",
            help="kvm, rv64: after the point of no return give memory back to this host as the destination acknowledges"
            " its pages",
        )  # fmt: skip


def _heartbeat(text: str) -> float:
    value = _seconds(text)
    if not 0.05 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a heartbeat from 0.05 to 3600 seconds")
    return value


def _patience(text: str) -> float:
    return math.inf if text == "forever" else _seconds(text)


def _add_network_arguments(parser: argparse.ArgumentParser, *, salvage: bool = True) -> None:
    group = parser.add_argument_group("when the network fails")
    group.add_argument(
        "--heartbeat", type=_heartbeat, default=HEARTBEAT_S, metavar="SECONDS",
        help=f"how often to give a sign of life; a peer silent for {MISSED_HEARTBEATS} times as long is lost"
        f" (default {HEARTBEAT_S:g})",
    )  # fmt: skip
    group.add_argument(
        "--recover-for", type=_patience, default=math.inf, metavar="SECONDS|forever",
        help="how long a peer that was lost after the point of no return is looked for (default forever)",
    )  # fmt: skip
    if salvage:
        group.add_argument(
            "--salvage", type=_path, metavar="DIR",
            help="when it ends and the other side is lost for good: write what is here into this new directory,"
            " for `postcopy merge`",
        )  # fmt: skip


def _add_control_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("operating it")
    group.add_argument(
        "--control",
        type=_control,
        metavar="PATH",
        help="a control socket for `postcopy ctl`, this user's and root's only",
    )
    group.add_argument(
        "--metrics", metavar="[HOST]:PORT",
        help="Prometheus metrics at http://HOST:PORT/metrics; without HOST on the loopback interface only",
    )  # fmt: skip
    group.add_argument(
        "--metrics-file",
        type=_path,
        metavar="FILE.prom",
        help="write the metrics there when a migration has ended",
    )


def _add_user_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--user", metavar="NAME[:GROUP]",
        help="as root: open the devices, then give up every right but those of this user, before anything is received",
    )  # fmt: skip


def _add_output_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="one JSON object a line on stdout, the result last")
    group.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="warning")
    group.add_argument(
        "--log-json", action="store_true", help="one JSON object a line on stderr, with the migration's id"
    )
    group.add_argument("-v", "--verbose", action="store_const", const="info", dest="log_level", help="--log-level info")


def _add_peer_arguments(parser: argparse.ArgumentParser, *, hold: bool = False) -> None:
    where = parser.add_mutually_exclusive_group(required=True)
    if hold:
        where.add_argument(
            "--hold",
            action="store_true",
            help="run the machine until `postcopy ctl` says where it is to go (--control)",
        )
    where.add_argument("--listen", metavar="HOST:PORT", help="wait for the other side here; port 0: any")
    where.add_argument("--connect", metavar="HOST:PORT", help="the other side listens there")
    where.add_argument(
        "--peer-file", type=_path, metavar="FILE",
        help="as --connect, with the HOST:PORT in a file, read again when the connection is lost and at SIGHUP",
    )  # fmt: skip


# The arguments of a command, and with them its modules, are made only when it is the one asked for: the two sides
# of a migration run for long, and what `bench` and the others need would cost each of them megabytes.


def _add_origin_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("with --from")
    group.add_argument(
        "--reclaim", action="store_true",
        help="DIR is of a source, and its destination is dead for good: go on from the switchover, without what the"
        " machine has done since. If that host lives, the machine then runs twice",
    )  # fmt: skip
    group.add_argument(
        "--force", action="store_true", help="also with pages that nobody has, which are then zeros, or a second time"
    )


def _source_arguments(parser: argparse.ArgumentParser) -> None:
    _add_machine_arguments(parser, origin=True)
    _add_origin_arguments(parser)
    _add_peer_arguments(parser, hold=True)
    _add_engine_arguments(parser, source=True, dest=False)
    _add_network_arguments(parser)
    parser.add_argument(
        "--migrate-after", type=_seconds, default=0.0, metavar="SECONDS",
        help="let the machine compute so long after it is ready (default 0)",
    )  # fmt: skip
    parser.add_argument(
        "--serve", type=_serve, default=1, metavar="N|forever",
        help="image with --listen: how many destinations to serve, also at the same time (default 1)",
    )  # fmt: skip
    parser.add_argument(
        "--on-failure", choices=("keep", "exit"), default="keep",
        help="when a migration under way fails and the machine is still here: keep running it (default), or end",
    )  # fmt: skip
    _add_user_argument(parser)
    _add_control_arguments(parser)
    _add_output_arguments(parser)


def _dest_arguments(parser: argparse.ArgumentParser) -> None:
    _add_peer_arguments(parser)
    _add_engine_arguments(parser, source=False, dest=True)
    _add_network_arguments(parser)
    parser.add_argument(
        "--on-lost", choices=("hold", "kill"), default="hold",
        help="when the source is given up (--recover-for, or it knows nothing of us) and pages are missing: keep the"
        " machine, blocked where it needs them (default), or end it",
    )  # fmt: skip
    parser.add_argument(
        "--disk",
        type=_path,
        metavar="FILE",
        help="where the machine's disk is on this host, if not as on the source",
    )
    parser.add_argument(
        "--net", type=_net, metavar="tap:NAME", help="where the machine's network device is attached on this host"
    )
    _add_after_arguments(parser, run_for=None)
    _add_user_argument(parser)
    _add_control_arguments(parser)
    _add_output_arguments(parser)


def _daemon_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--listen", metavar="HOST:PORT", help="take machines that come here; port 0: any")
    _add_machine_arguments(parser, default="none to begin with")
    parser.add_argument("--name", metavar="NAME", help="of the machine that it begins with")
    _add_engine_arguments(parser, source=True, dest=True)
    _add_network_arguments(parser, salvage=False)
    _add_user_argument(parser)
    _add_control_arguments(parser)
    _add_output_arguments(parser)


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    from postcopy.testbed.chaos import KINDS as CHAOS_KINDS

    _add_machine_arguments(parser)
    _add_engine_arguments(parser, source=True, dest=True)
    parser.add_argument("--migrate-after", type=_seconds, default=1.0, metavar="SECONDS")
    _add_after_arguments(parser, run_for=2.0)
    parser.add_argument(
        "--chaos", metavar="PLAN",
        help=f"a bad network between the two: {', '.join(CHAOS_KINDS)}; or more exactly, as cut:every=0.1..0.5,down=0.2"
        " (docs/chaos.md); --seed repeats it",
    )  # fmt: skip
    parser.add_argument(
        "--lab", action="store_true",
        help="each side in a host of a laboratory of its own (docs/lab.md); the cable between them is cut in the middle"
        " of postcopy, and healed",
    )  # fmt: skip
    parser.add_argument(
        "--deadline", type=_seconds, default=300.0, metavar="SECONDS", help="give up after so long (default 300)"
    )
    _add_output_arguments(parser)


def _chaos_arguments(parser: argparse.ArgumentParser) -> None:
    from postcopy.testbed.chaos import KINDS as CHAOS_KINDS

    kinds = ", ".join(CHAOS_KINDS)
    parser.add_argument("plan", metavar="PLAN", nargs="?", default="cut", help=f"{kinds} (default cut)")
    parser.add_argument("--listen", metavar="HOST:PORT", required=True, help="where the one side connects; port 0: any")
    parser.add_argument("--to", metavar="HOST:PORT", required=True, help="where the other side listens")
    parser.add_argument(
        "--seed", type=_whole(0, 2**64 - 1), metavar="N", help="repeats what was drawn (default: random)"
    )
    _add_output_arguments(parser)


def _merge_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "salvages",
        nargs="+",
        type=_path,
        metavar="DIR",
        help="written by --salvage: of the source, the destination, or both",
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--output", type=_path, metavar="FILE", help="the image, sparse: one RAM block after the other")
    where.add_argument(
        "--into", type=_path, metavar="DIR",
        help="a new directory, with all that is there of the machine, for `postcopy source --from`",
    )  # fmt: skip
    _add_output_arguments(parser)


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    from postcopy.testbed.bench import add_arguments

    add_arguments(parser)


def _ctl_arguments(parser: argparse.ArgumentParser) -> None:
    from postcopy.cli.ctl_arguments import add_ctl_arguments

    add_ctl_arguments(parser)


def _probe_arguments(parser: argparse.ArgumentParser) -> None:
    from postcopy.testbed.probe import add_arguments

    add_arguments(parser)


def _lab_arguments(parser: argparse.ArgumentParser) -> None:
    from postcopy.testbed.lab.command import add_arguments

    add_arguments(parser)


def _faultpaths_arguments(parser: argparse.ArgumentParser) -> None:
    from postcopy.testbed.faultpaths import add_arguments

    add_arguments(parser)


_COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "source": ("run a machine, or hold an image, and migrate it away", _source_arguments),
    "dest": ("receive what a source offers", _dest_arguments),
    "daemon": ("own machines, send them away when told to, take those that come", _daemon_arguments),
    "demo": ("both sides on this host, verified", _demo_arguments),
    "merge": ("join what both sides of a lost migration have salvaged into an image", _merge_arguments),
    "ctl": ("ask or tell a running process with --control", _ctl_arguments),
    "probe": ("what this host allows, and what would help", _probe_arguments),
    "faultpaths": ("which kernel paths wait for a missing page here, and which do not", _faultpaths_arguments),
    "bench": ("measure, each figure against its floor in the same run", _bench_arguments),
    "lab": ("hosts with cables and a switch between them, on this machine", _lab_arguments),
    "chaos": ("a bad network between two programs, to try them with", _chaos_arguments),
}


def make_parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser for these arguments: of the commands that they do not name it knows the names only."""
    parser = _Parser(
        prog="postcopy",
        description="Moves the memory of a running machine after the machine has moved.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"postcopy {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    asked = next((argument for argument in arguments if not argument.startswith("-")), None)
    for name, (text, add_arguments) in _COMMANDS.items():
        command = commands.add_parser(name, help=text, allow_abbrev=False)
        if name == asked:
            add_arguments(command)
    return parser


def _add_after_arguments(parser: argparse.ArgumentParser, run_for: float | None) -> None:
    parser.add_argument(
        "--run-for", type=_seconds, default=run_for, metavar="SECONDS",
        help="a live machine runs so long here, and until its last page has come, and is then paused and ended"
        + (" (default: until interrupted)" if run_for is None else f" (default {run_for:g})"),
    )  # fmt: skip
    parser.add_argument(
        "--dump",
        type=_path,
        metavar="FILE",
        help="write the memory there at the end, sparse where it is zero",
    )
    parser.add_argument(
        "--verify", action=argparse.BooleanOptionalAction, default=True,
        help="check all memory at the end, by what is known of the machine (default: yes)",
    )  # fmt: skip


def machine_options(args: argparse.Namespace) -> MachineOptions:
    return MachineOptions(
        memory_bytes=args.memory,
        vcpus=args.vcpus,
        workload=args.workload,
        backing=args.backing if args.machine != "image" else None,
        working_set_bytes=args.working_set,
        seed=args.seed,
        disk=args.disk,
        image=args.image,
        net=args.net,
        net_mac=args.net_mac,
        net_address=args.net_address,
    )


def _source_options(args: argparse.Namespace) -> SourceOptions:
    return SourceOptions(
        bulk_channels=args.bulk_channels,
        busy_poll_us=args.busy_poll,
        max_bandwidth_bytes_per_s=args.max_bandwidth,
        heartbeat_s=args.heartbeat,
        recover_for_s=args.recover_for,
        release_ram=args.release_ram,
    )


def _route(args: argparse.Namespace) -> Route | None:
    """Where the other side listens, for a side that connects."""
    if getattr(args, "peer_file", None) is not None:
        path: str = args.peer_file
        return Route(read_peer_file(path), lambda: read_peer_file(path))
    return Route(parse_address(args.connect)) if getattr(args, "connect", None) is not None else None


def _make_command(
    args: argparse.Namespace, output: Output, connect: Route | None
) -> Callable[[trio.Event], Awaitable[bool]]:
    if args.command == "demo":
        from postcopy.testbed.demo import DemoCommand

        return DemoCommand(args, output).run
    if args.command == "ctl":
        from postcopy.cli.ctl import CtlCommand

        return CtlCommand(args, output).run
    if args.command == "merge":
        return MergeCommand(args.salvages, args.output, args.into, output).run
    if args.command == "chaos":
        from postcopy.testbed.chaos import ChaosPlan
        from postcopy.testbed.chaos.command import ChaosCommand

        seed = args.seed if args.seed is not None else secrets.randbits(32)
        return ChaosCommand(
            ChaosPlan.parse(args.plan, seed),
            output,
            listen=parse_address(args.listen, listening=True),
            target=parse_address(args.to),
        ).run
    listen = parse_address(args.listen, listening=True) if args.listen is not None else None
    if args.command == "source":
        _check_origin(args)
    if args.command == "daemon" or (args.command == "source" and args.hold):
        from postcopy.cli.operated import make_daemon

        options = machine_options(args) if args.machine is not None else None
        return make_daemon(args, output, _source_options(args), options, listen)
    if args.command == "source":
        if args.serve != 1 and (args.machine != "image" or listen is None):
            raise ConfigurationError("--serve goes with --machine image and --listen only")
        source = SourceCommand(
            args.machine or "",
            machine_options(args),
            _source_options(args),
            output,
            origin=Origin(args.origin, args.reclaim, args.force) if args.origin is not None else None,
            listen=listen,
            connect=connect,
            migrate_after_s=args.migrate_after,
            serve=args.serve,
            keep=args.on_failure == "keep",
            salvage_to=args.salvage,
        )
        return _operated(source, args, output)
    dest = DestinationCommand(
        output,
        listen=listen,
        connect=connect,
        backing=args.backing,
        disk=args.disk,
        net=args.net,
        busy_poll_us=args.busy_poll,
        pager_process=args.pager == "process",
        heartbeat_s=args.heartbeat,
        recover_for_s=args.recover_for,
        kill_when_lost=args.on_lost == "kill",
        run_for_s=args.run_for,
        dump=args.dump,
        verify=args.verify,
        salvage_to=args.salvage,
    )
    return _operated(dest, args, output)


def _check_origin(args: argparse.Namespace) -> None:
    """A machine is described by --machine and its options, or by what is left of it."""
    if args.origin is None:
        if args.reclaim or args.force:
            raise ConfigurationError("--reclaim and --force go with --from")
        return
    if args.hold:
        raise ConfigurationError("--from does not go with --hold: say --listen or --connect")
    described = ("memory", "vcpus", "workload", "working_set", "seed", "image", "net_mac", "net_address")
    for name in described:
        if getattr(args, name) is not None:
            raise ConfigurationError(f"--{name.replace('_', '-')} does not go with --from: the machine is what it was")


def _operated(
    command: SourceCommand | DestinationCommand, args: argparse.Namespace, output: Output
) -> Callable[[trio.Event], Awaitable[bool]]:
    """The command with all that around it by which it is operated, where that was asked for."""
    asked = (args.control, args.metrics, args.metrics_file)
    if all(one is None for one in asked) and not os.environ.get("NOTIFY_SOCKET"):
        return command.run
    from postcopy.cli.operated import operated

    return operated(command, args, output)


async def _with_signals(command: Callable[[trio.Event], Awaitable[bool]], route: Route | None) -> bool:
    """Runs a command; the first signal asks it to end, the second one ends it. SIGHUP asks the `route` to look up where
    it leads; without one the terminal has been closed, which is the first signal, and never the second: shell and
    kernel may both say it."""
    stop = trio.Event()
    done = False
    # (under nohup it is ignored, and stays so)
    hangup = (signal.SIGHUP,) if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN else ()
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, *hangup) as signals:
        async with trio.open_nursery() as nursery:

            async def listen() -> None:
                async for number in signals:
                    if number == signal.SIGHUP and route is not None:
                        route.refresh(told=True)
                        continue
                    logging.getLogger(__name__).info("%s: ending in order", signal.Signals(number).name)
                    if stop.is_set() and number != signal.SIGHUP:
                        nursery.cancel_scope.cancel()
                    stop.set()

            nursery.start_soon(listen)
            done = await command(stop)
            nursery.cancel_scope.cancel()
    return done


def main(argv: Sequence[str] | None = None) -> int:
    """The console script: the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    _keep_standard_descriptors()
    output = make_output(False)
    try:
        args = make_parser(arguments).parse_args(arguments)
        run = _RUN_BY_THEMSELVES.get(args.command)
        if run is not None:
            return run(args)
        output = make_output(args.json, getattr(args, "log_json", False))
        with output.standard_streams():
            return _run(args, output)
    except KeyboardInterrupt:  # before or after the signal receiver
        return EXIT_FAILED
    except PostcopyError as error:
        return _failed(error, output)
    except Exception as error:  # noqa: BLE001 -- the end of everything
        want = want_of(error)
        if want is not None:
            return _failed(want, output)
        # A mistake in this package. Said like all else: the interpreter's own last words would wait for their reader.
        output.say(traceback.format_exc().rstrip())
        return EXIT_FAILED
    finally:
        with contextlib.suppress(KeyboardInterrupt):  # whoever is tired of waiting for a reader
            output.close()


def _run(args: argparse.Namespace, output: Output) -> int:
    """A command whose words all go through `output`."""
    try:
        logging.basicConfig(level=args.log_level.upper(), handlers=[LogHandler(output)], force=True)
        logging.captureWarnings(True)
        route = _route(args)
        command = _make_command(args, output, route)
        hears_hangup = route if args.command in ("source", "dest") and args.peer_file is not None else None
        if getattr(args, "user", None) is not None:
            from postcopy.service.privileges import become, find_user

            become(find_user(args.user))
        output.start()
        done = trio.run(_with_signals, command, hears_hangup, strict_exception_groups=True)
        return EXIT_OK if done else EXIT_FAILED
    except BaseExceptionGroup as group:
        return _failed(known_error(group), output)


def _failed(error: PostcopyError, output: Output) -> int:
    output.complain(one_line(str(error), 2000))
    return EXIT_USAGE if isinstance(error, ConfigurationError) else EXIT_FAILED


def _keep_standard_descriptors() -> None:
    """A process may be started with its standard descriptors closed. What it opened first would get their numbers (a
    machine's memory, say), and whoever believes that 2 is where errors go would write into it."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            # The lowest number that is free; whatever cannot be read or written will do.
            os.open("/", os.O_RDONLY | os.O_DIRECTORY)


def _run_bench(args: argparse.Namespace) -> int:
    from postcopy.testbed.bench import run

    return run(args)


def _run_probe(args: argparse.Namespace) -> int:
    from postcopy.testbed.probe import run

    return run(args)


def _run_lab(args: argparse.Namespace) -> int:
    from postcopy.testbed.lab.command import run

    return run(args)


def _run_faultpaths(args: argparse.Namespace) -> int:
    from postcopy.testbed.faultpaths import run

    return run(args)


_RUN_BY_THEMSELVES: dict[str, Callable[[argparse.Namespace], int]] = {
    "bench": _run_bench,
    "probe": _run_probe,
    "lab": _run_lab,
    "faultpaths": _run_faultpaths,
}
