# SPDX-License-Identifier: Apache-2.0
"""All cases. The first number is that of docs/conformance.md, where each has its set-up, what is right, and what was
seen wrong."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

import trio

from postcopy.testbed.conformance import _client as c
from postcopy.testbed.conformance._client import HUGE_BYTES, Client, Gone, Pending, any_of
from postcopy.testbed.conformance._kit import IMAGE, OWN, ZERO, Kit
from postcopy.testbed.conformance._model import Case, Failed, Json, NotApplicable
from postcopy.testbed.conformance._slow import SlowImage

CASES: list[Case] = []
STRANGER_UID = 65533
JAILED_UID = 65534
HUGE_PAGES = HUGE_BYTES // 4096
OTHER_FDS = 12
"""Sockets that a handler may open meanwhile, as for another process that it starts."""
Run = Callable[[Kit], Awaitable[str | None]]


def case(name: str, what: str, right: str, *needs: str) -> Callable[[Run], Run]:
    def add(run: Run) -> Run:
        CASES.append(Case(name, what, right, run, frozenset(needs)))
        return run

    return add


def need_root() -> None:
    if os.geteuid():
        raise NotApplicable("needs root")


def unwanted(data: str) -> str:
    return f"{data}: never zeros, never old content"


# ---- 1 to 9: the handshake, and one fault


@case("01-missing", "one page is read, another one written", "one COPY each")
async def missing(kit: Kit) -> None:
    first, second = kit.image.runs(1, 2)
    async with kit.client() as vm:
        await kit.check(vm, first, what="a read fault")
        await kit.check(vm, second, write=True, what="a write fault")


@case(
    "01-write-protect",
    "the client registered WP too, and writes to a page that it has protected",
    "un-protect, never COPY",
)
async def write_protect(kit: Kit) -> None:
    page = kit.image.runs(1)[0]
    async with kit.client(mode=c.MISSING | c.WP) as vm:
        await kit.check(vm, page)
        for what in ("its first write to a page", "a write to a page that it has protected"):
            await (await vm.begin("fill", page, 1)).answer(kit.deadline_s, what)
            await kit.check(vm, page, 1, OWN, what)
            await vm.do("protect", page, 1)
        await (await vm.begin("fill", page, 1)).answer(kit.deadline_s, "a write to a page that it has protected")


@case(
    "01-minor", "the client registered MINOR, which nobody does", "answered, or said: the connection is closed; no hang"
)
async def minor(kit: Kit) -> str | None:
    page = kit.image.runs(1)[0]
    async with kit.client(kind=c.MEMFD, features=c.EVENT_REMOVE | c.MINOR_SHMEM, mode=c.MISSING | c.MINOR) as vm:
        await vm.do("cache", page)
        touched = await kit.begin_check(vm, page, 1, OWN)
        closed = await vm.begin("closed", int(kit.deadline_s * 1000))
        await any_of([touched, closed], kit.deadline_s + 1)
        try:
            if touched.done:
                await kit.finish(touched, OWN, "a page that is in the page cache")
                note = "answered"
            elif (await closed.answer(1.0))["closed"]:
                note = "refused"
            else:
                raise Failed("a minor fault is neither answered nor refused: the client hangs")
        except Gone:
            note = "the client was killed"
    await kit.check_others("a client had a minor fault")
    return note


GENERATIONS = {
    "none": "as Firecracker 1.1 to 1.6 says it: no page size",
    "kib": "as 1.7 to 1.11: page_size_kib alone, which is in bytes",
    "both": "as 1.12 and later",
    "unknown": "with fields that nobody knows, objects in them, line breaks",
}


def _generation(name: str, what: str) -> None:
    @case(f"02-{name}", f"the message {what}", "accepted; sizes are bytes")
    async def run(kit: Kit) -> None:
        async with kit.client(generation=name) as vm:
            for page in (0, kit.image.pages // 2, kit.image.pages - 1):
                await kit.check(vm, page)


for _name, _what in GENERATIONS.items():
    _generation(_name, _what)


@case("03-early", "the message is sent before the handler accepts", "it is read then", "command")
async def early(kit: Kit) -> None:
    async with kit.own_handler() as handler:
        await kit.check_others()
        handler.stop()
        try:
            async with kit.client() as vm:
                await trio.sleep(0.05)
                handler.go_on()
                await kit.check(vm, kit.image.runs(1)[0])
        finally:
            handler.go_on()


@case(
    "03-eof",
    "a connection ends without a message, another one after a text without a descriptor",
    "the next is accepted",
)
async def eof(kit: Kit) -> None:
    for text in ("", "[]"):
        async with kit.bare_client() as vm:
            await kit.connect(vm)
            if text:
                await vm.send(text, "-")
            await vm.do("hang-up")
        await kit.check_others(f"a connection ended after {text!r}")


@case("03-old", "the client closes its socket after the message, as Firecracker before 1.12", "it lives and is served")
async def old(kit: Kit) -> None:
    async with kit.client(generation="kib") as vm:
        await vm.do("hang-up")
        await trio.sleep(0.5)  # the handler sees that, and what it does about it
        await kit.check(vm, kit.image.runs(64)[0], 64, what="after the connection was closed")


Bad = Callable[[Client, Kit], tuple[str, str]]


def _message(vm: Client, change: Callable[[list[Json]], None]) -> str:
    said = json.loads(vm.message())
    change(said)
    return json.dumps(said)


BAD: dict[str, tuple[str, Bad]] = {
    "no-fd": ("a message without a descriptor", lambda vm, kit: (vm.message(), "-")),
    "two-fds": ("a message with two descriptors", lambda vm, kit: (vm.message(), "up")),
    "not-uffd": ("a descriptor that is no userfaultfd", lambda vm, kit: (vm.message(), "n")),
    "zero-size": (
        "a region of size 0",
        lambda vm, kit: (_message(vm, lambda said: said.append({**said[0], "size": 0, "offset": 0})), "u"),
    ),
    "overlap": (
        "two regions at the same addresses",
        lambda vm, kit: (_message(vm, lambda said: said.append({**said[0]})), "u"),
    ),
    "too-big": (
        "more memory than the source has",
        lambda vm, kit: (_message(vm, lambda said: said[0].update(size=kit.image.bytes + HUGE_BYTES)), "u"),
    ),
    "wraps": (
        "a region that ends beyond all addresses",
        lambda vm, kit: (_message(vm, lambda said: said[0].update(base_host_virt_addr=(1 << 64) - 8192)), "u"),
    ),
    "garbage": ("a text that is no JSON", lambda vm, kit: ("[{]", "u")),
    "deep": ("arrays within arrays, twenty thousand", lambda vm, kit: ("[" * 20000 + "]" * 20000, "u")),
}


def _refusal(name: str, what: str, bad: Bad) -> None:
    @case(f"04-{name}", what, "refused: connection and descriptors closed, other clients unhurt")
    async def run(kit: Kit) -> None:
        async with kit.client() as other, kit.mapped_client() as vm:
            page, later = kit.image.runs(4, 2)
            await kit.check(other, page, 4)
            await kit.connect(vm)
            text, fds = bad(vm, kit)
            await vm.send(text, fds)
            if not await vm.closed(kit.deadline_s):
                raise Failed(f"{what} is not refused: the connection is still open after {kit.deadline_s:g} s")
            if "p" in fds and not (await vm.do("pipe-closed", int(kit.deadline_s * 1000)))["closed"]:
                raise Failed("a descriptor of a refused message is still open in the handler")
            if "u" in fds:  # with nobody's descriptor left the kernel gives zeros
                await vm.do("close-uffd")
                kept = "the userfaultfd of a refused client is still open in the handler"
                await kit.check(vm, page, 1, ZERO | IMAGE, kept)
            await kit.check(other, later, 4, what="a client that was there before")
        await kit.check_others(f"refused {what}")


for _name, (_what, _bad) in BAD.items():
    _refusal(_name, _what, _bad)


@case("05-silent", "a client connects and says nothing", "others are served meanwhile; it is sent away in bounded time")
async def silent(kit: Kit) -> None:
    async with kit.bare_client() as vm:
        await kit.connect(vm)
        await kit.check_others("a client says nothing")
        if not await vm.closed(kit.settings.silent_s):
            raise Failed(f"a client that says nothing is still connected after {kit.settings.silent_s:g} s")


@case(
    "05-drips",
    "a client says its message a byte every half second, without end",
    "others are served meanwhile; it is sent away in bounded time",
)
async def drips(kit: Kit) -> None:
    async with kit.bare_client() as vm:
        await kit.connect(vm)
        with trio.move_on_after(kit.settings.silent_s):
            await vm.send('[{"size":1', "-")
            await kit.check_others("a client says its message byte by byte")
            while not await vm.closed(0.5):
                try:
                    await vm.send("0", "-")
                except OSError:
                    return
            return
        raise Failed(f"a client whose message has no end is still connected after {kit.settings.silent_s:g} s")


@case(
    "05-dies", "clients are killed before their message", "their connections are freed, the next is accepted", "command"
)
async def dies(kit: Kit) -> None:
    async with kit.own_handler() as handler, kit.client() as other:
        await kit.check(other, kit.image.runs(1)[0])
        before = handler.sockets()
        for _ in range(2 * OTHER_FDS):
            async with kit.bare_client() as vm:
                await kit.connect(vm)
                vm.kill()
        await kit.check_others("clients died before their message")
        await eventually(
            kit,
            lambda: handler.sockets() <= before + OTHER_FDS,
            lambda: f"{handler.sockets() - before} connections of dead clients are kept",
        )


async def eventually(kit: Kit, condition: Callable[[], bool], words: Callable[[], str]) -> None:
    with trio.move_on_after(kit.deadline_s):
        while not condition():  # noqa: ASYNC110 -- /proc does not say when
            await trio.sleep(0.02)
        return
    raise Failed(words())


@case(
    "05-uid",
    f"a client of another user (uid {STRANGER_UID})",
    "refused, by SO_PEERCRED or the socket's permissions",
    "root",
)
async def stranger(kit: Kit) -> str | None:
    need_root()
    await kit.check_others()
    async with kit.mapped_client() as vm:
        await vm.do("become", STRANGER_UID)
        try:
            await vm.connect(kit.handler.path, kit.deadline_s)
        except PermissionError:
            return "the socket's permissions keep it out"
        try:
            await vm.send(vm.message())
        except OSError:
            return None
        if not await vm.closed(kit.deadline_s):
            raise Failed(f"a client of uid {STRANGER_UID} is not refused")
    return None


@case("06-below", "two regions, the second right below the first", "offsets by region, never one COPY for both")
async def below(kit: Kit) -> None:
    half = kit.image.pages // 2
    async with kit.client([half * 4096, (kit.image.pages - half) * 4096], below=True) as vm:
        last = kit.image.pages - 1
        await kit.check(vm, last, what="the last page of the region below")
        await kit.check(vm, 0, what="the first page of the region above")
        await kit.check(vm, last - 63, 64, what="the end of the region below")
        await kit.check(vm, 0, 64, what="the start of the region above")
        await kit.check(vm, half - 32, 64, what="the last pages of one, the first of the other")


@case("07-clipped", "a region that is not aligned to 2 MiB", "fault-around ends where the region does")
async def clipped(kit: Kit) -> None:
    async with kit.client(shift=3 * 4096) as vm:
        last = kit.image.pages - 1
        for page in (0, last, last - 1, 1, HUGE_PAGES - 3, HUGE_PAGES - 4):
            await kit.check(vm, page)
        await kit.check(vm, kit.image.runs(64)[0], 64)


@case("08-huge", "pages of 2 MiB", "whole pages, zeros by COPY", "huge")
async def huge(kit: Kit) -> None:
    need_huge(kit)
    async with kit.client(page_bytes=HUGE_BYTES, kind=c.HUGE) as vm:
        await kit.check(vm, 0, what="a page of 2 MiB")
        await kit.check(vm, 1, write=True, what="a write to a page of 2 MiB")
        await kit.check(vm, kit.image.pages // HUGE_PAGES - 1)


@case("08-huge-zeros", "a page of 2 MiB with zeros in the image, and one that was removed", "zeros by COPY", "huge")
async def huge_zeros(kit: Kit) -> str | None:
    need_huge(kit)
    async with kit.client(page_bytes=HUGE_BYTES, kind=c.HUGE) as vm:
        await kit.check(vm, 0)
        await kit.discard(vm, 0, 1)
        await kit.check(vm, 0, 1, ZERO, "a page of 2 MiB that was removed")
        try:
            zeros = kit.image.zero_pages(HUGE_PAGES, HUGE_PAGES) // HUGE_PAGES
        except NotApplicable as reason:
            return str(reason)
        await kit.check(vm, zeros, what="2 MiB of zeros")
    return None


def need_huge(kit: Kit) -> None:
    try:
        with open("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages") as file:
            free = int(file.read())
    except OSError:
        free = 0
    if free < 8:
        raise NotApplicable("needs 8 free pages of 2 MiB (sysctl vm.nr_hugepages=16)")
    if kit.image.bytes % HUGE_BYTES:
        raise NotApplicable("the image is not a multiple of 2 MiB")


@case("09-exact", "a client with EXACT_ADDRESS: low bits in the address", "masked")
async def exact(kit: Kit) -> None:
    async with kit.client(features=c.EVENT_REMOVE | c.EXACT_ADDRESS) as vm:
        for page in kit.image.runs(3, 3):
            await kit.check(vm, page + 1)


# ---- 10 to 17: many at once, and what COPY may say


@case("10-storm", "64 threads touch 4096 pages in different orders", "all served, bounded memory")
async def storm(kit: Kit) -> None:
    count = min(4096, kit.image.pages // 2)
    async with kit.client() as vm:
        known = kit.settings.commands is not None
        before = kit.handler.private_bytes() if known else 0
        await kit.check(vm, kit.image.pages // 4, count // 2, threads=64, apart=True, what="each thread its own pages")
        await kit.check(vm, kit.image.pages // 4, count, threads=64)
        if known and kit.handler.private_bytes() - before > max(64 << 20, 2 * count * 4096):
            raise Failed(f"the handler took {(kit.handler.private_bytes() - before) >> 20} MiB for {count} pages")


@case(
    "10-same",
    "32 threads touch the same page; others touch theirs in system calls that signals interrupt",
    "one request a page",
)
async def same(kit: Kit) -> None:
    async with kit.client() as vm:
        first, second = kit.image.runs(64, 2)
        for page in range(first, first + 64, 16):
            await kit.check(vm, page, threads=32)
        answer = await (await vm.begin("signals", second, 64)).answer(
            kit.deadline_s, "pages that are touched under signals"
        )
        if answer["wrong"]:
            raise Failed(f"page {answer['page']}, which was touched under signals, is wrong")


async def race(kit: Kit, vm: Client, which: int, first: int, count: int, hits: int, ms: int, words: str) -> Json:
    """Until it has happened `hits` times, or has been tried for `ms`. `Failed` when the thread that touches hangs."""
    pending = await vm.begin("race", which, first, count, hits, ms)
    answer = await pending.answer(kit.deadline_s + ms / 1000, words)
    if answer["wrong"]:
        raise Failed(f"{words}: page {answer['page']} is wrong")
    return answer


def need_hits(answer: Json) -> None:
    if not answer["hits"]:
        raise NotApplicable(f"the handler was always first, {answer['tried']} times: it could not be tried")


async def goes_on_after(kit: Kit, which: int, pages: int, hits: int, words: str, what: str) -> str:
    """A race in so many pages at most, after which others are still served."""
    first, count = longest(kit, pages)
    async with kit.client() as vm:
        answer = await race(kit, vm, which, first, count, hits, 6000, words)
        await kit.check(vm, kit.image.pages - 256, 256, what=f"after {what}")
    need_hits(answer)
    return f"{answer['hits']} times"


@case("11-eexist", "another one places a page, without a wake, while a thread waits for it", "EEXIST: WAKE")
async def eexist(kit: Kit) -> str:
    first, count = longest(kit, 2048)
    async with kit.client() as vm:
        words = "a thread sleeps for ever at a page that is there: EEXIST needs a WAKE"
        answer = await race(kit, vm, c.RACE_PLACE, first, count, 1, 6000, words)
    need_hits(answer)
    return f"after {answer['tried']} tries"


def longest(kit: Kit, pages: int) -> tuple[int, int]:
    """As many pages in a row that are not zeros, up to that number."""
    while pages > 16:
        try:
            return kit.image.runs(pages)[0], pages
        except NotApplicable:
            pages //= 2
    return kit.image.runs(pages)[0], pages


@case(
    "12-partial", "pages in the middle of a run are there already", "they stay as they are, the rest of the run arrives"
)
async def partial(kit: Kit) -> None:
    first = kit.image.runs(64)[0]
    async with kit.client() as vm:
        own = []
        for page in (first + 3, first + 17, first + 18, first + 40):
            if (await vm.do("place", page))["placed"]:
                own.append(page)
        for page in range(first, first + 64):
            await kit.check(vm, page, 1, OWN if page in own else IMAGE, "a run with pages in it that were there")


@case("13-negative", "COPY says EEXIST, the field is negative", "nothing was placed: the others still come")
async def negative(kit: Kit) -> str:
    return await goes_on_after(kit, c.RACE_PLACE_WAKE, 2048, 3, "a race for pages", "COPY had said EEXIST")


@case("14-unread", "REMOVEs one after the other, and faults beside them", "EAGAIN: read the event, decide anew")
async def unread(kit: Kit) -> None:
    count = min(3000, kit.image.pages // 4)
    async with kit.client() as vm:
        removing = await vm.begin("discard", 0, count, 1, 0)
        await kit.check(vm, kit.image.pages // 2, count, threads=4, what="faults beside REMOVEs")
        await removing.answer(kit.deadline_s + count / 100, "REMOVEs beside faults")
        await kit.check(vm, 0, 64, ZERO, "removed")


@case("15-eagain", "COPY says EAGAIN for 100 ms, and no event comes that ends it", "retried within milliseconds")
async def eagain(kit: Kit) -> str:
    held, *pages = kit.image.runs(1, 8)
    async with kit.client() as vm:
        for page in pages:
            await kit.hold(vm, held, 100)
            answer = await kit.check(vm, page, what="EAGAIN that ends without an event")
            ended = await vm.do("hold-end")
            if answer["slowest_ms"] > 5:  # else it was over before the fault came
                return held_for(ended)
    raise NotApplicable("EAGAIN was over before the fault came, each time: it could not be tried")


def held_for(answer: Json) -> str:
    return f"EAGAIN for {answer['ms']:.0f} ms"


@case(
    "16-long-eagain", "COPY says EAGAIN for a second, with 32 threads that wait", "bounded backoff, then all are served"
)
async def long_eagain(kit: Kit) -> str:
    held, *firsts = kit.image.runs(640, 5)
    async with kit.client() as vm:
        for first in firsts:  # until the scheduler has let it last
            await kit.hold(vm, held, 1000)
            # far from each other: none must be served with another one
            await kit.check(
                vm, first, 32, stride=20, threads=32, apart=True, within_s=kit.deadline_s + 2, what="a second of EAGAIN"
            )
            answer = await vm.do("hold-end")
            if answer["ms"] > 500:
                break
        return held_for(answer)


@case("17-prefetch", "prefetch or fault-around meets EAGAIN", "not marked as placed")
async def prefetch(kit: Kit) -> None:
    held, first = kit.image.runs(512, 2)
    first += 256
    async with kit.client() as vm:
        await kit.hold(vm, held, 50)
        await kit.check(vm, first)  # when it is over
        await vm.do("hold-end")
        await kit.check(vm, first - 256, 512, what="the pages around one whose COPY said EAGAIN")


# ---- 18 to 26: REMOVE


@case("18-removed", "pages that were placed are removed, then touched", "zeros")
async def removed(kit: Kit) -> None:
    first = kit.image.runs(16)[0]
    async with kit.client() as vm:
        await kit.check(vm, first, 16)
        await kit.discard(vm, first + 4, 8)
        await kit.check(vm, first + 4, 8, ZERO, "pages that were placed and removed")
        await kit.check(vm, first, 4)
        await kit.check(vm, first + 12, 4)


@case("19-never-placed", "pages that were never placed are removed, then touched; pages of zeros in the image", "zeros")
async def never_placed(kit: Kit) -> None:
    first = kit.image.runs(64)[0]
    async with kit.client() as vm:
        await kit.discard(vm, first, 64)
        await kit.check(vm, first, 64, ZERO, "pages that were removed before they ever came")
        try:
            zeros = kit.image.zero_pages()
        except NotApplicable:
            return
        await kit.check(vm, zeros, what="a page of zeros")
        await (await vm.begin("fill", zeros, 1)).answer(kit.deadline_s, "a write to a page of zeros")
        await kit.check(vm, zeros, 1, OWN)


@case(
    "19-not-fetched",
    "such pages, with a source that does not answer for them",
    "the source is not asked",
    "command",
    "slow",
    "root",
)
async def not_fetched(kit: Kit) -> None:
    first = kit.image.runs(256)[0]
    async with kit.slow_handler() as slow, kit.client() as vm:
        slow.hold(*range(first, first + 256))
        await kit.discard(vm, first, 256)
        await kit.check(vm, first + 64, 64, ZERO, "pages that were removed need no source")


@case(
    "20-batch", "a page fault and a REMOVE of the same page can be read at once", "REMOVEs first: only zeros afterwards"
)
async def batch(kit: Kit) -> str:
    pages = kit.image.runs(1, 6)
    note = "raced only: --handler-cmd makes it certain"
    if kit.settings.commands is not None:
        async with kit.own_handler() as handler, kit.client() as vm:
            await kit.check(vm, pages[0])
            for page in pages[1:]:
                handler.stop()
                try:
                    touched = await kit.begin_check(vm, page, 1, IMAGE | ZERO)
                    await vm.do("pending", 1000)
                    removing = await vm.begin("discard", page, 1, 1, 0)
                    await trio.sleep(0.02)  # both are in the queue; were they not, the case would be weaker, not wrong
                finally:
                    handler.go_on()
                await removing.answer(kit.deadline_s, "a REMOVE that came with a fault")
                await kit.finish(touched, IMAGE | ZERO, "a fault that came with a REMOVE")
                await kit.check(vm, page, 1, ZERO, "after a REMOVE that was read with a fault")
        note = ""
    first, count = longest(kit, 1024)
    async with kit.client() as vm:
        answer = await race(kit, vm, c.RACE_DISCARD, first, count, count, 1000, "faults and REMOVEs of the same pages")
    if answer["stale"]:
        raise Failed(
            f"{answer['stale']} of {answer['tried']} pages have old content after their REMOVE: page {answer['page']}"
        )
    return note


@case(
    "21-in-flight",
    "a page is removed while its data is on the way",
    "dropped on arrival: zeros",
    "command",
    "slow",
    "root",
)
async def in_flight(kit: Kit) -> None:
    page, held = kit.image.runs(512, 2)
    async with kit.slow_handler() as slow, kit.client() as vm:
        await kit.check(vm, held)
        slow.hold(page)
        touched = await kit.begin_check(vm, page, 1, IMAGE | ZERO)
        await arrives(kit, slow, touched)
        removing = await vm.begin("discard", page, 1, 1, 0)
        await removing.within(1.0)
        slow.release()
        await removing.answer(kit.deadline_s, "a REMOVE of a page that is on the way")
        await kit.finish(touched, IMAGE | ZERO)
        await kit.check(vm, page, 1, ZERO, "a page that was removed while its data was on the way")


async def arrives(kit: Kit, slow: SlowImage, touched: Pending) -> None:
    """Until the handler reads a page that is held, for one that is touched."""
    with trio.move_on_after(kit.deadline_s):
        while not slow.waiting.is_set():
            if await touched.within(0.01):
                await kit.finish(touched, what="before the source had answered")
                raise NotApplicable("the handler had read the page before it could be held: it prefetches")
        return
    raise Failed("a page fault does not read the image")


@case("22-decided", "a page is removed between the handler's decision and its COPY", "decided again: zeros")
async def decided(kit: Kit) -> None:
    held, *pages = kit.image.runs(1, 4)
    async with kit.client() as vm:
        for page in pages:
            await kit.hold(vm, held, 1000)
            touched = await kit.begin_check(vm, page, 1, IMAGE | ZERO)
            await trio.sleep(0.05)  # the handler has decided by then
            await kit.discard(vm, page)
            await vm.do("hold-end")
            await kit.finish(touched, IMAGE | ZERO, "a page that was removed while its COPY said EAGAIN")
            await kit.check(vm, page, 1, ZERO, "a page that was removed after it was decided to place it")


@case(
    "23-partly", "a REMOVE of less than 2 MiB", "only whole pages that it covers; their neighbours keep their content"
)
async def partly(kit: Kit) -> None:
    try:
        first = kit.image.runs(HUGE_PAGES, 1, HUGE_PAGES)[0]
    except NotApplicable:
        first = kit.image.runs(64)[0]
    async with kit.client() as vm:
        await kit.check(vm, first + 1)
        await kit.discard(vm, first + 20)
        await kit.check(vm, first + 20, 1, ZERO)
        await kit.check(vm, first, 20, what="the pages before one that was removed")
        await kit.check(vm, first + 21, 43, what="the pages behind one that was removed")


@case(
    "23-partly-huge",
    "the same with pages of 2 MiB: a REMOVE of one and a half",
    "the half one keeps its content",
    "huge",
)
async def partly_huge(kit: Kit) -> None:
    need_huge(kit)
    async with kit.client(page_bytes=HUGE_BYTES, kind=c.HUGE) as vm:
        await kit.check(vm, 1)
        await kit.discard(vm, 0, 1, more=HUGE_BYTES // 2)
        await kit.check(vm, 0, 1, ZERO)
        await kit.check(vm, 1, what="the page of 2 MiB of which half was to be removed")


@case("24-flood", "thousands of REMOVEs of one page, with faults between", "faults stay fast, no quadratic work")
async def flood(kit: Kit) -> str:
    count = min(16384, kit.image.pages // 2)
    rest = kit.image.pages - count
    async with kit.client() as vm:
        removing = await vm.begin("discard", 0, count // 4, 1, 0)
        took_ms = []
        for page in range(count, kit.image.pages, max(1, rest // 64)):
            took_ms.append((await kit.check(vm, page, what="a fault within a flood of REMOVEs"))["slowest_ms"])
        took_ms.sort()
        if (median_ms := took_ms[len(took_ms) // 2]) > kit.deadline_s * 200:
            raise Failed(f"half of the faults within a flood of REMOVEs took {median_ms:.0f} ms and more")
        first_us = (await removing.answer(4 * kit.deadline_s, f"{count // 4} REMOVEs beside faults"))["first_us"]
        removing = await vm.begin("discard", 0, count, 1, 0)
        answer = await removing.answer(4 * kit.deadline_s, f"{count} REMOVEs")
        if answer["last_us"] > max(100, 4 * first_us):
            raise Failed(
                f"REMOVEs are quadratic work: each took {first_us:.0f} us at first, and"
                f" {answer['last_us']:.0f} us after {count}"
            )
        await kit.check(vm, count // 2, 64, ZERO, "pages of a flood of REMOVEs")
    return f"{answer['ms'] / count * 1000:.0f} us a REMOVE, slowest fault {took_ms[-1]:.1f} ms"


@case(
    "25-unreachable",
    "a REMOVE while the source does not answer",
    "read at once: else balloon and API hang",
    "command",
    "slow",
    "root",
)
async def unreachable(kit: Kit) -> None:
    page, other = kit.image.runs(512, 2)
    async with kit.slow_handler() as slow, kit.client() as vm:
        await kit.check(vm, other)
        slow.hold(page)
        touched = await kit.begin_check(vm, page)
        await arrives(kit, slow, touched)
        await kit.discard(vm, other, 8, "a REMOVE while the source does not answer")
        slow.release()
        await kit.finish(touched, what="a page of a source that was slow")
        await kit.check(vm, other, 8, ZERO, "removed while the source did not answer")


def need_takeover(kit: Kit) -> None:
    if not kit.handler.takes_over:
        raise NotApplicable("no successor of this handler goes on (--takes-over, --handler-restart-cmd)")


@case(
    "26-recovered",
    "pages are removed, one is written again, and the handler is killed",
    "zeros, and what was written",
    "command",
)
async def recovered(kit: Kit) -> None:
    async with kit.own_handler() as handler, kit.client() as vm:
        need_takeover(kit)
        first, later = kit.image.runs(64, 2)
        await kit.check(vm, first, 16)
        await kit.discard(vm, first + 4, 8)
        await kit.discard(vm, later + 8, 8)
        await (await vm.begin("fill", first + 4, 2)).answer(kit.deadline_s, "a write to pages that were removed")
        await handler.kill()
        await handler.restart()
        await kit.check(vm, later, 8, within_s=2 * kit.deadline_s, what="after the handler was killed")
        await kit.check(vm, first + 4, 2, OWN, "written after it was removed, before the handler was killed")
        await kit.check(vm, first + 6, 6, ZERO, "removed before the handler was killed")
        await kit.check(vm, later + 8, 8, ZERO, "removed, never placed, before the handler was killed")
        await kit.check(vm, first, 4)


# ---- 27 to 37: clients and sources that go, or do odd things


@case(
    "27-left",
    "pages leave the userfaultfd without an event, also while a thread waits there",
    "ENOENT: dropped, WAKE, no death",
)
async def left(kit: Kit) -> str:
    first, count = longest(kit, 1024)
    apart = kit.image.pages - 64
    async with kit.client() as vm:
        await kit.check(vm, apart - 64)  # the handler is at work
        await vm.do("replace", apart + 4, 4)
        await kit.check(vm, apart, 4, what="beside pages that have left the userfaultfd")
        await kit.check(vm, apart + 4, 4, ZERO)
        await kit.check(vm, apart + 8, 8, what="beside pages that have left the userfaultfd")
        words = "a thread sleeps for ever at a page that has left the userfaultfd: ENOENT needs a WAKE"
        answer = await race(kit, vm, c.RACE_REPLACE, first, count, 2, 6000, words)
        await kit.check(vm, kit.image.pages // 2, 64, what="after COPY had said ENOENT")
    need_hits(answer)
    return f"after {answer['tried']} tries"


@case("27-recovered", "pages leave the userfaultfd, and the handler is killed", "they stay out of it", "command")
async def left_recovered(kit: Kit) -> None:
    first, later = kit.image.runs(64, 2)
    async with kit.own_handler() as handler, kit.client() as vm:
        need_takeover(kit)
        await kit.check(vm, first)
        await vm.do("replace", later + 8, 8)
        await handler.kill()
        await handler.restart()
        await kit.check(vm, later, 8, within_s=2 * kit.deadline_s, what="after the handler was killed")
        await kit.check(vm, later + 8, 8, ZERO, "pages that had left the userfaultfd before the handler was killed")


@case("28-killed", "the client is killed", "seen soon: its userfaultfd is closed, others are served", "command")
async def killed(kit: Kit) -> None:
    async with kit.own_handler() as handler, kit.client() as other:
        await kit.check(other, kit.image.runs(1)[0])
        before = handler.userfaultfds()
        async with kit.client() as vm:
            await kit.check(vm, kit.image.runs(64)[0], 64)
            if handler.userfaultfds() <= before:
                raise NotApplicable("the handler's userfaultfds cannot be seen in /proc")
            waiting = await kit.begin_check(vm, 0, kit.image.pages, threads=4)
            await waiting.within(0.02)
            vm.kill()
        words = "the userfaultfd of a client that was killed is still open in the handler"
        await eventually(kit, lambda: handler.userfaultfds() <= before, lambda: words)
        await kit.check(other, kit.image.runs(4, 2)[1], 4, what="a client beside one that was killed")


@case("29-pid", "the client is killed, and its pid is another process's", "a pidfd, never a later kill(pid)", "root")
async def pid_reused(kit: Kit) -> None:
    async with kit.bare_client() as parent:
        async with kit.client() as vm:
            await kit.check(vm, kit.image.runs(1)[0])
            pid = vm.pid
            vm.kill()
            try:
                await parent.do("clone", pid)
            except OSError as error:
                raise NotApplicable(f"cannot make a process with a given pid: {error.strerror}") from None
        ended = await parent.do("wait", pid, 1500)
        if ended["ended"]:
            raise Failed(f"the handler killed a process that has got the pid of its client (signal {ended['signal']})")


@case(
    "30-takeover",
    "the handler is killed with faults that it has read",
    "its successor wakes all, and serves",
    "command",
)
async def takeover(kit: Kit) -> None:
    async with kit.own_handler() as handler, kit.client() as vm:
        need_takeover(kit)
        held, second, *firsts = kit.image.runs(256, 6)
        for first in firsts:
            await kit.hold(vm, held, 2000)  # what is read now cannot be answered
            waiting = await kit.begin_check(vm, first, 256, threads=32, apart=True)
            answer = await vm.do("read", 2000, 32)
            if answer["read"] and answer["held"]:
                break
            await vm.do("hold-end")
            await kit.finish(waiting, within_s=2 * kit.deadline_s)
        else:
            raise NotApplicable("the kernel did not say EAGAIN for long enough: it could not be tried")
        await handler.kill()
        await handler.restart()
        await vm.do("hold-end")
        await kit.finish(waiting, IMAGE, "faults that a handler had read when it was killed", 2 * kit.deadline_s)
        await kit.check(vm, second, 256, threads=8, what="after the handler was killed")
        await kit.check(vm, held, 1, ZERO)


@case(
    "30-frozen",
    "the handler is killed, and nobody goes on",
    "the client waits, or is served or killed; never zeros",
    "command",
)
async def frozen(kit: Kit) -> str:
    async with kit.own_handler() as handler, kit.client() as vm:
        first, later = kit.image.runs(16, 2)
        await kit.check(vm, first, 16)
        await handler.kill()
        note = await waits_or_right(kit, await kit.begin_check(vm, later, 16), "after the handler was killed")
        if note != "killed":
            await kit.check(vm, first, 16, what="pages that had been there")
        return note


async def waits_or_right(kit: Kit, pending: Pending, what: str) -> str:
    """What a client may meet whose pages cannot be had. `Failed` for content that is not the image's."""
    try:
        if not await pending.within(kit.settings.slow_s):
            return "waits"
        await kit.finish(pending, IMAGE, unwanted(what))
    except OSError:
        return "gets an error"
    except Gone:
        return "killed"
    return "served"


