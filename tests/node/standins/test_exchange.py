"""Stand-ins of two composers over a real directory and transport: equal to the bit, and safe from what peers send."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from loopback import SECONDS, Loopback, LoopbackPeer, loopback
from shoal.kernels.standin import Form, initial_standin
from shoal.node.learning.composer import Composer
from shoal.node.standins.exchange import FETCH_SECONDS
from shoal.protocol import messages
from shoal.protocol.experts.surrogates import state_digest
from shoal.protocol.messages import ExpertCounts, StandInSnapshot, SurrogateDelta
from shoal.protocol.transport.downloads import FetchQuery, Resource
from tiny import HIDDEN, LAYERS, SLOTS, WIDTH, manifest_of, train


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    manifest = manifest_of(standin={"publish_every": 1}, outer={"every_steps": 1_000_000}, train={"steps": 1_000_000})
    with loopback(tmp_path_factory.mktemp("exchange"), manifest, 2) as swarm:
        first, second = swarm.peers
        swarm.call(first.own([0, 1], 1))
        swarm.call(second.own([2, 3], 1))
        yield swarm


def digests(peer: LoopbackPeer, slot: int) -> bytes:
    return peer.ask(lambda composer: state_digest(composer.standins(slot)))


def agree(swarm: Loopback) -> bool:
    first, second = swarm.peers
    return all(digests(first, slot) == digests(second, slot) for slot in range(SLOTS))


def test_what_one_publishes_the_other_runs(swarm: Loopback) -> None:
    before = [digests(swarm.peers[0], slot) for slot in range(SLOTS)]
    for _ in range(3):
        for peer in swarm.peers:
            peer.step()
    for peer in swarm.peers:
        swarm.until(lambda p=peer: all(digests(p, s) != before[s] for s in range(SLOTS)), "all slots were published")
    swarm.until(lambda: agree(swarm), "both run the same stand-ins")


def test_no_step_waits_for_deltas_and_what_runs_does_not_change_in_one(swarm: Loopback) -> None:
    first, second = swarm.peers
    swarm.until(lambda: agree(swarm), "both run the same stand-ins")
    in_step, leave = threading.Event(), threading.Event()

    def long_step(composer: Composer) -> tuple[bytes, bytes]:
        before = state_digest(composer.standins(0))
        in_step.set()
        assert leave.wait(SECONDS)
        return before, state_digest(composer.standins(0))

    step = second.trainer.ask(long_step)
    assert in_step.wait(SECONDS)
    try:
        book, version = second.exchange._book, second.exchange._book.subscribers[0].version
        first.step()
        swarm.until(lambda: book.subscribers[0].version > version, "the book has moved")
    finally:
        leave.set()
    before, after = step.result(SECONDS)
    assert before == after
    swarm.until(lambda: agree(swarm), "the next step runs what has come")
    assert digests(second, 0) != before


def test_deltas_that_nobody_delivers_are_repaired(swarm: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = swarm.peers
    with monkeypatch.context() as deaf:
        lost: list = []
        deaf.setattr(second.exchange._book, "receive", lambda *message: lost.append(message))
        first.step()
        swarm.until(lambda: lost, "the deltas are lost")
        published = digests(first, 0)
    assert digests(second, 0) != published
    running = swarm.network.loop.create_task
    tasks: list = []
    swarm.network.loop.call_soon_threadsafe(
        lambda: tasks.extend(running(peer.exchange.run()) for peer in (first, second))
    )
    try:
        swarm.until(lambda: agree(swarm), "the gap is fetched")
    finally:
        swarm.network.loop.call_soon_threadsafe(lambda: [task.cancel() for task in tasks])


def test_announcements_cost_no_work_on_orders(swarm: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    """A message of 800 kB has 32,000: at 48 layers their orders took 1.6 s of everybody's only interpreter."""
    first, second = swarm.peers
    swarm.until(lambda: agree(swarm), "both run the same stand-ins")
    point, digest = second.exchange._book.subscribers[0].point, digests(first, 0)
    layers = of_size(HIDDEN, WIDTH)
    told = [SurrogateDelta(0, point.epoch, point.seq, 0, (), digest)] * 1000
    nobodys = [SurrogateDelta(SLOTS, point.epoch, 1, 0, tuple(layers), digest)] * 1000
    ordered: list[int] = []
    outward = second.exchange.layers.outward
    with monkeypatch.context() as counting:
        counting.setattr(second.exchange.layers, "outward", lambda slot, e: ordered.append(slot) or outward(slot, e))
        before = second.exchange._book.refusals["unknown-slot"]
        swarm.call(first.exchange.send([*told, *nobodys]))
        swarm.until(lambda: second.exchange._book.refusals["unknown-slot"] >= before + 1000, "the deltas are heard")
    assert len(ordered) < 100
    assert agree(swarm)


