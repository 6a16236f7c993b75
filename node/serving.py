"""What this peer answers when another one fetches: the run's manifest, backbone fragments, stand-ins, whole slots."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import torch

from ..protocol import messages
from ..protocol.resources import ResourceKind, parse_resource
from ..protocol.transport.downloads import FetchQuery, Resource
from .blobs import fragment_to_bytes
from .links import Links
from .state import Count

if TYPE_CHECKING:  # a bootstrap peer serves none of these: their imports would be most of its start
    from .composer import Composer
    from .exchange import Exchange
    from .keeper import SlotKeeper
    from .outer import OuterDriver
    from .trainer import Trainer


class Library:
    """Answers fetches. A bootstrap peer has the manifest only."""

    def __init__(self, links: Links, signed_manifest: bytes) -> None:
        self._links = links
        self._manifest = Resource(signed_manifest)
        self._shelves: tuple[Trainer, OuterDriver, Exchange, SlotKeeper] | None = None

    def stock(self, trainer: Trainer, outer: OuterDriver, exchange: Exchange, keeper: SlotKeeper) -> None:
        """From now on answer for a composer too."""
        self._shelves = (trainer, outer, exchange, keeper)

    async def answer(self, query: FetchQuery) -> Resource | None:
        """One fetch. None: there is no such thing here. Refused: there is, but not for this peer or not now."""
        wanted = parse_resource(query.resource)
        resource = await self._find(wanted.kind, wanted.index, query.peer_id)
        if resource is not None:
            self._links.state.count(Count.BYTES, wanted.kind.value, "out", by=len(resource.data))
        return resource

    async def _find(self, kind: ResourceKind, index: int | None, requester: str) -> Resource | None:
        if kind is ResourceKind.MANIFEST:
            return self._manifest
        if self._shelves is None or index is None:
            return None
        trainer, outer, exchange, keeper = self._shelves
        if kind is ResourceKind.SNAPSHOT:
            return await keeper.serve_snapshot(index) if index < keeper.num_slots else None
        if kind is ResourceKind.HANDOVER:
            return await keeper.serve_handover(index, requester) if index < keeper.num_slots else None
        if kind is ResourceKind.STANDIN:
            if index >= keeper.num_slots:
                return None
            snapshot = await asyncio.wrap_future(trainer.ask(lambda composer: exchange.published(composer, index)))
            return Resource(messages.encode(snapshot))
        if index >= len(outer.held):
            return None

        def state(composer: Composer) -> bytes:
            if kind is ResourceKind.LOCAL:
                local = composer.local_fragment(index)
                return fragment_to_bytes(local, torch.zeros_like(local))
            return fragment_to_bytes(composer.common[index], composer.momentum[index])

        return Resource(await asyncio.wrap_future(trainer.ask(state)))
