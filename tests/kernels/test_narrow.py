"""Narrow stand-ins: which neurons they start from, that they learn, and that deltas add up exactly."""

from __future__ import annotations

import random

import pytest
import torch
from shoal.kernels.codecs import quantise_rows
from shoal.kernels.experts import DenseExpert, run_expert
from shoal.kernels.interface import MARK_BYTES, output_fidelity
from shoal.kernels.lowrank import Factors
from shoal.kernels.narrow import NarrowPublisher, NarrowStandIn
from shoal.kernels.replay import ReplayBuffer
from torch import Tensor


def new_expert(hidden: int, width: int) -> DenseExpert:
    return DenseExpert(torch.randn(2 * width, hidden) / hidden**0.5, torch.randn(hidden, width) / width**0.5)


def new_publisher(expert: DenseExpert, width: int, rank: int, steps: int) -> NarrowPublisher:
    return NarrowPublisher(
        NarrowStandIn.of(*expert.dense(), width),
        ReplayBuffer(512, expert.down.shape[0]),
        rank=rank,
        refit_steps=steps,
        learning_rate=3e-3,
        generator=torch.Generator().manual_seed(0),
    )


def test_the_first_standin_keeps_the_neurons_of_highest_norms_in_order() -> None:
    expert = new_expert(12, 10)
    loud = sorted(random.sample(range(10), 4))
    expert.down[:, loud] *= 100
    standin = NarrowStandIn.of(*expert.dense(), 4)
    gate, up = expert.gate_up.chunk(2)
    assert torch.equal(standin.tensors["gate_up"], torch.cat([gate[loud], up[loud]]))
    assert torch.equal(standin.tensors["down"], expert.down[:, loud])


def test_equal_neurons_are_chosen_by_index_and_full_width_is_the_expert() -> None:
    expert = DenseExpert(torch.ones(12, 3), torch.ones(3, 6) * torch.arange(1, 7) ** 0)
    expert.gate_up[:6] = 0.3
    order = NarrowStandIn.of(*expert.dense(), 2)
    assert torch.equal(order.tensors["down"], expert.down[:, :2])
    whole = new_expert(5, 7)
    for mine, theirs in zip(NarrowStandIn.of(*whole.dense(), 7).dense(), whole.dense(), strict=True):
        assert torch.equal(mine, theirs)
    silent = NarrowStandIn.of(torch.zeros(8, 3), torch.zeros(3, 4), 2)
    assert silent.width == 2


def test_with_rows_energy_is_measured_on_them() -> None:
    expert = new_expert(8, 6)
    gate, up = expert.gate_up.chunk(2)
    gate[:, 4:], up[:, 4:] = 0.0, 0.0
    up[:3, :4] = 0.0  # silent on inputs that live in the first four dimensions ...
    up[:3, 4:] = 50.0  # ... though their norms are the largest
    x = torch.randn(64, 8)
    x[:, 4:] = 0.0
    by_rows = NarrowStandIn.of(*expert.dense(), 3, (x, torch.rand(64)))
    assert torch.equal(by_rows.tensors["down"], expert.down[:, 3:])
    by_norm = NarrowStandIn.of(*expert.dense(), 3)
    assert torch.equal(by_norm.tensors["down"], expert.down[:, :3])


def test_fidelity_rises_with_refits_and_publishing() -> None:
    """Inputs fill four of 24 dimensions, of which the weights say nothing: half the neurons learn what norms miss."""
    hidden, full = 24, 32
    expert = new_expert(hidden, full)
    basis = torch.linalg.qr(torch.randn(hidden, 4)).Q.t() * 2

    def rows(num: int) -> tuple[Tensor, Tensor]:
        return torch.randn(num, 4) @ basis, torch.rand(num)

    owner = new_publisher(expert, 16, 8, 30)
    owner.observe(*rows(512))
    curve = [owner.fidelity(expert)]
    for _ in range(25):
        owner.refit(expert)
        owner.delta(expert)
        curve.append(owner.fidelity(expert))
    assert 1 - curve[-1] < 0.6 * (1 - curve[0]), "wherever it begins"
    assert curve[-1] > 0.5
    x, gate = rows(200)
    assert output_fidelity(expert, owner.published, x, gate, "silu") == pytest.approx(curve[-1], abs=0.15)


