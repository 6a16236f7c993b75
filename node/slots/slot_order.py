"""In which order the experts of a slot travel, and where they belong on arrival.

On the wire they come in the order of their handles under the lease's epoch, never by layer, so that a worker that holds
them does not learn which is which (docs/privacy.md). A composer has the run's handle key and knows the layers. A worker
keeps the order in which they came; when a slot changes hands it asks a composer for a table from the former lease's
order to its own.

A place is an index on the wire, a position an index here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

from torch import Tensor

from ...protocol.errors import Refused
from ...protocol.experts.handles import Handles
from ...protocol.messages import HandleTable

T = TypeVar("T")


class SlotOrder(Protocol):
    """Places and positions of a slot's experts."""

    def positions(self, slot: int, from_epoch: int, epoch: int) -> tuple[int, ...]:
        """For each place under `from_epoch` the position here under `epoch`. Refused if that is not known here."""
        ...

    def outward(self, slot: int, epoch: int) -> tuple[int, ...]:
        """For each place under `epoch` the position here."""
        ...

    def by_handle(self, slot: int, epoch: int) -> dict[bytes, int]:
        """Positions by handle."""
        ...


class LayerOrder:
    """A composer's: positions are layers."""

    def __init__(self, handles: Handles, num_layers: int) -> None:
        self.handles, self.num_layers = handles, num_layers

    def positions(self, slot: int, from_epoch: int, epoch: int) -> tuple[int, ...]:
        return self.outward(slot, from_epoch)

    def outward(self, slot: int, epoch: int) -> tuple[int, ...]:
        return self.handles.order(slot, epoch, self.num_layers)

    def by_handle(self, slot: int, epoch: int) -> dict[bytes, int]:
        return {self.handles.of(slot, layer, epoch): layer for layer in range(self.num_layers)}


class HandleOrder:
    """A worker's: positions are places under its own lease."""

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        self._tables: dict[tuple[int, int, int], HandleTable] = {}  # by slot, former epoch, own epoch

    def learn(self, slot: int, from_epoch: int, epoch: int, table: HandleTable) -> None:
        """Keep a composer's table; tables of the slot's other leases are forgotten. Refused if it is not that table."""
        if (table.slot, table.epoch, len(table.entries)) != (slot, epoch, self.num_layers):
            raise Refused("malformed", f"not a table of the {self.num_layers} handles of slot {slot} at epoch {epoch}")
        tables = {key: kept for key, kept in self._tables.items() if key[0] != slot or key[2] == epoch}
        self._tables = {**tables, (slot, from_epoch, epoch): table}  # anew: the training thread reads the old

    def positions(self, slot: int, from_epoch: int, epoch: int) -> tuple[int, ...]:
        table = self._tables.get((slot, from_epoch, epoch))
        if table is None:
            raise Refused("unknown-handle", f"no table of slot {slot} from epoch {from_epoch} to {epoch}")
        position = {place: position for position, (_, place) in enumerate(table.entries)}
        return tuple(position[place] for place in range(self.num_layers))

    def outward(self, slot: int, epoch: int) -> tuple[int, ...]:
        return tuple(range(self.num_layers))

    def by_handle(self, slot: int, epoch: int) -> dict[bytes, int]:
        for (known, _, own), table in self._tables.items():
            if (known, own) == (slot, epoch):
                return {handle: position for position, (handle, _) in enumerate(table.entries)}
        return {}


def moved(values: Sequence[T], positions: Sequence[int]) -> list[T]:
    """Values by place, brought to their positions. ValueError if there are too few or too many."""
    if len(values) != len(positions):
        raise ValueError(f"{len(values)} values for {len(positions)} positions")
    out = list(values)
    for value, position in zip(values, positions, strict=True):
        out[position] = value
    return out


def renamed(tensors: Mapping[str, Tensor], positions: Sequence[int]) -> dict[str, Tensor]:
    """Tensors named `<place>.<rest>`, by position. ValueError for names that are not."""
    out = {}
    for name, tensor in tensors.items():
        place, _, rest = name.partition(".")
        if not place.isdecimal() or int(place) >= len(positions) or not rest:
            raise ValueError(f"a slot has no tensor {name[:40]!r}")
        out[f"{positions[int(place)]}.{rest}"] = tensor
    return out


def inverse(positions: Sequence[int]) -> tuple[int, ...]:
    """From positions back to places."""
    return tuple(moved(range(len(positions)), positions))
