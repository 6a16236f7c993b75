"""NF4 copies: the same bits as bitsandbytes, bounded inflation, cheap deltas, the promised size."""

from __future__ import annotations

import random
import struct
import zlib

import pytest
import torch
from shoal.kernels import lowbit
from shoal.kernels.bnb import functional as bnb
from shoal.kernels.copies import CopyPublisher
from shoal.kernels.experts import DenseExpert, run_expert
from shoal.kernels.interface import MARK_BYTES
from shoal.kernels.lowbit import STICKY, LowbitStandIn
from shoal.kernels.replay import ReplayBuffer


def new_expert(hidden: int, width: int) -> DenseExpert:
    return DenseExpert(torch.randn(2 * width, hidden) / hidden**0.5, torch.randn(hidden, width) / width**0.5)


@pytest.mark.parametrize("hidden", [1, 7, 63, 64, 96])
def test_codes_and_values_are_those_of_bitsandbytes(hidden: int) -> None:
    expert = new_expert(hidden, random.randint(1, 70))
    expert.gate_up[0] = 0.0
    flat = torch.cat([w.reshape(-1) for w in expert.dense()])
    padded = torch.cat([flat, torch.zeros(-len(flat) % 64)]).view(-1, 64)
    codes, state = bnb.quantize_4bit(padded, quant_type="nf4", blocksize=64)
    standin = LowbitStandIn.of(*expert.dense())
    assert torch.equal(standin.tensors["codes"], codes.view(-1))
    assert torch.equal(standin.tensors["absmax"], state.absmax)
    values = torch.cat([w.reshape(-1) for w in standin.dense()])
    assert torch.equal(values, bnb.dequantize_4bit(codes, state).view(-1)[: len(flat)])
    assert torch.equal(values, bnb.get_4bit_type("nf4", device="cpu")[unpacked(standin)].mul(state.absmax[:, None])
                       .view(-1)[: len(flat)])  # fmt: skip


def test_every_value_gets_its_nearest_level() -> None:
    """Random values, and those at which a level or a cell of the table ends, with their neighbours."""
    levels = bnb.get_4bit_type("nf4", device="cpu")
    bounds = (levels[1:] + levels[:-1]) / 2
    ends = torch.cat([bounds, torch.linspace(-1, 1, 129)])
    near = [ends, ends.nextafter(torch.tensor(2.0)), ends.nextafter(torch.tensor(-2.0))]
    values = torch.cat([torch.rand(10_000) * 2 - 1, *near]).clamp(-1, 1)
    codes = lowbit._nearest(values).long()
    assert torch.equal(codes, torch.bucketize(values, bounds))
    distance = (values.double()[:, None] - levels.double()).abs()
    torch.testing.assert_close(distance.gather(1, codes[:, None])[:, 0], distance.amin(1), rtol=0, atol=1e-7)


def unpacked(standin: LowbitStandIn) -> torch.Tensor:
    codes = standin.tensors["codes"]
    return torch.stack([codes >> 4, codes & 15], dim=-1).view(-1, 64).long()


def test_memory_is_four_and_a_half_bits_a_weight() -> None:
    standin = LowbitStandIn.of(*new_expert(128, 64).dense())
    assert standin.nbytes / (3 * 128 * 64) == pytest.approx(0.5625, abs=0.001)
    assert len(standin.to_bytes()) < standin.nbytes + 400


@pytest.mark.parametrize("by", [0.0, 1e-3, 0.03, 1.0])
def test_delta_follows_the_weights_within_the_sticky_tolerance(by: float) -> None:
    expert = new_expert(random.randint(10, 80), random.randint(10, 80))
    standin = LowbitStandIn.of(*expert.dense())
    for _ in range(3):
        expert = DenseExpert(*(w + by * torch.randn_like(w) for w in expert.dense()))
        standin.delta(standin.payload_to(*expert.dense()))
    fresh = LowbitStandIn.of(*expert.dense())
    ratio = standin.tensors["absmax"] / fresh.tensors["absmax"]
    assert bool(((1 / ratio - 1).abs() <= STICKY * 1.001).all())
    weights = torch.cat([w.reshape(-1) for w in expert.dense()])
    error, fresh_error = (
        (torch.cat([w.reshape(-1) for w in s.dense()]) - weights).norm() / weights.norm() for s in (standin, fresh)
    )
    assert error < 1.1 * fresh_error


