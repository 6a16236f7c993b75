"""A worker's slots on disk: each as it travels, in the wire's order of the lease that it was held under.

slot.<s>.<place>.<rest>   weights, optimizer state and publisher state
published.<s>             what had been published of the slot, as the bytes of its StandInSnapshot
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...kernels.codecs import tensor_bytes
from ...protocol import messages
from ...protocol.errors import Refused
from ...protocol.experts.ownership import Copy
from ...protocol.messages import StandInSnapshot
from ..learning.persistence import has_backbone, saved_slots
from ..learning.worker import Worker
from ..standins.publishing import Publishing
from ..storage.checkpoint import Checkpoint
from .copies import Snapshot


def slots_to_save(
    publishing: Publishing[Worker], worker: Worker, held: Mapping[int, int]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of a checkpoint of the slots `held`, by their epochs. On the training thread."""
    tensors: dict[str, Tensor] = {}
    epochs = {}
    for slot, epoch in held.items():
        published = publishing.published(worker, slot)
        if published is None:
            continue  # given away meanwhile
        for name, value in publishing.to_wire(slot, epoch, worker.saved(slot)).items():
            tensors[f"slot.{slot}.{name}"] = value
        data = bytearray(messages.encode(published.snapshot()))
        tensors[f"published.{slot}"] = torch.frombuffer(data, dtype=torch.uint8)
        epochs[str(slot)] = epoch
    return tensors, {"step": worker.step, "slots": epochs}


def saved_snapshots(checkpoint: Checkpoint) -> dict[int, Snapshot]:
    """The slots of a worker's checkpoint. Raises Refused if it is not one."""
    found = {}
    if has_backbone(checkpoint.tensors):
        raise Refused("malformed", f"the checkpoint at {checkpoint.path} is a composer's")
    for slot, tensors in saved_slots(checkpoint.tensors).items():
        published, epoch = checkpoint.tensors.get(f"published.{slot}"), checkpoint.meta["slots"].get(str(slot))
        if published is None or epoch is None:
            raise Refused("malformed", f"the checkpoint at {checkpoint.path} does not say all about slot {slot}")
        standin = messages.decode(tensor_bytes(published), StandInSnapshot)
        found[slot] = Snapshot(Copy(int(epoch), int(checkpoint.meta["step"])), tensors, standin)
    return found
