"""Composer peers in one process: real directory, real gossip and fetches on loopback, a trainer's thread each.

Only hivemind's averager is left out: `Meeting` averages what arrives for the same round by function calls.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from shoal.node.backbone.common_state import CommonState, Held
from shoal.node.backbone.outer import OuterDriver
from shoal.node.learning.composer import Composer, StepReport
from shoal.node.learning.trainer import Trainer
from shoal.node.model.cut import cadences
from shoal.node.peer.background import NetworkThread
from shoal.node.peer.links import Links
from shoal.node.peer.membership import Membership
from shoal.node.peer.serving import Library
from shoal.node.run.manifest import Manifest
from shoal.node.sketches.sketch_sending import SketchSender, collector_of
from shoal.node.slots.keeper import SlotKeeper
from shoal.node.slots.slot_order import LayerOrder
from shoal.node.standins.exchange import Exchange
from shoal.node.storage.known_peers import KnownPeers
from shoal.node.watching.state import PeerState, Phase
from shoal.protocol.averaging.facts import RoundFacts, pack_norms
from shoal.protocol.averaging.merging import digest, shares, weights
from shoal.protocol.averaging.outcome import Outcome, Status
from shoal.protocol.averaging.parts import sendable
from shoal.protocol.directory.dht import start_dht
from shoal.protocol.directory.directory import Directory
from shoal.protocol.directory.records import Lease, LeaseRecord
from shoal.protocol.experts.handles import Handles, new_key
from shoal.protocol.identity import Identity
from shoal.protocol.transport.client import Transport
from tiny import LAYERS, composer_of
from torch import Tensor

T = TypeVar("T")

MANIFEST_BYTES = b"the run's signed manifest"
SECONDS = 40.0
MEETING_SECONDS = 2.0
RUN = "tiny-" + secrets.token_hex(6)
HANDLE_KEY = new_key()  # every run has its own


class WallClock:
    """The true time, and what somebody has set it ahead by."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead


class Meeting:
    """All members of a swarm meet here; a round is averaged once as many as expected have come from one base.

    Whoever waits in vain for `MEETING_SECONDS` has no group.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[tuple[int, int, bytes], dict[str, tuple[Tensor, RoundFacts, Future[Outcome]]]] = {}
        self.absent: set[str] = set()  # peers that never find a group
        self.spoilers: set[str] = set()  # peers whose parts are NaN
        self.deaf: set[str] = set()  # peers that never hear what came of their next round
        self.stuck: set[int] = set()  # even, odd: rounds of such numbers never find a group

    def submit(self, peer: str, number: int, attempt: int, tensor: Tensor, **facts: Any) -> Future[Outcome]:
        future: Future[Outcome] = Future()
        if not sendable(tensor):
            future.set_result(Outcome(Status.REFUSED, number, attempt, detail="it is not to be sent"))
            return future
        if peer in self.absent or number % 2 in self.stuck:
            future.set_result(Outcome(Status.NO_GROUP, number, attempt))
            return future
        if self.spoilers & set(facts["avoid"]):
            self.absent |= self.spoilers  # whom somebody avoids stays alone here
        with self._lock:
            group = self._waiting.setdefault((number, attempt, facts["base"]), {})
            signed = RoundFacts(
                peer_id=peer,
                round=number,
                attempt=attempt,
                fragment=0,
                tokens=facts["tokens"],
                steps=facts["steps"],
                base=facts["base"],
                reduces=True,
                issued_at=time.time(),
                packed_norms=pack_norms(facts["norms"]),
            )
            group[peer] = (tensor.clone(), signed, future)
            present = facts["expected"] - len(self.absent - set(facts["avoid"]))
            if len(group) < present:
                timer = threading.Timer(MEETING_SECONDS, self.abandon, (peer, number))
                timer.daemon = True
                timer.start()
                return future
            del self._waiting[(number, attempt, facts["base"])]
        members = tuple(sorted(group))
        if spoilers := self.spoilers & set(members):
            for *_, waiting in group.values():
                waiting.set_result(
                    Outcome(Status.PARTIAL, number, attempt, members=members, proven=tuple(sorted(spoilers)))
                )
            return future
        share = shares(weights([signed for _, signed, _ in group.values()]))
        average = sum((t * (share[p] / sum(share.values())) for p, (t, *_) in sorted(group.items())), torch.zeros(()))
        for member, (*_, waiting) in group.items():
            if member in self.deaf:
                self.deaf.discard(member)
                waiting.set_result(Outcome(Status.TIMED_OUT, number, attempt, members=members))
                continue
            waiting.set_result(
                Outcome(
                    Status.COMPLETE,
                    number,
                    attempt,
                    average=average.clone(),
                    members=members,
                    facts=tuple(group[member][1] for member in members),
                )
            )
        return future

    def abandon(self, peer: str, number: int) -> None:
        """Wait no more."""
        with self._lock:
            for key, group in list(self._waiting.items()):
                if key[0] == number and peer in group:
                    group.pop(peer)[2].set_result(Outcome(Status.NO_GROUP, number, key[1]))


class Seat:
    """One peer's place at the meeting: what it has for an averager."""

    def __init__(self, meeting: Meeting, peer: str) -> None:
        self._meeting, self._peer = meeting, peer

    def submit(self, number: int, attempt: int, tensor: Tensor, **facts: Any) -> Future[Outcome]:
        return self._meeting.submit(self._peer, number, attempt, tensor, **facts)

    def abandon(self, number: int) -> None:
        self._meeting.abandon(self._peer, number)


