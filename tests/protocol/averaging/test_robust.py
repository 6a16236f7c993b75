"""Robust averages: near the mean without liars, and near the honest members' mean with some."""

from __future__ import annotations

import math

import pytest
import torch
from shoal.protocol.averaging.robust import robust_mean
from torch import Tensor

SIZE = 4096


def members(num: int, noise: float = 0.5) -> list[Tensor]:
    """What honest members send: a common direction and each its own noise."""
    common = torch.randn(SIZE)
    return [common + noise * torch.randn(SIZE) for _ in range(num)]


def reference(parts: list[Tensor], shares: list[float]) -> Tensor:
    """The module's formulas, member by member, in float64."""

    def median(values: list[float]) -> float:
        return sorted(values)[(len(values) - 1) // 2]

    x = [part.double() for part in parts]
    norms = [float(part.norm()) for part in x]
    x = [part * min(1.0, median(norms) / norm) for part, norm in zip(x, norms, strict=True)]
    columns = torch.stack(x).numpy()
    centre = torch.tensor([float(torch.tensor(column).quantile(0.5)) for column in columns.T], dtype=torch.float64)
    for _ in range(3):
        away = [part - centre for part in x]
        distances = [float(part.norm()) for part in away]
        tau = median(distances)
        for part, distance, share in zip(away, distances, shares, strict=True):
            centre = centre + share / sum(shares) * part * min(1.0, tau / distance)
    return centre


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("num", [2, 3, 4, 7])
def test_it_is_what_the_formulas_say(num: int) -> None:
    parts = members(num)
    shares = (0.2 + torch.rand(num)).tolist()
    assert distance(robust_mean(parts, shares), reference(parts, shares)) < 1e-5


@pytest.mark.parametrize("num", [4, 8, 16])
def test_among_honest_members_it_is_near_the_mean(num: int) -> None:
    parts = members(num)
    mean = torch.stack(parts).mean(0)
    assert distance(robust_mean(parts, [1.0] * num), mean) < 0.05


@pytest.mark.parametrize("factor", [-1.0, -100.0, 1e30, 0.0])
@pytest.mark.parametrize("num", [4, 8, 16])
def test_a_quarter_of_liars_moves_it_little(num: int, factor: float) -> None:
    """Sign flips, huge ones, and silence: far less harm than they do to the mean, and in the honest direction still."""
    honest = members(num - num // 4)
    liars = [factor * part for part in honest[: num // 4]]
    mean = torch.stack(honest).mean(0)
    got = robust_mean([*liars, *honest], [1.0] * num)
    harm = distance(got, mean)
    assert bool(got.isfinite().all())
    assert harm < 0.35
    assert harm < distance(torch.stack([*liars, *honest]).mean(0), mean)
    assert float(torch.nn.functional.cosine_similarity(got, mean, dim=0)) > 0.95


def test_equal_parts_and_single_ones_stay_as_they_are() -> None:
    part = torch.randn(3, 5)
    torch.testing.assert_close(robust_mean([part] * 5, [1.0, 2.0, 3.0, 4.0, 5.0]), part)
    torch.testing.assert_close(robust_mean([part], [0.1]), part)
    assert float(robust_mean([torch.zeros(7)] * 3, [1.0] * 3).abs().max()) == 0.0


def test_order_does_not_matter() -> None:
    parts, shares = members(6), (0.2 + torch.rand(6)).tolist()
    order = torch.randperm(6).tolist()
    got = robust_mean([parts[i] for i in order], [shares[i] for i in order])
    assert distance(got, robust_mean(parts, shares)) < 1e-5


@pytest.mark.parametrize(
    ("parts", "shares"), [([], []), ([torch.ones(2)], [0.0]), ([torch.ones(2)], [math.nan]), ([torch.ones(2)], [])]
)
def test_what_makes_no_mean_is_an_error(parts: list[Tensor], shares: list[float]) -> None:
    with pytest.raises(ValueError, match="shares"):
        robust_mean(parts, shares)
