"""Radial-directional averaging (RDA): norms and directions of pseudo-gradients are averaged apart, per tensor.

The plain mean of n directions that have nothing to do with each other is shorter by sqrt(n): the more peers, the
smaller the step. Here it is as long as the members' own ones, whatever their number. In the style of Decoupled DiLoCo:

    sent by member i, for tensor t of k elements
        n_i = ||v_i||                               in its signed facts, float32; norms of all tensors in flat order
        d_i = ELEMENT sqrt(k) v_i / n_i             in the vector that the all-reduce averages; 0 where n_i = 0
    merged by everybody
        a   = sum_i s_i d_i / sum_i s_i             the all-reduce's result;  s_i = merging.shares of the facts
        n   = sum_i s_i min(n_i, 3 median) / sum_i s_i                      median: the lower one of the norms above 0
        v   = n a / ||a||                           or, if the direction is degenerate,
        v   = n a S / (ELEMENT sqrt(k) A)           the mean of unit vectors, not made longer
    with S = sum_i s_i,  A = sum_i s_i over n_i > 0,  degenerate:  ||a|| S / (ELEMENT sqrt(k)) < sqrt(sum_i s_i^2) / 2

The last is half the length that orthogonal directions would add up to: members that contradict each other say nothing
about where to go, and what is left of their sum is noise. Equal v_i give their mean, and so does a single one above 0:
members without news (n_i = 0) shorten the step as they do a mean's, but have no say in direction or median.

Embeddings and the output head travel as they are and are averaged as they are: rows of rare tokens are sparse, and what
the others did not see is no vote. ELEMENT makes a direction's elements about as large as those of pseudo-gradients, so
that neighbours of both kinds fit one int8 scale; float16 has its full precision there.

No member can check another's direction, of which it sees a part only. But a direction's length does not reach the step:
whoever lies about it can turn the step, as in a mean, but not make it longer than three times the median.

Everybody must end with the same bytes, on whatever CPU and Python. So sums of squares are folded in halves, each
addition an elementwise one; scalars are float64 and summed exactly (`math.fsum`: since Python 3.12 `sum` rounds
otherwise than before).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .fragments import Fragment, kind_of
from .merging import Claims, shares, weights

ELEMENT = 2.0**-7  # root mean square of a direction's elements; a power of two costs no rounding
NORM_CAP = 3.0
DEGENERATE = 0.5  # of the length that orthogonal directions add up to
_FOLD = 1 << 18  # elements in float64 at a time


class NormedClaims(Claims, Protocol):
    """`facts.RoundFacts` has it, and `merging.Facts`."""

    @property
    def norms(self) -> Sequence[float]: ...


def num_norms(fragment: Fragment) -> int:
    """How many of the fragment's tensors are merged by norm and direction."""
    return sum(1 for _ in _radial(fragment))


def split(fragment: Fragment, pseudo_gradient: Tensor) -> tuple[Tensor, tuple[float, ...]]:
    """(what the all-reduce is to average, float32 norms in the fragment's order). Shapes (numel,), float32 on the CPU.

    What is not finite stays so, in the vector or in the norms.
    """
    _require_flat(fragment, pseudo_gradient)
    vector, norms = pseudo_gradient.clone(), []
    for start, end in _radial(fragment):
        length = _length(vector[start:end])
        norm = torch.tensor(length, dtype=torch.float32).item()
        _multiply(vector[start:end], _unit(end - start) / length if norm else 0.0)
        norms.append(norm)
    return vector, tuple(norms)


def combine(fragment: Fragment, average: Tensor, facts: Sequence[NormedClaims]) -> Tensor:
    """The merged pseudo-gradient, shape (numel,), float32: the same bits for the same arguments, in any order of facts.

    Args:
        average: the all-reduce's result over all members' `split`, by the shares of `facts`; finite.
        facts: of all members.

    Raises ValueError on a wrong shape, a wrong number of norms, norms that are negative or not finite, and as
    `merging.weights` does. The result may be infinite if the norms are as large as float32 has them.
    """
    _require_flat(fragment, average)
    count = num_norms(fragment)
    for fact in facts:
        if len(fact.norms) != count or not all(math.isfinite(norm) and norm >= 0 for norm in fact.norms):
            raise ValueError(f"{fact.peer_id} has not {count} finite norms for fragment {fragment.index}")
    share_by_peer = shares(weights(facts))
    share = [share_by_peer[fact.peer_id] for fact in facts]
    norms = [[fact.norms[index] for fact in facts] for index in range(count)]
    return scaled(fragment, average, sum(share), [lengths(each, share, norm_limit(each)) for each in norms])


