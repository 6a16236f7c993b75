"""The auditor's side: every composer has a slot of somebody else put one step on file now and then, and takes it again.

When is random, so that no owner knows when it will be watched; where a composer accuses an owner, at once. A worker's
step can be taken again; a composer mixes in gradients of text that nobody else has, so of its experts it is only
checked that the published stand-ins do their work. docs/trust.md says what that leaves open.
"""

from __future__ import annotations

import asyncio
import time
from random import Random

from ...protocol import messages, resources
from ...protocol.errors import FetchFailed, PeerUnreachable, Refused, TransportError
from ...protocol.experts.auditing import LIES, Asked, Finding, SentLog, check_claims, chosen, num_chosen
from ...protocol.experts.surrogates import Point
from ...protocol.messages import Accusation, AuditRecord, SlotState
from ..learning.composer import Composer
from ..learning.trainer import Trainer
from ..logs import get_logger
from ..peer.links import NEWS_TOPIC, Links
from ..slots.deposing import Deposing
from ..standins.exchange import Exchange
from ..watching.state import Count
from .audit_verdict import Known, judge, judge_weights

log = get_logger(__name__)

RECORD_SECONDS = 60.0  # for one attempt
ATTEMPTS = 4  # where the owner is busy, with other audits or with a step that takes long
PAUSE_SECONDS = 2.0
CATCH_UP_SECONDS = 5.0  # for the deltas that the owner had published when it took its step
LOOK_SECONDS = 0.1
MAX_AUDITS = 2  # at once


