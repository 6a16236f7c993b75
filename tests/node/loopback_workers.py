"""Workers beside the composers of `loopback`: the real `WorkerPeer`, each on a training thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch
from loopback import HANDLE_KEY, RUN, SECONDS, Loopback, LoopbackPeer, loopback
from shoal.node.config import PeerConfig
from shoal.node.learning.worker import Worker
from shoal.node.peer.links import Links
from shoal.node.peer.membership import Membership
from shoal.node.peer.peer import StopRequest
from shoal.node.peer.serving import Library
from shoal.node.peer.working import WorkerPeer
from shoal.node.run.manifest import Manifest, OwnershipSpec, Run, SketchSpec
from shoal.node.slots.slot_state import SlotTensors
from shoal.node.storage.known_peers import KnownPeers
from shoal.node.watching.state import Phase
from shoal.protocol.experts.handles import Handles
from tiny import LAYERS, SLOTS, manifest_of

T = TypeVar("T")

LEASE_SECONDS = 4.0
HANDLES = Handles(HANDLE_KEY)


class Vanished(Exception):
    """Ends a worker as a crash would: it says nothing to anybody."""


class LoopbackWorker:
    """A worker peer. The same `folder` makes it the same peer, with what it wrote down."""

    def __init__(self, swarm: Loopback, folder: Path, *, capacity: int) -> None:
        self.swarm = swarm
        self.links = swarm.call(swarm._observe(folder))
        self.links.record_seconds = LEASE_SECONDS
        transport = self.links.transport
        self.member = Membership(
            self.links, role="worker", capacity=capacity, transport_addrs=transport.addrs, dht_addrs=[],
            metrics_url="", signed_manifest=b"", known=KnownPeers(folder, RUN),
        )  # fmt: skip
        self.stop = StopRequest()
        config = PeerConfig(role="worker", data_dir=folder, device="cpu", drain_seconds=20.0)
        run = Run(RUN, self.links.manifest, b"")
        nothing: Any = None  # of a directory's process: only averagers fork from it
        self.peer = WorkerPeer(config, self.links.state, self.links.identity, run, nothing)
        self.library = Library(self.links, b"")
        self.error: BaseException | None = None
        swarm.call(self._join())
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        swarm.until(lambda: self.links.state.phase in (Phase.READY, Phase.TRAINING), "the worker is there")

    async def _join(self) -> None:
        self.links.transport.serve(self.library.answer)
        await self.member.start()
        self.links.spawn(self.member.run())

    def _run(self) -> None:
        try:
            self.peer.run(self.swarm.network, self.links, self.member, self.library, self.stop)
        except Vanished as error:
            self.error = error

    @property
    def peer_id(self) -> str:
        return self.links.peer_id

    @property
    def held(self) -> dict[int, int]:
        """Epochs of the slots it has."""
        return dict(self.peer.keeper.held)

    def ask(self, work: Callable[[Worker], T]) -> T:
        return self.peer.trainer.ask(work).result(SECONDS)

    @contextmanager
    def stuck(self) -> Iterator[None]:
        """Its training thread does nothing meanwhile."""
        entered, leave = threading.Event(), threading.Event()

        def hold(_: Worker) -> None:
            entered.set()
            assert leave.wait(SECONDS)

        held = self.peer.trainer.ask(hold)
        assert entered.wait(SECONDS)
        try:
            yield
        finally:
            leave.set()
            held.result(SECONDS)

    def leave(self) -> None:
        """As on SIGTERM: hand over, write down the rest, go."""
        self.stop.requested = True
        self.swarm.until(lambda: not self.thread.is_alive(), "the worker has left")
        self._hang_up()

    def vanish(self) -> None:
        """As on SIGKILL."""

        def fail() -> None:
            self.links._failure = Vanished()

        self.swarm.network.loop.call_soon_threadsafe(fail)
        self.swarm.until(lambda: self.error is not None and not self.thread.is_alive(), "the worker has vanished")
        self._hang_up()

    def _hang_up(self) -> None:
        async def hang_up() -> None:
            tasks = [*self.links._tasks]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.links.transport.close()

        self.swarm.call(hang_up())

    def close(self) -> None:
        """However it stands."""
        if self.thread.is_alive():
            self.peer.config = PeerConfig(role="worker", data_dir=self.peer.config.data_dir, drain_seconds=0.0)
            self.leave()


def worked_manifest(**sketch: Any) -> Manifest:
    """A run in which everything is published at once and leases are short. Keywords go to its sketches."""
    base = manifest_of(
        outer={"every_steps": 1_000_000},
        train={"steps": 1_000_000, "learning_rate": 0.01},
        standin={"publish_every": 1},
    )
    return msgspec.structs.replace(
        base,
        ownership=OwnershipSpec(lease_seconds=LEASE_SECONDS, snapshot_every=1),
        sketch=SketchSpec(**{"patience_seconds": 0.3, "max_age": 4} | sketch),
    )


class Working:
    """Composers that own nothing, and workers. Composers step when the test says so, workers when they can."""

    def __init__(self, swarm: Loopback, folder: Path) -> None:
        self.swarm, self._folder = swarm, folder
        self.workers: list[LoopbackWorker] = []
        self._tasks: list[asyncio.Task[None]] = []
        for peer in swarm.peers:
            peer.send_sketches()
            self.set_capacity(peer, 0)
            swarm.call(self._follow(peer))

    async def _follow(self, peer: LoopbackPeer) -> None:
        self._tasks += [asyncio.create_task(work) for work in (peer.exchange.run(), peer.keeper.run())]

    def set_capacity(self, peer: LoopbackPeer, slots: int) -> None:
        """How many slots a composer wants, announced."""
        assert peer.member is not None
        peer.member.capacity = peer.keeper.capacity = slots
        self.swarm.call(peer.member.announce())

    def join(self, name: str = "worker", *, capacity: int = SLOTS) -> LoopbackWorker:
        worker = LoopbackWorker(self.swarm, self._folder / name, capacity=capacity)
        self.workers.append(worker)
        return worker

    def step(self, steps: int = 1) -> None:
        """One after the other: each step's sketches have been answered before the next."""
        for _ in range(steps):
            for peer in self.swarm.peers:
                peer.step()
            self.swarm.until(lambda: not any(sender._under_way for sender in self._senders()), "all were answered")

    def _senders(self) -> list[Any]:
        return [peer.sender for peer in self.swarm.peers]

    def quiet(self, worker: LoopbackWorker) -> None:
        """Until it has stepped on everything that it was told."""
        self.swarm.until(lambda: worker.ask(lambda w: not w._waiting and not w._sums), "nothing waits any more")

    def same_standins(self, worker: LoopbackWorker) -> bool:
        """Whether all composers run, layer by layer, what the worker has published."""
        for slot, epoch in worker.held.items():
            ours = worker.ask(lambda w, s=slot: [standin.digest() for standin in w.standins(s)])
            by_layer = dict(zip(HANDLES.order(slot, epoch, LAYERS), ours, strict=True))
            for peer in self.swarm.peers:
                theirs = peer.ask(lambda c, s=slot: [standin.digest() for standin in c.standins(s)])
                if dict(enumerate(theirs)) != by_layer:
                    return False
        return True

    def close(self) -> None:
        for worker in self.workers:
            worker.close()

        async def cancel() -> None:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

        self.swarm.call(cancel())


@contextmanager
def working(folder: Path, spec: Manifest, composers: int) -> Iterator[Working]:
    with loopback(folder / "swarm", spec, composers) as swarm:
        it = Working(swarm, folder)
        try:
            for peer in swarm.peers:
                assert peer.library is not None
                peer.library.handle_key = HANDLE_KEY
            yield it
        finally:
            it.close()


def counted(links: Links, what: str) -> dict[str, float]:
    """A peer's counts of one kind, by label."""
    return dict(links.state.snapshot()[what])


def by_layer(tensors: SlotTensors, slot: int, epoch: int) -> SlotTensors:
    """A worker's tensors, named by layer instead of by handle; without what has been published, which moves on."""
    order = HANDLES.order(slot, epoch, LAYERS)
    named = {}
    for name, value in tensors.items():
        place, _, rest = name.partition(".")
        named[f"{order[int(place)]}.{rest}"] = value
    return without_published(named)


def without_published(tensors: SlotTensors) -> SlotTensors:
    return {name: value for name, value in tensors.items() if "publisher" not in name}


def same(a: SlotTensors, b: SlotTensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
