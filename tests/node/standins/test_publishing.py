"""Peers that fit stand-ins beside training: steps go on, and nothing is lost or said twice, whatever happens."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from loopback import SECONDS, Loopback, LoopbackPeer, loopback
from loopback_workers import worked_manifest, working
from msgspec.structs import replace
from shoal.kernels.experts import OwnedExpert
from shoal.kernels.narrow import NarrowPublisher
from shoal.node.learning.composer import Composer
from shoal.node.run.manifest import StandInSpec
from shoal.node.standins.publishing import MOST_SKIPPED, ExpertDiverged
from shoal.protocol.experts.surrogates import Point, state_digest
from tiny import LAYERS, SLOTS, manifest_of

NARROW = {"kind": "narrow", "publish_every": 1, "refit_steps": 2, "replay_rows": 64}


class Held:
    """Fits that begin, and end when the test says so."""

    def __init__(self) -> None:
        self.begun, self.leave, self.fits = threading.Event(), threading.Event(), 0
        self.error: Exception | None = None
        self._refit = NarrowPublisher.refit

    def refit(self, publisher: NarrowPublisher, expert: OwnedExpert) -> None:
        self.fits += 1
        self.begun.set()
        assert self.leave.wait(SECONDS)
        if self.error is not None:
            raise self.error
        self._refit(publisher, expert)


@contextmanager
def held_fits() -> Iterator[Held]:
    held = Held()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NarrowPublisher, "refit", lambda publisher, expert: held.refit(publisher, expert))
        try:
            yield held
        finally:
            held.leave.set()


@pytest.fixture
def swarm(tmp_path: Path) -> Iterator[Loopback]:
    manifest = manifest_of(standin=NARROW, outer={"every_steps": 1_000_000}, train={"steps": 1_000_000})
    with loopback(tmp_path, manifest, 2) as swarm:
        first, second = swarm.peers
        swarm.call(first.own([0, 1], 1))
        swarm.call(second.own([2, 3], 1))
        yield swarm


def point(peer: LoopbackPeer, slot: int) -> Point | None:
    return peer.ask(lambda _: peer.exchange.point(slot))


def digest(peer: LoopbackPeer, slot: int) -> bytes:
    return peer.ask(lambda composer: state_digest(composer.standins(slot)))


def idle(peer: LoopbackPeer) -> bool:
    return peer.ask(lambda _: peer.exchange._making is None)


def test_steps_go_on_while_a_fit_runs(swarm: Loopback) -> None:
    first, second = swarm.peers
    with held_fits() as held:
        before = [digest(first, slot) for slot in (0, 1)]
        first.step()
        assert held.begun.wait(SECONDS)
        first.step(3)  # returns: three whole steps, each of which owes a publication
        assert first.composer.step == 4
        assert held.fits == 1
        assert [point(first, slot) for slot in (0, 1)] == [Point(1, 0)] * 2
        assert [digest(first, slot) for slot in (0, 1)] == before
        held.leave.set()
        # The one that was being made, and one for the three that fell due.
        swarm.until(lambda: [point(first, slot) for slot in (0, 1)] == [Point(1, 2)] * 2, "both are published")
        swarm.until(lambda: idle(first), "no other was begun")
    assert held.fits == 2 * 2 * LAYERS
    told = first.links.state.snapshot()["fits"]
    assert told["skipped"] == 2 * 2  # of the three, of two slots
    assert told["seconds"] > 0
    for slot in (0, 1):
        swarm.until(lambda s=slot: digest(first, s) == digest(second, s), "the other runs what was published")


@pytest.mark.parametrize("bad", [float("nan"), 1e30])
@pytest.mark.parametrize("kind", ["lowbit", "ternary"])
def test_what_has_diverged_is_an_error_that_says_what_to_do(tmp_path: Path, kind: str, bad: float) -> None:
    manifest = manifest_of(standin={**NARROW, "kind": kind}, train={"steps": 1_000_000})
    with loopback(tmp_path, manifest, 1) as swarm:
        (peer,) = swarm.peers
        swarm.call(peer.own([0], 1))

        def diverge(composer: Composer) -> None:
            with torch.no_grad():
                composer.experts_of(0)[1].masters()[1].fill_(bad)

        peer.ask(diverge)
        with pytest.raises(ExpertDiverged, match="learning rate is too high") as caught:
            peer.ask(lambda composer: peer.exchange.publish_now(composer, [0]))
        assert "weights" in caught.value.cause
        assert point(peer, 0) == Point(1, 0)


def test_training_waits_for_fits_that_are_far_behind(swarm: Loopback) -> None:
    """And goes on by itself: stand-ins do not get older and older where fits take longer than steps."""
    first, _ = swarm.peers
    with held_fits() as held:
        first.trainer.start_training()
        assert held.begun.wait(SECONDS)
        last = 1 + 1 + MOST_SKIPPED  # it begins, another falls due, and so often again
        swarm.until(lambda: first.composer.step == last, "it waits")
        # Others are still served. Between two of these it would take a step, if it did not wait.
        assert [first.ask(lambda composer: composer.step) for _ in range(4)] == [last] * 4
        held.leave.set()
        swarm.until(lambda: first.composer.step > 3 * last, "it goes on")
        first.trainer.pause_training()


def test_a_slot_that_changes_hands_meanwhile_is_not_published(swarm: Loopback) -> None:
    """Neither under its old lease nor under the next, also if that is this peer's again."""
    first, _ = swarm.peers
    with held_fits() as held:
        first.step()
        assert held.begun.wait(SECONDS)
        tensors, published = first.ask(lambda c: (c.snapshot(0), first.exchange.published(c, 0).snapshot()))
        first.ask(lambda c: first.exchange.release(c, 0))
        first.ask(lambda c: first.exchange.adopt(c, 0, 5, tensors, 1, published))
        was = digest(first, 0)
        first.ask(lambda c: first.exchange.release(c, 1))
        held.leave.set()
        swarm.until(lambda: idle(first), "the fits are done")
    assert point(first, 0) == Point(5, 0)
    assert digest(first, 0) == was
    assert point(first, 1) is None
    first.step()
    swarm.until(lambda: point(first, 0) == Point(5, 1), "its next is published as any other")