def test_an_owner_that_does_not_send_holds_up_no_repair_of_other_slots(swarm: Loopback) -> None:
    first, second = swarm.peers
    transport, loop = first.links.transport, swarm.network.loop
    honest, asked, tasks = transport._answerer.handler, [], []
    assert honest is not None

    async def withhold(query: FetchQuery) -> Resource | None:
        asked.append(query.resource)
        if query.resource == "standin/0":
            await asyncio.sleep(SECONDS)
        return await honest(query)

    swarm.until(lambda: agree(swarm), "both run the same stand-ins")
    transport.serve(withhold)
    lost = second.exchange._book.subscribers
    try:
        loop.call_soon_threadsafe(lambda: tasks.append(loop.create_task(second.exchange.run())))
        lost[0]._must_fetch, lost[0]._behind_since = True, 0.0
        swarm.until(lambda: "standin/0" in asked, "the first slot is asked for")
        lost[1]._must_fetch, lost[1]._behind_since = True, 0.0
        began = time.monotonic()
        swarm.until(lambda: "standin/1" in asked and not lost[1].behind, "the other slot was fetched meanwhile")
        assert time.monotonic() - began < FETCH_SECONDS / 2, "the other slot was fetched, but only afterwards"
        assert lost[0].behind
    finally:
        loop.call_soon_threadsafe(lambda: [task.cancel() for task in tasks])
        transport.serve(honest)
        lost[0]._must_fetch, lost[0]._behind_since = False, None


def test_a_standin_of_another_form_is_fetched_by_all_who_run_it(tmp_path: Path) -> None:
    spec = {"kind": "chosen", "publish_every": 1, "choose_every": 3, "trial_steps": 2, "refit_steps": 1}
    budgets = {"bytes_per_weight": 0.7, "flops_fraction": 0.4}
    manifest = manifest_of(
        standin=spec | budgets, outer={"every_steps": 1_000_000}, train={"steps": 1_000_000, "learning_rate": 1e-2}
    )
    with loopback(tmp_path, manifest, 2) as pair:
        first, second = pair.peers
        pair.call(first.own([0, 1], 1))
        pair.call(second.own([2, 3], 1))
        loop, tasks = pair.network.loop, []
        loop.call_soon_threadsafe(lambda: tasks.extend(loop.create_task(peer.exchange.run()) for peer in pair.peers))
        try:
            for _ in range(12):
                for peer in pair.peers:
                    peer.step()
            pair.until(lambda: agree(pair), "both run the same stand-ins")
            found = {form for slot in range(SLOTS) for form in first.ask(lambda c, s=slot: forms_of(c, s))}
            assert len(found) > 1, "all stand-ins have the form that they began with"
        finally:
            loop.call_soon_threadsafe(lambda: [task.cancel() for task in tasks])


def forms_of(composer: Composer, slot: int) -> list[Form]:
    return [Form.of(standin) for standin in composer.standins(slot)]


def of_size(hidden: int, width: int, kind: str = "lowbit") -> list[bytes]:
    standin = initial_standin(kind, torch.randn(2 * width, hidden), torch.randn(hidden, width), width)
    return [standin.to_bytes()] * LAYERS


@pytest.mark.parametrize(
    "layers",
    [of_size(2 * HIDDEN, WIDTH), of_size(HIDDEN, WIDTH, "narrow"), of_size(HIDDEN, WIDTH)[:1], [b"junk"] * LAYERS],
    ids=["another size", "another kind", "too few layers", "junk"],
)
def test_standins_that_do_not_fit_are_refused(swarm: Loopback, layers: list[bytes]) -> None:
    first, second = swarm.peers
    swarm.until(lambda: agree(swarm), "both run the same stand-ins")
    before = digests(second, 0)

    async def lie(_: FetchQuery) -> Resource:
        return Resource(messages.encode(StandInSnapshot(0, 1, 1 << 40, tuple(layers), bytes(16))))

    honest = first.links.transport._answerer.handler
    first.links.transport.serve(lie)
    try:
        assert not swarm.call(second.exchange.fetch_standin(0, first.peer_id))
    finally:
        first.links.transport.serve(honest)
    assert digests(second, 0) == before
    second.step()


