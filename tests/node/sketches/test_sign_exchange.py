"""Sign sketches over real transports: composers that own nothing, and a worker that sees no text."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from loopback import RUN, SECONDS
from loopback_workers import HANDLES, Working, counted, worked_manifest, working
from shoal.kernels.sign_sketch import SignSketch
from shoal.protocol import messages
from shoal.protocol.envelope import seal
from shoal.protocol.messages import ExpertSketch, SketchBatch, SketchReply, SlotSketch
from sketches import rows, sketch_of
from tiny import BATCH, CONTEXT, HIDDEN, LAYERS, SLOTS, WIDTH

ALL = set(range(SLOTS))
EVERY = 3


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Working]:
    spec = worked_manifest(kind="signs", gradient_every=EVERY)
    with working(tmp_path_factory.mktemp("signs"), spec, 2) as it:
        worker = it.join()
        it.swarm.until(lambda: set(worker.held) == ALL, "the worker owns every slot")
        owned = [peer.exchange.owners for peer in it.swarm.peers]
        it.swarm.until(lambda: all(len(owners()) == SLOTS for owners in owned), "composers know it")
        yield it


def test_every_few_steps_they_teach_experts_that_others_own(trio: Working) -> None:
    [worker] = trio.workers
    before = {slot: worker.ask(lambda w, s=slot: w.weights(s)) for slot in ALL}
    trio.step(EVERY - 1)
    assert not any(counted(peer.links, "sketch_rows") for peer in trio.swarm.peers), "not before it is due"
    trio.step(1)
    trio.swarm.until(lambda: worker.ask(lambda w: set(w.slot_steps)) == ALL, "every slot was stepped")
    trio.swarm.until(lambda: trio.same_standins(worker), "the composers run what the worker published")
    after = {slot: worker.ask(lambda w, s=slot: w.weights(s)) for slot in ALL}
    assert not any(torch.equal(after[slot][name], before[slot][name]) for slot in ALL for name in before[slot])
    pairs = EVERY * BATCH * CONTEXT * 2 * LAYERS  # of one composer; two experts a token
    assert [counted(peer.links, "sketch_rows")["out"] for peer in trio.swarm.peers] == [pairs, pairs]
    trio.swarm.until(lambda: counted(worker.links, "sketch_rows")["in"] == 2 * pairs, "all have arrived")
    assert not any(counted(peer.links, "sketches_lost") for peer in trio.swarm.peers)
    assert not refused(trio)


def refused(trio: Working) -> dict[str, float]:
    counts = counted(trio.workers[0].links, "refusals")
    return {reason: count for reason, count in counts.items() if reason.startswith("sketch")}


def signs(pairs: int = 5) -> bytes:
    return SignSketch.of(torch.randn(2 * WIDTH, HIDDEN), torch.randn(HIDDEN, WIDTH), pairs).to_bytes()


def test_what_is_none_is_refused_with_its_reason_and_changes_nothing(trio: Working) -> None:
    [worker], composer = trio.workers, trio.swarm.peers[0]
    slot, epoch = 1, worker.held[1]
    point = worker.ask(lambda _: worker.peer.publishing.point(slot))
    assert point is not None
    stepped = worker.ask(lambda w: dict(w.slot_steps))
    cases = {
        "malformed": [sketch_of(*rows(5)).to_bytes(), signs()[:-1], signs() + b"\0", b""],
        "implausible": [signs(BATCH * CONTEXT + 1)],
    }
    step = 1000
    for reason, bad in cases.items():
        for data in bad:
            experts = [ExpertSketch(HANDLES.of(slot, i, epoch), signs() if i else data) for i in range(LAYERS)]
            step += 1
            batch = SketchBatch(step, BATCH * CONTEXT, 1, (SlotSketch(slot, epoch, point.seq, tuple(experts)),))
            body = seal(composer.links.identity, RUN, batch.kind, messages.encode(batch))
            transport, addrs = composer.links.transport, worker.links.transport.addrs
            answer = trio.swarm.call(transport.call(addrs, batch.kind, body, deadline_seconds=SECONDS))
            assert messages.decode(answer, SketchReply).refused == ((slot, reason),)
    assert refused(trio) == {"sketch-malformed": 4, "sketch-implausible": 1}
    assert worker.ask(lambda w: dict(w.slot_steps)) == stepped
