"""What one owned expert was told since its last step: sketches as they came, and the sum of what they teach.

Sketches wait until the step, or until many rows wait, and then go through the expert together (`sum_gradients`), each
corrected against the stand-in that it was taken at.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...kernels.experts import OwnedExpert
from ...kernels.interface import Publisher, StandIn
from ...kernels.sketch import Curvature, RowSketch
from ...kernels.sketch_gradient import Taught, norm, sum_gradients

# Bounds that no honest sketch comes near (sampling leaves it worth a tenth of a token at least) and within which
# float32 neither overflows nor divides by zero: one peer must not be able to spoil the step for all.
LARGEST_GRADIENT = 1e12  # norm, summed over tokens
FEWEST_TOKENS = 1e-3  # effective ones, of one sketch

SETTLE_ROWS = 4096  # waiting rows are bounded where no step is taken


@dataclass(frozen=True)
class _Heard:
    sketch: RowSketch
    tokens: float
    standin: StandIn


@dataclass
class SketchSum:
    """Gradient of one expert over the sketches since its last step.

    Attributes:
        gradients: of what the expert trains, summed over tokens; None before anything came.
        tokens: effective ones that the sum is over.
        rows: without any, an expert is left alone: it neither decays nor moves by old momentum.
        dropped: sketches left out because what they teach is not finite or absurdly large.
    """

    gradients: list[Tensor] | None = None
    tokens: float = 0.0
    rows: int = 0
    dropped: int = 0
    _waiting: list[_Heard] = field(default_factory=list)
    _waiting_rows: int = 0

    @property
    def is_full(self) -> bool:
        """Whether so many rows wait that they should be settled before the step."""
        return self._waiting_rows >= SETTLE_ROWS

    def add(self, sketch: RowSketch, tokens: float, standin: StandIn) -> None:
        """A sketch of `tokens` tokens, taken at `standin`, which is not to change any more.

        Raises ValueError if the tokens come to nothing; nothing has changed then.
        """
        _check_tokens(tokens, sketch.effective)
        self._waiting.append(_Heard(sketch, tokens, standin))
        self._waiting_rows += sketch.num_rows

    def add_gradient(self, expert: OwnedExpert, d_gate_up: Tensor, d_down: Tensor, *, tokens: float, rows: int) -> None:
        """A gradient of the expert's weights, summed over `tokens` tokens.

        Raises:
            ValueError: not finite, absurdly large, or of tokens that come to nothing; nothing has changed then.
        """
        check_gradient(d_gate_up, d_down, tokens=tokens)
        projected = expert.project(d_gate_up, d_down)
        if self.gradients is None:
            self.gradients = [gradient.clone() for gradient in projected]
        else:
            for sum_, gradient in zip(self.gradients, projected, strict=True):
                sum_.add_(gradient)
        self.tokens += tokens
        self.rows += rows

    def settle(self, expert: OwnedExpert, publisher: Publisher, act: str, kappa: float, curvature: Curvature) -> None:
        """Add up what waits, and show its rows to the publisher. A sketch that would spoil the sum is dropped."""
        heard, self._waiting, self._waiting_rows = self._waiting, [], 0
        if not heard:
            return
        heard.sort(key=lambda each: id(each.standin))
        try:
            kept = heard
            self._take(kept, expert, act, kappa, curvature)
        except ValueError:
            kept = []
            for each in heard:  # to find the one
                try:
                    self._take([each], expert, act, kappa, curvature)
                    kept.append(each)
                except ValueError:
                    self.dropped += 1
        x_ND = torch.cat([each.sketch.x.dense() for each in kept]) if kept else None
        if x_ND is not None and len(x_ND):
            publisher.observe(x_ND, torch.ones(len(x_ND)))

    def _take(self, heard: list[_Heard], expert: OwnedExpert, act: str, kappa: float, curvature: Curvature) -> None:
        gate_up, down = (weights.detach() for weights in expert.dense())
        dense = {id(each.standin): each.standin.dense() for each in heard} if kappa else {}
        taught = [Taught(each.sketch, kappa, each.sketch.effective, dense.get(id(each.standin))) for each in heard]
        rows = sum(each.sketch.num_rows for each in heard)
        tokens = sum(each.sketch.effective * each.tokens for each in heard)
        if rows:
            gradients = sum_gradients(gate_up, down, taught, act, curvature=curvature)
            self.add_gradient(expert, *gradients, tokens=tokens, rows=rows)
        elif self.gradients is None:
            self.gradients, self.tokens = [torch.zeros_like(tensor) for tensor in expert.trained], tokens
        else:
            self.tokens += tokens


def check_gradient(d_gate_up: Tensor, d_down: Tensor, *, tokens: float) -> None:
    """Raises ValueError for one that is not finite, absurdly large, or of tokens that come to nothing."""
    size = norm(d_gate_up, d_down)
    if not size <= LARGEST_GRADIENT:  # also true for NaN
        raise ValueError(f"a gradient's norm is {size:.3g}")
    _check_tokens(tokens, 1.0)


def _check_tokens(tokens: float, effective: float) -> None:
    if effective and effective * tokens < FEWEST_TOKENS:
        raise ValueError(f"a sketch counts as {effective * tokens:.3g} tokens")
