"""Bases: weights that many experts of a model have in common, by digest. What `shared` stand-ins add corrections to.

An upcycled model's experts are copies of the shards of a dense one, so there are few different ones at the start. They
are part of the run's seed, the same bytes on every peer, and never change.

Shapes: D hidden, F expert width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from safetensors.torch import save
from torch import Tensor

from .codecs import tensor_bytes
from .interface import check_tensor, read_tensors

DIGEST_BYTES = 16
_MATRICES = ("gate_up", "down")


class Bases(Mapping[bytes, tuple[Tensor, Tensor]]):
    """By digest: gate_up (2F, D) and down (D, F), bfloat16 on the CPU.

    Args:
        weights: pairs of any floating dtype; equal ones are kept once.

    Raises:
        ValueError: they are not those of experts, or not finite.
    """

    def __init__(self, weights: Iterable[tuple[Tensor, Tensor]] = ()) -> None:
        self._held: dict[bytes, tuple[Tensor, Tensor]] = {}
        self._placed: dict[tuple[bytes, torch.device], tuple[Tensor, Tensor]] = {}
        for gate_up, down in weights:
            if down.dim() != 2 or not down.numel():
                raise ValueError(f"a base's down is {tuple(down.shape)}, not (D, F)")
            hidden, width = down.shape
            pair = tuple(m.detach().to("cpu", torch.bfloat16, copy=True).contiguous() for m in (gate_up, down))
            for name, matrix, size in zip(_MATRICES, pair, ((2 * width, hidden), (hidden, width)), strict=True):
                check_tensor(f"a base's {name}", matrix, torch.bfloat16, size)
            self._held[_digest(*pair)] = pair[0], pair[1]

    def __getitem__(self, digest: bytes) -> tuple[Tensor, Tensor]:
        return self._held[digest]

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    @property
    def nbytes(self) -> int:
        """Memory of all of them."""
        return sum(matrix.nbytes for pair in self._held.values() for matrix in pair)

    def on(self, device: torch.device, digest: bytes) -> tuple[Tensor, Tensor]:
        """One of them in float32 on a device, kept there. KeyError if it is not known here."""
        key = digest, device
        if key not in self._placed:
            gate_up, down = self._held[digest]
            self._placed[key] = gate_up.to(device, torch.float32), down.to(device, torch.float32)
        return self._placed[key]

    def nearest(self, gate_up: Tensor, down: Tensor) -> bytes:
        """The digest of that with the least squared distance from an expert. ValueError if none has its shapes."""
        found, least = b"", float("inf")
        for digest, pair in self._held.items():
            if pair[0].shape == gate_up.shape and pair[1].shape == down.shape:
                pairs = zip((gate_up, down), pair, strict=True)
                distance = sum(float((matrix - base.float()).square().sum()) for matrix, base in pairs)
                if distance < least:
                    found, least = digest, distance
        if not found:
            raise ValueError(f"none of {len(self)} bases is one of an expert of {tuple(down.shape)}")
        return found

    def to_bytes(self) -> bytes:
        """safetensors, in an order that the bases alone decide."""
        ordered = enumerate(self._held[digest] for digest in sorted(self._held))
        return save({f"{i}.{name}": m for i, pair in ordered for name, m in zip(_MATRICES, pair, strict=True)})

    @classmethod
    def from_bytes(cls, *parts: bytes) -> Bases:
        """All that are in some of what `to_bytes` wrote.

        Raises:
            ValueError: malformed, or not bases.
        """
        pairs = []
        for data in parts:
            tensors = read_tensors(data)
            numbers = {name.partition(".")[0] for name in tensors}
            if set(tensors) != {f"{number}.{name}" for number in numbers for name in _MATRICES}:
                raise ValueError(f"bases are gate_up and down by number, not {sorted(tensors)[:4]}")
            pairs += [(tensors[f"{number}.gate_up"], tensors[f"{number}.down"]) for number in sorted(numbers)]
        return cls(pairs)


def common_bases(experts: Iterable[tuple[Tensor, Tensor]], near: float) -> list[tuple[Tensor, Tensor]]:
    """Means of experts that lie together: each joins the first group whose first member is near it.

    Args:
        experts: gate_up (2F, D) and down (D, F) of one layer's experts.
        near: greatest distance, over the norm of the group's first member.
    """
    groups: list[tuple[tuple[Tensor, Tensor], list[Tensor], int]] = []  # first member, sums, members
    for pair in experts:
        for number, (first, sums, members) in enumerate(groups):
            distance = sum(float((a - b).square().sum()) for a, b in zip(pair, first, strict=True))
            if distance <= near**2 * sum(float(matrix.square().sum()) for matrix in first):
                groups[number] = first, [s + m for s, m in zip(sums, pair, strict=True)], members + 1
                break
        else:
            groups.append((pair, list(pair), 1))
    return [(sums[0] / members, sums[1] / members) for _, sums, members in groups]


def _digest(gate_up: Tensor, down: Tensor) -> bytes:
    sha = hashlib.sha256(f"base {tuple(gate_up.shape)} {tuple(down.shape)}\n".encode())
    sha.update(tensor_bytes(gate_up))
    sha.update(tensor_bytes(down))
    return sha.digest()[:DIGEST_BYTES]
