"""A slot's state as it travels: in full, or its weights alone in the run's wire format.

In full, float32 with the optimizer's two moments, a slot costs 12 bytes a weight. Where `snapshot_format` names another
format, copies for newcomers and standbys are `<i>.wire`, one blob of `kernels/formats.py` for each expert; with
`standin` they are nothing at all beside the published stand-ins, which travel with every slot anyway. Experts that are
trained ternary come out of the ternary format, and of ternary stand-ins, exactly as they compute. The optimizer then
starts anew.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...kernels.codecs import tensor_bytes
from ...kernels.experts import DenseExpert
from ...kernels.formats import decode_expert, encode_expert
from ...kernels.standin import StandIn
from ...kernels.ternary import TernaryExpert
from ...kernels.ternary_standin import TernaryStandIn
from ..learning.expert_mode import expert_type
from ..learning.owning import ExpertOwner
from ..run.manifest import Manifest, TrainSpec
from .slot_state import SlotTensors


def packed(tensors: SlotTensors, manifest: Manifest) -> SlotTensors:
    """A full slot in the run's snapshot format; one that is packed already, or a run of full ones, stays as it is."""
    spec = manifest.ownership.snapshot_format
    if spec == "full" or any(name.endswith(".wire") for name in tensors):
        return tensors
    out: SlotTensors = {}
    if spec == "standin":
        return out
    for name, gate_up in tensors.items():
        place, _, rest = name.partition(".")
        if rest == "gate_up":
            data = encode_expert(gate_up, tensors[f"{place}.down"], spec)
            out[f"{place}.wire"] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return out


def unpacked(tensors: SlotTensors, owner: ExpertOwner, published: Sequence[StandIn]) -> SlotTensors:
    """The inverse of `packed`, as far as the format keeps what there was.

    Args:
        published: the slot's stand-ins, by position.

    Raises:
        ValueError: a blob is damaged or of another expert's size, or there is nothing beside narrow stand-ins.
    """
    shape, out = owner.shape, dict[str, Tensor]()
    if not tensors:
        if any(standin.width != shape.width for standin in published):
            raise ValueError("a slot without weights, whose stand-ins are narrow")
        for position, expert in enumerate(experts_like(published, owner.train)):
            out[f"{position}.gate_up"], out[f"{position}.down"] = expert.gate_up, expert.down
        return out
    for name, value in tensors.items():
        place, _, rest = name.partition(".")
        if rest != "wire":
            out[name] = value
            continue
        if value.dtype != torch.uint8 or value.dim() != 1:
            raise ValueError(f"{name} is {value.dtype} {tuple(value.shape)}, not bytes")
        masters = expert_type(owner.train) is TernaryExpert
        gate_up, down = decode_expert(tensor_bytes(value), shape.hidden, shape.width, masters=masters)
        out[f"{place}.gate_up"], out[f"{place}.down"] = gate_up, down
    return out


def experts_like(standins: Sequence[StandIn], train: TrainSpec) -> list[DenseExpert]:
    """Experts that compute what these stand-ins, which have their width, compute."""
    kind = expert_type(train)
    # Of ternary weights the ternary form is smaller: their masters are wanted, not they.
    as_masters = kind is TernaryExpert
    return [kind(*(s.masters() if as_masters and isinstance(s, TernaryStandIn) else s.dense())) for s in standins]
