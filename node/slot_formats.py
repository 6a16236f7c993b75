"""A slot's state as it travels: in full, or its weights alone in the run's wire format.

In full, float32 with the optimizer's two moments, a slot costs 12 bytes a weight; a handover always does. A newcomer's
or a standby's copy may be a run's `snapshot_format` instead: `<i>.wire`, one blob of `kernels/formats.py` for each
expert. Experts that are trained ternary come out of the ternary format exactly as they compute. The optimizer then
starts anew.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.codecs import tensor_bytes
from ..kernels.formats import decode_expert, encode_expert
from .manifest import Manifest
from .owning import ExpertOwner, SlotTensors


def packed(tensors: SlotTensors, manifest: Manifest) -> SlotTensors:
    """A full slot in the run's snapshot format; one that is packed already, or a run of full ones, stays as it is."""
    spec = manifest.ownership.snapshot_format
    if spec == "full" or any(name.endswith(".wire") for name in tensors):
        return tensors
    out = {}
    for name, gate_up in tensors.items():
        place, _, rest = name.partition(".")
        if rest == "gate_up":
            data = encode_expert(gate_up, tensors[f"{place}.down"], spec)
            out[f"{place}.wire"] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return out


def unpacked(tensors: SlotTensors, owner: ExpertOwner) -> SlotTensors:
    """The inverse of `packed`, as far as the format keeps what there was.

    Raises:
        ValueError: a blob is damaged or of another expert's size.
    """
    out: dict[str, Tensor] = {}
    for name, value in tensors.items():
        place, _, rest = name.partition(".")
        if rest != "wire":
            out[name] = value
            continue
        if value.dtype != torch.uint8 or value.dim() != 1:
            raise ValueError(f"{name} is {value.dtype} {tuple(value.shape)}, not bytes")
        gate_up, down = decode_expert(tensor_bytes(value), owner.shape.hidden, owner.shape.width)
        out[f"{place}.gate_up"], out[f"{place}.down"] = gate_up, down
    return out
