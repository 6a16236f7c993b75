"""Experts that are computed together: which these are, their weights, and the products of their rows.

Experts of one kind and width form groups, of which all but the products is done together, and stand-ins are unpacked
together: as many as stay in a CPU's cache (then each operation finds there what the last one wrote), on a GPU as many
as memory bears (then few operations are launched).

Products are done one expert after the other, each on its own rows. Where a GPU has a kernel for it, all of a group's
are one launch, for which the weights of owned experts are copied side by side.

Shapes: E experts, G experts of one group, N their rows, D hidden, F width, I and O columns of rows and of a product.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .experts import ExpertWeights

# Of one group at most: values of its rows, and of its weights.
TOGETHER = {"cpu": (1 << 16, 1 << 20), "cuda": (1 << 26, 1 << 26)}

ALIGNMENT = 16  # bytes, of a row of every operand of a grouped product


@dataclass(frozen=True)
class Group:
    """Experts of one kind and width, and their rows among the sorted pairs.

    Attributes:
        parts: rows of each expert, within the group's.
        ends: int32 (G) on the device, where each part ends; None if products are done one by one.
    """

    experts: list[int]
    rows: slice
    parts: list[slice]
    ends: Tensor | None = None


def arranged(experts: Sequence[ExpertWeights]) -> list[int]:
    """All experts in an order that has those of one kind and width side by side."""
    kinds: dict[type, int] = {}
    return sorted(range(len(experts)), key=lambda e: (kinds.setdefault(type(experts[e]), len(kinds)), experts[e].width))


def groups_of(
    arrangement: Sequence[int],
    counts: Sequence[int],
    experts: Sequence[ExpertWeights],
    hidden: int,
    device: torch.device,
    dtype: torch.dtype,
) -> list[Group]:
    """All experts that were hit, in order.

    Args:
        arrangement: as of `arranged`.
        counts: (E) rows of each expert, by its number.
        dtype: of the products.
    """
    most_rows, most_weights = (values // hidden for values in TOGETHER[device.type])
    found: list[tuple[list[int], list[int]]] = []  # experts and their ends, by group
    kind: tuple[type, int] | None = None
    for expert in arrangement:
        if not counts[expert]:
            continue
        members, ends = found[-1] if found else ([], [0])
        its = type(experts[expert]), experts[expert].width
        full = ends[-1] + counts[expert] > most_rows or 3 * its[1] * (len(members) + 1) > most_weights
        if its != kind or full:
            members, ends, kind = [], [], its
            found.append((members, ends))
        members.append(expert)
        ends.append((ends[-1] if ends else 0) + counts[expert])
    launches = [_in_one_launch(device, dtype, hidden, experts[members[0]].width) for members, _ in found]
    placed: Sequence[Tensor | None] = [None] * len(found)
    if any(launches):  # one copy to the device for all groups of a layer
        ends_of_all = torch.tensor([end for _, ends in found for end in ends], dtype=torch.int32, device=device)
        placed = torch.split(ends_of_all, [len(ends) for _, ends in found])
    groups, start = [], 0
    for (members, ends), one_launch, on_device in zip(found, launches, placed, strict=True):
        parts = [slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]
        groups.append(Group(members, slice(start, start + ends[-1]), parts, on_device if one_launch else None))
        start += ends[-1]
    return groups


def weights_of(
    group: Group, experts: Sequence[ExpertWeights], dtype: torch.dtype
) -> tuple[Tensor | list[Tensor], Tensor | list[Tensor]]:
    """gate_up (G, 2F, D) and down (G, D, F) of a group, detached; one tensor where that costs no copy, or is needed."""
    members = [experts[expert] for expert in group.experts]
    dense_all: Any = getattr(type(members[0]), "dense_all", None)
    if dense_all is not None:
        gate_up, down = dense_all(members)
        return gate_up.to(dtype), down.to(dtype)
    apart = [[matrix.detach().to(dtype) for matrix in pair] for pair in zip(*(m.dense() for m in members), strict=True)]
    if group.ends is None:
        return apart[0], apart[1]
    return torch.stack(apart[0]), torch.stack(apart[1])


def products(
    group: Group,
    rows_NI: Tensor,
    matrices: Tensor | Sequence[Tensor],
    *,
    transposed: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Each part of a group's rows times its expert's matrix.

    Args:
        matrices: (G, I, O); (G, O, I) if `transposed`.
        out: where to.

    Returns:
        (N, O).
    """
    if group.ends is not None:
        assert isinstance(matrices, Tensor)
        stacked_GIO = matrices.transpose(1, 2) if transposed else matrices
        found = torch.nn.functional.grouped_mm(rows_NI, stacked_GIO, offs=group.ends)
        return found if out is None else out.copy_(found)
    if out is None:
        out = rows_NI.new_empty(len(rows_NI), matrices[0].shape[0 if transposed else 1])
    for matrix, part in zip(matrices, group.parts, strict=True):
        torch.mm(rows_NI[part], matrix.t() if transposed else matrix, out=out[part])
    return out


def fast_dtype(device: torch.device) -> torch.dtype | None:
    """What to compute experts in on this device, whatever their inputs are; None if it makes no difference.

    bfloat16 where all products of a group are one launch then: float32 would be done one by one.
    """
    return torch.bfloat16 if _has_kernel(device, torch.bfloat16) else None


def _in_one_launch(device: torch.device, dtype: torch.dtype, hidden: int, width: int) -> bool:
    """Whether `grouped_mm` has a kernel for it. Elsewhere it does one product after the other, and waits for `ends`."""
    aligned = all(size * dtype.itemsize % ALIGNMENT == 0 for size in (hidden, width))
    return aligned and _has_kernel(device, dtype)


@functools.cache
def _has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    if device.type != "cuda" or dtype != torch.bfloat16:
        return False
    major, _ = torch.cuda.get_device_capability(device)
    return major in (9, 10)  # Hopper, Blackwell
