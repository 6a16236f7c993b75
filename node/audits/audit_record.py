"""The owner's side of audits: one step of a slot on file, for a composer that asks.

Of which experts is the asker's choice, made before the step is taken. Who has to wait does so in a row, in which nobody
has more places than an honest auditor takes: an owner that seems to have no time for an audit is taken for a liar in
the end, and whoever asks again and again must not be able to bring that about.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Mapping

from ...protocol import messages
from ...protocol.errors import Refused
from ...protocol.experts.auditing import chosen, num_chosen
from ...protocol.messages import AuditedExpert, AuditedSketch, AuditRecord
from ...protocol.transport.downloads import Resource
from ..learning.trainer import Trainer
from ..learning.worker import Worker
from ..logs import get_logger
from ..peer.links import Links
from ..slots.keeper import SlotKeeper
from ..standins.publishing import Publishing
from ..storage.blobs import to_bytes
from .step_record import StepRecord

log = get_logger(__name__)

STEP_SECONDS = 90.0  # in which the step must have been taken; peers are told `busy` after 30, and ask again
KEPT_SECONDS = 60.0  # a finished record, for an asker whose connection broke
MAX_UNDER_WAY = 2  # records at once
MAX_ASKED = 2  # by one auditor, those that wait included

Wanted = tuple[int, int, int]  # slot, epoch, seed


class AuditDesk:
    """Answers `audit/<slot>/<epoch>/<seed>`. On the asyncio loop."""

    def __init__(
        self, links: Links, trainer: Trainer[Worker], publishing: Publishing[Worker], keeper: SlotKeeper[Worker]
    ) -> None:
        self._links, self._trainer = links, trainer
        self._publishing, self._keeper = publishing, keeper
        self._asked: defaultdict[str, dict[Wanted, asyncio.Task[Resource]]] = defaultdict(dict)  # by requester
        self._turns = asyncio.Semaphore(MAX_UNDER_WAY)
        self._one_at_a_time: defaultdict[int, asyncio.Lock] = defaultdict(asyncio.Lock)  # by slot
        self._kept: dict[int, tuple[str, int, Resource]] = {}  # by slot: asker, seed, record

    async def serve(self, slot: int, epoch: int, seed: int, requester: str) -> Resource | None:
        """The record of the slot's next step; None in a run without audits.

        Refused: not a composer's, not held at that epoch, too many of the requester's are not done, no step.
        """
        if not self._links.manifest.trust.audit_every:
            return None
        if requester not in self._links.active_composers():
            raise Refused("not-granted", f"{requester} is no active composer: it has nothing to audit with")
        kept = self._kept.get(slot)
        if kept is not None and kept[:2] == (requester, seed):
            return kept[2]
        if self._keeper.held.get(slot) != epoch:
            raise Refused("not-owner", f"slot {slot} is not held here at epoch {epoch}")
        wanted = slot, epoch, seed
        asked = self._asked[requester]
        if wanted not in asked:
            if len(asked) >= MAX_ASKED:
                raise Refused("busy", f"{len(asked)} audits of {requester} are not done")
            task = asked[wanted] = asyncio.ensure_future(self._in_turn(wanted, requester))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())  # perhaps nobody waits any more
        return await asyncio.shield(asked[wanted])  # whose patience ends asks again, and has not lost its place

    async def _in_turn(self, wanted: Wanted, requester: str) -> Resource:
        slot, epoch, seed = wanted
        try:
            async with self._one_at_a_time[slot], self._turns:
                resource = await self._record(slot, epoch, seed)
        finally:
            del self._asked[requester][wanted]
            if not self._asked[requester]:
                del self._asked[requester]
        self._kept[slot] = requester, seed, resource
        self._links.loop.call_later(KEPT_SECONDS, self._drop, slot, resource)
        return resource

    def _drop(self, slot: int, resource: Resource) -> None:
        if slot in self._kept and self._kept[slot][2] is resource:
            del self._kept[slot]

    async def _record(self, slot: int, epoch: int, seed: int) -> Resource:
        by_handle = self._publishing.order.by_handle(slot, epoch)
        loop = self._links.loop
        done: asyncio.Future[tuple[StepRecord, int, dict[int, bytes]] | None] = loop.create_future()

        def settle(result: tuple[StepRecord, int, dict[int, bytes]] | None) -> None:
            if not done.done():
                done.set_result(result)

        def begin(worker: Worker) -> None:
            point = self._publishing.point(slot)
            if slot not in worker.owned or point is None or point.epoch != epoch:
                raise Refused("not-owner", f"slot {slot} is not held here at epoch {epoch}")
            shape = worker.shape
            handles = chosen(seed, by_handle, num_chosen(len(by_handle), 3 * shape.hidden * shape.width))
            positions = tuple(by_handle[handle] for handle in handles)

            def finish(record: StepRecord | None) -> None:
                result = None
                if record is not None:
                    now = self._publishing.point(slot)
                    assert now is not None  # it is held, or it would have been forgotten
                    standins = worker.standins(slot)
                    result = record, now.seq, {position: standins[position].to_bytes() for position in positions}
                loop.call_soon_threadsafe(settle, result)

            worker.record_step(slot, positions, finish)

        await asyncio.wrap_future(self._trainer.ask(begin))
        try:
            async with asyncio.timeout(STEP_SECONDS):
                result = await done
        except TimeoutError:
            self._trainer.ask(lambda worker: worker.recorder.forget(slot))
            raise Refused("idle", f"slot {slot} had no step in {STEP_SECONDS:.0f} s") from None
        if result is None:
            raise Refused("not-owner", f"slot {slot} was let go of")
        data = await asyncio.to_thread(lambda: messages.encode(message_of(slot, epoch, by_handle, *result)))
        log.info("audit.recorded", slot=slot, step=result[0].step, nbytes=len(data))
        return Resource(data)


def message_of(
    slot: int, epoch: int, by_handle: Mapping[bytes, int], record: StepRecord, seq: int, standins: Mapping[int, bytes]
) -> AuditRecord:
    experts = []
    for handle, position in by_handle.items():
        if position not in record.before:
            continue
        versions = [standins[position]]
        sketches = []
        for used in record.used.get(position, ()):
            taken_at = used.standin.to_bytes()
            if taken_at not in versions:
                versions.append(taken_at)
            sketches.append(
                AuditedSketch(used.sender, used.step, used.tokens, used.sketch.to_bytes(), versions.index(taken_at))
            )
        before, after = to_bytes(record.before[position]), to_bytes(record.after[position])
        experts.append(AuditedExpert(handle, before, tuple(sketches), after, versions[0], tuple(versions[1:])))
    return AuditRecord(slot, epoch, seq, record.step, record.learning_rate, record.clip, tuple(experts))
