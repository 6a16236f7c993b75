"""Ternary copies: exact for experts trained ternary, cheap deltas, nothing bad gets in; and see test_standin.py."""

from __future__ import annotations

import random
import struct
import zlib

import pytest
import torch
from shoal.kernels.bases import Bases
from shoal.kernels.experts import DenseExpert
from shoal.kernels.interface import MARK_BYTES
from shoal.kernels.routed import apply_experts
from shoal.kernels.standin import KINDS, initial_standin, make_publisher, standin_from_bytes
from shoal.kernels.ternary import TernaryExpert, ternarise
from shoal.kernels.ternary_standin import TernaryStandIn


def new_expert(hidden: int | None = None, width: int | None = None) -> TernaryExpert:
    hidden, width = hidden or random.randint(1, 40), width or random.randint(1, 40)
    return TernaryExpert(torch.randn(2 * width, hidden) / hidden**0.5, torch.randn(hidden, width) / width**0.5)


def moved(expert: TernaryExpert, by: float) -> TernaryExpert:
    return TernaryExpert(*(w + by * w.std() * torch.randn_like(w) for w in (expert.gate_up, expert.down)))


def test_a_copy_computes_what_the_expert_computes() -> None:
    """To the bit, forward and to the inputs, in every dtype, before and after deltas."""
    expert = new_expert(random.randint(2, 40))
    owner = make_publisher(TernaryStandIn.of(*expert.masters()), generator=torch.Generator())
    copy = initial_standin("ternary", expert.gate_up, expert.down, 1)
    for by in (0.0, 0.01, 0.3, 3.0):
        expert = moved(expert, by)
        copy.apply(owner.delta(expert))
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(copy.dense(), expert.dense(), strict=True))
        assert owner.fidelity(expert) == 1.0
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(9, copy.hidden).to(dtype).requires_grad_()
            index, gates = torch.zeros(9, 1, dtype=torch.int64), torch.rand(9, 1)
            mine, theirs = (apply_experts(x, index, gates, [one]) for one in (copy, expert))
            assert torch.equal(mine, theirs)
            gradients = [torch.autograd.grad(y.float().square().sum(), x)[0] for y in (mine, theirs)]
            assert torch.equal(*gradients)


def test_masters_are_copied_whatever_the_expert_computes_with() -> None:
    expert = new_expert()
    owners = [make_publisher(TernaryStandIn.of(*expert.masters()), generator=torch.Generator()) for _ in (0, 1)]
    after = moved(expert, 0.1)
    for owner, one in zip(owners, (after, DenseExpert(after.gate_up, after.down)), strict=True):
        owner.delta(one)
        assert owner.published.digest() == TernaryStandIn.of(after.gate_up, after.down).digest()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_can_stand_in_for_an_expert_trained_ternary(kind: str) -> None:
    """Composers made the initial stand-in from the seeded masters; the owner's deltas must lead on from there."""
    expert = new_expert(24, 16)
    bases = Bases([expert.masters()])
    copy = initial_standin(kind, expert.gate_up, expert.down, 16, bases=bases)
    owner = make_publisher(copy, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        expert = moved(expert, 0.01)
        owner.observe(torch.randn(64, 24), torch.ones(64))
        owner.refit(expert)
        copy.apply(owner.delta(expert))
    assert copy.digest() == owner.published.digest()
    if kind == "lowbit":  # follows what the expert computes with, not its masters
        assert owner.fidelity(expert) > 0.7  # of 160 small experts the least was 0.81


def test_memory_is_a_fifth_of_a_byte_a_weight() -> None:
    standin = TernaryStandIn.of(*(w.to(torch.float64) for w in vars(new_expert(512, 256)).values()))
    assert standin.nbytes / (3 * 512 * 256) < 0.21
    assert len(standin.to_bytes()) < standin.nbytes + 500
    assert (standin.hidden, standin.width) == (512, 256)


def test_a_delta_costs_what_changed() -> None:
    expert, sizes = new_expert(64, 64), []
    for by in (0.0, 1e-4, 1e-3, 1e-2, 1e-1):
        standin = TernaryStandIn.of(expert.gate_up, expert.down)
        near = moved(expert, by)
        sizes.append(len(standin.delta(standin.payload_to(near.gate_up, near.down))))
    print(f"sizes {sizes} of {standin.nbytes}")
    assert sizes == sorted(sizes)
    assert sizes[0] < 64
    assert sizes[2] < standin.nbytes / 4
    assert sizes[3] < standin.nbytes / 2


def test_no_delta_inflates_beyond_the_state() -> None:
    expert = new_expert(20, 20)
    standin = TernaryStandIn.of(expert.gate_up, expert.down)
    before = standin.to_bytes()
    for size in (0, standin.nbytes - 1, standin.nbytes + 1, 1 << 28):
        with pytest.raises(ValueError, match="exactly"):
            standin.apply(bytes(MARK_BYTES) + zlib.compress(bytes(size), 9))
    assert standin.to_bytes() == before


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -1.0, 1e30, 0.0])
def test_a_delta_cannot_bring_in_a_bad_scale(scale: float) -> None:
    expert = new_expert(8, 8)
    standin = TernaryStandIn.of(expert.gate_up, expert.down)
    before = standin.to_bytes()
    tensors = standin.tensors
    trits = sum(len(tensors[f"{part}_trits"]) for part in ("gate_up", "down"))
    # bfloat16 is the upper half of a float32
    bits = [struct.unpack("<I", struct.pack("<f", f))[0] >> 16 for f in (scale, float(tensors["gate_up_scales"][0]))]
    change = (bits[0] ^ bits[1]).to_bytes(2, "little")
    planes = change[:1] + bytes(15) + change[1:] + bytes(15) + bytes(2 * 8)
    with pytest.raises(ValueError, match="scale"):
        standin.delta(zlib.compress(bytes(trits) + planes))
    assert standin.to_bytes() == before


