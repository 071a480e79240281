# SPDX-License-Identifier: Apache-2.0
"""Two peers and a network that delays, cuts and drops: whatever happens, there are never two owners of the machine, no
page is at neither end, and once the network stays up, the migration comes to its end."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from postcopy import wire as p
from postcopy.errors import ProtocolError
from postcopy.memory.bitmap import Bitmap
from postcopy.wire import DestinationProtocol, SourceProtocol, State

BLOCKS = (p.Block("ram", 1 << 20, 4096),)
PAGES = 256


class TwoHosts(RuleBasedStateMachine):
    """Each side does what its table allows, at any time. The network is two byte queues, delivered in pieces of any
    size; a cut drops what is still on its way, in one direction or both, and the sides learn of it at different
    times."""

    @initialize(
        first=st.one_of(st.integers(6, 9), st.integers(0, 14)),
        more=st.lists(st.integers(0, 4), max_size=5),
        frees=st.booleans(),
        rounds=st.integers(0, 2),
    )
    def begin(self, first: int, more: list[int], frees: bool, rounds: int) -> None:
        """Steps that go well, with a cut and a new connection between one run and the next: without them hardly any
        example would get near the decision, or behind it."""
        self.source = SourceProtocol()
        self.dest = DestinationProtocol()
        self.wire = {"source": bytearray(), "dest": bytearray()}  # by receiver
        self.cut = {"source": False, "dest": False}
        self.ran_at_source = self.ran_at_dest = False
        self.source_decided = False
        self.frees = frees  # the source wants to give memory back as it goes
        self.arrived = Bitmap(PAGES)  # at the destination
        self.told = Bitmap(PAGES)  # of them: to the source, as the destination believes
        self.released = Bitmap(PAGES)  # at the source: not there any more
        self.heard: Bitmap | None = None  # the received map of a recovery that is under way
        self.rounds = rounds  # that are still to come
        self.killed = False
        self.returned = False  # the destination has proven that it never took it
        self.proceed(first)
        for steps in more:
            self.cut_and_come_back()
            self.proceed(steps)

    # ---- helpers

    def send(self, receiver: str, data: bytes) -> None:
        if not self.cut[receiver]:
            self.wire[receiver] += data

    def side(self, name: str) -> SourceProtocol | DestinationProtocol:
        return self.source if name == "source" else self.dest

    def settle(self, name: str) -> None:
        side = self.side(name)
        try:
            while (message := side.next_message()) is not None:
                self.take(message)
        except ProtocolError as error:
            # Only a stranger's bytes get here (see `inject`); the engine then gives up, as below.
            if side.may_abort:
                self.send("dest" if name == "source" else "source", side.send(p.Abort(str(error))))
            side.connection_lost(str(error))

    def take(self, message: p.Message) -> None:
        """What the source does with what it hears of pages."""
        if isinstance(message, p.Placed):
            self.release(Bitmap.rle_decode(message.runs, PAGES))
        elif isinstance(message, p.ReceivedMap):
            self.heard = Bitmap.rle_decode(message.runs, PAGES)
        elif isinstance(message, p.Recover):
            assert self.heard is not None
            assert not self.released.without(self.heard).count()  # for this it would be shown out
            self.release(self.heard)

    def release(self, pages: Bitmap) -> None:
        if self.frees:
            for first, count in pages.runs():
                self.released.set_range(first, count)

    # ---- what the sides do

    @precondition(lambda self: self.source.state is State.SETUP)
    @rule()
    def offer(self) -> None:
        self.send("dest", self.source.send(p.Offer(b"m" * 16, b"t" * 16, "kvm", {}, BLOCKS, 1, 200 * self.frees)))

    @precondition(lambda self: self.dest.state is State.OFFERED)
    @rule(yes=st.integers(0, 9))
    def answer(self, yes: int) -> None:
        self.send("source", self.dest.send(p.Accept((4096,), 1, 1)) if yes else self.dest.send(p.Reject("no room")))

    @precondition(lambda self: self.dest.state is State.CHANNELS)
    @rule()
    def ready(self) -> None:
        self.send("source", self.dest.send(p.Ready()))

    @precondition(lambda self: self.source.state in (State.READY, State.MAPS))
    @rule()
    def page_map(self) -> None:
        self.send("dest", self.source.send(p.PageMap(0, 0, 256, b"\x01")))

    @precondition(lambda self: self.source.state is State.READY)
    @rule(state=st.binary(max_size=20))
    def early_state(self, state: bytes) -> None:
        self.send("dest", self.source.send(p.EarlyState(state)))

    @precondition(lambda self: self.source.state is State.MAPS)
    @rule()
    def round(self) -> None:
        self.rounds -= 1
        self.send("dest", self.source.send(p.Round(0, 1, False)))

    @precondition(lambda self: self.dest.state is State.ROUND)
    @rule()
    def round_done(self) -> None:
        self.send("source", self.dest.send(p.RoundDone(0)))

    @precondition(lambda self: self.source.state in (State.READY, State.MAPS))
    @rule()
    def switchover(self) -> None:
        self.send("dest", self.source.send(p.Switchover(b"", 1)))

    @precondition(lambda self: self.dest.state is State.HANDED)
    @rule()
    def prepared(self) -> None:
        self.send("source", self.dest.send(p.Prepared()))

    @precondition(lambda self: self.source.state is State.PREPARED)
    @rule()
    def commit(self) -> None:
        data = self.source.send(p.Commit())
        self.source_decided = True
        self.send("dest", data)

    @precondition(lambda self: self.dest.state is State.COMMITTED)
    @rule()
    def running(self) -> None:
        self.send("source", self.dest.send(p.Running(1)))

    @precondition(lambda self: self.dest.may_run)
    @rule(page=st.integers(0, PAGES - 1), count=st.integers(1, 20))
    def pages_arrive(self, page: int, count: int) -> None:
        self.arrived.set_range(page, min(count, PAGES - page))

    @precondition(lambda self: self.dest.state is State.POSTCOPY and self.frees)
    @rule()
    def placed(self) -> None:
        news = self.arrived.without(self.told)
        self.send("source", self.dest.send(p.Placed(0, 0, PAGES, news.rle_encode())))
        self.told = self.arrived.copy()

    @precondition(lambda self: self.dest.state is State.POSTCOPY and not self.frees)
    @rule()
    def placed_that_nobody_wants(self) -> None:
        try:
            self.dest.send(p.Placed(0, 0, PAGES, b"\x01"))
        except ProtocolError:
            return
        raise AssertionError("it must not be sent")

    @precondition(lambda self: self.dest.state is State.POSTCOPY)
    @rule()
    def complete(self) -> None:
        self.send("source", self.dest.send(p.Complete({})))

    @precondition(lambda self: self.dest.state is State.RECOVER)
    @rule(last=st.booleans())
    def tell_what_is_here(self, last: bool) -> None:
        self.send("source", self.dest.send(p.ReceivedMap(0, 0, PAGES, self.arrived.rle_encode())))
        self.told = self.arrived.copy()
        if last:
            self.send("source", self.dest.send(p.Recover(1 if self.dest_runs() else 0, 1, 0)))

    @precondition(lambda self: self.source.state is State.RECOVERING)
    @rule()
    def take_it_back(self) -> None:
        self.send("dest", self.source.send(p.Recovered()))

    @precondition(lambda self: self.source.state is State.CLOSING)
    @rule()
    def acknowledge(self) -> None:
        self.send("dest", self.source.send(p.CompleteAck({})))

    @rule(name=st.sampled_from(["source", "dest"]), chance=st.integers(0, 4))
    def abort(self, name: str, chance: int) -> None:
        side = self.side(name)
        if side.may_abort and not chance:
            self.send("dest" if name == "source" else "source", side.send(p.Abort("interrupted")))

    @rule(name=st.sampled_from(["source", "dest"]))
    def ping(self, name: str) -> None:
        side = self.side(name)
        if not side.ended:
            self.send("dest" if name == "source" else "source", side.send(p.Ping(1)))

    @rule(name=st.sampled_from(["source", "dest"]), chance=st.integers(0, 9))
    def kill(self, name: str, chance: int) -> None:
        """The process dies: it never acts again, and the other one sees its end after what is still on its way."""
        if chance:
            return
        self.side(name).connection_lost("killed")
        self.cut["source"] = self.cut["dest"] = True
        self.killed = True

    @rule(times=st.integers(1, 12))
    def proceed(self, times: int) -> None:
        """As it should go, for a while."""
        for _ in range(times):
            self.go_well()
            self.never_two_owners()

    def cut_and_come_back(self) -> None:
        for name in self.cut:
            self.side(name).connection_lost("cut")
            self.wire[name].clear()
        if self.dest.recoverable:
            self.connect_again()

    def go_well(self) -> None:
        """Everything arrives, then each side takes its next step."""
        steps: dict[tuple[SourceProtocol | DestinationProtocol, State], Callable[[], None]] = {
            (self.source, State.SETUP): self.offer,
            (self.dest, State.OFFERED): lambda: self.answer(1),
            (self.dest, State.CHANNELS): self.ready,
            (self.source, State.READY): self.page_map,
            (self.source, State.MAPS): self.round if self.rounds > 0 else self.switchover,
            (self.dest, State.ROUND): self.round_done,
            (self.dest, State.HANDED): self.prepared,
            (self.source, State.PREPARED): self.commit,
            (self.dest, State.COMMITTED): self.running,
            (self.dest, State.POSTCOPY): self.come_and_complete,
            (self.source, State.CLOSING): self.acknowledge,
            (self.dest, State.RECOVER): lambda: self.tell_what_is_here(True),
            (self.source, State.RECOVERING): self.take_it_back,
        }
        for name in self.wire:
            self.deliver(name, 1)
        for side in (self.dest, self.source):
            if step := steps.get((side, side.state)):
                step()

    def come_and_complete(self) -> None:
        if self.frees and self.arrived.count() < PAGES:
            self.pages_arrive(self.arrived.next(0, False), PAGES // 3)
            self.placed()
        else:
            self.complete()

    # ---- what the network does

    @rule(name=st.sampled_from(["source", "dest"]), share=st.floats(0, 1))
    def deliver(self, name: str, share: float) -> None:
        wire = self.wire[name]
        some = int(len(wire) * share) + (share > 0)
        self.side(name).receive_data(bytes(wire[:some]))
        del wire[:some]
        self.settle(name)

    @rule(name=st.sampled_from(["source", "dest"]), keep=st.integers(0, 40))
    def lose_tail(self, name: str, keep: int) -> None:
        del self.wire[name][keep:]
        self.cut[name] = True

    @rule(name=st.sampled_from(["source", "dest"]))
    def notice_end(self, name: str) -> None:
        if self.cut[name] and not self.wire[name]:
            self.side(name).receive_eof()
            self.settle(name)

    def dest_runs(self) -> bool:
        return self.dest._reached in (State.POSTCOPY, State.CLOSING)

    @precondition(lambda self: not self.killed and self.dest.recoverable)
    @rule()
    def connect_again(self) -> None:
        """A new connection comes about, perhaps while the source still believes in the old one."""
        self.dest.reconnected()
        self.never_two_owners()  # the source may not have decided, and learns only now that its connection is gone
        self.source.connection_lost("the destination has come back on another connection")
        if self.source.recoverable:
            self.wire = {"source": bytearray(), "dest": bytearray()}
            self.cut = {"source": False, "dest": False}
            self.source.reconnected()
        else:  # it is refused, with a proof: that has ended here
            self.dest.connection_lost("refused")
            self.dest.peer_ended(self.source.ending)

    @precondition(lambda self: not self.killed and self.dest.state in (State.PAUSED, State.IN_DOUBT))
    @rule()
    def patience_runs_out(self) -> None:
        """In doubt, it will not run here, and the source hears that when it is back; complete, it is no matter."""
        self.dest.give_up("nobody there")

    @precondition(lambda self: not self.killed and self.dest.state in (State.COMPLETED, State.ABORTED))
    @rule()
    def told_by_one_that_has_ended(self) -> None:
        """The destination, or its successor, answers whoever comes back, or says so by itself."""
        self.source.connection_lost("the destination has come to say that it has ended")
        if self.source.recoverable:
            self.returned = self.source.peer_ended(self.dest.ending) is State.ABORTED

    @rule(name=st.sampled_from(["source", "dest"]))
    def heartbeat_missed(self, name: str) -> None:
        self.side(name).connection_lost("no sign of life")

    @rule(name=st.sampled_from(["source", "dest"]), again=st.booleans(), data=st.binary(max_size=30))
    def inject(self, name: str, again: bool, data: bytes) -> None:
        """Bytes that nobody sent, or the last ones twice. Only once the stream is cut: TCP does not do this by
        itself."""
        if self.cut[name]:
            self.wire[name] += bytes(self.wire[name][-20:]) if again else data

    # ---- what must hold

    @invariant()
    def never_two_owners(self) -> None:
        if not hasattr(self, "source"):
            return
        assert not (self.source.may_run and self.dest.may_run)

    @invariant()
    def the_source_never_takes_back(self) -> None:
        if hasattr(self, "source") and self.source_decided and not self.returned:
            assert not self.source.may_run

    @invariant()
    def what_was_given_back_is_not_run_there(self) -> None:
        if hasattr(self, "source") and self.returned:
            assert self.source.may_run
            assert not self.dest.may_run
            assert not self.released.count()

    @invariant()
    def without_a_decision_the_source_keeps_it(self) -> None:
        if hasattr(self, "source") and not self.source_decided:
            assert self.source.may_run
            assert not self.dest.may_run

    @invariant()
    def no_page_is_at_neither_end(self) -> None:
        if hasattr(self, "source"):
            assert not self.released.without(self.arrived).count()

    @invariant()
    def nobody_runs_it_only_when_a_state_says_so(self) -> None:
        if hasattr(self, "source") and not self.source.may_run and not self.dest.may_run:
            assert self.source.state in (State.COMMITTED, State.PAUSED, State.RECOVER, State.RECOVERING)

    # ---- once the network stays up

    def teardown(self) -> None:
        if not hasattr(self, "source") or self.killed:
            return
        if True in self.cut.values() or self.source.ended or self.dest.ended:
            self.cut_and_come_back()
        if self.dest.state in (State.COMPLETED, State.ABORTED):
            self.told_by_one_that_has_ended()
        for _ in range(40):
            self.go_well()
            self.never_two_owners()
        assert self.dest.state in (State.COMPLETED, State.ABORTED)
        assert self.source.state is self.dest.state
        assert self.source.may_run == (self.source.state is State.ABORTED)


TwoHosts.TestCase.settings = settings(max_examples=300, stateful_step_count=60)
TestTwoHosts = pytest.mark.slow(TwoHosts.TestCase)