class Auditor:
    """One composer's.

    Args:
        sent: what this composer's `SketchSender` remembers.
        max_record_bytes: refuse larger records.
    """

    def __init__(
        self,
        links: Links,
        trainer: Trainer[Composer],
        exchange: Exchange,
        deposing: Deposing,
        sent: SentLog,
        *,
        max_record_bytes: int,
        rng: Random | None = None,
    ) -> None:
        self._links, self._trainer, self._exchange = links, trainer, exchange
        self._deposing, self._sent = deposing, sent
        self._max_record_bytes = max_record_bytes
        self._rng = rng or Random()
        self._every = links.manifest.trust.audit_every
        self._step = 0
        self._under_way: set[int] = set()  # slots
        self._accusations: dict[str, Accusation] = {}  # by owner
        self._menu = exchange.menu
        deposing.on_accused, deposing.on_distrust = self._on_accused, exchange.distrust

    # -- training thread -------------------------------------------------------------------------------------------

    def after_step(self, composer: Composer) -> None:
        """Audit somebody, once in `audit_every` steps on average."""
        self._step = composer.step
        if self._every and self._rng.random() * self._every < 1.0:
            self._links.loop.call_soon_threadsafe(self._audit_somebody)

    # -- asyncio loop ----------------------------------------------------------------------------------------------

    def _audit_somebody(self) -> None:
        leases = self._links.view().leases
        slots = [slot for slot, claim in leases.items() if claim.owner != self._links.peer_id]
        if slots:
            self._audit_soon(self._rng.choice(sorted(slots)))

    def _on_accused(self, accusation: Accusation) -> None:
        held = sorted(s for s, claim in self._links.view().leases.items() if claim.owner == accusation.owner)
        if held:
            self._audit_soon(accusation.slot if accusation.slot in held else self._rng.choice(held))

    def _audit_soon(self, slot: int) -> None:
        if slot not in self._under_way and len(self._under_way) < MAX_AUDITS:
            self._under_way.add(slot)
            self._links.spawn(self._guarded(slot))

    async def _guarded(self, slot: int) -> None:
        try:
            await self.audit(slot)
        finally:
            self._under_way.discard(slot)

    async def audit(self, slot: int) -> Finding | None:
        """Audit whoever owns a slot, and act on it. None: nothing can be said now."""
        claim = self._links.view().leases.get(slot)
        record = None if claim is None else self._links.view().peers.get(claim.owner)
        if claim is None or record is None or claim.owner == self._links.peer_id:
            return None
        point, _ = await self._published(slot, claim.epoch)
        if point is None:
            return None  # what its owner goes on from has not come here yet
        check = self._step_of if record.role == "worker" else self._standins_of
        finding = await check(slot, claim.owner, claim.epoch)
        now = self._links.view().leases.get(slot)
        if finding is None or now is None or (now.owner, now.epoch) != (claim.owner, claim.epoch):
            return None
        self._links.state.count(Count.AUDITS, finding.value)
        log.info("audit.done", slot=slot, owner=claim.owner, finding=finding.value)
        if self._deposing.distrust.judge(claim.owner, finding):
            log.error("audit.failed", slot=slot, epoch=claim.epoch, owner=claim.owner, finding=finding.value)
            self._accusations[claim.owner] = Accusation(claim.owner, slot, claim.epoch, finding.value)
            self._deposing.depose()
            await self._accuse()
        return finding

    async def run(self) -> None:
        """Until cancelled: repeat accusations, for those who have come since or missed them."""
        while True:
            await asyncio.sleep(self._links.manifest.ownership.lease_seconds)
            await self._accuse()

    async def _accuse(self) -> None:
        peers = self._links.view().peers
        for owner, accusation in list(self._accusations.items()):  # another one may be found out meanwhile
            if owner in peers:
                await self._links.gossip(NEWS_TOPIC, accusation)

    # -- one audit -------------------------------------------------------------------------------------------------

    async def _published(self, slot: int, epoch: int) -> tuple[Point | None, dict[bytes, bytes]]:
        """The stand-ins that run here for a slot, by handle under a lease; no point if they are of another lease."""
        ask = self._trainer.ask(lambda _: self._exchange.followed_standins(slot))
        point, layers = await asyncio.wrap_future(ask)
        if point is None or point.epoch != epoch:
            return None, {}
        return point, {self._exchange.layers.handles.of(slot, i, epoch): data for i, data in enumerate(layers)}

    async def _fetch(self, owner: str, resource: str, max_bytes: int) -> bytes | None:
        for attempt in range(ATTEMPTS):
            if attempt:
                await asyncio.sleep(PAUSE_SECONDS * (1 + self._rng.random()))
            try:
                got = await self._links.fetch(owner, resource, max_bytes=max_bytes, deadline_seconds=RECORD_SECONDS)
                return got.data
            except (FetchFailed, PeerUnreachable, TransportError) as error:
                log.info("audit.no_answer", owner=owner, resource=resource, error=str(error))
        return None

    async def _step_of(self, slot: int, owner: str, epoch: int) -> Finding | None:
        links, manifest = self._links, self._links.manifest
        before, at_first = await self._published(slot, epoch)
        if before is None:
            return None
        newest = max(self._sent.steps_taken(slot), default=-1)
        shape, seed = self._exchange.shape, self._rng.getrandbits(48)
        handles = chosen(seed, at_first, num_chosen(len(at_first), 3 * shape.hidden * shape.width))
        slowest = min(links.active_steps.values(), default=0)
        data = await self._fetch(owner, resources.audit(slot, epoch, seed), self._max_record_bytes)
        if data is None:  # one that takes sketches all the while has steps to show
            return Finding.NO_ANSWER if self._sent.steps_taken(slot, newest) else None
        try:
            record = await asyncio.to_thread(messages.decode, data, AuditRecord)
        except Refused:
            return Finding.MALFORMED
        senders = {sketch.sender for expert in record.experts for sketch in expert.sketches}
        if not senders <= links.view().peers.keys():
            await links.read_directory()
        asked = Asked(
            me=links.peer_id,
            slot=slot,
            epoch=epoch,
            seq=before.seq,
            handles=handles,
            newest=newest,
            rows=manifest.sketch.kind == "rows",
        )
        roles = {peer: seen.role for peer, seen in links.view().peers.items()}
        found = check_claims(record, asked, self._sent, roles, now=time.monotonic())
        if found in LIES:
            return found
        after, at_last = await self._caught_up(slot, epoch, record.seq)
        published = {before.seq: at_first} | ({} if after is None else {after.seq: at_last})
        known = Known(published=published, steps=[slowest, *links.active_steps.values(), self._step])
        judged = await asyncio.to_thread(judge, record, manifest, known, self._menu)
        return judged if judged is not Finding.PASSED else found

    async def _caught_up(self, slot: int, epoch: int, seq: int) -> tuple[Point | None, dict[bytes, bytes]]:
        deadline = self._links.loop.time() + CATCH_UP_SECONDS
        while True:
            found = await self._published(slot, epoch)
            if found[0] is None or found[0].seq >= seq or self._links.loop.time() > deadline:
                return found
            await asyncio.sleep(LOOK_SECONDS)

    async def _standins_of(self, slot: int, owner: str, epoch: int) -> Finding | None:
        data = await self._fetch(owner, resources.weights(slot), self._max_record_bytes)
        point, published = await self._published(slot, epoch)
        if data is None or point is None:
            return None  # a composer owes nobody a step; its lease runs out if it is gone
        try:
            state = await asyncio.to_thread(messages.decode, data, SlotState)
        except Refused:
            return Finding.MALFORMED
        if (state.slot, state.epoch) != (slot, epoch):
            return None if state.slot == slot and state.epoch > epoch else Finding.NOT_AS_ASKED
        handles = self._exchange.layers.handles.sorted_handles(slot, epoch, self._exchange.layers.num_layers)
        in_order = [published[handle] for handle in handles]
        return await asyncio.to_thread(judge_weights, state, self._links.manifest, in_order, self._menu)
