"""What an owner does about its stand-in's error, where the right answer is known: losses quadratic in the output.

An expert's dy is taken at its stand-in's output S(x). Losses are L = 1/2 (y - t)ᵀ diag(h) (y - t), so the gradient at
the expert's output is dy + h (E - S) exactly, and `expert_gradient` should find it where kappa mean(dy²) is h.
"""

from __future__ import annotations

import itertools
import random
from typing import get_args

import pytest
import torch
from shoal.kernels.experts import run_expert
from shoal.kernels.sketch import Curvature, RowBuffer, RowSketch
from shoal.kernels.sketch_gradient import expert_gradient
from torch import Tensor

Weights = tuple[Tensor, Tensor]


def weights(width: int, hidden: int) -> Weights:
    down = torch.randn(hidden, width, dtype=torch.float64) / width**0.5
    return torch.randn(2 * width, hidden, dtype=torch.float64) / hidden**0.5, down


def sketched(x: Tensor, dy: Tensor, num: int | None = None) -> RowSketch:
    buffer = RowBuffer(x.shape[1], "int8")
    buffer.add(x, dy)
    return buffer.take(num)


def error(got: Weights, want: Weights) -> float:
    return float(sum((g - w).norm() for g, w in zip(got, want, strict=True)) / sum(w.norm() for w in want))


@pytest.mark.parametrize("curvature", get_args(Curvature))
@pytest.mark.parametrize("num", [None, 30])
def test_the_corrected_gradient_is_that_at_the_experts_own_output(curvature: Curvature, num: int | None) -> None:
    """The Hessian is whatever kappa mean(dy dyᵀ) says; the targets are such that dy is the gradient at S(x)."""
    expert, standin = weights(9, 12), weights(4, 12)
    kappa = random.uniform(0.5, 20)
    x = torch.randn(80, 12, dtype=torch.float64)
    dy = (
        torch.randn(80, 1, dtype=torch.float64).exp()
        * torch.randn(80, 12, dtype=torch.float64)
        * (0.1 + torch.rand(12))
    )
    sketch = sketched(x, dy, num)
    x, dy = sketch.x.dense().double(), sketch.dy.dense().double()  # what the owner sees; the codec has tests of its own
    each = torch.ones(len(x)) if sketch.weights_N is None else sketch.weights_N
    each = each.double()[:, None]

    h_DD = kappa * (dy.t() @ (each * dy)) / each.sum()
    if curvature != "full":
        h_DD = h_DD.diagonal().diag()
    if curvature == "isotropic":
        h_DD = h_DD.trace() / 12 * torch.eye(12).double()
    targets = run_expert(x, *standin) - torch.linalg.solve(h_DD, dy.t()).t()
    leaves = [part.clone().requires_grad_() for part in expert]
    off = run_expert(x, leaves[0], leaves[1]) - targets
    loss = (each * off * (off @ h_DD)).sum() / 2
    want = torch.autograd.grad(loss, leaves)

    def found(kappa: float, curvature: Curvature) -> float:
        return error(expert_gradient(*expert, sketch, kappa=kappa, standin=standin, curvature=curvature), want)  # type: ignore[arg-type]

    assert found(kappa, curvature) < 1e-6  # weights are float32
    assert found(0.0, curvature) > 0.05  # the correction is needed ...
    for other in set(get_args(Curvature)) - {curvature}:
        assert found(kappa, other) > 1e-3  # ... and which one matters


def test_mean_loss_units_give_the_same_correction() -> None:
    """The design's kappa N mean(dy'²), with dy' of a mean loss over N tokens, is kappa mean(dy²) of the tokens' own."""
    expert, standin, num_tokens = weights(9, 12), weights(4, 12), random.randint(100, 9999)
    x, dy = torch.randn(80, 12, dtype=torch.float64), torch.randn(80, 12, dtype=torch.float64)
    sketch = sketched(x, dy)
    x, dy = sketch.x.dense().double(), sketch.dy.dense().double()
    dy_mean = dy / num_tokens
    difference = run_expert(x, *expert) - run_expert(x, *standin)
    corrected = dy_mean + 7.0 * num_tokens * dy_mean.square().mean() * difference
    leaves = [part.clone().requires_grad_() for part in expert]
    want = torch.autograd.grad(run_expert(x, leaves[0], leaves[1]), leaves, corrected)
    got = [part / num_tokens for part in expert_gradient(*expert, sketch, kappa=7.0, standin=standin)]
    assert error(got, want) < 1e-9  # type: ignore[arg-type]


def test_exact_stand_ins_need_no_correction() -> None:
    expert = weights(9, 12)
    sketch = sketched(torch.randn(50, 12), torch.randn(50, 12))
    plain = expert_gradient(*expert, sketch)
    corrected = expert_gradient(*expert, sketch, kappa=80.0, standin=expert, curvature="diagonal")
    assert all(map(torch.equal, plain, corrected))