def test_refits_weigh_rows_by_their_gates() -> None:
    """Rows with gate 0 decide nothing."""
    expert = new_expert(8, 8)
    one, other = (new_publisher(expert, 3, 2, 4) for _ in range(2))
    x, gate = torch.randn(64, 8), torch.rand(64)
    gate[::2] = 0.0
    one.observe(x, gate)
    x = x.clone()
    x[::2] = torch.randn(32, 8)
    other.observe(x, gate)
    for owner in (one, other):
        owner.refit(expert)
    for mine, theirs in zip(
        one.state_dict(replay=False).values(), other.state_dict(replay=False).values(), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_nothing_is_fitted_without_rows() -> None:
    expert = new_expert(8, 8)
    owner = new_publisher(expert, 4, 2, 5)
    before = owner.published.to_bytes()
    owner.refit(expert)
    owner.delta(expert)
    assert owner.published.to_bytes() == before


def test_what_rank_and_rounding_cut_off_comes_with_later_deltas() -> None:
    """Publishing again without a refit converges to the fit: error feedback."""
    expert = new_expert(16, 16)
    owner = new_publisher(expert, 8, 2, 40)
    owner.observe(torch.randn(256, 16), torch.rand(256))
    owner.refit(expert)
    fitted = {name.removeprefix("fitted."): t for name, t in owner.state_dict().items() if name.startswith("fitted.")}

    def missing() -> float:
        return sum(float((fitted[name] - t).norm()) for name, t in owner.published.tensors.items())

    start = missing()
    for _ in range(12):
        owner.delta(expert)
    assert missing() < 0.01 * start


def test_a_delta_is_the_sum_of_its_factors() -> None:
    standin = NarrowStandIn.of(*new_expert(6, 5).dense(), 3)
    before = {name: tensor.clone() for name, tensor in standin.tensors.items()}
    factors = {n: Factors(quantise_rows(torch.randn(t.shape[0], 2)), quantise_rows(torch.randn(t.shape[1], 2)))
               for n, t in (("gate_up", before["gate_up"]), ("down", before["down"]))}  # fmt: skip
    delta = standin.delta(b"\x02\x00" + factors["gate_up"].to_bytes() + factors["down"].to_bytes())
    assert len(delta) == MARK_BYTES + 2 + (6 + 6 + 6 + 3) * 4
    for name, tensor in standin.tensors.items():
        assert torch.equal(tensor, before[name] + factors[name].expand())


@pytest.mark.parametrize("rank", [0, 4, 200, 65535])
def test_ranks_that_do_not_fit_are_refused(rank: int) -> None:
    standin = NarrowStandIn.of(*new_expert(6, 5).dense(), 3)
    before = standin.to_bytes()
    for body in (b"", bytes(21 * (rank + 2))):
        with pytest.raises(ValueError, match="rank"):
            standin.apply(bytes(MARK_BYTES) + rank.to_bytes(2, "little") + body)
    assert standin.to_bytes() == before


def test_a_delta_cannot_grow_weights_without_bound() -> None:
    standin = NarrowStandIn.of(*new_expert(4, 4).dense(), 2)
    before = standin.to_bytes()
    huge = quantise_rows(torch.full((4, 1), 1e6))
    zero = quantise_rows(torch.zeros(4, 1)), quantise_rows(torch.zeros(2, 1))
    body = huge.to_bytes() + huge.to_bytes() + zero[0].to_bytes() + zero[1].to_bytes()
    with pytest.raises(ValueError, match="finite or above"):
        standin.delta(b"\x01\x00" + body)
    assert standin.to_bytes() == before


def test_run_expert_is_the_plain_formula() -> None:
    expert, x = new_expert(5, 4), torch.randn(3, 5)
    gate, up = expert.gate_up[:4] @ x.t(), expert.gate_up[4:] @ x.t()
    torch.testing.assert_close(
        run_expert(x, expert.gate_up, expert.down), (expert.down @ (gate * gate.sigmoid() * up)).t()
    )
