"""What a peer gives away of its slots: their state, their weights, what was published of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Generic

from ...protocol import messages
from ...protocol.errors import Refused
from ...protocol.experts.ownership import Copy
from ...protocol.experts.surrogates import Point
from ...protocol.messages import SlotState, StandInSnapshot
from ...protocol.transport.downloads import Resource
from ..learning.owning import Owner
from ..learning.trainer import Trainer
from ..peer.links import Links
from ..standins.publishing import Published, Publishing
from ..storage.blobs import to_bytes
from .copies import CopyStore
from .slot_formats import packed
from .slot_state import SlotTensors


class SlotServing(Generic[Owner]):
    """Answers for a keeper. Nothing is encoded on the trainer's thread, nor on the loop.

    Args:
        holding: the epoch of each slot held now, and the trainer's step.
    """

    def __init__(
        self,
        links: Links,
        trainer: Trainer[Owner],
        exchange: Publishing[Owner],
        copies: CopyStore,
        holding: Callable[[], tuple[Mapping[int, int], int]],
    ) -> None:
        self._links, self._trainer, self._exchange, self._copies = links, trainer, exchange, copies
        self._holding = holding

    async def snapshot(self, slot: int, *, full: bool = False) -> Resource | None:
        """A held slot as it is now, or the copy that is kept here; None without either. Unless `full`, packed."""
        if slot in self._holding()[0]:
            return await self._held(slot, self._exchange.snapshot, full=full)
        if slot not in self._copies.held:
            return None
        kept = await self._copies.load(slot)
        published = await asyncio.wrap_future(self._trainer.ask(lambda owner: self._exchange.published(owner, slot)))
        came = kept.published  # newer than what runs here, if this peer was restarted meanwhile
        newer = came is not None and (published is None or Point(came.epoch, came.seq) > published.point)
        return await self._resource(slot, kept.copy, kept.tensors, came if newer else published, full=full)

    async def weights(self, slot: int) -> Resource | None:
        """What a held slot computes with."""
        held, _ = self._holding()
        return await self._held(slot, self._exchange.weights, full=True) if slot in held else None

    async def standin(self, slot: int) -> Resource | None:
        """What has been published of a slot, as far as it is known here."""
        published = await asyncio.wrap_future(self._trainer.ask(lambda owner: self._exchange.published(owner, slot)))
        return None if published is None else Resource(messages.encode(await asyncio.to_thread(published.snapshot)))

    async def rebuilt(self, slot: int) -> Resource | None:
        """A first state for a slot that nobody holds, for a worker, which cannot make one. Refused while it is held."""
        if slot in self._links.view().leases:
            raise Refused("not-granted", f"slot {slot} has an owner")
        await self._exchange.can_seed(slot)
        rebuilt = await asyncio.wrap_future(self._trainer.ask(lambda owner: self._exchange.rebuilt(owner, slot)))
        if rebuilt is None:
            return None
        return await self._resource(slot, Copy(rebuilt[1].point.epoch, 0), *rebuilt, full=False)

    async def _held(self, slot: int, part: Callable[[Owner, int, int], SlotTensors], *, full: bool) -> Resource | None:
        held, step = self._holding()
        copy = Copy(held[slot], step)

        def take(owner: Owner) -> tuple[SlotTensors, Published | None] | None:
            if slot not in owner.owned:
                return None  # let go of meanwhile
            return part(owner, slot, copy.epoch), self._exchange.published(owner, slot)

        taken = await asyncio.wrap_future(self._trainer.ask(take))
        return None if taken is None else await self._resource(slot, copy, *taken, full=full)

    async def _resource(
        self, slot: int, copy: Copy, tensors: SlotTensors, published: Published | StandInSnapshot | None, *, full: bool
    ) -> Resource | None:
        if published is None:
            return None

        def encoded() -> bytes:
            standin = published.snapshot() if isinstance(published, Published) else published
            blob = to_bytes(tensors if full else packed(tensors, self._links.manifest))
            return messages.encode(SlotState(slot, copy.epoch, copy.version, blob, standin))

        return Resource(await asyncio.to_thread(encoded))
