"""A worker peer: wires the worker, its trainer and the network's parts together, and takes them down again.

It needs no data and no backbone: it claims slots that fit its memory, fetches them, and trains them on sketches. What
it holds is written to disk now and then, and when nobody takes it over at the end; a worker that comes back offers it.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import psutil
import torch

from ...kernels.bases import Bases
from ...protocol import messages, resources
from ...protocol.errors import FetchFailed, PeerUnreachable, Refused
from ...protocol.identity import Identity
from ...protocol.messages import HandleTable
from ..audits.audit_record import AuditDesk
from ..capacity import device_to_use, slot_bytes
from ..config import PeerConfig
from ..errors import ConfigError
from ..learning.data import seed_of_peer
from ..learning.expert_mode import ExpertMode
from ..learning.trainer import Trainer
from ..learning.worker import Worker, WorkReport
from ..logs import get_logger
from ..model.init import expert_shape
from ..sketches.gradient_receiving import GradientReceiver
from ..sketches.gradient_rounds import GradientRounds, form_of, sketch_averager
from ..sketches.sketch_receiving import SketchReceiver
from ..slots.deposing import Deposing
from ..slots.keeper import SlotKeeper
from ..slots.slot_order import HandleOrder
from ..slots.slot_saving import slots_to_save
from ..standins.publishing import ANNOUNCE_EVERY_SECONDS, Publishing
from ..storage.checkpoint import CheckpointStore
from ..storage.checkpoint_writer import CheckpointWriter
from ..watching.state import Count, PeerState, Phase, StepPart
from .composing import CHECKPOINT_EVERY, HEADER_BYTES, POLL_SECONDS, SNAPSHOT_BYTES_PER_WEIGHT
from .links import Links
from .membership import Membership
from .restoring import restore_worker
from .reviving import HELPER_ENDED
from .serving import Library

if TYPE_CHECKING:
    import hivemind

    from ..run.manifest import Run
    from .background import NetworkThread
    from .peer import StopRequest

log = get_logger(__name__)

TABLE_SECONDS = 10.0


class WorkerPublishing(Publishing[Worker]):
    """Publishing in the order of handles, which composers tell."""

    order: HandleOrder

    async def prepare(self, slot: int, epoch: int, from_epochs: Collection[int]) -> None:
        for from_epoch in from_epochs:
            self.order.learn(slot, from_epoch, epoch, await self._table(slot, from_epoch, epoch))

    async def _table(self, slot: int, from_epoch: int, epoch: int) -> HandleTable:
        problem = "there is no composer"
        for peer in self._links.active_composers(waiting=True):
            try:
                got = await self._links.fetch(
                    peer,
                    resources.handles(slot, from_epoch, epoch),
                    max_bytes=HandleTable.max_bytes,
                    deadline_seconds=TABLE_SECONDS,
                )
                return messages.decode(got.data, HandleTable)
            except (FetchFailed, PeerUnreachable, Refused) as error:
                problem = error.cause
        raise Refused("no-composer", f"nobody told the handles of slot {slot}: {problem}")

    async def run(self) -> None:
        """Until cancelled: announce own slots while they are quiet, so that a lost last delta is noticed."""
        while True:
            await asyncio.sleep(ANNOUNCE_EVERY_SECONDS)
            if time.monotonic() - self._last_sent > ANNOUNCE_EVERY_SECONDS:
                quiet = await asyncio.wrap_future(self._trainer.ask(self._announcements))
                if quiet:
                    await self.send(quiet)


class WorkerPeer:
    """Construct it on the main thread before any other thread: a run with gradient sketches has an averager to fork.

    `run` is the training thread until the peer has left.
    """

    def __init__(self, config: PeerConfig, state: PeerState, identity: Identity, run: Run, dht: hivemind.DHT) -> None:
        if config.expert_mode == "frozen" and run.manifest.trust.audit_every:
            raise ConfigError(
                "this run audits its workers, and one that learns nothing from sketches is taken for a liar",
                fix="leave --expert-mode at full or take lora; composers may keep theirs frozen",
            )
        self.config, self.state, self.identity, self.facts = config, state, identity, run
        self.averager = sketch_averager(dht, identity, run, config.pace)
        self.writer = CheckpointWriter(CheckpointStore(config.data_dir / "checkpoints" / run.run_id), state)
        self._saved_step = 0
        self._unpublished: Counter[int] = Counter()  # by slot, composers' steps since its last delta

    def run(self, network: NetworkThread, links: Links, member: Membership, library: Library, stop: StopRequest) -> int:
        """Train until told to stop; returns the exit code."""
        try:
            return self._run(network, links, member, library, stop)
        finally:
            if self.averager is not None:
                self.averager.shutdown()

    def _run(
        self, network: NetworkThread, links: Links, member: Membership, library: Library, stop: StopRequest
    ) -> int:
        if self.config.threads is not None:
            torch.set_num_threads(self.config.threads)
        manifest = self.facts.manifest
        worker = Worker(
            manifest,
            composers=lambda: links.active_steps,
            device=device_to_use(self.config.device),
            fit_seed=seed_of_peer(self.identity.peer_id, self.facts.run_id) % (1 << 31),
            mode=ExpertMode.of(self.config, manifest.train),
            bases=self._bases(network, links),
        )
        self.worker = worker
        self.trainer = Trainer(worker, self._after_step)
        shape = worker.shape
        self.publishing = WorkerPublishing(links, self.trainer, HandleOrder(shape.num_layers), worker.menu)
        weights = 3 * shape.hidden * shape.width * shape.num_layers
        self.keeper = SlotKeeper(
            links,
            self.trainer,
            self.publishing,
            capacity=member.capacity,
            num_slots=worker.num_slots,
            folder=self.config.data_dir / "standby" / self.facts.run_id,
            saved=restore_worker(self.writer.store),
            max_slot_bytes=SNAPSHOT_BYTES_PER_WEIGHT * weights + HEADER_BYTES,
        )
        self.receiver = SketchReceiver(links, self.trainer, self.publishing, self.keeper, worker)
        self.gradients: GradientReceiver[Worker] | None = None
        if self.averager is not None:
            rounds = GradientRounds(links, self.averager)
            self.gradients = GradientReceiver(
                links, self.trainer, self.publishing, self.keeper, form_of(self.facts), rounds
            )
            member.on_sketch_open = rounds.on_sketch_open
        self.links, self.member = links, member
        library.stock_slots(self.keeper, AuditDesk(links, self.trainer, self.publishing, self.keeper))
        self.deposing = Deposing(links, audits=False)
        member.on_accusation = self.deposing.on_accusation
        if manifest.sketch.goes_to_owners:
            links.transport.answer_calls(self.receiver.answer, admit=self.receiver.admit)
        size = slot_bytes(shape, manifest.standin, worker.device, worker.mode)
        log.info("worker.capacity", slots=member.capacity, slot_bytes=size, device=str(worker.device))
        stop.holds = True
        life = asyncio.run_coroutine_threadsafe(self._live(stop), network.loop)
        life.add_done_callback(lambda _: self.trainer.stop())
        self.trainer.start_training()
        self.trainer.run()
        try:
            life.result()
        except HELPER_ENDED:
            if self.keeper.held:  # else the checkpoint that it came with has more
                self.writer.finish()
                self.writer.write(*self._checkpoint_of(worker))
            raise
        self.state.enter(Phase.STOPPED)
        return 0

    # -- the network thread ----------------------------------------------------------------------------------------

    async def _live(self, stop: StopRequest) -> None:
        self.state.enter(Phase.SYNCING, "reading the directory")
        await self.links.read_directory()
        self.links.check()
        self.state.enter(Phase.READY, "waiting for experts")
        await self.member.announce()
        tasks = [asyncio.create_task(work) for work in (self.keeper.run(), self.publishing.run())]
        try:
            while not stop.requested:
                self._set_phase()
                done, _ = await asyncio.wait(tasks, timeout=POLL_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()  # they end by failing only; that ends the peer, with the reason
                self.links.check()
                if self.averager is not None:
                    self.averager.require_alive()
            await self._leave()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _set_phase(self) -> None:
        self.state.beat()
        self.links.view()  # keeps `active_steps` current
        self.keeper.step = self.worker.step
        if self.worker.step >= self.facts.manifest.train.steps:
            self.state.enter(Phase.FINISHED)
        elif (self.receiver.rows or (self.gradients and self.gradients.learned)) and self.state.phase is Phase.READY:
            self.state.enter(Phase.TRAINING)
            seconds = time.time() - psutil.Process().create_time()
            log.info("worker.useful", seconds_since_start=round(seconds, 2))
        elif self.state.phase is Phase.READY:
            here = f"{len(self.keeper.held)} experts are here, room for {self.keeper.capacity}"
            waits = "" if self.links.active_composers(waiting=True) else "; waits for a composer"
            self.state.enter(Phase.READY, here + waits)

    async def _leave(self) -> None:
        """Drain: stop stepping, hand over, write down what nobody took."""
        log.info("peer.leaving", drain_seconds=self.config.drain_seconds)
        self.trainer.pause_training()
        self.state.enter(Phase.LEAVING, "publishing the last stand-ins")
        left = self.config.drain_seconds - await self.publishing.settle(self.config.drain_seconds / 2)
        self.state.enter(Phase.LEAVING, "handing over slots")
        await self.member.announce(Phase.LEAVING)
        await self.keeper.drain(left)
        if self.keeper.held:
            self.state.enter(Phase.LEAVING, "writing a checkpoint")
            tensors, meta = await asyncio.wrap_future(self.trainer.ask(self._checkpoint_of))
            await asyncio.to_thread(self.writer.write_last, tensors, meta, self.keeper.held)
        await self.keeper.announce()  # what is still held is in the checkpoint; the lease says so until it runs out

    # -- the training thread ---------------------------------------------------------------------------------------

    def _after_step(self, worker: Worker, report: WorkReport) -> None:
        began = time.perf_counter()
        publish_every = self.facts.manifest.standin.publish_every
        # Counted here: the schedule's step may jump, and stands still at the end, while some composers train on.
        sketch = self.facts.manifest.sketch
        self._unpublished.update(dict.fromkeys(report.slots, sketch.interval))
        due = [slot for slot in report.slots if self._unpublished[slot] >= publish_every]
        if due:
            self.publishing.publish(worker, due)
            for slot in due:
                del self._unpublished[slot]
        checkpoint_every = self.config.checkpoint_every or CHECKPOINT_EVERY
        if worker.step - self._saved_step >= checkpoint_every and not self.writer.busy:
            self._saved_step = worker.step
            self.writer.write_soon(*self._checkpoint_of(worker), self.links.loop)
        if report.skipped:
            self.state.count(Count.STEPS_SKIPPED, "not_finite")
            log.warning("step.skipped", step=worker.step, reason="gradients are not finite")
        self.state.record_step(
            step=worker.step,
            tokens=0,  # it sees none; composers count theirs
            loss=float("nan"),
            rows=report.rows,
            seconds={
                StepPart.OPTIMIZER: report.seconds,
                StepPart.EXCHANGE: time.perf_counter() - began,
                StepPart.WAITING: self.trainer.take_served_seconds(),
            },
        )

    def _checkpoint_of(self, worker: Worker) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        return slots_to_save(self.publishing, worker, dict(self.keeper.held))

    def _bases(self, network: NetworkThread, links: Links) -> Bases | None:
        """What the run's stand-ins are corrections of, fetched; they tell a worker which layer an expert may be of."""
        manifest = self.facts.manifest
        if not manifest.model.start or manifest.standin.kind not in ("shared", "chosen"):
            return None
        from ..seed.joining import SeedAtHome  # transformers, which workers of other runs do without
        from ..seed.start import bases_in

        seed = SeedAtHome(links, self.config.data_dir / "seed", self.config.join_seconds)
        network.call(seed.fetch_bases())
        return bases_in(seed.store, expert_shape(manifest.model).num_experts)
