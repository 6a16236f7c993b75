"""Audits over real transports: a worker that falsifies its updates loses its slots to one that does not."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from loopback import HANDLE_KEY, SECONDS, Loopback, LoopbackPeer, loopback
from loopback_workers import LEASE_SECONDS, LoopbackWorker
from shoal.node.audits.auditor import Auditor
from shoal.node.learning.worker import Worker
from shoal.node.run.manifest import Manifest, OwnershipSpec, SketchSpec, TrustSpec
from shoal.node.slots.deposing import Deposing
from shoal.protocol import resources
from shoal.protocol.directory.records import Lease, LeaseRecord
from shoal.protocol.errors import FetchFailed
from shoal.protocol.experts.auditing import LIES, Finding
from shoal.protocol.experts.ownership import COPY_RAISE
from shoal.protocol.messages import Accusation
from tiny import SLOTS, manifest_of

ALL = set(range(SLOTS))
NEVER = 1_000_000_000


def manifest(audit_every: int) -> Manifest:
    base = manifest_of(outer={"every_steps": 1_000_000}, train={"steps": 1_000_000}, standin={"publish_every": 2})
    return msgspec.structs.replace(
        base,
        ownership=OwnershipSpec(lease_seconds=LEASE_SECONDS, snapshot_every=4),
        sketch=SketchSpec(patience_seconds=0.3),
        trust=TrustSpec(audit_every=audit_every),
    )


class Watched:
    """Composers that own nothing and audit, and workers."""

    def __init__(self, swarm: Loopback, folder: Path) -> None:
        self.swarm, self.folder = swarm, folder
        self.workers: list[LoopbackWorker] = []
        self.auditors: dict[str, Auditor] = {}
        self._tasks: list[asyncio.Task[None]] = []
        for peer in swarm.peers:
            self._equip(peer)

    def _equip(self, peer: LoopbackPeer) -> None:
        assert peer.member is not None
        assert peer.library is not None
        peer.library.handle_key = HANDLE_KEY
        peer.send_sketches()
        assert peer.sender is not None
        deposing = Deposing(peer.links, audits=True)
        auditor = Auditor(
            peer.links, peer.trainer, peer.exchange, deposing, peer.sender.sent,
            max_record_bytes=1 << 24, rng=random.Random(len(self.auditors)),
        )  # fmt: skip
        self.auditors[peer.peer_id] = auditor
        peer.member.on_accusation = deposing.on_accusation
        peer.member.capacity = peer.keeper.capacity = 0

        async def follow() -> None:
            assert peer.member is not None
            await peer.member.announce()
            self._tasks.extend(
                asyncio.create_task(work) for work in (peer.exchange.run(), peer.keeper.run(), auditor.run())
            )

        self.swarm.call(follow())

    def join(self, name: str) -> LoopbackWorker:
        worker = LoopbackWorker(self.swarm, self.folder / name, capacity=SLOTS)
        self.workers.append(worker)
        return worker

    def step_until(self, condition: Callable[[], object], what: str) -> None:
        """Composers train until something holds."""
        deadline = time.monotonic() + 2 * SECONDS
        while not condition():
            assert time.monotonic() < deadline, f"still waiting: {what}; audits {self.audits()}"
            for peer in self.swarm.peers:
                peer.step()
                peer.trainer.ask(self.auditors[peer.peer_id].after_step).result(SECONDS)
                # As fast as its sketches are answered: that is what paces a real composer's link.
                self.swarm.until(lambda p=peer: not p.sender._under_way, "its sketches were answered")

    def audits(self) -> list[dict[str, float]]:
        """Per composer, audits by outcome."""
        return [dict(peer.links.state.snapshot()["audits"]) for peer in self.swarm.peers]

    def owned(self, worker: LoopbackWorker) -> set[int]:
        """In every composer's eyes."""
        views = [peer.links.view().leases for peer in self.swarm.peers]
        return {s for s in ALL if all(s in view and view[s].owner == worker.peer_id for view in views)}

    def targets(self) -> list[dict[int, str]]:
        """Per composer, to whom its sketches go."""
        return [{s: t.owner for s, t in p.exchange.owners().items()} for p in self.swarm.peers]

    def close(self) -> None:
        for worker in self.workers:
            worker.close()

        async def cancel() -> None:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

        self.swarm.call(cancel())