def test_a_handover_does_not_wait_for_fits(swarm: Loopback) -> None:
    first, _ = swarm.peers
    with held_fits() as held:
        first.step()
        assert held.begun.wait(SECONDS)
        first.ask(lambda c: c.freeze(0))
        tensors, was = first.ask(lambda c: c.snapshot(0)), digest(first, 0)
        assert tensors
        held.leave.set()
        swarm.until(lambda: point(first, 1) == Point(1, 1), "what is not frozen is published")
    assert point(first, 0) == Point(1, 0)
    assert digest(first, 0) == was


def test_an_error_in_a_fit_ends_the_training(swarm: Loopback) -> None:
    first, _ = swarm.peers
    failed: list[threading.ExceptHookArgs] = []
    with held_fits() as held, pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading, "excepthook", failed.append)
        held.error = ArithmeticError("no fit")
        held.leave.set()
        first.step()
        first.thread.join(SECONDS)
    assert failed[0].exc_value is held.error


def test_a_trainer_that_stops_leaves_no_fit_behind(swarm: Loopback) -> None:
    first, _ = swarm.peers
    with held_fits() as held:
        first.step()
        assert held.begun.wait(SECONDS)
        first.trainer.stop()
        swarm.until(first.trainer.fits._stopped.is_set, "it has stopped")
        held.leave.set()
        first.thread.join(SECONDS)
    assert not first.thread.is_alive()
    assert held.fits == 1  # of 2 * LAYERS


def test_settling_waits_for_what_is_due_and_no_longer_than_it_may(swarm: Loopback) -> None:
    first, second = swarm.peers
    with held_fits() as held:
        first.step(2)
        assert held.begun.wait(SECONDS)
        swarm.call(first.exchange.settle(0.1))  # comes back
        assert point(first, 0) == Point(1, 0)
        held.leave.set()
        swarm.call(first.exchange.settle(SECONDS))
        assert point(first, 0) == Point(1, 2)
        assert idle(first)
    swarm.until(lambda: digest(first, 0) == digest(second, 0), "it was sent")


def test_a_worker_that_leaves_publishes_what_is_being_made(tmp_path: Path) -> None:
    spec = replace(worked_manifest(), standin=StandInSpec(**NARROW))  # type: ignore[arg-type]
    with working(tmp_path, spec, 1) as swarm:
        worker = swarm.join()
        swarm.swarm.until(lambda: len(worker.held) == SLOTS, "the worker has all slots")
        with held_fits() as held:
            swarm.step()
            assert held.begun.wait(SECONDS)
            before = worker.ask(lambda w: {s: worker.peer.publishing.point(s).seq for s in w.owned})  # type: ignore[union-attr]
            worker.stop.requested = True
            held.leave.set()
            worker.leave()
        owner = worker.peer.worker
        after = {slot: worker.peer.publishing.point(slot) for slot in owner.owned}
        assert any(now is not None and now.seq > before[slot] for slot, now in after.items())
        followed = swarm.swarm.peers[0]
        for slot in owner.owned:
            ours = state_digest(owner.standins(slot))
            swarm.swarm.until(lambda s=slot, d=ours: digest(followed, s) == d, "composers have what it sent last")
