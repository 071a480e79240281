# SPDX-License-Identifier: Apache-2.0
"""The `postcopy` command: exit status, errors, signals.

Exit status: 0 when what was asked has happened, 1 when it has not, 2 when it was asked in a way that makes no sense. An
error meant for a person is one line on stderr, ``postcopy: error: ...``; a traceback is a mistake in this package.

Ctrl-C and SIGTERM mean: end in order, now. Where a command runs until it is interrupted (a destination without
``--run-for``, a source that serves forever), that is how it succeeds. What is lost when it ends now, and cannot be had
again, is seen through first, unless the signal comes again (`postcopy._stop`). A closed terminal (SIGHUP) ends what
keeps no machines; the others go on without it, and with ``--peer-file`` and ``--tls`` read those again.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import trio

from postcopy._host import run_record
from postcopy._stop import Stop, heard
from postcopy.cli._parser import load, make_parser, values, written
from postcopy.errors import ConfigurationError, PostcopyError, known_error, shortage
from postcopy.net import LOCAL, Protection, Route, read_peer_file
from postcopy.output import LogHandler, Output, make_output
from postcopy.service.options import COMMANDS, LOG_LEVEL
from postcopy.wire import one_line

log = logging.getLogger(__name__)

EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """The console script: the exit status."""
    _keep_standard_descriptors()
    output = make_output()
    status = EXIT_FAILED
    handlers = {number: signal.getsignal(number) for number in heard(signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        with output.standard_streams():  # every word of every command, its help too
            status = _command(sys.argv[1:] if argv is None else argv, output)
    except (KeyboardInterrupt, BrokenPipeError):  # before the signal receiver; the reader of the answer has gone
        pass
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else EXIT_OK
    except PostcopyError as error:
        status = _failed(error, output)
    except Exception as error:  # noqa: BLE001 -- the end of everything
        want = shortage(error)
        if want is not None:
            status = _failed(want, output)
        else:
            # A mistake in this package. It goes through the output: the interpreter's own message would wait for a
            # reader.
            output.say(traceback.format_exc().rstrip())
    finally:
        if output.has_answered:  # its reader is waited for, however long it takes: that must have an end
            for number in {signal.SIGINT, signal.SIGTERM} & handlers.keys():
                signal.signal(number, signal.default_int_handler)
        try:
            complete = output.close()
        except KeyboardInterrupt:
            complete = False
        if not complete and status == EXIT_OK:
            status = EXIT_FAILED
        if argv is not None:  # this process goes on
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return status


_MOVES = frozenset({"source", "dest", "daemon", "demo"})
"""Whose `--json` begins with what runs where (`run`); a pager says it when it begins to serve."""


def _command(arguments: Sequence[str], output: Output) -> int:
    args = make_parser(arguments).parse_args(arguments)
    module = load(args.command)
    if hasattr(module, "run"):
        status: int = module.run(args)
        return status
    given = values(args)
    output.configure(given.get("json", False), given.get("log_json", False))
    output.reports = "report" in given
    return _run(module.make, given, output, getattr(module, "KEEPS_MACHINES", False))


def _run(
    make: Callable[..., Callable[[Stop], Awaitable[bool]]], given: dict[str, Any], output: Output, keeps: bool
) -> int:
    """A command whose words all go through `output`. `keeps`: what it has is lost with it."""
    try:
        level = given.get("log_level", LOG_LEVEL).upper()
        logging.basicConfig(level=level, handlers=[LogHandler(output)], force=True)
        logging.captureWarnings(True)
        hostname, protection = given.get("tls_hostname"), LOCAL
        if given.get("command") in COMMANDS:
            protection = Protection.of(
                given.get("tls"), hostname, given.get("tls_authz", ()), given.get("insecure", False)
            )
            given["protection"] = protection
        route: Route | None = None  # that may lead elsewhere after SIGHUP
        if "connect" in given:
            given["connect"] = Route(given["connect"], tls_hostname=hostname)
        if "peer_file" in given:
            path = given["peer_file"]
            route = given["connect"] = Route(read_peer_file(path), lambda: read_peer_file(path), hostname)
        run = make(given, output)
        if "report" in given:
            from postcopy.report import Reporter

            # (a pager may go on with virtual machines that another process has served)
            run = Reporter(given["report"], output).around(run, patient=given["command"] == "pager")
        if output.records and given.get("command") in _MOVES:
            output.emit("run", run_record(given["command"], written(given)))
        if "user" in given:
            from postcopy.service.privileges import become, find_user

            become(find_user(given["user"]))
        with contextlib.suppress(AttributeError):  # glibc only
            ctypes.CDLL(None).malloc_trim(0)  # a megabyte that imports have used and freed
        output.start()
        try:
            done = trio.run(_with_signals, run, keeps, route, protection, strict_exception_groups=True)
        finally:
            # A signal that comes with the last one must not end the process while it writes its result.
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
        return EXIT_OK if done else EXIT_FAILED
    except BaseExceptionGroup as group:
        return _failed(known_error(group), output)


async def _with_signals(
    run: Callable[[Stop], Awaitable[bool]], keeps: bool, route: Route | None, protection: Protection
) -> bool:
    """Runs a command. Ctrl-C and SIGTERM ask it to end (`Stop`), SIGHUP too where it `keeps` nothing; else that makes
    the `route` look its address up again and the certificates be read again, and changes nothing where there is
    neither."""
    stop = Stop()
    done = ended = False
    early: list[int] = []  # those that come before they are received; one that comes afterwards changes nothing
    numbers = heard(signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        signal.signal(number, lambda number, _: early.append(number))
    numbers += _hangup(keeps)
    with trio.open_signal_receiver(*numbers) if numbers else contextlib.nullcontext() as signals:
        async with trio.open_nursery() as nursery:

            async def listen(signals: AsyncIterator[int]) -> None:
                nonlocal ended
                async for number in signals:
                    if number == signal.SIGHUP and keeps:
                        known = {"the peer's address": route, "the certificates": protection.credentials}
                        again = [what for what, there in known.items() if there is not None]
                        log.info("SIGHUP: reading %s again", " and ".join(again) or "nothing")
                        if route is not None:
                            route.refresh(by_user=True)
                        nursery.start_soon(protection.reload)
                    elif stop.ask(_told(number)):
                        ended = True
                        nursery.cancel_scope.cancel()

            if signals is not None:
                nursery.start_soon(listen, signals)
            if early:
                stop.ask(_told(early[0]))
            done = await run(stop)
            nursery.cancel_scope.cancel()
    if ended and not done:
        raise PostcopyError("ended at once, since it was asked to end again")
    return done


def _told(number: int) -> str:
    """A signal, as it is told to people."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def _hangup(keeps: bool) -> tuple[signal.Signals, ...]:
    """SIGHUP, unless it is ignored, as under nohup. From now on it does not end a command that `keeps` something, also
    before and after the signals are received."""
    if (found := heard(signal.SIGHUP)) and keeps:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    return found


def _failed(error: PostcopyError, output: Output) -> int:
    output.complain(one_line(str(error), 2000))
    return EXIT_USAGE if isinstance(error, ConfigurationError) else EXIT_FAILED


def _keep_standard_descriptors() -> None:
    """A process may be started with its standard descriptors closed. What it opens first would then get their numbers
    (a machine's memory, say), and code that writes errors to descriptor 2 would write into it."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            # The lowest number that is free; whatever cannot be read or written will do.
            os.open("/", os.O_RDONLY | os.O_DIRECTORY)
