"""Sketches over real transports: composers that own nothing, and workers that see no text."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from loopback import RUN, SECONDS
from loopback_workers import HANDLES, LoopbackWorker, Working, by_layer, counted, same, worked_manifest, working
from shoal.kernels.sketch import RowBuffer
from shoal.node.peer.links import Links
from shoal.node.sketches import sketch_receiving
from shoal.protocol import messages
from shoal.protocol.envelope import seal
from shoal.protocol.errors import Refused
from shoal.protocol.experts.surrogates import state_digest
from shoal.protocol.messages import ExpertSketch, SketchBatch, SketchReply, SlotSketch
from sketches import rows, sketch_of
from tiny import BATCH, CONTEXT, HIDDEN, LAYERS, SLOTS

ALL = set(range(SLOTS))
TOKENS = BATCH * CONTEXT

# -- one worker and two composers --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Working]:
    with working(tmp_path_factory.mktemp("sketches"), worked_manifest(), 2) as it:
        worker = it.join()
        it.swarm.until(lambda: set(worker.held) == ALL, "the worker owns every slot")
        owned = [peer.exchange.owners for peer in it.swarm.peers]
        it.swarm.until(lambda: all(len(owners()) == SLOTS for owners in owned), "composers know it")
        yield it


def test_composers_teach_experts_that_they_do_not_own(trio: Working) -> None:
    """Sketches there, deltas back: afterwards everybody runs what the worker has learned, to the bit."""
    [worker] = trio.workers
    before = {slot: worker.ask(lambda w, s=slot: w.weights(s)) for slot in ALL}
    seeded = trio.swarm.peers[0].ask(lambda c: [state_digest(c.standins(slot)) for slot in ALL])
    for slot, epoch in worker.held.items():  # it began with the seeded experts, each where it belongs
        first = {}
        for layer, expert in enumerate(trio.swarm.peers[0].ask(lambda c, s=slot: c.first_experts(s))):
            first |= {f"{layer}.gate_up": expert.gate_up, f"{layer}.down": expert.down}
        assert same(by_layer(before[slot], slot, epoch), first)
    trio.step(3)
    trio.swarm.until(lambda: worker.ask(lambda w: set(w.slot_steps)) == ALL, "every slot was stepped")
    trio.swarm.until(lambda: trio.same_standins(worker), "the composers run what the worker published")
    after = {slot: worker.ask(lambda w, s=slot: w.weights(s)) for slot in ALL}
    assert not any(torch.equal(after[slot][name], before[slot][name]) for slot in ALL for name in before[slot])
    now = trio.swarm.peers[0].ask(lambda c: [state_digest(c.standins(slot)) for slot in ALL])
    assert not set(now) & set(seeded)
    assert not any(peer.ask(lambda c: c.owned) for peer in trio.swarm.peers)
    assert worker.ask(lambda w: w.step) == 3
    sent = sum(counted(peer.links, "sketch_rows")["out"] for peer in trio.swarm.peers)
    trio.swarm.until(lambda: counted(worker.links, "sketch_rows")["in"] == sent, "every row has arrived")
    assert not any(counted(peer.links, "sketches_lost") for peer in trio.swarm.peers)


class Told:
    """A batch of one slot that the worker takes, and ways to spoil it."""

    def __init__(self, worker: LoopbackWorker, step: int) -> None:
        self.slot = 1
        self.epoch = worker.held[self.slot]
        point = worker.ask(lambda _: worker.peer.publishing.point(self.slot))
        assert point is not None
        self.seq, self.step, self.tokens, self.steps = point.seq, step, TOKENS, 1
        self.rows = [sketch_of(*rows(5)).to_bytes() for _ in range(LAYERS)]
        self.handle_epoch: int | None = None

    def batch(self) -> SketchBatch:
        epoch = self.epoch if self.handle_epoch is None else self.handle_epoch
        experts = [ExpertSketch(HANDLES.of(self.slot, i, epoch), data) for i, data in enumerate(self.rows)]
        sketch = SlotSketch(self.slot, self.epoch, self.seq, tuple(experts))
        return SketchBatch(self.step, self.tokens, self.steps, (sketch,))


def call(
    trio: Working, links: Links, batch: SketchBatch, *, sealer: Links | None = None, name: str = ""
) -> SketchReply:
    body = seal((sealer or links).identity, RUN, batch.kind, messages.encode(batch))
    addrs = trio.workers[0].links.transport.addrs
    answer = trio.swarm.call(links.transport.call(addrs, name or batch.kind, body, deadline_seconds=SECONDS))
    return messages.decode(answer, SketchReply)


def of_hidden(hidden: int) -> bytes:
    buffer = RowBuffer(hidden)
    buffer.add(torch.randn(5, hidden), torch.randn(5, hidden))
    return buffer.take(None).to_bytes()


def not_finite() -> bytes:
    data = bytearray(sketch_of(*rows(5)).to_bytes())
    data[24:26] = torch.tensor([math.nan]).half().view(torch.uint8).numpy().tobytes()
    return bytes(data)


# Each spoils a batch so that its one slot is refused for the reason that names it.
SPOILED: dict[str, Callable[[Told], object]] = {
    "not-owner": lambda told: setattr(told, "slot", SLOTS + 3),
    "stale-epoch": lambda told: setattr(told, "epoch", told.epoch - 1),
    "early-epoch": lambda told: setattr(told, "epoch", told.epoch + 1),
    "early-version": lambda told: setattr(told, "seq", told.seq + 1),
    "stale-version": lambda told: setattr(told, "seq", told.seq - 5),
    "unknown-handle": lambda told: setattr(told, "handle_epoch", told.epoch + 7),
    "malformed": lambda told: setattr(told, "rows", [of_hidden(HIDDEN + 2)] * LAYERS),
    "malformed ": lambda told: setattr(told, "rows", [told.rows[0], not_finite()]),
    "malformed  ": lambda told: setattr(told, "rows", [told.rows[0], b"junk"]),
    "implausible": lambda told: setattr(told, "tokens", 4),
}


@pytest.mark.parametrize("reason", SPOILED)
def test_a_bad_sketch_is_refused_with_its_reason_and_counted(trio: Working, reason: str) -> None:
    [worker], composer = trio.workers, trio.swarm.peers[0]
    while worker.ask(lambda _: min(worker.peer.publishing.point(slot).seq for slot in ALL)) < 5:  # type: ignore[union-attr]
        trio.step()
        trio.swarm.until(lambda: trio.same_standins(worker), "published")
    trio.quiet(worker)
    key = f"sketch-{reason.strip()}"
    before = counted(worker.links, "refusals").get(key, 0)
    seen, sums = worker.peer.receiver.rows, worker.ask(lambda w: set(w._sums))
    told = Told(worker, step=1000 + hash(reason) % 1000)
    SPOILED[reason](told)
    reply = call(trio, composer.links, told.batch())
    assert (reply.accepted, reply.refused) == (0, ((told.slot, reason.strip()),))
    assert counted(worker.links, "refusals")[key] == before + 1
    assert worker.ask(lambda w: set(w._sums)) == sums
    assert worker.peer.receiver.rows == seen


def refused(trio: Working, links: Links, batch: SketchBatch, **how: Any) -> str:
    with pytest.raises(Refused) as caught:
        call(trio, links, batch, **how)
    return caught.value.reason


def test_batches_of_who_may_not_send_are_refused_whole(trio: Working, tmp_path: Path) -> None:
    [worker], (first, second) = trio.workers, trio.swarm.peers
    told = Told(worker, step=3000)
    before = counted(worker.links, "refusals")
    with trio.swarm.observer(tmp_path / "stranger") as stranger:
        assert refused(trio, stranger, told.batch()) == "not-a-member"
    assert refused(trio, first.links, told.batch(), sealer=second.links) == "forged"
    assert refused(trio, first.links, told.batch(), name="sketch-match") == "unknown-call"
    told.tokens = TOKENS + 1
    assert refused(trio, first.links, told.batch()) == "too-many-tokens"
    told.steps = 5000
    assert refused(trio, first.links, told.batch()) == "too-many-steps"
    after = counted(worker.links, "refusals")
    for reason in ("not-a-member", "forged", "too-many-tokens", "too-many-steps"):
        assert after[f"sketch-{reason}"] == before.get(f"sketch-{reason}", 0) + 1


def test_no_body_of_a_stranger_is_read(trio: Working, tmp_path: Path) -> None:
    """Two that send as slowly as they may would hold all the memory that there is for composers' sketches."""
    [worker] = trio.workers
    transport, body = worker.links.transport, bytes(8_000_000)
    began = transport.counters.call_bytes_received
    with trio.swarm.observer(tmp_path / "stranger") as stranger:

        async def send() -> None:
            await stranger.transport.call(transport.addrs, SketchBatch.kind, body, deadline_seconds=SECONDS)

        with pytest.raises(Refused) as caught:
            trio.swarm.call(send())
    assert caught.value.reason == "not-a-member"
    time.sleep(1.5)  # the host counts every second
    assert transport.counters.call_bytes_received < began + len(body) // 2


