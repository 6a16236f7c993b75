"""What an expert learns from row sketches: the gradient that their rows give, corrected (`sketch.py`), in one pass.

An owner gets several sketches of an expert between two steps, one from each composer and step. Their rows go through
the expert together: it is the number of small products, not their size, that costs an owner of many experts its time.

Shapes: N rows of all sketches, D hidden, F width of the expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import get_args

import torch
from torch import Tensor
from torch.nn.functional import linear

from .activations import ACTIVATIONS, check_activation, gated_backward
from .rows import joined
from .sketch import FOLLOWS_FIDELITY, Curvature, RowSketch, kappa_for


@dataclass(frozen=True)
class Taught:
    """A sketch and how much its rows count.

    Attributes:
        kappa: of the correction; FOLLOWS_FIDELITY: `kappa_for` the stand-in's fidelity on these rows.
        factor: of the sketch's gradient in the sum.
        standin: gate_up and down, of any width, that its rows were taken at. Needed where kappa is not 0.
    """

    sketch: RowSketch
    kappa: float = 0.0
    factor: float = 1.0
    standin: tuple[Tensor, Tensor] | None = None


def expert_gradient(
    gate_up: Tensor,
    down: Tensor,
    sketch: RowSketch,
    act: str = "silu",
    *,
    kappa: float = 0.0,
    standin: tuple[Tensor, Tensor] | None = None,
    curvature: Curvature = "isotropic",
) -> tuple[Tensor, Tensor]:
    """Sum over one sketch's rows, each as often as it counts, of its token's gradient. See `sum_gradients`."""
    return sum_gradients(gate_up, down, [Taught(sketch, kappa, standin=standin)], act, curvature=curvature)


@torch.no_grad()
def sum_gradients(
    gate_up: Tensor,
    down: Tensor,
    taught: Sequence[Taught],
    act: str = "silu",
    *,
    curvature: Curvature = "isotropic",
) -> tuple[Tensor, Tensor]:
    """Sum over sketches of factor · (sum over rows, each as often as it counts, of the gradients of its token's loss).

    Args:
        gate_up, down: (2F, D) and (D, F), what the forward computes with; their dtype and device are used throughout.
        taught: at least one sketch; second moments are each sketch's own. Neighbours with the same stand-in go through
            it together.

    Returns:
        Gradients of gate_up and down. Divide by tokens for the gradient of a mean loss.

    Raises:
        ValueError: shapes disagree, an unknown activation, a kappa that is negative, not finite or without a
            stand-in, or a result that is not finite.
    """
    check_activation(act)
    if curvature not in get_args(Curvature):
        raise ValueError(f"curvature {curvature!r} is not one of {', '.join(get_args(Curvature))}")
    for each in taught:
        possible = 0.0 <= each.kappa < math.inf or each.kappa == FOLLOWS_FIDELITY
        if not possible or (each.kappa and each.standin is None):
            raise ValueError(f"cannot correct with kappa {each.kappa} and {'a' if each.standin else 'no'} stand-in")
        if each.sketch.hidden != down.shape[0] or gate_up.shape != (2 * down.shape[1], down.shape[0]):
            raise ValueError(
                f"rows of {each.sketch.hidden} for an expert of {tuple(gate_up.shape)} and {tuple(down.shape)}"
            )
    activate = ACTIVATIONS[act]
    x_ND = joined([each.sketch.x for each in taught], like=gate_up)
    dy_ND = joined([each.sketch.dy for each in taught], like=gate_up)

    hg, hu = linear(x_ND, gate_up).chunk(2, dim=-1)
    act_NF = activate(hg)
    a_NF = act_NF * hu
    if len(x_ND) and any(each.kappa for each in taught):
        y_ND = linear(a_NF, down)
        error_ND = y_ND - _through_standins(x_ND, taught, activate)
        dy_ND = dy_ND + _corrections(dy_ND, y_ND, error_ND, taught, curvature)
    if any(each.factor != 1.0 or each.sketch.weights_N is not None for each in taught):
        dy_ND = dy_ND * _counts(taught, like=dy_ND)
    dh = gated_backward(dy_ND @ down, hg, hu, act_NF, act)
    d_gate_up, d_down = dh.t() @ x_ND, dy_ND.t() @ a_NF
    if not math.isfinite(norm(d_gate_up, d_down)):
        raise ValueError("the gradient of a sketch is not finite")
    return d_gate_up, d_down


def norm(*gradients: Tensor) -> float:
    """Of all of them together; NaN or infinity if a value is, or is too large to be squared."""
    return math.hypot(*(float(torch.linalg.vector_norm(gradient)) for gradient in gradients))


def _through_standins(x_ND: Tensor, taught: Sequence[Taught], activate: Callable[[Tensor], Tensor]) -> Tensor:
    """(N, D): S(x), zero where no correction is to be made."""
    outputs, start = [], 0
    for _, neighbours in groupby(taught, key=lambda each: id(each.standin) if each.kappa else None):
        group = list(neighbours)
        end = start + sum(each.sketch.num_rows for each in group)
        rows_ND, standin = x_ND[start:end], group[0].standin
        if standin is None or not group[0].kappa:
            outputs.append(torch.zeros_like(rows_ND))
        else:
            sg, su = linear(rows_ND, standin[0].to(x_ND)).chunk(2, dim=-1)
            outputs.append(linear(activate(sg) * su, standin[1].to(x_ND)))
        start = end
    return torch.cat(outputs)


def _counts(taught: Sequence[Taught], like: Tensor) -> Tensor:
    """(N, 1): how often each row counts."""
    columns = []
    for each in taught:
        weights_N = each.sketch.weights_N
        once = like.new_ones(each.sketch.num_rows) if weights_N is None else weights_N.to(like)
        columns.append(once * each.factor)
    return torch.cat(columns)[:, None]


def _corrections(
    dy_ND: Tensor, y_ND: Tensor, error_ND: Tensor, taught: Sequence[Taught], curvature: Curvature
) -> Tensor:
    """(N, D): kappa H (E - S), with H of each sketch's own rows: mean dy dyᵀ, its diagonal, or the diagonal's mean.

    Args:
        y_ND: E(x).
        error_ND: E(x) - S(x).
    """
    found, sizes = [], [each.sketch.num_rows for each in taught]
    parts = zip(taught, *(torch.split(t, sizes) for t in (dy_ND, y_ND, error_ND)), strict=True)
    for each, rows_ND, y_nD, error_nD in parts:
        kappa = each.kappa
        if kappa == FOLLOWS_FIDELITY:
            size = norm(y_nD)
            kappa = kappa_for(1.0 - norm(error_nD) / size) if size > 0 else 0.0
        if not kappa or not len(rows_ND):
            found.append(torch.zeros_like(rows_ND))
            continue
        weights_N = each.sketch.weights_N
        share_N1 = rows_ND.new_ones(len(rows_ND), 1) if weights_N is None else weights_N.to(rows_ND)[:, None]
        share_N1 = kappa * share_N1 / share_N1.sum()
        if curvature == "full":
            found.append(error_nD @ (rows_ND.t() @ (share_N1 * rows_ND)))
            continue
        second_D = (share_N1 * rows_ND.square()).sum(0)
        found.append(error_nD * (second_D if curvature == "diagonal" else second_D.mean()))
    return torch.cat(found)