def test_a_delta_costs_what_changed() -> None:
    expert = new_expert(64, 64)
    sizes = []
    for by in (0.0, 1e-4, 1e-3, 1e-2):
        standin = LowbitStandIn.of(*expert.dense())
        near = [w + by * torch.randn_like(w) for w in expert.dense()]
        sizes.append(len(standin.delta(standin.payload_to(*near))))
    assert sizes == sorted(sizes)
    assert sizes[0] < 64
    assert sizes[2] < standin.nbytes / 8
    assert sizes[3] < standin.nbytes / 2


@pytest.mark.parametrize(("learning_rate", "share"), [(3e-3, 0.95), (3e-4, 0.9), (3e-5, 0.4)])
def test_sticky_absmax_pays(learning_rate: float, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes and error of following an expert that AdamW trains, published every 8 steps, against fresh absmax."""
    teacher, expert = new_expert(64, 64), new_expert(64, 64)
    weights = [w.requires_grad_() for w in expert.dense()]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, betas=(0.9, 0.95))
    tolerances = (STICKY, 0.0)
    standins = [LowbitStandIn.of(*expert.dense()) for _ in tolerances]
    num_bytes = [0, 0]
    for step in range(1, 97):
        x = torch.randn(128, 64)
        wanted = run_expert(x, teacher.gate_up, teacher.down) + 0.3 * torch.randn(128, 64)
        loss = (run_expert(x, expert.gate_up, expert.down) - wanted).square().mean()
        for weight, grad in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            weight.grad = grad
        optimizer.step()
        if step % 8 == 0:
            for n, (tolerance, standin) in enumerate(zip(tolerances, standins, strict=True)):
                monkeypatch.setattr(lowbit, "STICKY", tolerance)
                num_bytes[n] += len(standin.delta(standin.payload_to(*expert.dense())))
    flat = torch.cat([w.detach().reshape(-1) for w in weights])
    errors = [float((torch.cat([w.reshape(-1) for w in s.dense()]) - flat).norm()) for s in standins]
    print(f"bytes {num_bytes}, errors {errors}")
    assert num_bytes[0] < share * num_bytes[1]
    assert errors[0] < 1.03 * errors[1]


def test_no_delta_inflates_beyond_the_state() -> None:
    standin = LowbitStandIn.of(*new_expert(64, 64).dense())
    before = standin.to_bytes()
    for size in (0, standin.nbytes - 1, standin.nbytes + 1, 1 << 28):
        bomb = zlib.compress(bytes(size), 9)
        with pytest.raises(ValueError, match="exactly"):
            standin.apply(bytes(MARK_BYTES) + bomb)
    assert standin.to_bytes() == before


@pytest.mark.parametrize("absmax", [float("nan"), float("inf"), -1.0, 1e30])
def test_a_delta_cannot_bring_in_a_bad_absmax(absmax: float) -> None:
    standin = LowbitStandIn.of(*new_expert(8, 8).dense())
    before = standin.to_bytes()
    codes, old = standin.tensors["codes"], standin.tensors["absmax"]
    (bits,) = struct.unpack("<I", struct.pack("<f", absmax))
    (old_bits,) = struct.unpack("<I", struct.pack("<f", float(old[0])))
    change = (bits ^ old_bits).to_bytes(4, "little")
    planes = b"".join(bytes([byte]) + bytes(len(old) - 1) for byte in change)
    with pytest.raises(ValueError, match="absmax"):
        standin.delta(zlib.compress(bytes(len(codes)) + planes))
    assert standin.to_bytes() == before


def test_fidelity_is_measured_on_the_rows_seen() -> None:
    """Routed inputs that use only half of the dimensions do not see what is wrong in the other half."""
    expert = new_expert(32, 16)
    owner = CopyPublisher(LowbitStandIn.of(*expert.dense()), ReplayBuffer(128, 32))
    wrong = DenseExpert(expert.gate_up.clone(), expert.down)
    wrong.gate_up[:, 16:] += 1.0
    x = torch.randn(200, 32)
    x[:, 16:] = 0.0
    owner.observe(x, torch.rand(200))
    assert owner.fidelity(wrong) == pytest.approx(owner.fidelity(expert), abs=0.01)
    assert owner.fidelity(expert) > 0.75
    owner.observe(torch.randn(200, 32), torch.rand(200))
    assert owner.fidelity(wrong) < owner.fidelity(expert) - 0.2
