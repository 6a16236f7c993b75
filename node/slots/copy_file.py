"""One slot's copy as a file: safetensors, with the lease it is of in the header, so that a restart reads no tensors.

slot.<name>   as the slot travels, in the wire's order of that lease
published     what had been published of the slot, as the bytes of its StandInSnapshot; missing if nothing had
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ...kernels.codecs import tensor_bytes
from ...protocol import messages
from ...protocol.errors import Refused
from ...protocol.experts.ownership import Copy
from ...protocol.messages import StandInSnapshot
from ..storage.blobs import from_bytes, to_bytes
from .slot_state import SlotTensors, under

_SLOT, _PUBLISHED = "slot.", "published"


def write_copy(path: Path, copy: Copy, tensors: SlotTensors, published: StandInSnapshot | None) -> None:
    """Write a slot's state in full. OSError if that cannot be."""
    named = {_SLOT + name: value for name, value in tensors.items()}
    if published is not None:
        named[_PUBLISHED] = torch.frombuffer(bytearray(messages.encode(published)), dtype=torch.uint8)
    path.write_bytes(to_bytes(named, {"epoch": str(copy.epoch), "version": str(copy.version)}))


def read_copy(path: Path) -> tuple[SlotTensors, StandInSnapshot | None]:
    """What `write_copy` wrote. Refused if it is damaged, OSError if it cannot be read."""
    tensors = from_bytes(path.read_bytes(), what=f"copy {path.name}")
    published = tensors.get(_PUBLISHED)
    standin = None if published is None else messages.decode(tensor_bytes(published), StandInSnapshot)
    return under(_SLOT, tensors), standin


def lease_of(path: Path) -> Copy:
    """Which state of its slot a file says it has; of what is in it nothing is checked. Refused if it says nothing."""
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
        return Copy(int(facts["epoch"]), int(facts["version"]))
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise Refused("malformed", f"copy {path.name} does not say what it is of: {error!r}") from error
