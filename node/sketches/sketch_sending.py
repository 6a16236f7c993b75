"""Sketches as a composer sends them: to each owner what its experts can learn from the tokens trained on here.

On the training thread, every `SketchSpec.interval` steps and as soon as the backward pass is done, what was collected
for the owners that can take some is handed to the loop, which packs it. One call per owner is under way at a time;
meanwhile rows for that owner go on collecting. An owner's answer says how large a share of the rows to send from now
on; a call that fails halves it. Signs are of one size: they are sent, or not.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ...protocol import messages
from ...protocol.envelope import seal
from ...protocol.errors import PeerUnreachable, Refused, TransportError
from ...protocol.experts.auditing import SentLog
from ...protocol.experts.sketches import Rules, SenderRate, split
from ...protocol.messages import ExpertSketch, SketchBatch, SketchReply, SlotSketch
from ...protocol.transport.call_wire import CallReason
from ..learning.composer import Composer
from ..logs import get_logger
from ..model.init import expert_shape
from ..peer.links import Links
from ..run.manifest import Manifest
from ..standins.exchange import Exchange, Target
from ..watching.state import Count
from .row_memory import rows_held
from .sign_collecting import SignCollector
from .sketching import Collected, SketchCollector

log = get_logger(__name__)

CALL_SECONDS = 20.0
# What is counted by its name; an owner could make up any number of others.
_REASONS = frozenset(CallReason) | frozenset({
    "early-epoch", "early-version", "forged", "implausible", "malformed", "not-a-member", "not-owner",
    "oversized", "repeated", "stale-epoch", "stale-version", "too-many-steps", "too-many-tokens", "unknown-call",
    "unknown-handle", "unreachable",
})  # fmt: skip


def collector_of(manifest: Manifest, seed: int) -> SketchCollector | SignCollector:
    """What a composer of a run collects sketches with that it sends to owners; `seed` is its own."""
    if manifest.sketch.kind == "signs":
        return SignCollector(expert_shape(manifest.model), seed=seed)
    return SketchCollector(manifest.sketch, expert_shape(manifest.model), seed=seed, max_rows=rows_held(manifest))


class _Taken(NamedTuple):
    """What was collected for one slot of somebody else, and whose it was then."""

    slot: int
    target: Target
    collected: Collected


class SketchSender:
    """One composer's. `collector` is the composer's own."""

    def __init__(self, links: Links, exchange: Exchange, collector: SketchCollector | SignCollector) -> None:
        self._links, self._exchange, self._collector = links, exchange, collector
        self._every = links.manifest.sketch.interval
        self._under_way: set[str] = set()  # owners; added to on the training thread, taken from on the loop's
        self._rates: dict[str, SenderRate] = {}
        self.sent = SentLog()  # on the loop

    # -- training thread -------------------------------------------------------------------------------------------

    def after_compute(self, composer: Composer) -> None:
        """Send what is due."""
        step = composer.step + 1  # the one that is being taken
        if step % self._every:
            return
        now = time.monotonic()
        owners = self._exchange.owners()
        present = {target.owner for target in owners.values()} | self._under_way
        self._rates = {owner: rate for owner, rate in self._rates.items() if owner in present}
        targets = {slot: target for slot, target in owners.items() if target.owner not in self._under_way}
        shares = {}
        for slot, target in targets.items():
            rate = self._rates.setdefault(target.owner, SenderRate(random.Random()))
            if rate.ready(now):
                shares[slot] = rate.share
        taken: dict[str, list[_Taken]] = defaultdict(list)  # by owner
        rows = 0
        for slot, collected in self._collector.take(shares).items():
            if collected.steps > Rules.max_steps:  # it would be refused, with all that travels beside it
                self._lost("too-many-steps", 1)
            elif collected.tokens:
                rows += sum(layer.num_rows for layer in collected.layers)
                taken[targets[slot].owner].append(_Taken(slot, targets[slot], collected))
        self._links.state.count(Count.SKETCH_ROWS, "out", by=rows)
        if isinstance(self._collector, SignCollector) and (refused := self._collector.take_refused()):
            self._links.state.count(Count.REFUSALS, "sketch-rows-not-finite", by=refused)
        if taken:
            self._under_way.update(taken)
            self._links.loop.call_soon_threadsafe(self._send_soon, step, taken)

    # -- asyncio loop ----------------------------------------------------------------------------------------------

    def _send_soon(self, step: int, taken: Mapping[str, Sequence[_Taken]]) -> None:
        for owner, slots in taken.items():
            self._links.spawn(self._send(owner, step, slots))

    def _batches(self, step: int, taken: Sequence[_Taken]) -> list[SketchBatch]:
        alike: dict[tuple[int, int], list[SlotSketch]] = defaultdict(list)
        for slot, target, collected in taken:
            alike[collected.tokens, collected.steps].append(self._packed(slot, target, collected))
        return [batch for (tokens, steps), slots in alike.items() for batch in split(step, tokens, steps, slots)]

    def _packed(self, slot: int, target: Target, collected: Collected) -> SlotSketch:
        handles = self._exchange.layers.handles
        experts = [
            ExpertSketch(handles.of(slot, layer, target.epoch), collected.layers[layer].to_bytes())
            for layer in self._exchange.order.outward(slot, target.epoch)
        ]
        return SlotSketch(slot, target.epoch, target.seq, tuple(experts))

    async def _send(self, owner: str, step: int, taken: Sequence[_Taken]) -> None:
        rate = self._rates[owner]
        waiting: deque[SketchBatch] = deque()
        try:
            waiting.extend(self._batches(step, taken))
            while waiting:
                await self._send_one(owner, waiting[0], rate)
                waiting.popleft()
        except (PeerUnreachable, Refused, TransportError, TimeoutError, ValueError) as error:
            rate.failed(time.monotonic())
            reason = error.reason if isinstance(error, Refused) else "unreachable"
            self._lost(reason, sum(len(batch.slots) for batch in waiting) or len(taken))
            log.info("sketch.not_delivered", owner=owner, error=str(error))
        finally:
            self._under_way.discard(owner)

    async def _send_one(self, owner: str, batch: SketchBatch, rate: SenderRate) -> None:
        links = self._links
        body = seal(links.identity, links.run_id, batch.kind, messages.encode(batch))
        links.state.count(Count.BYTES, batch.kind, "out", by=len(body))
        now = time.monotonic()
        for sketch in batch.slots:
            self.sent.sent(sketch.slot, batch.step, batch.tokens, ((e.handle, e.rows) for e in sketch.experts), now)
        answer = await links.transport.call(links.addrs(owner), batch.kind, body, deadline_seconds=CALL_SECONDS)
        reply = messages.decode(answer, SketchReply)
        rate.replied(reply, time.monotonic())
        refused = {slot for slot, _ in reply.refused}
        if len(batch.slots) == reply.accepted + len(refused):  # else more were refused than a reply lists
            for sketch in batch.slots:
                if sketch.slot not in refused:
                    self.sent.taken(sketch.slot, batch.step, (e.handle for e in sketch.experts))
        for slot, reason in reply.refused:
            self._lost(reason, 1)
            log.debug("sketch.refused_by_owner", owner=owner, slot=slot, reason=reason)

    def _lost(self, reason: str, slots: int) -> None:
        self._links.state.count(Count.SKETCHES_LOST, reason if reason in _REASONS else "other", by=slots)