@case("31-ended", "the handler ends in good order while the client lives", "never zeros", "command")
async def ended(kit: Kit) -> str:
    async with kit.own_handler() as handler, kit.client() as vm:
        first, later = kit.image.runs(16, 2)
        await kit.check(vm, first, 16)
        handler.terminate()
        stays = not await handler.ended(min(3.0, kit.deadline_s))
        note = await waits_or_right(kit, await kit.begin_check(vm, later, 16), "after the handler was told to end")
        return f"it stays as long as its client lives, which is {note}" if stays else f"the client {note}"


@case(
    "32-slow",
    "a page takes seconds",
    "its client waits, others are served; no timeout becomes data",
    "command",
    "slow",
    "root",
)
async def slow_source(kit: Kit) -> None:
    page, other = kit.image.runs(512, 2)
    async with kit.slow_handler() as slow, kit.client() as vm, kit.client() as beside:
        await kit.check(vm, other)
        slow.hold(page)
        touched = await kit.begin_check(vm, page)
        await arrives(kit, slow, touched)
        await kit.check(beside, other, 64, what="another client, while a page takes seconds")
        if await touched.within(kit.settings.slow_s):
            await kit.finish(touched, what="before the source had answered")
        slow.release()
        await kit.finish(touched, what="a page that took seconds")