class Lengths(NamedTuple):
    """What members say of one tensor's length. Sums, so that groups of members can be added."""

    norms: float  # sum of s n, each n capped
    moved: float  # sum of s over n > 0
    squares: float  # sum of s^2 over n > 0

    @classmethod
    def added(cls, parts: Sequence[Lengths]) -> Lengths:
        """Of several groups."""
        return cls(*(math.fsum(each) for each in zip(*parts, strict=True)))


def norm_limit(norms: Sequence[float]) -> float:
    """What a norm is capped at: three times the lower median of those above 0."""
    ordered = sorted(norm for norm in norms if norm > 0)
    return NORM_CAP * ordered[(len(ordered) - 1) // 2] if ordered else 0.0


def lengths(norms: Sequence[float], share: Sequence[float], limit: float) -> Lengths:
    """Of one tensor, over members with these norms and shares."""
    moved = [(norm, s) for norm, s in zip(norms, share, strict=True) if norm > 0]
    return Lengths(
        math.fsum(s * min(norm, limit) for norm, s in moved),
        math.fsum(s for _, s in moved),
        math.fsum(s * s for _, s in moved),
    )


def scaled(fragment: Fragment, average: Tensor, total: float, by_tensor: Sequence[Lengths]) -> Tensor:
    """The merged pseudo-gradient of averaged directions, shape (numel,), float32; a new tensor.

    Args:
        total: sum of all members' shares.
        by_tensor: in the fragment's order.
    """
    _require_flat(fragment, average)
    merged = average.clone()
    for (start, end), said in zip(_radial(fragment), by_tensor, strict=True):
        unit = _unit(end - start)
        _multiply(merged[start:end], _scale(_length(merged[start:end]) / unit, total, said) / unit)
    return merged


def _scale(resultant: float, total: float, said: Lengths) -> float:
    """What the averaged direction is to be multiplied by. `resultant`: its length, 1 if all members' are equal."""
    if not said.moved:
        return 0.0
    mean = said.norms / total
    if resultant * total < DEGENERATE * math.sqrt(said.squares):
        return mean * total / said.moved
    return mean / resultant


def _unit(numel: int) -> float:
    """Length of a direction of so many elements."""
    return ELEMENT * math.sqrt(numel)


def _multiply(piece: Tensor, scale: float) -> None:
    """In place; the product is rounded once to float64 and then to float32."""
    for block in torch.split(piece, _FOLD):
        block.copy_(torch.mul(block.double(), scale))


def _length(piece: Tensor) -> float:
    """Euclidean norm of a float32 vector in float64, the same bits everywhere."""
    squares = (torch.mul(block, block) for block in map(torch.Tensor.double, torch.split(piece, _FOLD)))
    return math.sqrt(math.fsum(map(_folded, squares)))


def _folded(values: Tensor) -> float:
    """Sum of float64 (n,), overwritten, by adding the second half to the first until one element is left."""
    while (n := values.numel()) > 1:
        half = (n + 1) // 2
        values[: n - half] += values[half:]
        values = values[:half]
    return values.item()


def _radial(fragment: Fragment) -> Iterator[tuple[int, int]]:
    """(start, end) of each tensor that is merged by norm and direction."""
    start = 0
    for name, size in zip(fragment.names, fragment.sizes, strict=True):
        if kind_of(name) is None:
            yield start, start + size
        start += size


def _require_flat(fragment: Fragment, flat: Tensor) -> None:
    if flat.dtype != torch.float32 or flat.device.type != "cpu" or flat.shape != (fragment.numel,):
        raise ValueError(f"fragment {fragment.index} needs {fragment.numel} float32, got {flat.dtype} {flat.shape}")
