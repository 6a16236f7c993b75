"""What this peer answers when another one fetches: the run's manifest, backbone fragments, stand-ins, whole slots."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...protocol import messages
from ...protocol.errors import Refused
from ...protocol.resources import Resource as Wanted
from ...protocol.resources import ResourceKind, parse_resource
from ...protocol.transport.downloads import FetchQuery, Resource
from ..slots.handle_key import HOLDERS
from ..storage.blobs import fragment_to_bytes
from ..watching.state import Count
from .links import Links
from .sharing import Room, Shared

if TYPE_CHECKING:  # a bootstrap peer serves none of these: their imports would be most of its start
    from ..audits.audit_record import AuditDesk
    from ..backbone.common_state import CommonState, Held
    from ..learning.composer import Composer
    from ..learning.trainer import Trainer
    from ..learning.worker import Worker
    from ..seed.joining import SeedAtHome
    from ..slots.keeper import SlotKeeper
    from ..standins.exchange import Exchange


SHARED_SECONDS = 30.0  # what others read may be given to one more peer for so long
_OF_SLOTS = {
    ResourceKind.SNAPSHOT, ResourceKind.WEIGHTS, ResourceKind.HANDOVER, ResourceKind.REBUILT, ResourceKind.STANDIN
}  # fmt: skip
_LARGE = _OF_SLOTS - {ResourceKind.HANDOVER} | {ResourceKind.BACKBONE, ResourceKind.LOCAL, ResourceKind.SEED}
_WHOLE = {ResourceKind.SNAPSHOT, ResourceKind.WEIGHTS, ResourceKind.REBUILT}
SERVED_BYTES = 1 << 30  # of whole slots that anybody reads, of handovers, and of all else; or one at a time of each
COPIES_MADE = 2  # times its bytes a resource takes while it is made: tensors, their encoding, the message around them


@dataclass(frozen=True)
class _Shelves:
    """What only a composer has to give."""

    trainer: Trainer[Composer]
    common: CommonState
    exchange: Exchange


class Library:
    """Answers fetches. A bootstrap peer has the manifest only."""

    def __init__(self, links: Links, signed_manifest: bytes) -> None:
        self._links = links
        self._manifest = Resource(signed_manifest)
        self._shared = Shared(seconds=SHARED_SECONDS)
        self._handed_over = Shared(seconds=0.0)  # never what was made before: the slot may have been trained since
        # Apart: who reads slots slowly must not keep newcomers from stand-ins, nor anybody from taking slots over.
        self._slots, self._handovers, self._rest = Room(SERVED_BYTES), Room(SERVED_BYTES), Room(SERVED_BYTES)
        self.handle_key: bytes | None = None
        self.seed: SeedAtHome | None = None
        self._shelves: _Shelves | None = None
        self._keeper: SlotKeeper[Any] | None = None
        self._desk: AuditDesk | None = None

    def stock(
        self, trainer: Trainer[Composer], common: CommonState, exchange: Exchange, keeper: SlotKeeper[Composer]
    ) -> None:
        """From now on answer for a composer too."""
        self._shelves = _Shelves(trainer, common, exchange)
        self._keeper = keeper

    def stock_slots(self, keeper: SlotKeeper[Worker], desk: AuditDesk) -> None:
        """From now on answer for a worker too: it has slots, and nothing else."""
        self._keeper, self._desk = keeper, desk

    async def answer(self, query: FetchQuery) -> Resource | None:
        """One fetch. None: there is no such thing here. Refused: there is, but not for this peer or not now."""
        wanted = parse_resource(query.resource)
        if wanted.kind in _LARGE:
            key = wanted, self._version_of(wanted)
            resource = await self._shared.get(key, lambda: self._make(wanted, query.peer_id))
        elif wanted.kind is ResourceKind.HANDOVER:
            # Who was told to come again, as steps took long, finds what is being made for it.
            asked = wanted, query.peer_id
            resource = await self._handed_over.get(asked, lambda: self._make(wanted, query.peer_id))
        else:
            resource = await self._find(wanted, query.peer_id)
        if resource is not None:
            self._links.state.count(Count.BYTES, wanted.kind.value, "out", by=len(resource.data))
        return resource

    def _version_of(self, wanted: Wanted) -> Held | int | None:
        """What has to be equal for two requests to mean the same bytes, or some that are a little older."""
        if wanted.index is None:
            return None
        if wanted.kind is ResourceKind.BACKBONE and self._shelves is not None:
            held = self._shelves.common.held
            return held[wanted.index] if wanted.index < len(held) else None
        return self._keeper.held.get(wanted.index) if wanted.kind in _OF_SLOTS and self._keeper is not None else None

    async def _make(self, wanted: Wanted, requester: str) -> Resource | None:
        """Of what is large, if there is room for it. Refused: come again."""
        room = self._rest
        if wanted.kind is ResourceKind.HANDOVER:
            room = self._handovers
        elif wanted.kind in _WHOLE:
            room = self._slots
        return await room.fill(COPIES_MADE * self._most_bytes(wanted), lambda: self._find(wanted, requester))

    def _most_bytes(self, wanted: Wanted) -> int:
        """A resource is no larger, as far as that is known before it is made."""
        kind, index = wanted.kind, wanted.index
        if kind is ResourceKind.SEED:
            return 0 if self.seed is None or index is None else self.seed.store.nbytes(index)
        if kind in _OF_SLOTS:
            whole = 0 if self._keeper is None else self._keeper.max_slot_bytes
            return whole // 4 if kind is ResourceKind.STANDIN else whole
        return 0 if self._shelves is None or index is None else self._shelves.common.max_bytes(index)

    async def _find(self, wanted: Wanted, requester: str) -> Resource | None:
        kind, index = wanted.kind, wanted.index
        if kind is ResourceKind.MANIFEST:
            return self._manifest
        if kind is ResourceKind.HANDLE_KEY:
            return self._key_for(requester)
        if kind in (ResourceKind.SEED, ResourceKind.SEED_INDEX):
            return await asyncio.to_thread(self._part, index)
        if self._keeper is None or index is None:
            return None
        if kind in _OF_SLOTS:
            if index >= self._keeper.num_slots:
                return None
            if kind is ResourceKind.SNAPSHOT:
                return await self._keeper.serving.snapshot(index)
            if kind is ResourceKind.WEIGHTS:
                return await self._keeper.serving.weights(index)
            if kind is ResourceKind.HANDOVER:
                return await self._keeper.serve_handover(index, requester)
            if kind is ResourceKind.REBUILT:
                return await self._keeper.serving.rebuilt(index)
            return await self._keeper.serving.standin(index)
        if kind is ResourceKind.AUDIT:
            assert wanted.pair is not None
            return None if self._desk is None else await self._desk.serve(index, *wanted.pair, requester)
        if self._shelves is None:
            return None
        shelves = self._shelves
        if kind is ResourceKind.HANDLES:
            assert wanted.pair is not None
            layers = shelves.exchange.layers
            return Resource(messages.encode(layers.handles.table(index, *wanted.pair, layers.num_layers)))
        if index >= len(shelves.common.held):
            return None

        def state(composer: Composer) -> tuple[Tensor, Tensor]:
            if kind is ResourceKind.LOCAL:
                local = composer.local_fragment(index)
                return local, torch.zeros_like(local)
            return composer.common[index], composer.momentum[index]  # replaced as a whole, never written to

        fragment, momentum = await asyncio.wrap_future(shelves.trainer.ask(state))
        return Resource(await asyncio.to_thread(fragment_to_bytes, fragment, momentum))

    def _part(self, number: int | None) -> Resource | None:
        """Of the run's seed, as far as it is here."""
        if self.seed is None:
            return None
        data = self.seed.store.index_bytes() if number is None else self.seed.store.part(number)
        return None if data is None else Resource(data)

    def _key_for(self, requester: str) -> Resource | None:
        record = self._links.view().peers.get(requester)
        if record is None or record.role not in HOLDERS:
            raise Refused("not-granted", f"{requester} is not known as a composer: workers do not get the handle key")
        return None if self.handle_key is None else Resource(self.handle_key)
