"""Intervals of gradient sketches as a peer lives them: opened by one composer's gossip, joined by all at once.

    due at one composer -> SketchOpen -> composers bring their sums, owners come with empty hands -> mean at the owner

A slot's round is one all-reduce among the composers and its owner (`protocol/averaging/sketch_averaging.py`). One that
is not complete is counted and left at that: its sums are lost, training goes on.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

from torch import Tensor

from ...protocol.averaging.facts import MAX_ROUND
from ...protocol.averaging.outcome import Outcome, Status
from ...protocol.averaging.sketch_averaging import SketchAverager
from ...protocol.errors import RoundFailed
from ...protocol.experts.sketch_intervals import Heard, Intervals
from ...protocol.identity import Identity
from ...protocol.messages import SketchOpen
from ...protocol.pacing import Pace
from ..logs import get_logger
from ..model.init import expert_shape
from ..peer.links import NEWS_TOPIC, Links
from ..watching.state import Count, Phase
from .gradient_collecting import GradientForm

if TYPE_CHECKING:
    import hivemind

    from ..run.manifest import Run

log = get_logger(__name__)

BYTES_KIND = "gradient-sketch"
CODEC: Final = "int8"

# Called as taker(interval, step, opener) when an interval is opened, by this peer or another one.
Taker = Callable[[int, int, str], None]


def form_of(run: Run) -> GradientForm:
    """How the run's gradient sketches are made."""
    manifest = run.manifest
    return GradientForm(run_id=run.run_id, shape=expert_shape(manifest.model), rank=manifest.sketch.rank)


def sketch_averager(dht: hivemind.DHT, identity: Identity, run: Run, pace: Pace) -> SketchAverager | None:
    """The averager of a run with gradient sketches, None in others. It forks: see `SketchAverager`."""
    manifest = run.manifest
    if manifest.sketch.kind != "gradient":
        return None
    form = form_of(run)
    return SketchAverager(
        dht=dht,
        identity=identity,
        run_id=run.run_id,
        num_slots=form.shape.num_experts,
        numel=form.numel,
        sketcher=f"rank {form.rank}, seeded by interval",
        codec=CODEC,
        matchmaking_seconds=manifest.outer.matchmaking_seconds,
        timeout_seconds=manifest.outer.timeout_seconds,
        pace=pace,
    )


class GradientRounds:
    """One peer's, all on the asyncio loop; only `running` is also read by the training thread.

    `takers` are called whenever an interval is opened.
    """

    def __init__(self, links: Links, averager: SketchAverager) -> None:
        self._links, self._averager = links, averager
        self.intervals = Intervals(MAX_ROUND // averager.num_slots)
        self.takers: list[Taker] = []
        self.running = 0  # rounds under way, or waiting for the slot's last one to end
        self._one_at_a_time: defaultdict[int, asyncio.Lock] = defaultdict(asyncio.Lock)  # by slot
        self._waiting: set[int] = set()  # slots

    def open(self, interval: int, step: int) -> bool:
        """Open the interval that this composer has collected. False if another one is next."""
        if not self.intervals.open(interval):
            return False
        self._links.spawn(self._links.gossip(NEWS_TOPIC, SketchOpen(interval, step)))
        self._take_part(interval, step, self._links.peer_id)
        return True

    def on_sketch_open(self, sender: str, message: SketchOpen) -> None:
        """Another peer opens an interval; only those who train have something to open one for."""
        if sender not in self._links.active_composers():
            self._links.state.count(Count.REFUSALS, "sketch-open-not-a-composer")
            return
        heard = self.intervals.hear(message.interval)
        if heard is Heard.OPEN:
            self._take_part(message.interval, message.step, sender)
        elif heard is not Heard.KNOWN:
            self._links.state.count(Count.REFUSALS, f"sketch-open-{heard.value}")

    def _take_part(self, interval: int, step: int, opener: str) -> None:
        if self._links.state.phase is not Phase.LEAVING:  # who leaves begins nothing that its going would cut off
            for taker in self.takers:
                taker(interval, step, opener)

    async def round(
        self, slot: int, interval: int, sketch: Tensor | None, *, tokens: int, owner: str, epoch: int
    ) -> Outcome | str:
        """Take part in one slot's round, as `SketchAverager.submit` says; counted. Not complete: the reason why.

        While the slot's last round runs, the next one waits: its other members may be ahead of this peer by a straggler
        that they did not wait for. Any more are `busy`.
        """
        if slot in self._waiting:
            self._links.state.count(Count.SKETCH_ROUNDS, "busy")
            return "busy"
        self.running += 1
        try:
            async with self._turn(slot):
                future = await asyncio.to_thread(
                    self._averager.submit,
                    slot,
                    interval,
                    sketch,
                    tokens=tokens,
                    expected=self._expected(owner),
                    owner=owner,
                    epoch=epoch,
                )
                outcome = await asyncio.wrap_future(future)
        except RoundFailed as error:  # the averager is stuck in the slot's last round, or gone, which ends the peer
            log.info("sketch.round_failed", slot=slot, interval=interval, error=error.cause)
            self._links.state.count(Count.SKETCH_ROUNDS, "failed")
            return "failed"
        finally:
            self.running -= 1
        state, reason = self._links.state, outcome.status.value.replace("_", "-")
        state.count(Count.SKETCH_ROUNDS, reason)
        state.count(Count.BYTES, BYTES_KIND, "out", by=outcome.bytes_sent)
        state.count(Count.BYTES, BYTES_KIND, "in", by=outcome.bytes_received)
        log.debug(
            "sketch.round", slot=slot, interval=interval, outcome=reason, members=len(outcome.members),
            seconds=round(outcome.seconds, 2), detail=outcome.detail,
        )  # fmt: skip
        if outcome.status is not Status.COMPLETE:
            return reason
        self.intervals.completed()
        return outcome

    @asynccontextmanager
    async def _turn(self, slot: int) -> AsyncIterator[None]:
        """After the slot's last round."""
        self._waiting.add(slot)
        try:
            await self._one_at_a_time[slot].acquire()
        finally:
            self._waiting.discard(slot)  # of who is cancelled too, or the slot would be busy for ever
        try:
            yield
        finally:
            self._one_at_a_time[slot].release()

    def _expected(self, owner: str) -> int:
        """Members worth waiting for: the owner and who trains. Who has finished may have nothing left to bring."""
        peers = self._links.view().peers
        training = {peer for peer, record in peers.items() if (record.role, record.phase) == ("composer", "training")}
        return len(training | {owner, self._links.peer_id})
