"""Which form each of an owner's stand-ins should have, within budgets. Pure: no weights, no clock.

What is to be small is the squared error that all stand-ins add to their blocks' outputs, each weighed by the tokens
that are routed to its expert: of what can be measured here it is that which follows the loss best
(`./dev bench surrogates`). So experts with many tokens get the good stand-ins, and those without any
the cheap ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...kernels.standin import Form


@dataclass(frozen=True)
class Option:
    """One form that an expert's stand-in could have."""

    form: Form
    nbytes: float  # of memory
    flops: float  # for all tokens that are routed to the expert, in any unit
    error: float  # squared, summed over these tokens, gates applied


def choose(options: Sequence[Sequence[Option]], *, nbytes: float, flops: float) -> list[int]:
    """By expert the number of an option: nearly the least total error within both budgets.

    Greedy: from the cheapest of each, always the change that saves the most error for what it costs of the budgets. If
    one form for all does better, that is taken.

    Args:
        options: of each expert the same forms in the same order.
        nbytes, flops: budgets of all experts together.

    Raises:
        ValueError: even the cheapest do not fit.
    """
    errors, memory, work = (
        torch.tensor([[getattr(option, name) for option in each] for each in options], dtype=torch.float64)
        for name in ("error", "nbytes", "flops")
    )
    cost = memory / nbytes + work / max(flops, 1e-300)
    rows = torch.arange(len(options))
    now = cost.argmin(1)

    def total(table: torch.Tensor, chosen: torch.Tensor) -> float:
        return float(table[rows, chosen].sum())

    def fits(chosen: torch.Tensor) -> bool:
        slack = 1 + 1e-9  # sums of the same numbers in another order
        return total(memory, chosen) <= nbytes * slack and total(work, chosen) <= flops * slack

    if not fits(now):
        raise ValueError("even the cheapest stand-ins are beyond the budgets")
    ruled_out = torch.zeros_like(errors, dtype=torch.bool)
    while True:
        saved = errors[rows, now].unsqueeze(1) - errors
        extra = (cost - cost[rows, now].unsqueeze(1)).clamp(min=1e-300)
        worth = torch.where((saved > 0) & ~ruled_out, saved / extra, -1.0)
        best = int(worth.argmax())
        expert, number = divmod(best, errors.shape[1])
        if worth.view(-1)[best] <= 0:
            break
        changed = now.clone()
        changed[expert] = number
        if fits(changed):
            now = changed
        else:
            ruled_out[expert, number] = True  # what is spent only grows but for changes that save both: rarely missed
    uniform = [torch.full_like(now, number) for number in range(errors.shape[1])]
    best_of = min([now, *filter(fits, uniform)], key=lambda chosen: total(errors, chosen))
    return [int(number) for number in best_of]
