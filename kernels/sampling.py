"""Taking a fixed number of rows so that weighted sums over them stay right on average.

Row i is taken with probability p_i and then counts w_i = 1 / p_i times (Horvitz and Thompson 1952): the expectation of
Σ_taken w_i f_i is Σ_all f_i, for any f. With f_i a row's gradient and s_i its norm, Σ s_i² / p_i, and with it the
variance, is smallest for p_i ~ s_i, which is capped at 1: what is too large is always taken and the rest shares what is
left (water-filling).

Systematic sampling (Madow 1949) takes exactly Σ p rows: lay the p_i end to end and take the rows in which the points
u, u + 1, u + 2, ... fall, one uniform u for all. Neighbours in a batch are alike, and it takes few of them together.
Rejected: drawing with replacement (rows come twice, also those that are certain), independent draws (their number is
random, a budget is not), and shuffling first (gives up the spread over the batch).

How much is left. Where rows are dominated by noise (independent, mean near zero, E||g_i||² = s_i²) the full sum has
variance Σ s_i² and the sampled one E Σ (taken_i / p_i)² s_i² = Σ s_i² / p_i. A batch of a share e of the rows, scaled
up by 1/e, has Σ s_i² / e. Equal variances give the effective share

    e = Σ s_i² / Σ (s_i² / p_i),      e = 0.1 for p_i = 0.1,     1 if all are taken.

Shapes: N rows, M of them taken.
"""

from __future__ import annotations

import torch
from torch import Tensor


def inclusion_probabilities(sizes_N: Tensor, num: int) -> Tensor:
    """float64 (N,) with p_i = min(1, size_i / t), t such that they sum to `num`; all 1 if there are no more rows.

    Rows of size zero are taken only if there are too few others, and then evenly.

    Raises:
        ValueError: num is negative, or a size is negative or not finite.
    """
    sizes = sizes_N.detach().double()
    if num < 0:
        raise ValueError(f"cannot take {num} rows")
    if not bool((sizes.isfinite() & (sizes >= 0)).all()):
        raise ValueError("a row's size is negative or not finite")
    if num >= len(sizes):
        return torch.ones_like(sizes)
    if num == 0:
        return torch.zeros_like(sizes)
    positive = sizes > 0
    num_positive = int(positive.sum())
    if num_positive <= num:
        rest = (num - num_positive) / (len(sizes) - num_positive)
        return torch.where(positive, torch.ones_like(sizes), torch.full_like(sizes, rest))
    sizes = sizes / sizes.amax()  # sums cannot overflow
    rising = sizes.sort().values
    # t if the k largest are capped, k = 0 ... num - 1: what the others sum to, over the rows left for them. The
    # smallest k will do whose next size is not above its t; k = num - 1 always does. Sums begin with the smallest:
    # as differences from the total they would be lost beside a large row.
    behind, falling = rising.cumsum(0).flip(0)[:num], rising.flip(0)[:num]
    threshold = behind / torch.arange(num, 0, -1, dtype=torch.float64, device=sizes.device)
    fits = falling <= threshold
    fits[-1] = True
    return (sizes / threshold[int(fits.int().argmax())]).clamp_(max=1.0)


def systematic(p_N: Tensor, num: int, generator: torch.Generator | None = None) -> Tensor:
    """Indices (M,), rising, of rows taken with probabilities that sum to `num`: exactly that many, none twice."""
    ends = p_N.double().cumsum(0)
    if num == 0:
        return torch.empty(0, dtype=torch.int64)
    ends = ends * (num / ends[-1])  # rounding may leave the sum a hair beside `num`
    points = torch.arange(num, dtype=torch.float64) + torch.rand((), generator=generator, dtype=torch.float64)
    index = torch.searchsorted(ends, points, right=True)
    # Rounding may also put two points into a row that is certain: the next row is taken then, once in 10^12.
    order = torch.arange(num)
    index = (index - order).cummax(0).values + order
    return index.minimum(order + len(ends) - num)
