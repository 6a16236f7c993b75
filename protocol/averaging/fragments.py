"""Cutting the backbone into P balanced fragments, merged in turn.

A fragment is a flat float32 vector: its tensors, flattened row-major, one after the other in `names` order.

    embeddings   embeddings and output head
    router       routers and norms: small, and what all experts' inputs and weights hang on
    body         attention and whatever else there is

A tier can have a cadence of its own; then no fragment holds tensors of two cadences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Tier = Literal["embeddings", "router", "body"]

_EMBEDDING_PARTS = frozenset({"embed_tokens", "wte", "word_embeddings", "embedding", "embeddings"})
_HEAD_PARTS = frozenset({"lm_head", "output_projection", "embed_out"})
_ROUTER_PARTS = frozenset({"gate", "router"})  # of layers; a dense MLP's are gate_proj


@dataclass(frozen=True)
class Fragment:
    """One subset of the backbone's tensors. `sizes` are element counts, aligned with `names`; `numel` is their sum."""

    index: int
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    numel: int


def partition(
    shapes: Mapping[str, Sequence[int]], fragments: int, every: Mapping[Tier, int] | None = None
) -> list[Fragment]:
    """Greedy balanced bin packing: largest tensor first, each into the smallest fragment so far.

    The same on every peer, whatever the order of `shapes`. Embeddings and the output head never share a fragment when
    there are at least two: both are as large as all the rest of a small model, and together they would unbalance it.

    Args:
        every: each tier's inner steps between merges; by default all have the same. Each cadence gets as many fragments
            as its share of the elements, one at least.

    Raises ValueError if there are fewer tensors than fragments, or fewer fragments than cadences.
    """
    if not 1 <= fragments <= len(shapes):
        raise ValueError(f"cannot cut {len(shapes)} tensors into {fragments} fragments")
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    if empty := [name for name, size in sizes.items() if size == 0]:
        raise ValueError(f"tensors without elements: {empty}")
    cadences: dict[int, dict[str, int]] = {}
    for name, size in sizes.items():
        cadences.setdefault(every[tier_of(name)] if every else 0, {})[name] = size
    groups = [cadences[steps] for steps in sorted(cadences)]
    if len(groups) > fragments:
        raise ValueError(f"{len(groups)} cadences need as many fragments, not {fragments}")
    shares = _apportion([(sum(group.values()), len(group)) for group in groups], fragments)
    bins = [names for group, share in zip(groups, shares, strict=True) for names in _pack(group, share)]
    result = []
    for i, names in enumerate(bins):
        ordered = tuple(sorted(names))
        counts = tuple(sizes[name] for name in ordered)
        result.append(Fragment(index=i, names=ordered, sizes=counts, numel=sum(counts)))
    return result


def _apportion(groups: Sequence[tuple[int, int]], fragments: int) -> list[int]:
    """How many fragments each (elements, tensors) gets: one, and the next always to whose fragments are largest."""
    shares = [1] * len(groups)
    for _ in range(fragments - len(groups)):
        open_ = [i for i, (_, tensors) in enumerate(groups) if shares[i] < tensors]
        largest = max(open_, key=lambda i: (groups[i][0] / shares[i], -i))
        shares[largest] += 1
    return shares


def _pack(sizes: Mapping[str, int], fragments: int) -> list[list[str]]:
    """The names of each fragment; none is empty."""
    bins: list[list[str]] = [[] for _ in range(fragments)]
    loads = [0] * fragments
    home: dict[str, int] = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        kind = kind_of(name)
        taken = {home[other] for other in ("embedding", "head") if other != kind and other in home}
        open_bins = [i for i in range(fragments) if kind is None or fragments == 1 or i not in taken]
        chosen = home.get(kind) if kind else None
        if chosen is None:
            chosen = min(open_bins, key=lambda i: (loads[i], i))
        if kind:
            home[kind] = chosen
        bins[chosen].append(name)
        loads[chosen] += sizes[name]
    for i, names in enumerate(bins):  # only a lone embedding-like family can leave a fragment empty
        if not names:
            donor = max(range(fragments), key=lambda j: (len(bins[j]), loads[j], -j))
            moved = min(bins[donor], key=lambda name: (sizes[name], name))
            bins[donor].remove(moved)
            bins[i].append(moved)
    return bins


def flatten(fragment: Fragment, tensors: Mapping[str, Tensor]) -> Tensor:
    """The fragment's flat float32 CPU vector, shape (numel,), a copy. Raises ValueError on a tensor of another size."""
    flat = torch.empty(fragment.numel, dtype=torch.float32)
    start = 0
    for name, size in zip(fragment.names, fragment.sizes, strict=True):
        tensor = tensors[name]
        if tensor.numel() != size:
            raise ValueError(f"{name} has {tensor.numel()} elements, its fragment says {size}")
        flat[start : start + size].copy_(tensor.detach().reshape(-1))
        start += size
    return flat


def unflatten(fragment: Fragment, flat: Tensor) -> dict[str, Tensor]:
    """Views of `flat`, shape (numel,), one flat vector per tensor name."""
    if flat.shape != (fragment.numel,):
        raise ValueError(f"fragment {fragment.index} has {fragment.numel} elements, got shape {tuple(flat.shape)}")
    return dict(zip(fragment.names, torch.split(flat, list(fragment.sizes)), strict=True))


def kind_of(name: str) -> str | None:
    """`embedding`, `head`, or None for all other tensors."""
    parts = set(name.split("."))
    if parts & _EMBEDDING_PARTS:
        return "embedding"
    return "head" if parts & _HEAD_PARTS else None


def tier_of(name: str) -> Tier:
    """The tier of a backbone tensor, by its name in transformers."""
    if kind_of(name) is not None:
        return "embeddings"
    parts = name.split(".")
    is_norm = any(part == "norm" or part.endswith(("_norm", "layernorm")) for part in parts)
    return "router" if is_norm or _ROUTER_PARTS & set(parts) else "body"
