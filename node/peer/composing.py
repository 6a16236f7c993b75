"""A composer peer: wires the composer, its trainer and the network's parts together, and takes them down again."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

import torch

from ...protocol.averaging.averaging import OuterAverager
from ...protocol.experts.auditing import BYTES_PER_WEIGHT, SentLog
from ...protocol.experts.handles import Handles
from ...protocol.identity import Identity
from ...protocol.messages import MAX_SKETCH_BYTES
from ..audits.auditor import Auditor
from ..backbone.common_state import CommonState, Held
from ..backbone.outer import OuterDriver
from ..config import PeerConfig
from ..learning.composer import Composer, StepReport
from ..learning.data import seed_of_peer
from ..learning.persistence import composer_tensors
from ..learning.token_file import check_text
from ..learning.trainer import Trainer
from ..logs import get_logger
from ..model.cut import backbone_fragments, cadences
from ..run.joining import catch_up, go_to_the_swarms_step
from ..seed.joining import SeedAtHome, start_of
from ..sketches.gradient_collecting import GradientCollector
from ..sketches.gradient_receiving import GradientReceiver
from ..sketches.gradient_rounds import GradientRounds, form_of, sketch_averager
from ..sketches.gradient_sending import GradientSender
from ..sketches.sketch_receiving import SketchReceiver
from ..sketches.sketch_sending import SketchSender, collector_of
from ..slots.deposing import Deposing
from ..slots.keeper import SlotKeeper
from ..slots.slot_order import LayerOrder
from ..standins.exchange import Exchange
from ..standins.saving import FACTS
from ..storage.checkpoint import CheckpointStore
from ..storage.checkpoint_writer import CheckpointWriter
from ..watching.state import Count, PeerState, Phase, StepPart
from .background import NetworkThread
from .beginning import batches_of, composer_of, go_on, seed_of, text_of
from .links import Links
from .membership import Membership
from .restoring import Restored
from .reviving import HELPER_ENDED
from .serving import Library

if TYPE_CHECKING:
    import hivemind

    from ..island.leader import Island
    from ..run.manifest import Run
    from .peer import StopRequest

log = get_logger(__name__)

CHECKPOINT_EVERY = 500  # steps
POLL_SECONDS = 0.2
# A slot's snapshot: weights and two moments in float32, the published stand-in, names and headers.
SNAPSHOT_BYTES_PER_WEIGHT = 16
HEADER_BYTES = 1 << 20


class ComposerPeer:
    """Construct it on the main thread before any other thread: the averagers fork here.

    `run` is the training thread until the peer has left.
    """

    def __init__(self, config: PeerConfig, state: PeerState, identity: Identity, run: Run, dht: hivemind.DHT) -> None:
        self.config, self.state, self.identity, self.facts = config, state, identity, run
        spec = run.manifest.outer
        self.fragments = backbone_fragments(run.manifest)
        self.averager = OuterAverager(
            dht=dht,
            identity=identity,
            run_id=run.run_id,
            fragments=self.fragments,
            codec=spec.codec,
            robust=spec.robust,
            matchmaking_seconds=spec.matchmaking_seconds,
            timeout_seconds=spec.timeout_seconds,
            pace=config.pace,
        )
        self.sketch_averager = sketch_averager(dht, identity, run, config.pace)
        self.writer = CheckpointWriter(CheckpointStore(config.data_dir / "checkpoints" / run.run_id), state)
        self.island: Island | None = None
        self._company_since: float | None = None  # monotonic seconds; enough composers to begin with
        check_text(text_of(config, run))  # before others know of this peer: text is what is wrong most often

    def run(self, network: NetworkThread, links: Links, member: Membership, library: Library, stop: StopRequest) -> int:
        """Train until told to stop; returns the exit code."""
        try:
            return self._run(network, links, member, library, stop)
        finally:
            if self.island is not None:
                self.island.close()
            self.averager.shutdown()
            if self.sketch_averager is not None:
                self.sketch_averager.shutdown()

    def _run(
        self, network: NetworkThread, links: Links, member: Membership, library: Library, stop: StopRequest
    ) -> int:
        self.links, self.member = links, member
        if self.config.threads is not None:
            torch.set_num_threads(self.config.threads)
        if self.config.island > 1:
            self._open_island()
        self.state.enter(Phase.SYNCING, "building the model")
        order, held, found = self._begin(network, library)
        self._own_experts(library.seed, order, found)
        del found  # this frame lives as long as the peer trains: it would keep every slot a second time
        self._merge_backbones(held)
        self._trade_sketches()
        self._watch_owners()
        self._listen(library)
        stop.holds = True
        life = asyncio.run_coroutine_threadsafe(self._live(stop), network.loop)
        life.add_done_callback(lambda _: self.trainer.stop())
        self.trainer.run()
        try:
            life.result()
        except HELPER_ENDED:
            if self.state.phase in (Phase.TRAINING, Phase.FINISHED):
                self.writer.finish()
                self.writer.write(*self._checkpoint_of(self.composer))
            raise
        self.state.enter(Phase.STOPPED)
        return 0

    # -- putting it together, each part on those before it -----------------------------------------------------------

    def _open_island(self) -> None:
        from ..island.forms import island_of

        self.island = island_of(self.config, self.facts.manifest)
        self.island.nursery()  # it has seconds of work to do, while the model is built here
        torch.set_num_threads(self.island.threads)

    def _begin(self, network: NetworkThread, library: Library) -> tuple[LayerOrder, list[Held], Restored]:
        """The composer where the run, or its own disk, has it."""
        config, run, peer_id = self.config, self.facts, self.identity.peer_id
        assert library.handle_key is not None
        seed = library.seed = seed_of(config, run, self.links)
        say = functools.partial(self.state.enter, Phase.SYNCING)
        start = start_of(run.manifest, library.handle_key, seed, network, say)
        self.batches = batches_of(config, run, peer_id, seed, say=say, beat=self.state.beat)
        say("building the model")
        composer = self.composer = composer_of(config, run, peer_id, start, self.batches)
        order = LayerOrder(Handles(library.handle_key), composer.shape.num_layers)
        if self.island is not None:
            self.island.serve(composer)
        held, found = go_on(self.writer.store, composer, self.batches, order)
        self.state.resume(step=composer.step)
        self.trainer = Trainer(composer, self._after_step)
        return order, held, found

    def _own_experts(self, seed: SeedAtHome | None, order: LayerOrder, found: Restored) -> None:
        """Stand-ins for all experts, and slots of its own."""
        links, composer = self.links, self.composer
        weights = self._weights_in_a_slot()
        self.exchange = Exchange(links, self.trainer, composer, order, max_standin_bytes=4 * weights + HEADER_BYTES)
        self.exchange.restore(composer, found.standins)
        self.exchange.fetch_first = None if seed is None else seed.fetch_experts
        standby = self.config.data_dir / "standby" / self.facts.run_id
        self._lived_before = standby.exists()
        self.keeper = SlotKeeper(
            links,
            self.trainer,
            self.exchange,
            capacity=self.member.capacity,
            num_slots=composer.num_slots,
            folder=standby,
            saved=found.saved,
            max_slot_bytes=SNAPSHOT_BYTES_PER_WEIGHT * weights + HEADER_BYTES,
        )

    def _weights_in_a_slot(self) -> int:
        shape = self.composer.shape
        return 3 * shape.hidden * shape.width * shape.num_layers

    def _merge_backbones(self, held: list[Held]) -> None:
        self.common = CommonState(self.links, self.trainer, self.fragments, held)
        self.outer = OuterDriver(
            self.links, self.trainer, self.averager, self.common, cadences(self.fragments, self.facts.manifest)
        )

    def _trade_sketches(self) -> None:
        """Send owners what its tokens teach their experts, and take what others' tokens teach its own."""
        links, composer, run = self.links, self.composer, self.facts
        self.sender: SketchSender | GradientSender | None = None
        if run.manifest.sketch.goes_to_owners:
            chance = seed_of_peer(self.identity.peer_id, f"{run.run_id} sketches") % (1 << 31)
            collector = composer.collector = collector_of(run.manifest, seed=chance)
            self.sender = SketchSender(links, self.exchange, collector)
            if self._lived_before:
                self.sender.sent.forgot(time.monotonic())
        elif self.sketch_averager is not None:
            form, rounds = form_of(run), GradientRounds(links, self.sketch_averager)
            composer.collector = GradientCollector(form)
            self.sender = GradientSender(links, self.trainer, self.exchange, composer.collector, rounds)
            GradientReceiver(links, self.trainer, self.exchange, self.keeper, form, rounds)
            self.member.on_sketch_open = rounds.on_sketch_open
        self.receiver = SketchReceiver(links, self.trainer, self.exchange, self.keeper, composer)
        self._between_seconds = 0.0
        composer.on_computed = self._on_computed
        if run.manifest.sketch.goes_to_owners:
            links.transport.answer_calls(self.receiver.answer, admit=self.receiver.admit)

    def _watch_owners(self) -> None:
        """Audit what others do with the experts they own."""
        self.deposing = Deposing(self.links, audits=True)
        sent = self.sender.sent if isinstance(self.sender, SketchSender) else SentLog()
        max_record_bytes = BYTES_PER_WEIGHT * self._weights_in_a_slot() + MAX_SKETCH_BYTES + HEADER_BYTES
        self.auditor = Auditor(
            self.links, self.trainer, self.exchange, self.deposing, sent, max_record_bytes=max_record_bytes
        )

    def _listen(self, library: Library) -> None:
        """From now on the network's thread calls into all of it."""
        member, exchange = self.member, self.exchange
        library.stock(self.trainer, self.common, exchange, self.keeper)
        member.on_accusation = self.deposing.on_accusation
        member.on_deltas, member.on_counts = exchange.on_deltas, exchange.on_counts
        member.on_round_open, member.on_records = self.outer.on_round_open, exchange.on_leases

    # -- the network thread ----------------------------------------------------------------------------------------

    async def _live(self, stop: StopRequest) -> None:
        """From joining to leaving. When this ends, or fails, so does the trainer."""
        joining = asyncio.create_task(self._join())
        try:
            while not stop.requested and not joining.done():
                await asyncio.wait([joining], timeout=POLL_SECONDS)
                self.state.beat()
                self._check()
        finally:
            joining.cancel()  # does nothing to one that is done
        if stop.requested:
            self.state.enter(Phase.LEAVING, "it had not joined yet")
            await self.member.announce()
            return
        joining.result()
        await self._take_part(stop)

    def _check(self) -> None:
        self.links.check()
        self.averager.require_alive()
        if self.sketch_averager is not None:
            self.sketch_averager.require_alive()

    async def _join(self) -> None:
        await catch_up(
            self.links, self.trainer, self.common, self.exchange, lambda what: self.state.enter(Phase.SYNCING, what)
        )
        await self.keeper.recall()
        await go_to_the_swarms_step(self.links, self.trainer)
        self.state.enter(Phase.READY)
        await self.member.announce()

    async def _take_part(self, stop: StopRequest) -> None:
        tasks = [asyncio.create_task(w) for w in self._work()]
        awake, lease = True, self.facts.manifest.ownership.lease_seconds
        try:
            while not stop.requested:
                await self._set_phase()
                done, _ = await asyncio.wait(tasks, timeout=POLL_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()  # they end by failing only; that ends the peer, with the reason
                self._check()
                slept, awake = not awake, self.links.directory.clocks.right(lease)
                if slept and awake:  # the others have gone on
                    await go_to_the_swarms_step(self.links, self.trainer)
            await self._leave(tasks[0])
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _work(self) -> list[Coroutine[Any, Any, None]]:
        return [self.keeper.run(), self.outer.run(), self.exchange.run(), self.auditor.run()]

    async def _set_phase(self) -> None:
        """Wait for company, train, be finished."""
        self.state.beat()
        step = self.keeper.step = self.composer.step
        self.state.set_unmerged(self.outer.unmerged_steps(self.composer))
        if step >= self.facts.manifest.train.steps:
            self.state.enter(Phase.FINISHED)
        elif self.state.phase is Phase.READY:
            present = [
                record
                for record in self.links.view().peers.values()
                if record.role == "composer" and record.phase in ("ready", "training", "finished")
            ]
            started = any(record.phase in ("training", "finished") for record in present)
            wanted = self.facts.manifest.train.min_composers
            unowned = self.keeper.num_slots - len(self.links.view().leases)
            if not started and len(present) < wanted:
                self._company_since = None
                self.state.enter(Phase.READY, f"{len(present)} of {wanted} composers are here")
                return
            if self._company_since is None:
                self._company_since = time.monotonic()
            waited = time.monotonic() - self._company_since
            # The first steps teach most: they should not go to experts that nobody trains yet.
            if started or unowned == 0 or waited > self.facts.manifest.ownership.lease_seconds:
                await go_to_the_swarms_step(self.links, self.trainer)  # of who came back at the same time, too
                self.state.enter(Phase.TRAINING)
                self.trainer.start_training()
            else:
                self.state.enter(Phase.READY, f"{unowned} experts are still without an owner")

    async def _leave(self, keeper_task: asyncio.Task[Any]) -> None:
        """Drain: stop training, hand over, checkpoint."""
        log.info("peer.leaving", drain_seconds=self.config.drain_seconds)
        self.trainer.pause_training()
        self.state.enter(Phase.LEAVING, "publishing the last stand-ins")
        left = self.config.drain_seconds - await self.exchange.settle(self.config.drain_seconds / 2)
        self.state.enter(Phase.LEAVING, "handing over slots")
        await self.member.announce(Phase.LEAVING)
        await self.keeper.drain(left)
        keeper_task.cancel()
        self.state.enter(Phase.LEAVING, "writing a checkpoint")
        tensors, meta = await asyncio.wrap_future(self.trainer.ask(self._checkpoint_of))
        await asyncio.to_thread(self.writer.write_last, tensors, meta, self.keeper.held)
        await self.keeper.announce()  # what is still held is in the checkpoint; the lease says so until it runs out

    # -- the training thread ---------------------------------------------------------------------------------------

    def _on_computed(self, composer: Composer) -> None:
        """Between the halves of a step: every step that a sketch waits makes it worth less."""
        began = time.perf_counter()
        if isinstance(self.sender, SketchSender):
            self.sender.after_compute(composer)
        self.receiver.drain(composer)
        self._between_seconds = time.perf_counter() - began

    def _after_step(self, composer: Composer, report: StepReport) -> None:
        began = time.perf_counter() - self._between_seconds
        self.exchange.after_step(composer)
        if isinstance(self.sender, GradientSender):
            self.sender.after_step(composer)
        self.auditor.after_step(composer)
        self.outer.after_step(composer)
        every = self.config.checkpoint_every or CHECKPOINT_EVERY
        if composer.came_round(every) and not self.writer.busy:
            self.writer.write_soon(*self._checkpoint_of(composer), self.links.loop)
        if report.skipped:
            self.state.count(Count.STEPS_SKIPPED, "not_finite")
            log.warning("step.skipped", step=composer.step, reason="loss or gradients are not finite")
        self.state.set_processes(report.processes)
        self.state.record_step(
            step=composer.step,
            steps=report.steps,
            tokens=report.tokens,
            loss=report.loss,
            seconds={
                StepPart.FORWARD_BACKWARD: report.forward_backward_seconds,
                StepPart.OPTIMIZER: report.optimizer_seconds,
                StepPart.EXCHANGE: time.perf_counter() - began,
                StepPart.WAITING: self.trainer.take_served_seconds(),
            },
        )

    def _checkpoint_of(self, composer: Composer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        standins, points = self.exchange.to_save()
        meta = {
            "run_id": self.facts.run_id,
            "step": composer.step,
            "tokens": composer.tokens,
            "held": [held.round for held in self.common.held],
            "slots": {str(slot): points[str(slot)][0] for slot in composer.owned},
            FACTS: points,
            "batches": self.batches.state_dict(),
        }
        return composer_tensors(composer) | standins, meta
