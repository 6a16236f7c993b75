"""One slot's copy as a file: safetensors, with the lease it is of in the header, so that a restart reads no tensors.

slot.<name>   as the slot travels, in the wire's order of that lease
published     what had been published of the slot, as the bytes of its StandInSnapshot; missing if nothing had

In the header is a SHA-256 of all that, too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...kernels.codecs import tensor_bytes
from ...protocol import messages
from ...protocol.errors import Refused
from ...protocol.experts.ownership import Copy
from ...protocol.messages import StandInSnapshot
from ..storage.blobs import from_bytes, to_bytes
from ..storage.whole_file import sync
from .slot_state import SlotTensors, under

_SLOT, _PUBLISHED, _DIGEST = "slot.", "published", "sha256"


def write_copy(path: Path, copy: Copy, tensors: SlotTensors, published: StandInSnapshot | None) -> None:
    """Write a slot's state in full; when this returns it survives a crash of the machine. OSError if that cannot be."""
    named = {_SLOT + name: value for name, value in tensors.items()}
    if published is not None:
        named[_PUBLISHED] = torch.frombuffer(bytearray(messages.encode(published)), dtype=torch.uint8)
    facts = {"epoch": str(copy.epoch), "version": str(copy.version)}
    path.write_bytes(to_bytes(named, facts | {_DIGEST: _digest(named, facts)}))
    sync(path)


def read_copy(path: Path) -> tuple[SlotTensors, StandInSnapshot | None]:
    """What `write_copy` wrote. Refused if it is damaged, OSError if it cannot be read."""
    data = path.read_bytes()
    tensors = from_bytes(data, what=f"copy {path.name}")
    facts = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
    if facts.pop(_DIGEST, None) != _digest(tensors, facts):
        raise Refused("wrong-digest", f"copy {path.name} does not match its digest")
    published = tensors.get(_PUBLISHED)
    standin = None if published is None else messages.decode(tensor_bytes(published), StandInSnapshot)
    return under(_SLOT, tensors), standin


def lease_of(path: Path) -> Copy:
    """Which state of its slot a file says it has; of what is in it nothing is checked. Refused if it says nothing,
    OSError if it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
        return Copy(int(facts["epoch"]), int(facts["version"]))
    except (SafetensorError, KeyError, ValueError) as error:
        raise Refused("malformed", f"copy {path.name} does not say what it is of: {error!r}") from error


def _digest(tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensor_bytes(tensors[name]))
    return digest.hexdigest()