@contextlib.contextmanager
def watched(folder: Path, spec: Manifest, composers: int = 2) -> Iterator[Watched]:
    with loopback(folder / "swarm", spec, composers) as swarm:
        it = Watched(swarm, folder)
        try:
            yield it
        finally:
            it.close()


def falsify(worker: Worker) -> None:
    """From now on this worker moves its experts the wrong way, and says nothing of it."""
    honest = worker.optimizer.step

    def step() -> None:
        weights = [w for group in worker.optimizer.param_groups for w in group["params"]]
        before = [w.detach().clone() for w in weights]
        honest()
        with torch.no_grad():
            for w, old in zip(weights, before, strict=True):
                w.copy_(2 * old - w)

    worker.optimizer.step = step  # type: ignore[assignment, method-assign]


@pytest.mark.timeout(300)
def test_a_worker_that_falsifies_its_updates_is_deposed_and_an_honest_one_is_not(tmp_path: Path) -> None:
    with watched(tmp_path, manifest(audit_every=5)) as it:
        liar = it.join("liar")
        it.step_until(lambda: it.owned(liar) == ALL, "the first worker owns every slot")
        honest = it.join("honest")
        it.step_until(lambda: it.owned(honest) and it.owned(liar) | it.owned(honest) == ALL, "they share")
        it.step_until(lambda: sum(each.get("passed", 0) for each in it.audits()) >= 4, "audits pass")
        assert not any(LIES & each.keys() for each in it.audits())
        epochs = dict(liar.held)
        kept = dict(honest.held)

        liar.ask(falsify)
        it.step_until(lambda: it.owned(honest) == ALL, "the liar's slots are the honest worker's")
        it.swarm.until(lambda: not liar.held, "the liar lets go")
        for slot, epoch in epochs.items():
            assert honest.held[slot] == epoch + COPY_RAISE
        assert {slot: honest.held[slot] for slot in kept} == kept
        for auditor in it.auditors.values():  # each has seen for itself
            assert auditor._deposing.distrust.convicted == {liar.peer_id: Finding.WRONG_UPDATE}
        assert sum(each.get("wrong-update", 0) for each in it.audits()) == 2

        # It claims them back, at an epoch that leaves no room for others.
        now = time.time()
        leases = [Lease(slot, 1 << 47, 0) for slot in ALL]
        again = LeaseRecord(owner=liar.peer_id, leases=leases, issued_at=now, expires_at=now + 60)
        it.swarm.call(liar.links.announce(again))
        it.swarm.until(
            lambda: any(  # the claim, or what its keeper said after it
                isinstance(entry.record, LeaseRecord)
                and entry.record.owner == liar.peer_id
                and entry.record.issued_at >= now
                for entry in it.swarm.peers[0].links.directory._cache.values()
            ),
            "the claim is heard",
        )
        steps = honest.ask(lambda w: w.step)
        it.step_until(lambda: honest.ask(lambda w: w.step) > steps + 5, "the honest one trains on")
        assert set(honest.held) == ALL
        assert it.owned(honest) == ALL
        assert all(set(owners.values()) == {honest.peer_id} for owners in it.targets())


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Watched, LoopbackWorker]]:
    """Two composers that audit when the test says so, and an honest worker that has every slot."""
    with watched(tmp_path_factory.mktemp("audits"), manifest(audit_every=NEVER)) as it:
        worker = it.join("worker")
        it.step_until(lambda: it.owned(worker) == ALL, "the worker owns every slot")
        it.step_until(lambda: all(len(owners) == SLOTS for owners in it.targets()), "composers send to it")
        yield it, worker


def audit(it: Watched, slot: int, composer: int = 0) -> Finding | None:
    """While everybody trains on."""
    auditor = it.auditors[it.swarm.peers[composer].peer_id]
    found = asyncio.run_coroutine_threadsafe(auditor.audit(slot), it.swarm.network.loop)
    it.step_until(found.done, "the audit has ended")
    return found.result()


def said_of(it: Watched, slot: int, composer: int = 0) -> Finding:
    """Audit until something can be said: on a busy machine the slot may get no sketch, or none of ours, during one."""
    return next(found for _ in range(100) if (found := audit(it, slot, composer)) not in (None, Finding.UNHEARD))


def test_an_honest_worker_passes(pair: tuple[Watched, LoopbackWorker]) -> None:
    it, _ = pair
    it.step_until(lambda: it.swarm.peers[0].composer.step > 4, "all have trained a little")
    assert [said_of(it, slot, slot % 2) for slot in sorted(ALL)] == [Finding.PASSED] * SLOTS