class Owner:
    """Trains `down` on the sketches of a composer that runs a fixed stand-in S and wants the outputs of a teacher T.

    The three share `gate_up`, so outputs are linear in `down` and the fixed points are known in closed form. Loss of a
    token: h/2 ||y - T(x)||².
    """

    def __init__(self, start: str, ratio: float) -> None:
        """ratio: of the assumed curvature, kappa mean(dy²), to the true one; 0 for no correction."""
        width, hidden = 4, 6
        self.gate_up, self.teacher = weights(width, hidden)
        self.standin = self.teacher + 0.3 * weights(width, hidden)[1]
        self.down = self.teacher.clone() if start == "teacher" else weights(width, hidden)[1]
        self.x = torch.randn(120, hidden, dtype=torch.float64)
        self.x = sketched(self.x, self.x).x.dense().double()  # as an owner will see it
        self.h, self.ratio = random.uniform(0.5, 2.0), ratio
        self.send()
        # The activations' Gram matrix, times the curvature, bounds the steps that converge.
        hidden_rows = self.activations()
        largest = float(torch.linalg.eigvalsh(hidden_rows.t() @ hidden_rows)[-1])
        self.rate = 1.0 / (max(ratio, 1.0) * self.h * largest)

    def send(self) -> None:
        """The composer's sketch, with the stand-in that it has now."""
        self.sketch = sketched(self.x, self.h * (self.run(self.standin) - self.run(self.teacher)))
        self.kappa = self.ratio * self.h / float(self.sketch.dy.dense().square().mean())

    def activations(self) -> Tensor:
        width = self.teacher.shape[1]
        return run_expert(self.x, self.gate_up, torch.eye(width, dtype=torch.float64))

    def run(self, down: Tensor) -> Tensor:
        return run_expert(self.x, self.gate_up, down)

    def distance(self, to: Tensor) -> float:
        """Between outputs, in units of the stand-in's error."""
        return float(
            (self.run(self.down) - self.run(to)).norm() / (self.run(self.standin) - self.run(self.teacher)).norm()
        )

    def train(self, steps: int) -> None:
        for _ in range(steps):
            standin = (self.gate_up, self.standin)
            _, gradient = expert_gradient(self.gate_up, self.down, self.sketch, kappa=self.kappa, standin=standin)
            self.down = self.down - self.rate * gradient


def test_an_uncorrected_owner_keeps_repairing_an_error_that_its_expert_does_not_have() -> None:
    """It starts where it should be, leaves, and never stops: dy does not change, whatever the expert does."""
    owner = Owner("teacher", ratio=0.0)
    assert owner.distance(owner.teacher) == 0.0
    travelled = []
    for _ in range(3):
        owner.train(40)
        travelled.append(owner.distance(owner.teacher))
    assert travelled[0] > 1.0  # further off than the stand-in
    assert travelled[1] / travelled[0] == pytest.approx(2.0)
    assert travelled[2] / travelled[0] == pytest.approx(3.0)


@pytest.mark.parametrize("start", ["teacher", "elsewhere"])
def test_a_corrected_owner_comes_to_the_right_expert_and_stays(start: str) -> None:
    owner = Owner(start, ratio=1.0)
    before = owner.distance(owner.teacher)
    owner.train(3000)
    assert owner.distance(owner.teacher) < 0.02  # the codec's error of dy
    assert start == "teacher" or before > 0.5


@pytest.mark.parametrize("ratio", [0.5, 1.0, 4.0])
def test_a_wrong_curvature_ends_between_stand_in_and_teacher_or_beyond(ratio: float) -> None:
    """h (S - T) + r h (E - S) = 0 at E = S - (S - T) / r: r above 1 stays nearer to S, below 1 overshoots."""
    owner = Owner("elsewhere", ratio)
    owner.train(4000)
    assert owner.distance(owner.standin - (owner.standin - owner.teacher) / ratio) < 0.02 / ratio + 0.01
    assert owner.distance(owner.teacher) == pytest.approx(abs(1 - 1 / ratio), abs=0.03)


def test_publishing_again_brings_any_large_enough_curvature_to_the_right_expert() -> None:
    """Each stand-in that equals the expert leaves |1 - 1/r| of the error, if the expert is given the time to settle."""
    owner = Owner("elsewhere", ratio=4.0)
    errors = []
    for _ in range(5):
        owner.train(3000)
        errors.append(float((owner.run(owner.down) - owner.run(owner.teacher)).norm()))
        owner.standin = owner.down.clone()
        owner.send()
    for before, after in itertools.pairwise(errors):
        assert after / before == pytest.approx(0.75, abs=0.03)