class LoopbackPeer:
    """A composer peer whose steps the test takes, or lets run."""

    def __init__(self, links: Links, folder: Path, meeting: Meeting) -> None:
        self.links = links
        self.composer = composer_of(links.manifest, owned=(), secret=HANDLE_KEY)
        self.trainer = Trainer(self.composer, self._after_step)
        self.exchange = Exchange(
            links, self.trainer, self.composer, LayerOrder(Handles(HANDLE_KEY), LAYERS), max_standin_bytes=1 << 20
        )
        zeros = [digest(c, m) for c, m in zip(self.composer.common, self.composer.momentum, strict=True)]
        seat: Any = Seat(meeting, links.peer_id)
        fragments = self.composer.fragments
        self.common = CommonState(links, self.trainer, fragments, [Held(-1, d) for d in zeros])
        self.outer = OuterDriver(links, self.trainer, seat, self.common, cadences(fragments, links.manifest))
        self.keeper = SlotKeeper(
            links,
            self.trainer,
            self.exchange,
            capacity=self.composer.num_slots,
            num_slots=self.composer.num_slots,
            folder=folder,
            saved={},
            max_slot_bytes=1 << 24,
        )
        self.thread = threading.Thread(target=self.trainer.run)
        self.thread.start()
        self.epoch = 0
        self.member: Membership | None = None  # once it is one
        self.library: Library | None = None
        self.sender: SketchSender | None = None  # of composers that `send_sketches`

    @property
    def peer_id(self) -> str:
        return self.links.peer_id

    def _after_step(self, composer: Composer, report: StepReport) -> None:
        self.exchange.after_step(composer)
        self.outer.after_step(composer)

    def send_sketches(self) -> None:
        """From now on tell owners what this composer's tokens teach."""
        collector = collector_of(self.links.manifest, seed=secrets.randbits(30))
        self.composer.collector = collector
        self.sender = SketchSender(self.links, self.exchange, collector)
        self.composer.on_computed = self.sender.after_compute

    def step(self, steps: int = 1) -> None:
        """Take inner steps, from any thread but the trainer's and the loop's."""

        def work(composer: Composer) -> None:
            for _ in range(steps):
                self._after_step(composer, composer.train_step())

        self.trainer.ask(work).result(SECONDS)

    def ask(self, work: Callable[[Composer], T]) -> T:
        return self.trainer.ask(work).result(SECONDS)

    async def own(self, slots: Collection[int], epoch: int) -> None:
        """Take slots without asking anybody."""
        for slot in slots:
            ask = self.trainer.ask(lambda c, slot=slot: self.exchange.adopt(c, slot, epoch, None, 0, None))
            await asyncio.wrap_future(ask)
        await self.claim(slots, epoch)

    async def claim(self, slots: Collection[int], epoch: int, seconds: float = 60.0) -> None:
        """Announce leases, held or not."""
        now = time.time()
        leases = [Lease(slot, epoch, 0) for slot in slots]
        await self.links.announce(
            LeaseRecord(owner=self.peer_id, leases=leases, issued_at=now, expires_at=now + seconds)
        )
        self.exchange.on_leases()

    def close(self) -> None:
        self.trainer.stop()
        self.thread.join(SECONDS)
        assert not self.thread.is_alive()


