"""Slots that move between workers and composers: nothing is lost, and every expert arrives at its own layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from loopback_workers import by_layer, counted, same, without_published, worked_manifest, working
from shoal.protocol.experts.ownership import COPY_RAISE
from tiny import LAYERS, SLOTS

ALL = set(range(SLOTS))


def test_a_slot_goes_to_a_composer_and_back_and_its_experts_to_their_own_layers(tmp_path: Path) -> None:
    with working(tmp_path, worked_manifest(), 1) as it:
        [composer], worker = it.swarm.peers, it.join("first")
        it.swarm.until(lambda: len(composer.exchange.owners()) == SLOTS, "the composer knows the owner")
        it.step(3)
        it.swarm.until(lambda: worker.ask(lambda w: set(w.slot_steps)) == ALL, "every slot was stepped")
        it.swarm.until(lambda: it.same_standins(worker), "the composer runs what was published")
        it.quiet(worker)
        epochs = worker.held
        before = {s: by_layer(worker.ask(lambda w, s=s: w.snapshot(s)), s, epochs[s]) for s in ALL}
        assert all(f"{layer}.down.exp_avg_sq" in before[s] for s in ALL for layer in range(LAYERS))

        it.set_capacity(composer, SLOTS)
        worker.leave()
        it.swarm.until(lambda: set(composer.keeper.held) == ALL, "the composer owns every slot")
        for slot in ALL:
            assert composer.keeper.held[slot] == epochs[slot] + COPY_RAISE
            assert same(without_published(composer.ask(lambda c, s=slot: c.snapshot(s))), before[slot])
        it.step(2)  # it trains them itself
        assert composer.ask(lambda c: c.owned) == ALL
        collector: Any = composer.composer.collector
        trained = {s: without_published(composer.ask(lambda c, s=s: c.snapshot(s))) for s in ALL}
        assert not any(same(trained[s], before[s]) for s in ALL)

        again = it.join("second")
        it.set_capacity(composer, 0)
        it.swarm.until(lambda: set(again.held) == ALL, "the second worker owns every slot")
        for slot in ALL:
            assert again.held[slot] == epochs[slot] + 2 * COPY_RAISE
            got = by_layer(again.ask(lambda w, s=slot: w.snapshot(s)), slot, again.held[slot])
            assert same(got, trained[slot])
        it.swarm.until(lambda: len(composer.exchange.owners()) == SLOTS, "the composer knows the new owner")
        # What it trained itself is not told again: a step's sketches stand for that step.
        it.swarm.until(lambda: not composer.ask(lambda c: c.owned), "the composer has let go")
        assert collector.take(dict.fromkeys(ALL, 1.0))[0].tokens == 0
        it.step(2)
        it.swarm.until(lambda: again.ask(lambda w: set(w.slot_steps)) == ALL, "it trains them")
        it.swarm.until(lambda: it.same_standins(again), "the composer runs what it publishes")
        assert not counted(again.links, "slots")["lost"]  # type: ignore[comparison-overlap]


def test_a_worker_takes_over_from_one_that_vanished(tmp_path: Path) -> None:
    with working(tmp_path, worked_manifest(), 1) as it:
        [composer] = it.swarm.peers
        first = it.join("first")
        it.swarm.until(lambda: len(composer.exchange.owners()) == SLOTS, "the composer knows the owner")
        second = it.join("second")

        async def share() -> set[int]:
            desired = second.peer.keeper._situation().desired
            return {slot for slot, peers in enumerate(desired) if peers[0] == second.peer_id}

        it.swarm.until(
            lambda: set(second.held) == it.swarm.call(share()) and set(first.held) == ALL - set(second.held),
            "each has its share",
        )
        epochs = first.held
        states = []
        for _ in range(4):
            it.step()
            it.quiet(first)  # a step whose call failed leaves it as it was: its rows go with the next
            states.append({s: by_layer(first.ask(lambda w, s=s: w.snapshot(s)), s, epochs[s]) for s in epochs})
        assert first.ask(lambda w: epochs.keys() <= w.slot_steps.keys())
        copies = second.peer.keeper._copies.held
        it.swarm.until(
            lambda: all(
                s in copies and copies[s].epoch == epoch and copies[s].version >= 2 for s, epoch in epochs.items()
            ),
            "copies are kept",
        )
        first.vanish()
        it.swarm.until(lambda: set(second.held) == ALL, "the other takes over")
        for slot, epoch in epochs.items():
            assert second.held[slot] == epoch + COPY_RAISE
            got = by_layer(second.ask(lambda w, s=slot: w.snapshot(s)), slot, epoch + COPY_RAISE)
            assert any(same(got, state[slot]) for state in states)  # as of its copy, every expert at its layer
        it.swarm.until(lambda: {t.owner for t in composer.exchange.owners().values()} == {second.peer_id}, "known")
        it.step(2)
        it.swarm.until(lambda: it.same_standins(second), "the composer runs what it publishes")
        assert not counted(second.links, "slots")["lost"]  # type: ignore[comparison-overlap]


def test_a_worker_that_comes_back_has_what_it_wrote_down(tmp_path: Path) -> None:
    with working(tmp_path, worked_manifest(), 1) as it:
        [composer], worker = it.swarm.peers, it.join("worker")
        it.swarm.until(lambda: len(composer.exchange.owners()) == SLOTS, "the composer knows the owner")
        it.step(2)
        it.swarm.until(lambda: worker.ask(lambda w: set(w.slot_steps)) == ALL, "every slot was stepped")
        it.swarm.until(lambda: it.same_standins(worker), "the composer runs what was published")
        it.quiet(worker)
        epochs = worker.held
        state = {s: by_layer(worker.ask(lambda w, s=s: w.snapshot(s)), s, epochs[s]) for s in ALL}
        worker.leave()
        again = it.join("worker")
        assert again.peer_id == worker.peer_id
        it.swarm.until(lambda: set(again.held) == ALL, "it owns every slot again")
        for slot, epoch in again.held.items():
            assert epoch > epochs[slot]
            assert same(by_layer(again.ask(lambda w, s=slot: w.snapshot(s)), slot, epoch), state[slot])


def test_a_worker_that_is_there_before_any_composer_says_what_it_waits_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with working(tmp_path, worked_manifest(), 0) as it:
        worker = it.join("early")
        tries = []
        rebuild = worker.peer.keeper._rebuild

        async def counted_rebuild(slot: int) -> Any:
            tries.append(slot)
            return await rebuild(slot)

        worker.peer.keeper._rebuild = counted_rebuild  # type: ignore[method-assign]
        it.swarm.until(lambda: len(tries) > SLOTS, "it has tried again")
        assert "waits for a composer" in worker.links.state.snapshot()["phase_detail"]
        assert "slot.attempt_failed" not in caplog.text
