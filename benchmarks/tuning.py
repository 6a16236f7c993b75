"""Each method's own learning rate and outer step, found by the same small sweep for all, one after the other.

Learning rates are the manifest's times powers of two: 1 and 2 first, then on towards the side where the best of them
lies, until it lies inside. At the best rate, methods that merge then try other outer steps than the manifest's. All on
a seed of its own, `CHANCE`, that no result is reported of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .comparison import Method

CHANCE = 900
FACTORS = (1.0, 2.0)  # of the manifest's learning rate, to begin with
FARTHEST = 16.0  # factor, up or down; whoever is best there is at an edge
OUTER = ((0.7, 0.9),)  # learning rate and Nesterov momentum: DiLoCo's own (Douillard et al. 2023)


@dataclass(frozen=True)
class Sweep:
    """What one method's cells came to, and which is the best."""

    method: str
    rates: dict[float, float]  # loss by factor
    outer: dict[tuple[float, float], float]  # loss by outer step, at the best factor
    best: str  # the method with its settings

    @property
    def factor(self) -> float:
        """The best."""
        return min(self.rates, key=self.rates.__getitem__)


def tune(method: Method, loss: Callable[[str], float]) -> Sweep:
    """Find its settings.

    Args:
        method: its own manifest has the learning rate and the outer step to begin with.
        loss: trains with a method's text, on the tuning seed.
    """
    rate = method.manifest.train.learning_rate

    def at(factor: float) -> str:
        return f"{method.name}:train.learning_rate={rate * factor:g}"

    def finite(text: str) -> float:
        found = loss(text)
        return found if math.isfinite(found) else math.inf

    rates = {factor: finite(at(factor)) for factor in FACTORS}
    while True:
        best = min(rates, key=rates.__getitem__)
        further = best / 2 if best == min(rates) else best * 2
        if further in rates or not 1 / FARTHEST <= further <= FARTHEST:
            break
        rates[further] = finite(at(further))
    chosen, least = at(best), rates[best]
    outer = {}
    for step in OUTER if method.merges else ():
        text = f"{at(best)}:outer.learning_rate={step[0]:g}:outer.momentum={step[1]:g}"
        outer[step] = finite(text)
        if outer[step] < least:
            chosen, least = text, outer[step]
    return Sweep(method.name, rates, outer, chosen)


def table(sweeps: Sequence[Sweep]) -> str:
    """Every cell of every sweep as Markdown, the best of each method bold."""
    factors = sorted({factor for sweep in sweeps for factor in sweep.rates})
    heads = ["method", *(f"x {factor:g}" for factor in factors)]
    heads += [f"best, outer {rate:g} / {momentum:g}" for rate, momentum in OUTER]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for sweep in sweeps:
        least = min([*sweep.rates.values(), *sweep.outer.values()])
        found = [*(sweep.rates.get(factor) for factor in factors), *(sweep.outer.get(step) for step in OUTER)]
        cells = ["" if loss is None else f"**{loss:.4f}**" if loss == least else f"{loss:.4f}" for loss in found]
        lines.append("| " + " | ".join([sweep.method, *cells]) + " |")
    return "\n".join(lines)