def test_a_delta_cannot_bring_in_bad_trits() -> None:
    expert = new_expert(7, 3)  # 42 and 21 trits: both paddings are in use
    standin = TernaryStandIn.of(expert.gate_up, expert.down)
    before = standin.to_bytes()
    sizes = [len(standin.tensors[f"{part}_trits"]) for part in ("gate_up", "down")]
    for position, byte in ((0, 243), (sum(sizes) - 1, 255), (sizes[0] - 1, 9), (sum(sizes) - 1, 3)):
        raw = bytearray(standin.nbytes)
        raw[position] = byte
        with pytest.raises(ValueError, match="trits"):
            standin.delta(zlib.compress(bytes(raw)))
    assert standin.to_bytes() == before


def test_a_snapshot_with_bad_trits_or_rows_is_refused() -> None:
    expert = new_expert(6, 4)
    tensors = TernaryStandIn.of(expert.gate_up, expert.down).tensors
    for name, change, what in (
        ("down_trits", lambda t: t.fill_(243), "trits"),
        ("down_trits", lambda t: t.fill_(0), "scale is zero"),
        ("gate_up_scales", lambda t: t[:-1], "holds"),
        ("gate_up_scales", lambda t: t[:0], "holds"),
        ("down_scales", lambda t: t[:0], "holds"),
        ("down_scales", lambda t: -t, "scale"),
    ):
        with pytest.raises(ValueError, match=what):
            TernaryStandIn({**tensors, name: change(tensors[name].clone())})


def test_golden_bytes() -> None:
    """The state on the wire. A change here means that peers of two versions no longer understand each other."""
    gate_up = torch.arange(8, dtype=torch.float32).view(4, 2) / 8 - 0.5
    down = torch.arange(4, dtype=torch.float32).view(2, 2) / 4
    standin = initial_standin("ternary", gate_up, down, 1)
    # gate_up (-4 -3 | -2 -1 | 0 1 | 2 3) / 8, down (0 1 | 2 3) / 4: only 0 is below half of its row's mean
    assert ternarise(gate_up).codes.tolist() == [[-1, -1], [-1, -1], [0, 1], [1, 1]]
    header = (
        b'{"down_scales":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]},'
        b'"gate_up_scales":{"dtype":"BF16","shape":[4],"data_offsets":[4,12]},'
        b'"down_trits":{"dtype":"U8","shape":[1],"data_offsets":[12,13]},'
        b'"gate_up_trits":{"dtype":"U8","shape":[2],"data_offsets":[13,15]}}'
    )
    header += b" " * (-len(header) % 8)
    scales = b"".join(struct.pack("<f", s)[2:] for s in (0.125, 0.625, 0.4375, 0.1875, 0.0625, 0.3125))
    trits = bytes([1 * 3 + 1 * 9 + 1 * 27, 2 + 2 * 3 + 2 * 9 + 2 * 27 + 0 * 81, 1 + 1 * 3 + 1 * 9])
    assert standin.to_bytes() == struct.pack("<Q", len(header)) + header + scales + trits
    assert standin_from_bytes(standin.to_bytes()).kind == "ternary"