def test_nobody_is_deposed_on_the_word_of_others(pair: tuple[Watched, LoopbackWorker]) -> None:
    """One composer of two slanders: the other audits, finds nothing, and the worker keeps its slots."""
    it, worker = pair
    slanderer, other = it.swarm.peers
    before = it.audits()[1].get("passed", 0)
    slot = min(worker.held)
    lie = Accusation(worker.peer_id, slot, worker.held[slot], "wrong-update")
    it.swarm.call(slanderer.links.gossip("news", lie))
    it.step_until(lambda: it.audits()[1].get("passed", 0) > before, "the other has audited")
    assert it.owned(worker) == ALL
    assert worker.peer_id not in other.links.view().distrusted
    assert worker.peer.deposing.distrust.distrusted([p.peer_id for p in it.swarm.peers]) == set()


def test_an_owner_may_be_found_out_while_others_are_told_of_one(pair: tuple[Watched, LoopbackWorker]) -> None:
    it, worker = pair
    auditor = it.auditors[it.swarm.peers[0].peer_id]
    slot = min(worker.held)

    async def tell() -> None:
        for owner in (worker.peer_id, it.swarm.peers[1].peer_id):
            auditor._accusations[owner] = Accusation(owner, slot, worker.held[slot], "wrong-update")
            telling.append(asyncio.create_task(auditor._accuse()))
            await asyncio.sleep(0)  # until it waits for gossip to go out
        await asyncio.gather(*telling)

    telling: list[asyncio.Task[None]] = []
    it.swarm.call(tell())
    auditor._accusations.clear()


def test_only_active_composers_may_look_into_a_step(pair: tuple[Watched, LoopbackWorker], tmp_path: Path) -> None:
    it, worker = pair
    slot = min(worker.held)
    addrs = worker.links.transport.addrs

    async def ask(links: object, name: str) -> None:
        await links.transport.fetch(addrs, name, deadline_seconds=10.0, max_bytes=1 << 20)  # type: ignore[attr-defined]

    with it.swarm.observer(tmp_path / "stranger") as stranger, pytest.raises(FetchFailed, match="busy"):
        it.swarm.call(ask(stranger, resources.audit(slot, worker.held[slot], 1)))
    composer = it.swarm.peers[0].links
    with pytest.raises(FetchFailed, match="busy"):
        it.swarm.call(ask(composer, resources.audit(slot, worker.held[slot] + 1, 1)))


def test_who_asks_for_audits_again_and_again_makes_nobody_a_liar(
    pair: tuple[Watched, LoopbackWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An owner that is busy whenever the others ask would be convicted by all of them."""
    it, worker = pair
    monkeypatch.setattr("shoal.node.audits.auditor.PAUSE_SECONDS", 0.05)
    greedy, addrs, seeds = it.swarm.peers[0].links, worker.links.transport.addrs, itertools.count(1)

    async def ask(slot: int) -> None:
        while True:
            name = resources.audit(slot, worker.held[slot], next(seeds))
            with contextlib.suppress(FetchFailed):
                await greedy.transport.fetch(addrs, name, deadline_seconds=30.0, max_bytes=1 << 24)

    asking = [asyncio.run_coroutine_threadsafe(ask(slot), it.swarm.network.loop) for slot in worker.held]
    try:
        found = [audit(it, slot, composer=1) for slot in sorted(ALL) * 2]
    finally:
        for each in asking:
            each.cancel()
    assert Finding.NO_ANSWER not in found
    assert Finding.PASSED in found


def test_a_worker_that_shows_nothing_while_it_takes_sketches_is_deposed_in_the_end(
    pair: tuple[Watched, LoopbackWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    it, worker = pair

    async def nothing(*_: object) -> None:
        return None

    desk = worker.library._desk
    assert desk is not None
    monkeypatch.setattr(desk, "serve", nothing)
    monkeypatch.setattr("shoal.node.audits.auditor.PAUSE_SECONDS", 0.05)
    slot = max(worker.held)
    assert [said_of(it, slot) for _ in range(2)] == [Finding.NO_ANSWER] * 2
    assert it.owned(worker) == ALL
    assert said_of(it, slot) is Finding.NO_ANSWER
    silent = it.auditors[it.swarm.peers[0].peer_id]._deposing.distrust.convicted
    assert silent == {worker.peer_id: Finding.SILENT}
    it.swarm.until(lambda: not it.targets()[0], "no sketches go to it")