def test_a_sketch_that_is_sent_again_counts_once(trio: Working) -> None:
    [worker], composer = trio.workers, trio.swarm.peers[1]
    told = Told(worker, step=4000)
    seen = worker.peer.receiver.rows
    assert call(trio, composer.links, told.batch()).accepted == 1
    assert call(trio, composer.links, told.batch()).refused == ((told.slot, "repeated"),)
    trio.swarm.until(lambda: worker.peer.receiver.rows == seen + 5 * LAYERS, "its rows were learned from")
    assert worker.ask(lambda w: w.step) < 100  # and its claim about the step moved nothing


def test_of_much_a_part_is_heard_before_each_step(trio: Working, monkeypatch: pytest.MonkeyPatch) -> None:
    [worker], composer = trio.workers, trio.swarm.peers[0]
    trio.quiet(worker)
    receiver, trainer, seen = worker.peer.receiver, worker.peer.trainer, worker.peer.receiver.rows
    drain, gate, drains = receiver.drain, threading.Event(), []

    def noted(owner: Any) -> None:
        drain(owner)
        drains.append(receiver.rows - seen)

    monkeypatch.setattr(sketch_receiving, "HEARD_STEPS", 1)
    monkeypatch.setattr(receiver, "drain", noted)
    told = [Told(worker, step=3000 + number) for number in range(4)]
    trainer.ask(lambda _: gate.wait(SECONDS))
    for each in told:
        assert call(trio, composer.links, each.batch()).accepted == 1
    gate.set()
    of_one = 5 * LAYERS
    trio.swarm.until(lambda: receiver.rows == seen + 4 * of_one, "all is heard")
    assert drains[:2] == [2 * of_one, 4 * of_one]


