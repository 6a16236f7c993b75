"""Muon against torch's own, against a singular value decomposition, and AdamW beside it."""

from __future__ import annotations

import pytest
import torch
from shoal.kernels.muon import ORTHOGONAL, Muon, orthogonal
from torch import Tensor, nn

SHAPES = ((3, 24, 16), (2, 16, 24), (1, 8, 8), (4, 1, 12))


def newton_schulz(matrix: Tensor) -> Tensor:
    """One matrix in float64, by polynomials of its singular values: what the iterations are."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.square().sum().sqrt()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ s.diag() @ v


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_singular_values_become_about_one(shape: tuple[int, int, int], size: float) -> None:
    matrices = torch.randn(shape)
    made = orthogonal(matrices * size)
    assert made.dtype == torch.float32
    assert made.shape == shape
    for matrix, one in zip(matrices, made, strict=True):
        if size >= 1.0:  # below 1e-7 a matrix counts as zero, and is made no larger than that
            torch.testing.assert_close(one.double(), newton_schulz(matrix), rtol=1e-3, atol=1e-4)
            before, values = torch.linalg.svdvals(matrix), torch.linalg.svdvals(one)
            assert values.max() < 1.3
            if before.min() > 0.01 * before.square().sum().sqrt():  # five iterations lift no smaller ones so far
                assert values.min() > 0.3
        assert torch.isfinite(one).all()
    assert torch.equal(orthogonal(torch.zeros(shape)), torch.zeros(shape))


def test_matrices_together_are_what_each_is_alone() -> None:
    matrices = torch.randn(5, 12, 20)
    alone = torch.cat([orthogonal(one.unsqueeze(0)) for one in matrices])
    torch.testing.assert_close(orthogonal(matrices), alone, rtol=1e-4, atol=1e-5)


def test_steps_are_those_of_torch() -> None:
    """Its iterations are in bfloat16, so that updates agree to some per cent."""
    weights = [torch.randn(16, 24), torch.randn(16, 24), torch.randn(40, 8)]
    ours, theirs = ([nn.Parameter(w.clone()) for w in weights] for _ in range(2))
    rate, decay = 1e-2, 0.1
    mine = Muon([{"params": ours, ORTHOGONAL: True}], lr=rate, weight_decay=decay, fused=True)
    other = torch.optim.Muon(theirs, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for one, two in zip(ours, theirs, strict=True):
            one.grad = torch.randn_like(one)
            two.grad = one.grad.clone()
        mine.step()
        other.step()
    for weight, one, two in zip(weights, ours, theirs, strict=True):
        moved = torch.linalg.norm(two - weight)
        assert torch.linalg.norm(one - two) < 0.05 * moved
        torch.testing.assert_close(mine.state[one]["momentum"], other.state[two]["momentum_buffer"])
        assert mine.state[one]["step"] == 4


def test_the_rest_is_adamw_to_the_bit() -> None:
    weights = [torch.randn(6, 4), torch.randn(4)]
    ours, theirs = ([nn.Parameter(w.clone()) for w in weights] for _ in range(2))
    matrix = nn.Parameter(torch.randn(4, 4))
    groups = [{"params": ours[:1]}, {"params": [matrix], ORTHOGONAL: True}, {"params": ours[1:], "weight_decay": 0.0}]
    mine = Muon(groups, lr=1e-2, weight_decay=0.1, fused=True)
    other = torch.optim.AdamW(
        [{"params": theirs[:1]}, {"params": theirs[1:], "weight_decay": 0.0}], lr=1e-2, weight_decay=0.1, fused=True
    )
    for _ in range(3):
        matrix.grad = torch.randn_like(matrix)
        for one, two in zip(ours, theirs, strict=True):
            one.grad = torch.randn_like(one)
            two.grad = one.grad.clone()
        mine.step()
        other.step()
    assert all(torch.equal(one, two) for one, two in zip(ours, theirs, strict=True))
    assert set(mine.state[matrix]) == {"step", "momentum"}
    assert len(mine.param_groups) == 3


def test_what_has_no_gradient_stays() -> None:
    moved, kept = (nn.Parameter(torch.randn(8, 8)) for _ in range(2))
    before = kept.detach().clone()
    optimizer = Muon([{"params": [moved, kept], ORTHOGONAL: True}], lr=1e-2, weight_decay=0.1)
    moved.grad = torch.randn(8, 8)
    optimizer.step()
    assert torch.equal(kept, before)
    assert kept not in optimizer.state


def test_many_are_done_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many at a time as fit, each once."""
    weights = [torch.randn(8, 8) for _ in range(7)]
    gradients = [torch.randn(8, 8) for _ in range(7)]
    results = []
    for together in (1 << 21, 3 * 64, 1):
        monkeypatch.setattr("shoal.kernels.muon._TOGETHER", together)
        parameters = [nn.Parameter(w.clone()) for w in weights]
        optimizer = Muon([{"params": parameters, ORTHOGONAL: True}], lr=1e-2)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        results.append(torch.stack([p.detach() for p in parameters]))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-6)
