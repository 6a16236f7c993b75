"""Sketches as a composer sends them: to each owner what its experts can learn from the tokens trained on here.

On the training thread, every `sketch.every` steps, what was collected for the owners that can take some is packed and
handed to the loop. One call per owner is under way at a time; meanwhile that owner's rows go on collecting. An owner's
answer says how large a share of the rows to send from now on; a call that fails halves it.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict

from ..protocol import messages
from ..protocol.envelope import seal
from ..protocol.errors import PeerUnreachable, Refused, TransportError
from ..protocol.messages import ExpertSketch, SketchBatch, SketchReply, SlotSketch
from ..protocol.sketches import SenderRate, split
from .composer import Composer
from .exchange import Exchange
from .links import Links
from .logs import get_logger
from .sketching import Collected, SketchCollector
from .state import Count

log = get_logger(__name__)

CALL_SECONDS = 20.0


class SketchSender:
    """One composer's. `collector` is the composer's own."""

    def __init__(self, links: Links, exchange: Exchange, collector: SketchCollector) -> None:
        self._links, self._exchange, self._collector = links, exchange, collector
        self._every = links.manifest.sketch.every
        self._under_way: set[str] = set()  # owners; added to on the training thread, taken from on the loop's
        self._rates: dict[str, SenderRate] = {}

    # -- training thread -------------------------------------------------------------------------------------------

    def after_step(self, composer: Composer) -> None:
        """Send what is due."""
        if composer.step % self._every:
            return
        now = time.monotonic()
        targets = {
            slot: target for slot, target in self._exchange.owners().items() if target.owner not in self._under_way
        }
        shares = {}
        for slot, target in targets.items():
            rate = self._rates.setdefault(target.owner, SenderRate(random.Random()))
            if rate.ready(now):
                shares[slot] = rate.share
        batches: dict[tuple[str, int, int], list[SlotSketch]] = defaultdict(list)
        rows = 0
        for slot, collected in self._collector.take(shares).items():
            if collected.tokens:
                target = targets[slot]
                rows += sum(layer.num_rows for layer in collected.layers)
                sketch = self._packed(slot, target.epoch, target.seq, collected)
                batches[target.owner, collected.tokens, collected.steps].append(sketch)
        self._links.state.count(Count.SKETCH_ROWS, "out", by=rows)
        by_owner: dict[str, list[SketchBatch]] = defaultdict(list)
        for (owner, tokens, steps), slots in batches.items():
            by_owner[owner].extend(split(composer.step, tokens, steps, slots))
        for owner, ready in by_owner.items():
            self._under_way.add(owner)
            self._links.loop.call_soon_threadsafe(self._send_soon, owner, ready)

    def _packed(self, slot: int, epoch: int, seq: int, collected: Collected) -> SlotSketch:
        handles = self._exchange.layers.handles
        experts = [
            ExpertSketch(handles.of(slot, layer, epoch), collected.layers[layer].to_bytes())
            for layer in self._exchange.order.outward(slot, epoch)
        ]
        return SlotSketch(slot, epoch, seq, tuple(experts))

    # -- asyncio loop ----------------------------------------------------------------------------------------------

    def _send_soon(self, owner: str, batches: list[SketchBatch]) -> None:
        self._links.spawn(self._send(owner, batches))

    async def _send(self, owner: str, batches: list[SketchBatch]) -> None:
        rate = self._rates[owner]
        try:
            for batch in batches:
                await self._send_one(owner, batch, rate)
        except (PeerUnreachable, Refused, TransportError, TimeoutError, ValueError) as error:
            rate.failed(time.monotonic())
            self._links.state.count(Count.SKETCHES_LOST, "unreachable")
            log.info("sketch.not_delivered", owner=owner, error=str(error))
        finally:
            self._under_way.discard(owner)

    async def _send_one(self, owner: str, batch: SketchBatch, rate: SenderRate) -> None:
        links = self._links
        body = seal(links.identity, links.run_id, batch.kind, messages.encode(batch))
        links.state.count(Count.BYTES, batch.kind, "out", by=len(body))
        answer = await links.transport.call(links.addrs(owner), batch.kind, body, deadline_seconds=CALL_SECONDS)
        reply = messages.decode(answer, SketchReply)
        rate.replied(reply, time.monotonic())
        for slot, reason in reply.refused:
            links.state.count(Count.SKETCHES_LOST, reason)
            log.debug("sketch.refused_by_owner", owner=owner, slot=slot, reason=reason)
