"""Sketches as an owner gets them: checked on the network thread, queued within bounds, learned from between steps.

What is taken is decided in `protocol/experts/sketches.py`: composers only, slots held here under the epoch named, rows
that decode, stand-ins that are not too old, no more than fits the queue. Every refusal is counted by its reason.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from concurrent.futures import Future
from typing import Generic

from ...protocol import messages
from ...protocol.envelope import ENVELOPE_OVERHEAD, open_sealed
from ...protocol.errors import BadSignature, Refused
from ...protocol.experts.sketches import Admitted, Held, Rules, SketchInbox
from ...protocol.messages import MAX_SKETCH_BYTES, SketchBatch
from ..learning.owning import Owner
from ..learning.trainer import Trainer
from ..logs import get_logger
from ..peer.links import Links
from ..slots.keeper import SlotKeeper
from ..standins.publishing import Publishing
from ..watching.state import Count
from .sketching import Sketch, reader_of

log = get_logger(__name__)


QUEUE_BYTES = 64 * 1024 * 1024
HEARD_STEPS = 2  # of each sender at a time


class SketchReceiver(Generic[Owner]):
    """Answers calls named `sketch-batch`."""

    def __init__(
        self,
        links: Links,
        trainer: Trainer[Owner],
        publishing: Publishing[Owner],
        keeper: SlotKeeper[Owner],
        owner: Owner,
    ) -> None:
        self._links, self._trainer = links, trainer
        self._publishing, self._keeper = publishing, keeper
        manifest = links.manifest
        rules = Rules(
            max_age=manifest.sketch.max_age,
            max_tokens_per_step=manifest.train.batch_size * manifest.data.context_length,
        )
        load = reader_of(manifest.sketch, owner.shape)
        self._inbox: SketchInbox[Sketch] = SketchInbox(QUEUE_BYTES, rules, load)
        self._asked_to_drain = False
        self.rows = 0  # learned from so far

    # -- network thread --------------------------------------------------------------------------------------------

    def admit(self, peer_id: str, name: str, _size: int) -> None:
        """Before a body is read, so that who may not send any takes no memory from who may. Refused if it may not."""
        if name != SketchBatch.kind:
            raise Refused("unknown-call", f"nothing here is called {name[:40]!r}")
        if peer_id not in self._members():
            self._inbox.refusals["not-a-member"] += 1
            self._count_refusals()
            raise Refused("not-a-member", f"{peer_id} has sketches to send and is no composer of this run")

    async def answer(self, peer_id: str, name: str, body: bytes) -> bytes:
        """One call that was admitted. Refused: nothing of it was taken."""
        try:
            batch = self._open(peer_id, body)
            reply = self._inbox.receive(peer_id, batch, self._members(), self._held(), time.monotonic())
        finally:
            self._count_refusals()
        self._links.state.count(Count.BYTES, batch.kind, "in", by=len(body))
        if reply.accepted and not self._asked_to_drain:
            self._asked_to_drain = True
            self._trainer.ask(self.drain).add_done_callback(_tell)
        return messages.encode(reply)

    def _members(self) -> set[str]:
        return {peer for peer, record in self._links.view().peers.items() if record.role == "composer"}

    def _count_refusals(self) -> None:
        refusals: dict[tuple[str, ...], float] = {
            (f"sketch-{reason}",): number for reason, number in self._inbox.refusals.items()
        }
        self._links.state.absorb("sketches", Count.REFUSALS, refusals)

    def _open(self, peer_id: str, body: bytes) -> SketchBatch:
        try:
            envelope = open_sealed(body, self._links.run_id, max_bytes=MAX_SKETCH_BYTES + ENVELOPE_OVERHEAD)
            if envelope.sender != peer_id or envelope.kind != SketchBatch.kind:
                raise Refused("forged", f"{peer_id} passed on a {envelope.kind} of {envelope.sender}")
            return messages.decode(envelope.payload, SketchBatch)
        except Refused as error:
            self._inbox.refusals[error.reason] += 1
            raise
        except BadSignature as error:
            self._inbox.refusals["forged"] += 1
            raise Refused("forged", error.cause) from error

    def _held(self) -> dict[int, Held]:
        """Owned slots. Also read on the training thread: a slot that comes or goes meanwhile is refused or left out."""
        held = {}
        for slot, epoch in list(self._keeper.held.items()):
            point = self._publishing.point(slot)
            if point is not None and point.epoch == epoch:
                held[slot] = Held(epoch=epoch, seq=point.seq, positions=self._publishing.order.by_handle(slot, epoch))
        return held

    # -- training thread -------------------------------------------------------------------------------------------

    def drain(self, owner: Owner) -> None:
        """Let the owner hear what has come; of much, a part before its next step and a part after it. Who cannot keep
        up would else spend its time on others' sketches, and take few steps on the means of many.
        """
        self._asked_to_drain = False  # first, so that what comes from now on asks again
        held = self._held()
        steps: defaultdict[str, set[int]] = defaultdict(set)  # by sender
        enough = False
        while len(self._inbox.queue):
            for item in self._inbox.take(held, max_bytes=1):  # which is one
                self._hear(owner, held, item)
                steps[item.sender].add(item.step)
                enough = len(steps[item.sender]) > HEARD_STEPS
            if enough:
                self._asked_to_drain = True
                self._trainer.ask(self.drain).add_done_callback(_tell)
                break
        # What a sketch teaches is known only when it is settled, so these are counted with the next ones.
        late = self._inbox.outdated + Counter({"not-finite": owner.dropped_sketches})
        outdated: dict[tuple[str, ...], float] = {(f"sketch-{reason}",): number for reason, number in late.items()}
        self._links.state.absorb("late sketches", Count.REFUSALS, outdated)

    def _hear(self, owner: Owner, held: dict[int, Held], item: Admitted[Sketch]) -> None:
        if item.slot not in owner.owned:
            self._inbox.outdated["not-owner"] += 1
            return
        try:
            age = held[item.slot].seq - item.seq
            self._links.state.record_sketch_age(age)
            owner.hear(item.sender, item.slot, dict(item.sketches), tokens=item.tokens, step=item.step, age=age)
        except ValueError as error:
            self._inbox.outdated["not-finite"] += 1
            log.warning("sketch.refused", slot=item.slot, sender=item.sender, error=str(error))
            return
        rows = sum(sketch.num_rows for _, sketch in item.sketches)
        if rows and not self.rows:
            log.info("sketch.first", slot=item.slot, rows=rows)
        self.rows += rows
        self._links.state.count(Count.SKETCH_ROWS, "in", by=rows)


def _tell(drained: Future[None]) -> None:
    """Nobody waits for it, and an error in it is a bug."""
    if not drained.cancelled() and (error := drained.exception()) is not None:
        log.error("sketch.not_heard", error=repr(error), exc_info=error)