def test_a_composer_that_waited_too_long_for_an_owner_is_not_refused_for_ever(
    trio: Working, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has come together over too many steps is given up; what comes after that counts."""
    [worker], composer = trio.workers, trio.swarm.peers[0]
    assert composer.sender is not None
    before = counted(worker.links, "refusals")
    with monkeypatch.context() as away:
        away.setattr(composer.exchange, "owners", dict)
        composer.step(2)
        assert not composer.sender._rates, "of an owner that has gone there is nothing to keep"
    composer.ask(lambda c: c.collector.begin_step(0, 5000))  # type: ignore[union-attr]
    trio.step()
    assert counted(composer.links, "sketches_lost") == {"too-many-steps": SLOTS}
    rows_before = counted(worker.links, "sketch_rows")["in"]
    trio.step(2)
    trio.swarm.until(lambda: counted(worker.links, "sketch_rows")["in"] > rows_before, "it is heard again")
    assert counted(worker.links, "refusals") == before
    assert composer.sender._rates[worker.peer_id].share == 1.0


def test_what_is_lost_on_the_way_is_counted_by_slots_and_known_reasons(trio: Working) -> None:
    """An owner cannot make a composer keep count of reasons that it makes up."""
    [worker], composer = trio.workers, trio.swarm.peers[0]
    assert composer.sender is not None
    lost = counted(composer.links, "sketches_lost")

    async def make_up(*_: Any) -> bytes:
        return messages.encode(SketchReply(1.0, 0, tuple((slot, f"whim-{slot}") for slot in ALL)))

    async def refuse(*_: Any) -> bytes:
        raise Refused("not-a-member", "go away")

    transport = worker.links.transport
    try:
        for answer, reason in ((make_up, "other"), (refuse, "not-a-member")):
            transport.answer_calls(answer)
            composer.step()
            trio.swarm.until(
                lambda r=reason: counted(composer.links, "sketches_lost").get(r, 0) == lost.get(r, 0) + SLOTS, "counted"
            )
        assert counted(composer.links, "sketches_lost").keys() == lost.keys() | {"other", "not-a-member"}
        assert composer.sender._rates[worker.peer_id].share == 0.5
    finally:
        transport.answer_calls(worker.peer.receiver.answer, admit=worker.peer.receiver.admit)


# -- a busy owner ------------------------------------------------------------------------------------------------------


def test_a_busy_owner_slows_its_senders_down_and_they_recover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sketch_receiving, "QUEUE_BYTES", 64_000)  # a few steps' rows
    with working(tmp_path, worked_manifest(max_age=1000), 1) as it:
        worker = it.join()
        [composer] = it.swarm.peers
        it.swarm.until(lambda: len(composer.exchange.owners()) == SLOTS, "the composer knows the owner")
        assert composer.sender is not None
        it.step()
        rate = composer.sender._rates[worker.peer_id]
        assert rate.share == 1.0
        with worker.stuck():

            def full() -> bool:
                it.step()
                return "busy" in counted(composer.links, "sketches_lost")

            it.swarm.until(full, "there is no room")
            assert rate.share < 0.6
            busy = counted(worker.links, "refusals")["sketch-busy"]
            assert busy >= 1
        learned = counted(worker.links, "sketch_rows")["in"]

        def faster() -> bool:
            it.step()
            return rate.share == 1.0

        it.swarm.until(faster, "it sends all of its rows again")
        it.swarm.until(lambda: counted(worker.links, "sketch_rows")["in"] > learned, "they are learned from")
