"""Averaging over more peers than one all-reduce holds: two rounds over groups add up to one average over all. Pure.

    at most 64 peers     one group, one round
    at most 4096         rows of a grid, then its columns; both about sqrt(peers) long

    row      S_r = sum over its members of (w v, w)               what everybody knows after the first round
    column   S   = sum over the rows of S_r                       after the second one
    result   v   = S.vector / S.weight

Products and weights travel, not means: a sum of sums is the sum, a mean of means is not the mean. Norms and the
division come last. Where norms and directions are merged apart (radial.py) a member adds (w d, w n, w) and what the
formulas there need beside: the weight of members with news, and its square. A weight is capped by its row's median, a
norm too: nobody has to hear of more than 64 peers' facts. So results differ from one round over all only in caps.

**Who is where** follows from the live peers and the round's number, so nobody assigns groups. Peers are shuffled anew
for every round: two that are far apart, or do not get on, meet elsewhere next time.

**Who is missing** costs its own share and nobody else's. Members keep what they sent until the round ends; what a lost
reducer had gathered, the next member of the row gathers again. In the second round each row's sum has one bringer in
each column: the row's own member there, else the next one of the row that is there. All members of a row hold equal
bytes, so it does not matter who brings them. Only a row of which nobody is left is missing, and the result's `members`
and `weight` say so. Every column adds in the order of rows, so all end with the same bytes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from . import radial
from .fragments import Fragment
from .merging import weights
from .radial import Lengths, NormedClaims

MAX_GROUP = 64


@dataclass(frozen=True)
class Grid:
    """The groups of one round's first half. With one row there is no second half."""

    rows: tuple[tuple[str, ...], ...]  # lengths differ by one at most

    @property
    def num_columns(self) -> int:
        """Groups of the second half."""
        return len(self.rows[0]) if len(self.rows) > 1 else 0

    def column(self, index: int, present: Collection[str]) -> tuple[str, ...]:
        """Who brings the rows' sums to one group of the second half, in the order of rows.

        Who stands in this column gets the result; others are there for a row that has nobody present here. A peer can
        be in several columns.

        Args:
            present: peers that have their row's sum. Rows without any are left out.
        """
        bringers = []
        for row in self.rows:
            order = (row[(index + step) % len(row)] for step in range(len(row)))
            bringer = next((peer for peer in order if peer in present), None)
            if bringer is not None:
                bringers.append(bringer)
        return tuple(bringers)

    def standing_in(self, index: int) -> tuple[str, ...]:
        """Whose own column this is, in the order of rows."""
        return tuple(row[index] for row in self.rows if index < len(row))


def plan(live: Collection[str], round_: int) -> Grid:
    """The same for all who know the same live peers. Raises ValueError on nobody, or more than two rounds can hold."""
    if not 1 <= len(live) <= MAX_GROUP**2:
        raise ValueError(f"{len(live)} peers: two rounds of groups of {MAX_GROUP} average 1 to {MAX_GROUP**2}")
    order = sorted(live, key=lambda peer: _draw(peer, round_))
    count = 1 if len(order) <= MAX_GROUP else math.ceil(len(order) / math.ceil(math.sqrt(len(order))))
    size, longer = divmod(len(order), count)
    rows, start = [], 0
    for index in range(count):
        end = start + size + (index < longer)
        rows.append(tuple(order[start:end]))
        start = end
    return Grid(tuple(rows))


def _draw(peer: str, round_: int) -> bytes:
    return hashlib.blake2b(round_.to_bytes(8) + peer.encode(), digest_size=16, person=b"shoal-group").digest()


@dataclass(frozen=True)
class Sums:
    """What members of any number of groups add up to.

    Attributes:
        vector: sum of w v, float64 (numel,).
        weight: sum of w.
        members: whose shares are in it, in the order of addition.
        lengths: per tensor that is merged by norm and direction, its part of the formulas.
    """

    vector: Tensor
    weight: float
    members: tuple[str, ...]
    lengths: tuple[Lengths, ...] = ()

    def average(self, fragment: Fragment | None = None) -> Tensor:
        """The merged pseudo-gradient, float32 (numel,).

        Args:
            fragment: where norms and directions were added apart; None for the plain weighted mean.
        """
        mean = self.vector / self.weight
        if fragment is None:
            return mean.float()
        return radial.scaled(fragment, mean.float(), self.weight, self.lengths)


def contributions(facts: Sequence[NormedClaims], vectors: Mapping[str, Tensor]) -> list[Sums]:
    """What each member of a row adds, in the order of `facts`; members without a vector add nothing.

    Args:
        facts: of all members of the row that are there; norms where the merge is radial.
        vectors: float32 (numel,), by peer id: a pseudo-gradient, or `radial.split` of it.

    Raises ValueError as `merging.weights` does.
    """
    weight = weights(facts)
    counts = {len(fact.norms) for fact in facts}
    if len(counts) != 1:
        raise ValueError("members of one row differ in their number of norms")
    limits = [radial.norm_limit([fact.norms[index] for fact in facts]) for index in range(counts.pop())]
    return [
        Sums(
            vector=vectors[fact.peer_id].double() * weight[fact.peer_id],
            weight=weight[fact.peer_id],
            members=(fact.peer_id,),
            lengths=tuple(
                radial.lengths([norm], [weight[fact.peer_id]], limit)
                for norm, limit in zip(fact.norms, limits, strict=True)
            ),
        )
        for fact in facts
        if fact.peer_id in vectors
    ]


def add(parts: Sequence[Sums]) -> Sums:
    """The sum, in the order given. Raises ValueError on nothing, a member that is in it twice, or unequal shapes."""
    if not parts:
        raise ValueError("nobody's share is here")
    members = tuple(peer for part in parts for peer in part.members)
    if len(set(members)) < len(members):
        raise ValueError("a member's share is here twice")
    if len({(part.vector.shape, len(part.lengths)) for part in parts}) != 1:
        raise ValueError("shares of different fragments have no sum")
    vector = parts[0].vector.clone()
    for part in parts[1:]:
        vector += part.vector
    return Sums(
        vector=vector,
        weight=math.fsum(part.weight for part in parts),
        members=members,
        lengths=tuple(Lengths.added(each) for each in zip(*(part.lengths for part in parts), strict=True)),
    )


def sent_bytes(grid: Grid, member_bytes: float, sum_bytes: float) -> float:
    """What one peer sends in both halves, on average: an all-reduce of g sends 2 (g - 1) / g of a vector.

    Args:
        member_bytes: of one member's vector as encoded in the first half; `sum_bytes`: of a row's sum in the second.
    """
    peers = sum(map(len, grid.rows))
    first = sum(2 * (len(row) - 1) for row in grid.rows) * member_bytes
    # Each column has a bringer per row, whichever peer that is.
    second = grid.num_columns * 2 * (len(grid.rows) - 1) * sum_bytes
    return (first + second) / peers