class Loopback:
    """Peers that know each other. `call` runs a coroutine on their loop, `until` waits for a condition."""

    def __init__(
        self, network: NetworkThread, peers: list[LoopbackPeer], meeting: Meeting, observe: Callable[[Path], Any]
    ) -> None:
        self.network, self.peers, self.meeting, self._observe = network, peers, meeting, observe

    @contextmanager
    def observer(self, folder: Path) -> Iterator[Links]:
        """The links of somebody who looks on: in no record, on no topic."""
        links = self.call(self._observe(folder))
        try:
            yield links
        finally:
            self.call(links.transport.close())

    def call(self, work: Any) -> Any:
        return self.network.call(work, SECONDS)

    def until(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < deadline, f"still waiting: {what}"
            time.sleep(0.02)


async def _links(dht: Any, folder: Path, manifest: Manifest) -> Links:
    identity = Identity.load_or_create(folder / "identity.key")
    clock = WallClock()
    return Links(
        identity=identity,
        run_id=RUN,
        manifest=manifest,
        directory=Directory(dht, identity, RUN, clock=clock),
        transport=await Transport.start(identity_path=folder / "identity.key", run_id=RUN),
        state=PeerState("composer"),
        clock=clock,
        loop=asyncio.get_running_loop(),
        record_seconds=20.0,
    )


async def _connect(dht: Any, folder: Path, manifest: Manifest, meeting: Meeting) -> LoopbackPeer:
    links = await _links(dht, folder, manifest)
    transport = links.transport
    library = Library(links, MANIFEST_BYTES)
    transport.serve(library.answer)
    member = Membership(
        links,
        role="composer",
        capacity=4,
        transport_addrs=transport.addrs,
        dht_addrs=[],
        metrics_url="",
        signed_manifest=b"",
        known=KnownPeers(folder, RUN),
    )
    peer = LoopbackPeer(links, folder / "standby", meeting)
    library.stock(peer.trainer, peer.common, peer.exchange, peer.keeper)
    member.on_deltas, member.on_counts = peer.exchange.on_deltas, peer.exchange.on_counts
    member.on_round_open, member.on_records = peer.outer.on_round_open, peer.exchange.on_leases
    peer.member, peer.library = member, library
    links.state.enter(Phase.TRAINING)
    await member.start()
    links.spawn(member.run())
    return peer


@contextmanager
def loopback(folder: Path, manifest: Manifest, count: int) -> Iterator[Loopback]:
    """`count` composers that see each other train. Call it on the main thread: the directory forks."""
    folders = [folder / str(i) for i in range(count)]
    for each in folders:
        each.mkdir(parents=True)
    dht = start_dht(folder / "dht.key", initial_peers=[], host="127.0.0.1", port=0, announce=[], run_id=RUN)
    network = NetworkThread()
    peers: list[LoopbackPeer] = []
    meeting = Meeting()
    try:
        for each in folders:
            peers.append(network.call(_connect(dht, each, manifest, meeting), SECONDS))  # noqa: PERF401 - closed below
        swarm = Loopback(network, peers, meeting, lambda folder: _links(dht, folder, manifest))
        everybody = {peer.peer_id for peer in peers}
        for peer in peers:
            swarm.until(lambda peer=peer: set(peer.links.active_composers()) == everybody, "everybody sees everybody")
            others = everybody - {peer.peer_id}
            swarm.until(lambda p=peer, o=others: p.links.transport.connected_peers() >= o, "all are connected")
        yield swarm
    finally:
        for peer in peers:
            network.call(peer.links.transport.close(), SECONDS)
            peer.close()
        dht.shutdown()  # before the loop: its answers would find it closed
        network.close()
