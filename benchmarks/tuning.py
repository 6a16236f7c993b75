"""Each method's own learning rates and outer step, found by the same small sweep for all, one after the other.

Learning rates are the manifest's times powers of two: 1 and 2 first, then on towards the side where the best of them
lies, until it lies inside. From there experts and backbone each try a rate twice and half as high. With the best of all
these, methods that merge then try other outer steps than the manifest's. All on a seed of its own, `CHANCE`, that no
result is reported of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .comparison import Method

CHANCE = 900
FACTORS = (1.0, 2.0)  # of the manifest's learning rate, to begin with
FARTHEST = 16.0  # factor, up or down; whoever is best there is at an edge
# Beside the best rate: times what, and experts' over the backbone's.
APART = {
    "experts x 2": (1.0, 2.0),
    "experts x 0.5": (1.0, 0.5),
    "backbone x 2": (2.0, 0.5),
    "backbone x 0.5": (0.5, 2.0),
}
OUTER = ((0.7, 0.9),)  # learning rate and Nesterov momentum: DiLoCo's own (Douillard et al. 2023)


@dataclass(frozen=True)
class Sweep:
    """What one method's cells came to, and which is the best."""

    method: str
    rates: dict[float, float]  # loss by factor
    apart: dict[str, float]  # loss by key of `APART`, at the best factor
    outer: dict[tuple[float, float], float]  # loss by outer step, with the best of these
    best: str  # the method with its settings

    @property
    def factor(self) -> float:
        """The best, of both alike."""
        return min(self.rates, key=self.rates.__getitem__)


def tune(method: Method, loss: Callable[[str], float]) -> Sweep:
    """Find its settings.

    Args:
        method: its own manifest has the learning rates and the outer step to begin with.
        loss: trains with a method's text, on the tuning seed.
    """
    train = method.manifest.train

    def at(factor: float, ratio: float = 1.0) -> str:
        text = f"{method.name}:train.learning_rate={train.learning_rate * factor:g}"
        return text if ratio == 1.0 else f"{text}:train.expert_rate={train.expert_rate * ratio:g}"

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
    apart = {name: at(best * factor, ratio) for name, (factor, ratio) in APART.items()}
    losses = {text: finite(text) for text in apart.values()} | {at(best): rates[best]}
    chosen = min(losses, key=losses.__getitem__)
    outer = {
        step: f"{chosen}:outer.learning_rate={step[0]:g}:outer.momentum={step[1]:g}"
        for step in (OUTER if method.merges else ())
    }
    losses |= {text: finite(text) for text in outer.values()}
    return Sweep(
        method.name,
        rates,
        {name: losses[text] for name, text in apart.items()},
        {step: losses[text] for step, text in outer.items()},
        min(losses, key=losses.__getitem__),
    )


def table(sweeps: Sequence[Sweep]) -> str:
    """Every cell of every sweep as Markdown, the best of each method bold."""
    factors = sorted({factor for sweep in sweeps for factor in sweep.rates})
    heads = ["method", *(f"x {factor:g}" for factor in factors)]
    heads += [*APART, *(f"best, outer {rate:g} / {momentum:g}" for rate, momentum in OUTER)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for sweep in sweeps:
        least = min([*sweep.rates.values(), *sweep.apart.values(), *sweep.outer.values()])
        found = [sweep.rates.get(factor) for factor in factors]
        found += [*(sweep.apart[name] for name in APART), *(sweep.outer.get(step) for step in OUTER)]
        cells = ["" if loss is None else f"**{loss:.4f}**" if loss == least else f"{loss:.4f}" for loss in found]
        lines.append("| " + " | ".join([sweep.method, *cells]) + " |")
    return "\n".join(lines)