@case(
    "33-lost",
    "the source is lost: every read fails",
    "the client waits or is killed; never zeros",
    "command",
    "slow",
    "root",
)
async def lost(kit: Kit) -> str:
    page, other = kit.image.runs(512, 2)
    async with kit.slow_handler() as slow, kit.client() as vm:
        await kit.check(vm, other)
        slow.fail()
        return await waits_or_right(kit, await kit.begin_check(vm, page), "after the source was lost")


@case("34-truncated", "the image file becomes shorter", "an error, not SIGBUS; never zeros; others go on", "command")
async def truncated(kit: Kit) -> str:
    copy = os.path.join(kit.directory, "copy")
    await trio.to_thread.run_sync(shutil.copyfile, kit.image.path, copy)
    first = kit.image.runs(16)[0]
    async with kit.own_handler(copy) as handler, kit.client() as vm, kit.client() as other:
        await kit.check(vm, first, 4)
        await kit.check(other, first, 4)
        os.truncate(copy, kit.image.bytes // 2)
        last = kit.image.pages - 1
        note = await waits_or_right(
            kit, await kit.begin_check(vm, last), "beyond the end of a file that became shorter"
        )
        if handler.death:
            raise Failed(f"the image became shorter: {handler.death}")
        await kit.check(other, first + 4, 4, what="another client, of pages that are still there")
        return note


@case("35-blocking", "O_NONBLOCK is cleared, which the descriptors share", "not the end: served on")
async def blocking(kit: Kit) -> None:
    first, later = kit.image.runs(64, 2)
    async with kit.client() as vm:
        await kit.check(vm, first)
        await vm.do("block")
        await kit.check(vm, first, 64, what="after O_NONBLOCK was cleared")
        await vm.do("block")
        await kit.discard(vm, later, 8, "a REMOVE after O_NONBLOCK was cleared")
        await kit.check(vm, later, 8, ZERO)


@case("36-spurious", "POLLIN, and nothing can be read", "go on")
async def spurious(kit: Kit) -> str:
    words = "events that are gone when they are read"
    return await goes_on_after(kit, c.RACE_STEAL, 4096, 40, words, "events that were gone when they were read")


@case("37-idle", "nothing happens for long", "no timeout: the first touch is served at once")
async def idle(kit: Kit) -> None:
    first, second = kit.image.runs(1, 2)
    async with kit.client() as vm, kit.client() as beside:
        await kit.check(beside, first)
        await trio.sleep(kit.settings.idle_s)
        await kit.check(vm, second, what=f"the first touch, after {kit.settings.idle_s:g} s")
        await kit.check(beside, second, what=f"after {kit.settings.idle_s:g} s")


# ---- 38 to 43, and what else there is


@case("38-snapshot", "a Full snapshot: all pages by faults of the kernel, in order", "each right")
async def snapshot(kit: Kit) -> str:
    count = min(27671, kit.image.pages)
    async with kit.client() as vm:
        within_s = kit.deadline_s * (1 + count / 8192)
        answer = await (await vm.begin("snapshot", count)).answer(within_s, "a Full snapshot")
        kit.judge(answer, IMAGE, "a Full snapshot")
    return f"{count} pages"


@case("38-third-party", "another process reads the client's memory (process_vm_readv)", "each page right")
async def third_party(kit: Kit) -> None:
    count = 256
    async with kit.client() as vm, kit.bare_client() as reader:
        base = vm.regions[0][0]
        try:
            answer = await (await reader.begin("readv", vm.pid, base, kit.image.pages // 2, count)).answer(
                kit.deadline_s
            )
        except OSError as error:
            raise NotApplicable(f"process_vm_readv: {error.strerror}") from None
        kit.judge(answer, IMAGE, "read by another process")


async def _crowd(kit: Kit, stuck: Callable[[Client], Awaitable[None]] | None) -> str:
    count = kit.image.pages // 4
    async with AsyncExitStack() as stack:
        vms = [await stack.enter_async_context(kit.client()) for _ in range(10)]
        for vm in vms:
            await kit.check(vm, kit.image.pages - 1)
        if stuck is not None:
            await stuck(vms[0])
        flooding = await vms[1].begin("discard", 0, count, 1, 0)
        storming = await kit.begin_check(vms[1], kit.image.pages // 2, 512, threads=16)
        slowest = 0.0
        for vm in vms[2:]:
            answer = await kit.check(
                vm, kit.image.pages // 2, 64, what="a client beside others that flood, or are stuck"
            )
            slowest = max(slowest, answer["slowest_ms"])
        await kit.finish(storming, within_s=2 * kit.deadline_s)
        await flooding.answer(kit.deadline_s + count / 100, "a flood of REMOVEs of one of ten clients")
    return f"slowest fault of the others {slowest:.1f} ms"


@case("39-ten", "ten clients, of which one floods", "the others are served")
async def ten(kit: Kit) -> str:
    return await _crowd(kit, None)


@case(
    "39-stuck",
    "ten clients, of which one floods and one waits for a source that is stuck",
    "the others are served",
    "command",
    "slow",
    "root",
)
async def ten_stuck(kit: Kit) -> str:
    page = kit.image.pages // 4 + 1000
    async with kit.slow_handler() as slow:

        async def stuck(vm: Client) -> None:
            slow.hold(page)
            await arrives(kit, slow, await kit.begin_check(vm, page))

        return await _crowd(kit, stuck)


@case("40-complete", "all pages are placed, then some are removed", "the handler stays until the client ends")
async def complete(kit: Kit) -> None:
    first = kit.image.runs(8)[0]
    async with kit.client() as vm:
        await kit.check(vm, 0, kit.image.pages, threads=2)
        await kit.discard(vm, first, 8, "a REMOVE after all pages were placed")
        await kit.check(vm, first, 8, ZERO, "removed after all pages were placed")


@case(
    "41-handler-protects",
    "the handler registered WP itself",
    "every page it places is protected, also after EEXIST; writes go on",
)
async def handler_protects(kit: Kit) -> None:
    first, count = longest(kit, 1024)
    async with kit.client() as vm:
        page = kit.image.pages - 64
        await kit.check(vm, page, 64)
        answer = await vm.do("protected", page, 64)
        if not answer["registered"]:
            raise NotApplicable("this handler does not write-protect its clients' memory")
        if answer["protected"] != 64:
            raise Failed(f"{64 - answer['protected']} of 64 pages were placed without protection")
        raced = await race(kit, vm, c.RACE_PLACE_WAKE, first, count, 3, 6000, "a race for pages")
        need_hits(raced)
        await kit.check(vm, first, raced["tried"])
        with trio.move_on_after(kit.deadline_s):
            while (await vm.do("protected", first, raced["tried"]))["protected"] != raced["tried"]:  # noqa: ASYNC110
                await trio.sleep(0.01)
            await (await vm.begin("fill", page, 4)).answer(
                kit.deadline_s, "a write to a page that the handler protects"
            )
            return
        raise Failed("pages that another one placed first (EEXIST) are not protected: writes there are not seen")


@case("42-jailed", "a client with a root directory and a uid of its own", "served", "command", "root")
async def jailed(kit: Kit) -> str | None:
    need_root()
    uid = kit.settings.jail_uid if kit.settings.jail_uid is not None else JAILED_UID
    async with kit.own_handler() as handler, kit.mapped_client() as vm:
        await kit.check_others()
        directory, name = os.path.split(handler.path)
        for path in (kit.directory, directory):
            os.chmod(path, 0o755)
        os.chown(handler.path, uid, uid)
        await vm.do("become", uid, directory)
        await vm.connect(f"/{name}", kit.deadline_s)
        try:
            await vm.send(vm.message())
            refused = await vm.closed(0.5)
        except OSError:
            refused = True
        if refused and kit.settings.jail_uid is None:
            raise NotApplicable(f"the handler refuses uid {uid}: --jail-uid says which one it admits")
        if refused:
            raise Failed("a jailed client is refused")
        await kit.check(vm, kit.image.runs(4)[0], 4, what="a jailed client")
    return None


@case(
    "43-fork",
    "a client with EVENT_FORK forks",
    "the event is read; the child's userfaultfd is served or closed",
    "root",
)
async def fork(kit: Kit) -> str:
    first, second = kit.image.runs(4, 2)
    async with kit.client(features=c.EVENT_REMOVE | c.EVENT_FORK) as vm:
        if await refused(kit, vm, first):
            return "refused"
        forked, child = await vm.begin_fork(second)
        await forked.answer(kit.deadline_s, "fork(2), whose event is not read")
        answer = await child.answer(kit.deadline_s, "a forked child that touches a page")
        note = f"the child got {answer['found']}"
        return f"{note}; then it was refused" if await refused(kit, vm, first + 1) else note


async def refused(kit: Kit, vm: Client, page: int) -> bool:
    """Whether the handler closes the connection instead of serving a page. `Failed` when it does neither."""
    touched = await kit.begin_check(vm, page)
    closed = await vm.begin("closed", int(kit.deadline_s * 1000))
    await any_of([touched, closed], kit.deadline_s + 1)
    if not touched.done and (await closed.answer(1.0))["closed"]:
        return True
    await kit.finish(touched, what="a fault of a client that has more events")
    return False


@case("44-unmap", "a client with EVENT_UNMAP unmaps a part", "the event is read, the rest is served; or it is refused")
async def unmap(kit: Kit) -> str | None:
    first = kit.image.runs(64)[0]
    async with kit.client(features=c.EVENT_REMOVE | c.EVENT_UNMAP) as vm:
        if await refused(kit, vm, first):
            return "refused"
        await (await vm.begin("unmap", first + 8, 8)).answer(kit.deadline_s, "munmap(2), whose event is not read")
        await kit.check(vm, first + 16, 48, what="beside memory that was unmapped")
    return None


@case("45-remap", "a client with EVENT_REMAP moves its memory", "served at the new place, or refused; no hang")
async def remap(kit: Kit) -> str:
    first = kit.image.runs(64)[0]
    async with kit.client(features=c.EVENT_REMOVE | c.EVENT_REMAP) as vm:
        if await refused(kit, vm, first):
            return "refused"
        await (await vm.begin("move")).answer(kit.deadline_s, "mremap(2), whose event is not read")
        await kit.check(vm, first, what="a page that had been there")
        try:
            return "refused" if await refused(kit, vm, first + 32) else "served"
        except Gone:
            return "the client was killed"


@case("46-connections", "a hundred connections that end at once", "nothing is kept of them", "command")
async def connections(kit: Kit) -> None:
    async with kit.own_handler() as handler, kit.client() as vm:
        first, later = kit.image.runs(4, 2)
        await kit.check(vm, first, 4)
        before = handler.descriptors(lambda link: True)
        for _ in range(100):
            with trio.socket.socket(trio.socket.AF_UNIX) as connection:
                await connection.connect(handler.path)
        await kit.check(vm, later, 4)
        await eventually(
            kit,
            lambda: handler.descriptors(lambda link: True) <= before + 4 * OTHER_FDS,
            lambda: f"{handler.descriptors(lambda link: True) - before} descriptors more after 100 connections",
        )


@case("47-more", "a client says more after its message", "ignored, or refused; the handler lives")
async def more(kit: Kit) -> None:
    async with kit.client() as vm:
        await vm.do("send", "n", "[" * 4096)
    await kit.check_others("a client said more")
