"""A composer's first weights: made here, or fetched, as the manifest says."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from pathlib import Path

from ...protocol.transport.fetches import Turns
from ..model.init import backbone_shapes, expert_shape
from ..model.start import Seeded, Start
from ..peer.background import NetworkThread
from ..peer.links import Links
from ..run.manifest import Manifest
from .fetching import fetch_parts
from .start import FromSeed
from .store import BACKBONE, TOKENIZER, SeedStore, bases_from, experts_of, standins_of

HEADER_BYTES = 1 << 20
MAX_TOKENIZER_BYTES = 64 << 20


class SeedAtHome:
    """A run's seed as one peer has it: what it fetches it keeps, and gives to others.

    Args:
        folder: of all seeds on this data directory.
        seconds: how long to look for somebody who has a part.
    """

    def __init__(self, links: Links, folder: Path, seconds: float) -> None:
        assert links.manifest.model.start
        self.store = SeedStore(folder, links.manifest.model.start)
        self._links, self._seconds = links, seconds
        self._turns = Turns(1)
        self._max_bytes = max_part_bytes(links.manifest)
        self._num_slots = expert_shape(links.manifest.model).num_experts

    async def fetch_to_build(self, progress: Callable[[int, int], None]) -> None:
        """All that a model is built from that owns nothing yet. Raises SeedMissing."""
        slots = range(self._num_slots)
        await self._fetch(lambda: [TOKENIZER, BACKBONE, *map(standins_of, slots), *self._base_parts()], progress)

    async def fetch_bases(self) -> None:
        """What stand-ins are corrections of, if they are. Raises SeedMissing."""
        await self._fetch(self._base_parts, lambda done, of: None)

    async def fetch_experts(self, slot: int) -> None:
        """The experts of a slot that is to be owned. Raises SeedMissing."""
        await self._fetch(lambda: [experts_of(slot)], lambda done, of: None)

    async def fetch_tokenizer(self) -> None:
        """Raises SeedMissing."""
        await self._fetch(lambda: [TOKENIZER], lambda done, of: None)

    def _base_parts(self) -> Collection[int]:
        return range(bases_from(self._num_slots), len(self.store.digests or ()))

    async def _fetch(self, parts: Callable[[], Collection[int]], progress: Callable[[int, int], None]) -> None:
        await fetch_parts(
            self._links,
            self.store,
            parts,
            self._turns,
            max_bytes=self._max_bytes,
            seconds=self._seconds,
            progress=progress,
        )


def max_part_bytes(manifest: Manifest) -> int:
    """No part of the seed is larger."""
    shape, backbone = expert_shape(manifest.model), backbone_shapes(manifest.model)
    slot = 4 * 3 * shape.hidden * shape.width * shape.num_layers
    weights = sum(math.prod(size) for size in backbone.values())
    bases = 2 * 3 * shape.hidden * shape.width * shape.num_experts // 2  # of a layer: at most half as many as experts
    return max(4 * weights, 2 * slot, bases, MAX_TOKENIZER_BYTES) + HEADER_BYTES


def start_of(
    manifest: Manifest, secret: bytes, seed: SeedAtHome | None, network: NetworkThread, progress: Callable[[str], None]
) -> Start:
    """Where the first weights come from, fetched if they have to be. Blocks the calling thread, not the network's.

    Args:
        secret: the run's handle key.
        seed: None if the run starts from none.
    """
    if seed is None:
        return Seeded(manifest.model, secret)
    network.call(seed.fetch_to_build(lambda done, of: progress(f"the run's checkpoint, part {done + 1} of {of}")))
    return FromSeed(manifest.model, seed.store)
