"""How many slots fit into a worker's memory.

A slot's experts cost, for each weight, the master and two moments of AdamW and a gradient in float32, the published
stand-in, and while one is published or stepped a few dense copies of a single expert, which are small beside it.
"""

from __future__ import annotations

import psutil
import torch

from .model.init import ExpertShape

BYTES_PER_WEIGHT = 4 * 4 + 1  # master, two moments, gradient; stand-in
SLACK = 1.25  # copies in flight, the allocator, snapshots being packed
FREE_SHARE = 0.8  # of what is free now


def device_of(name: str) -> torch.device:
    """The device called `name`; `auto` is a GPU if there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def slot_bytes(shape: ExpertShape) -> int:
    """Memory that one owned slot takes."""
    weights = 3 * shape.hidden * shape.width * shape.num_layers
    return int(SLACK * BYTES_PER_WEIGHT * weights)


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def slots_that_fit(shape: ExpertShape, device: torch.device, max_memory_gib: float | None) -> int:
    """Slots that a worker can own with what memory is free, or with `max_memory_gib` if that is less."""
    usable = FREE_SHARE * free_bytes(device)
    if max_memory_gib is not None:
        usable = min(usable, max_memory_gib * (1 << 30))
    return min(shape.num_experts, int(usable // slot_bytes(shape)))
