# SPDX-License-Identifier: Apache-2.0
"""`postcopy conformance`: choose cases, run them, say how each ended."""

from __future__ import annotations

import argparse
import fnmatch
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import trio
from rich.console import Console
from rich.status import Status

from postcopy.errors import ConfigurationError
from postcopy.testbed import _processes
from postcopy.testbed._report import Section, Span, emit_json, make_console, print_section, row
from postcopy.testbed.conformance._cases import CASES
from postcopy.testbed.conformance._handler import Handler, HandlerCommands
from postcopy.testbed.conformance._image import MIN_BYTES, Image, make_image
from postcopy.testbed.conformance._kit import Gone, Kit, Settings, make_directory
from postcopy.testbed.conformance._model import Case, Failed, NotApplicable, Outcome, Result
from postcopy.units import argument, did_you_mean, parse_seconds, parse_size

if TYPE_CHECKING:
    from collections.abc import Iterator

IMAGE_BYTES = 128 << 20
JOBS = 8
SOCKET_PATH_BYTES = 107
_KINDS = {Outcome.PASS: "good", Outcome.FAIL: "bad", Outcome.NOT_APPLICABLE: "muted"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `postcopy conformance`."""
    seconds = argument(parse_seconds, 0.1, 3600)
    parser.add_argument("--image", default=None, metavar="FILE", help="the memory that the handler serves")
    parser.add_argument(
        "--handler-socket", default=None, metavar="PATH", help="where a handler listens that runs already"
    )
    parser.add_argument(
        "--handler-cmd", default=None, metavar="COMMAND",
        help="starts a handler; {socket} in it is where it has to listen, {image} the image, {dir} an empty directory",
    )  # fmt: skip
    parser.add_argument(
        "--shared", action="store_true",
        help="one handler for all cases that do not need their own (default: one for each, which costs its start)",
    )  # fmt: skip
    parser.add_argument(
        "--takes-over", action="store_true",
        help="after SIGKILL the handler goes on with its clients: by itself, or when --handler-cmd is started again",
    )  # fmt: skip
    parser.add_argument(
        "--handler-kill-cmd", default=None, metavar="COMMAND",
        help="how to kill it, {pid} is the process of --handler-cmd (default: SIGKILL to that)",
    )  # fmt: skip
    parser.add_argument(
        "--handler-restart-cmd",
        default=None,
        metavar="COMMAND",
        help="starts the successor, where that is another command",
    )
    parser.add_argument("--cases", default="", metavar="PATTERN,...", help="as 18-removed, '2*' or 4 (default: all)")
    parser.add_argument("--list", action="store_true", help="the cases, without running any")
    parser.add_argument(
        "--make-image", nargs="?", const=IMAGE_BYTES, default=None, metavar="SIZE",
        type=argument(parse_size, MIN_BYTES, 1 << 40),
        help="write an image to --image first, which must not be there (default size: 128MiB)",
    )  # fmt: skip
    parser.add_argument(
        "--deadline",
        type=seconds,
        default=5.0,
        metavar="SECONDS",
        help="in which the handler has to do what it has to do",
    )
    parser.add_argument(
        "--slow", type=seconds, default=5.0, metavar="SECONDS", help="that a slow source takes for a page"
    )
    parser.add_argument("--idle", type=seconds, default=6.0, metavar="SECONDS", help="that nothing happens in 37-idle")
    parser.add_argument(
        "--silent",
        type=seconds,
        default=15.0,
        metavar="SECONDS",
        help="in which a client without a whole message is sent away",
    )
    parser.add_argument(
        "--jail-uid",
        type=int,
        default=None,
        metavar="UID",
        help="which --handler-cmd admits, for 42-jailed (default: 65534)",
    )
    parser.add_argument("--jobs", type=int, default=JOBS, metavar="N", help="cases at a time")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> int:
    """0 when cases have passed and none has failed, 1 otherwise. `ConfigurationError` for what was asked wrongly."""
    cases = chosen(args.cases)
    if args.list:
        if args.json:
            emit_json({"cases": [{"case": case.name, "what": case.what, "right": case.right} for case in cases]})
        else:
            rows = tuple(row(Span(case.name, "strong"), case.what, case.right) for case in cases)
            print_section(make_console(sys.stdout), Section("", ("case", "set-up", "right"), rows))
        return 0
    if args.image is None:
        raise ConfigurationError("--image FILE: the memory that the handler serves (--make-image writes one)")
    if args.make_image is not None:
        if args.make_image % (2 << 20):
            raise ConfigurationError("--make-image: a multiple of 2 MiB")
        make_image(args.image, args.make_image)
        if args.handler_cmd is None and args.handler_socket is None:
            return 0
    if (args.handler_cmd is None) == (args.handler_socket is None):
        raise ConfigurationError("--handler-socket PATH or --handler-cmd COMMAND: what is to be tested")
    if args.jobs < 1:
        raise ConfigurationError("--jobs: at least 1")
    settings = settings_of(args)
    with _progress(len(cases)) as progress:
        results = _processes.run(run_cases, settings, cases, args.jobs, args.shared, progress)
    report(results, settings, as_json=args.json)
    outcomes = {result.outcome for result in results}
    return 0 if Outcome.PASS in outcomes and Outcome.FAIL not in outcomes else 1


def chosen(text: str) -> list[Case]:
    """By name, pattern or number; all where there is none."""
    words = text.replace(",", " ").split()
    cases = []
    for word in words:
        number = f"{int(word):02d}-*" if word.isdigit() else word
        matched = [case for case in CASES if fnmatch.fnmatchcase(case.name, number)]
        if not matched:
            raise ConfigurationError(
                f"--cases: there is no {word!r}{did_you_mean(word, [case.name for case in CASES])}; --list shows all"
            )
        cases += [case for case in matched if case not in cases]
    return cases if words else list(CASES)


def settings_of(args: argparse.Namespace) -> Settings:
    commands = None
    if args.handler_cmd is not None:
        for name in ("handler_cmd", "handler_kill_cmd", "handler_restart_cmd"):
            text = getattr(args, name)
            try:
                empty = text is not None and not shlex.split(text)
            except ValueError as error:
                raise ConfigurationError(f"--{name.replace('_', '-')}: {text!r}: {error}") from None
            if empty:
                raise ConfigurationError(f"--{name.replace('_', '-')}: an empty command")
        if "{socket}" not in args.handler_cmd:
            raise ConfigurationError("--handler-cmd: without {socket} nobody knows where it listens")
        commands = HandlerCommands(args.handler_cmd, args.handler_restart_cmd, args.handler_kill_cmd, args.takes_over)
    if args.handler_socket is not None and len(os.fsencode(os.path.abspath(args.handler_socket))) > SOCKET_PATH_BYTES:
        raise ConfigurationError(f"--handler-socket: a path of more than {SOCKET_PATH_BYTES} bytes is no address")
    return Settings(
        image=Image(os.path.abspath(args.image)),
        commands=commands,
        socket=os.path.abspath(args.handler_socket) if args.handler_socket is not None else None,
        deadline_s=args.deadline,
        slow_s=args.slow,
        idle_s=args.idle,
        silent_s=args.silent,
        jail_uid=args.jail_uid,
    )


Progress = Callable[[Case], None]


@contextmanager
def _progress(total: int) -> Iterator[Progress]:
    """A line on the terminal, where there is one, that says which case has begun."""
    if not sys.stderr.isatty():
        yield lambda case: None
        return
    with Status("starting", console=Console(stderr=True)) as status:
        yield lambda case: status.update(f"{case.name}, of {total}: {case.what}")


async def run_cases(
    settings: Settings, cases: Sequence[Case], jobs: int, shared: bool, progress: Progress
) -> list[Result]:
    """In the order of `cases`. Those that wait longest begin first."""
    results: dict[str, Result] = {}
    limiter = trio.CapacityLimiter(jobs)
    with tempfile.TemporaryDirectory(prefix="pcc-") as directory:  # short: a socket's path has 107 bytes
        os.chmod(directory, 0o755)  # clients of other users have to get as far as the socket
        common = Handler(settings.commands, directory, settings.image.path, settings.socket)

        async def one(number: int, case: Case, task_status: trio.TaskStatus[None]) -> None:
            async with limiter:
                task_status.started()
                progress(case)
                own = os.path.join(directory, str(number))
                make_directory(own)
                results[case.name] = await run_case(settings, case, own, common if shared or settings.socket else None)

        try:
            if shared:
                common.start()
            async with trio.open_nursery() as nursery:
                for number, case in sorted(enumerate(cases), key=lambda pair: pair[1].name not in _LONG):
                    await nursery.start(one, number, case)
        finally:
            await common.end()
    return [results[case.name] for case in cases]


_LONG = ("05-silent", "05-drips", "37-idle", "32-slow", "30-takeover", "30-frozen", "33-lost", "34-truncated")


async def run_case(settings: Settings, case: Case, directory: str, common: Handler | None) -> Result:
    """With the common handler, or with one of its own."""
    began_s = trio.current_time()
    outcome, text = Outcome.FAIL, f"no end within {settings.case_s:g} s"
    handler = common if common is not None else Handler(settings.commands, directory, settings.image.path)
    kit = Kit(settings, handler, directory)
    try:
        with trio.move_on_after(settings.case_s):
            if common is None and "command" not in case.needs:  # which start their own
                handler.start()
            try:
                text = await case.run(kit) or ""
                outcome = Outcome.PASS
            except* Failed as group:
                outcome, text = Outcome.FAIL, _first(group)
            except* NotApplicable as group:
                outcome, text = Outcome.NOT_APPLICABLE, _first(group)
            except* Gone:
                outcome, text = Outcome.FAIL, "the client was killed"
            except* OSError as group:
                outcome, text = Outcome.FAIL, f"the client got an error: {_first(group)}"
        seen = kit.seen_handler
        if outcome is Outcome.FAIL:
            text += "".join(
                f"; {more}" for more in (seen.death, seen.last_words and f"it said: {seen.last_words}") if more
            )
        elif outcome is Outcome.PASS and common is not None and common.death:
            outcome, text = Outcome.FAIL, common.death
    finally:
        if common is None:
            await handler.end()
    return Result(case, outcome, text, trio.current_time() - began_s)


def _first(group: BaseException) -> str:
    while isinstance(group, BaseExceptionGroup):
        group = group.exceptions[0]
    return str(group)


def report(results: Sequence[Result], settings: Settings, *, as_json: bool) -> None:
    counts = {outcome: sum(result.outcome is outcome for result in results) for outcome in Outcome}
    if as_json:
        answer: dict[str, Any] = {
            "image-bytes": settings.image.bytes,
            "passed": counts[Outcome.PASS],
            "failed": counts[Outcome.FAIL],
            "not-applicable": counts[Outcome.NOT_APPLICABLE],
            "cases": [result.as_json() for result in results],
        }
        emit_json(answer)
        return
    console = make_console(sys.stdout)
    rows = tuple(
        row(
            Span(result.case.name, "strong"),
            Span(str(result.outcome).replace("-", " "), _KINDS[result.outcome]),
            f"{result.seconds:.2f} s",
            result.case.what,
            Span(result.text, "bad" if result.outcome is Outcome.FAIL else "muted"),
        )
        for result in results
    )
    print_section(console, Section("", ("case", "", "took", "set-up", "what was seen"), rows))
    console.print()
    console.print(
        f"{counts[Outcome.PASS]} passed, {counts[Outcome.FAIL]} failed, {counts[Outcome.NOT_APPLICABLE]} not applicable"
    )