@pytest.mark.parametrize("layers", [of_size(2 * HIDDEN, WIDTH), of_size(HIDDEN, WIDTH)[:1]], ids=["size", "layers"])
def test_a_handover_with_foreign_standins_leaves_the_slot_followed(swarm: Loopback, layers: list[bytes]) -> None:
    first, second = swarm.peers
    tensors = first.ask(lambda composer: composer.snapshot(0))
    lie = StandInSnapshot(0, 1, 1 << 40, tuple(layers), bytes(16))
    with pytest.raises(ValueError, match=r"."):
        second.ask(lambda composer: second.exchange.adopt(composer, 0, 2, tensors, 1, lie))
    assert second.ask(lambda composer: composer.owned) == {2, 3}
    second.step()
    before = digests(first, 0)
    first.step()
    swarm.until(lambda: digests(first, 0) != before, "the slot was published")
    swarm.until(lambda: agree(swarm), "it is still followed")


def test_counts_of_others_weigh_on_the_balance_loss(swarm: Loopback) -> None:
    first, second = swarm.peers
    first.step()
    counts = first.ask(lambda composer: composer.last_counts)
    known = second.exchange
    swarm.until(
        lambda: first.peer_id in known._others_counts and torch.equal(known._others_counts[first.peer_id][1], counts),
        "the counts have come",
    )
    second.step()
    assert torch.equal(second.ask(lambda composer: composer.swarm_counts), counts)
    second.step()


def test_counts_of_many_batches_are_told_as_of_one(swarm: Loopback) -> None:
    """An island's step may be of more than one; others believe no more pairs than a batch has."""
    first, second = swarm.peers

    def of_four(composer: Composer) -> None:
        composer.last_counts, composer.last_batches = 4 * torch.arange(LAYERS * SLOTS).view(LAYERS, SLOTS) + 3, 4
        first.exchange.after_step(composer)

    first.step()
    first.ask(of_four)
    swarm.until(
        lambda: torch.equal(
            second.exchange._others_counts[first.peer_id][1], torch.arange(LAYERS * SLOTS).view(LAYERS, SLOTS)
        ),
        "the counts have come",
    )


def counted(layers: int, slots: int, value: int) -> ExpertCounts:
    return ExpertCounts(1, tuple(tuple([value] * slots) for _ in range(layers)))


@pytest.mark.parametrize(
    "lie", [counted(LAYERS + 1, SLOTS, 1), counted(LAYERS, SLOTS + 3, 1), counted(LAYERS, SLOTS, (1 << 48) - 1)],
    ids=["layers", "slots", "huge"],
)  # fmt: skip
def test_counts_that_cannot_be_are_left_out(swarm: Loopback, lie: ExpertCounts) -> None:
    first, second = swarm.peers
    second.exchange.on_counts(first.peer_id, lie)
    second.step(2)
    assert second.ask(lambda composer: composer.swarm_counts) is None


def test_counts_of_strangers_are_not_kept(swarm: Loopback) -> None:
    second = swarm.peers[1]
    before = set(second.exchange._others_counts)
    second.exchange.on_counts("12D3KooWstranger", counted(LAYERS, SLOTS, 1))
    assert set(second.exchange._others_counts) == before


def test_a_slot_moves_with_its_published_state(swarm: Loopback) -> None:
    """Handover by hand: adopt at the next epoch, release, and both go on with equal stand-ins."""
    first, second = swarm.peers
    slot = random.choice([2, 3])
    first.step()
    second.step()
    tensors, published = second.ask(lambda c: (c.snapshot(slot), second.exchange.published(c, slot).snapshot()))
    announcement = first.ask(lambda c: first.exchange.adopt(c, slot, 2, tensors, 1, published))
    second.ask(lambda c: second.exchange.release(c, slot))
    swarm.call(first.claim([0, 1, slot], 2))
    swarm.call(first.exchange.send([announcement]))
    swarm.until(lambda: second.links.view().leases[slot].owner == first.peer_id, "the claim is known")
    swarm.call(on_loop(second))
    first.step(2)
    swarm.until(lambda: digests(first, slot) == digests(second, slot), "the former owner follows")
    assert second.ask(lambda composer: slot not in composer.owned)


async def on_loop(peer: LoopbackPeer) -> None:
    peer.exchange.on_leases()


def test_a_composer_trains_after_all_this(swarm: Loopback) -> None:
    def losses(composer: Composer) -> list[float]:
        return train(composer, 2)

    assert all(loss < 10 for peer in swarm.peers for loss in peer.ask(losses))
