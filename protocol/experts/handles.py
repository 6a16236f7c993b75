"""Names of experts that tell their owner nothing about where in the model they sit.

    handle(slot, layer, epoch) = BLAKE2b-64(key, slot | layer | epoch)

Composers share the key; an owner without data never has it. Whatever such an owner gets or sends about a slot is in
**handle order**, sorted by handle, so that neither names nor places tell layers apart. The lease's epoch goes in: with
every change of owner names and order change, so two owners of a slot cannot tell by them which of their experts are
the same. Who takes over needs to know how the experts of its copy, in the former order, are called now: a
`HandleTable` says just that. What is inside still speaks: activations of one layer resemble each other, and weights
can be compared with those of earlier owners (docs/privacy.md).

Rejected: a random table per slot (composers would have to agree on it, and keep it), encrypting (layer, epoch) under a
block cipher (reversible without being needed so), and shorter handles (64 bits do not collide within a slot by chance).
"""

from __future__ import annotations

import hashlib
import secrets

from ..directory.records import MAX_EPOCH
from ..messages import HANDLE_BYTES, MAX_LAYERS, MAX_SLOTS, HandleTable

KEY_BYTES = 32


def new_key() -> bytes:
    """A run's handle key, from the system's random source."""
    return secrets.token_bytes(KEY_BYTES)


def key_digest(key: bytes) -> bytes:
    """32 bytes that identify a key and do not give it away, e.g. to check a fetched one."""
    return hashlib.blake2b(key, digest_size=32, person=b"shoal-handle-key").digest()


class Handles:
    """What the holder of a key calls experts. Raises ValueError for a key of another length than `KEY_BYTES`."""

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"a handle key has {KEY_BYTES} bytes, not {len(key)}")
        self._key = key

    def __repr__(self) -> str:
        return "Handles(key=...)"  # secrets never reach logs

    def of(self, slot: int, layer: int, epoch: int) -> bytes:
        """8 bytes. Raises ValueError for numbers that no message can carry."""
        if not (0 <= slot < MAX_SLOTS and 0 <= layer < MAX_LAYERS and 0 <= epoch <= MAX_EPOCH):
            raise ValueError(f"no expert is at slot {slot}, layer {layer}, epoch {epoch}")
        place = slot.to_bytes(4) + layer.to_bytes(4) + epoch.to_bytes(8)
        return hashlib.blake2b(place, digest_size=HANDLE_BYTES, key=self._key, person=b"shoal-handle").digest()

    def order(self, slot: int, epoch: int, num_layers: int) -> tuple[int, ...]:
        """Layers in handle order: the expert at position p of the slot is that of layer `order[p]`."""
        return tuple(sorted(range(num_layers), key=lambda layer: (self.of(slot, layer, epoch), layer)))

    def sorted_handles(self, slot: int, epoch: int, num_layers: int) -> tuple[bytes, ...]:
        """Handles of the slot by position."""
        return tuple(sorted(self.of(slot, layer, epoch) for layer in range(num_layers)))

    def table(self, slot: int, from_epoch: int, to_epoch: int, num_layers: int) -> HandleTable:
        """Answer to `handles/<slot>/<from_epoch>/<to_epoch>`."""
        former = {layer: position for position, layer in enumerate(self.order(slot, from_epoch, num_layers))}
        entries = tuple(
            (self.of(slot, layer, to_epoch), former[layer]) for layer in self.order(slot, to_epoch, num_layers)
        )
        return HandleTable(slot, to_epoch, entries)
