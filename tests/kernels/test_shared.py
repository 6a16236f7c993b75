"""Shared stand-ins: low-rank corrections of a base, which is known by its digest and never sent."""

from __future__ import annotations

import random

import pytest
import torch
from safetensors.torch import save
from shoal.kernels.bases import Bases, common_bases
from shoal.kernels.shared import SharedStandIn
from torch import Tensor

Pair = tuple[Tensor, Tensor]


def weights(hidden: int = 24, width: int = 16) -> Pair:
    return torch.randn(2 * width, hidden) / hidden**0.5, torch.randn(hidden, width) / width**0.5


def plus(pair: Pair, by: float, rank: int | None = None) -> Pair:
    """The pair moved by random matrices of a norm relative to its own."""
    moved = []
    for matrix in pair:
        m, n = matrix.shape
        change = torch.randn(m, n) if rank is None else torch.randn(m, rank) @ torch.randn(rank, n)
        moved.append(matrix + by * matrix.norm() / change.norm() * change)
    return moved[0], moved[1]


def error(got: Pair, wanted: Pair) -> float:
    return float(
        sum((a - b).square().sum() for a, b in zip(got, wanted, strict=True)).sqrt()
        / sum(b.square().sum() for b in wanted).sqrt()
    )


def test_a_change_of_low_rank_is_kept_and_any_other_as_well_as_its_rank_allows() -> None:
    base = weights()
    bases = Bases([base])
    rounded = tuple(m.float() for m in next(iter(bases.values())))
    near = plus((rounded[0], rounded[1]), 0.3, rank=3)
    assert error(SharedStandIn.near(*near, 3, bases).dense(), near) < 0.3 * 0.02
    far = plus((rounded[0], rounded[1]), 0.3)
    got = SharedStandIn.near(*far, 5, bases)
    best = []
    for matrix, origin in zip(far, rounded, strict=True):
        u, s, v = torch.linalg.svd((matrix - origin).double(), full_matrices=False)
        best.append((origin + (u[:, :5] * s[:5]) @ v[:5]).float())
    assert error(got.dense(), far) < 1.05 * error((best[0], best[1]), far)
    assert got.rank == 5


def test_the_nearest_of_several_bases_is_taken() -> None:
    several = [weights() for _ in range(random.randint(2, 5))]
    bases = Bases([*several, weights(8, 4)])
    for number, base in enumerate(several):
        standin = SharedStandIn.near(*plus(base, 0.2), 2, bases)
        assert bytes(standin.tensors["base"].tolist()) == next(iter(Bases([several[number]])))
    assert SharedStandIn.near(*weights(8, 4), 99, bases).rank == 4, "a rank is cut to what the matrices have"
    with pytest.raises(ValueError, match="none of"):
        SharedStandIn.near(*weights(9, 5), 2, bases)


def test_a_base_that_is_not_here_or_of_another_size_is_refused() -> None:
    base = weights()
    standin = SharedStandIn.near(*plus(base, 0.1), 2, Bases([base]))
    with pytest.raises(ValueError, match="not one of this run's"):
        SharedStandIn(standin.tensors, Bases([weights()]))
    other = Bases([weights(20, 16)])
    state = dict(standin.tensors) | {"base": torch.tensor(list(next(iter(other))), dtype=torch.uint8)}
    with pytest.raises(ValueError, match="another size"):
        SharedStandIn(state, other)


def test_codes_and_scales_that_no_owner_makes_are_refused() -> None:
    bases = Bases([weights()])
    good = dict(SharedStandIn.near(*weights(), 2, bases).tensors)
    for name, bad in (("gate_up_left", torch.tensor(-128)), ("down_right_scales", torch.tensor(-1.0))):
        spoilt = {key: value.clone() for key, value in good.items()}
        spoilt[name].view(-1)[0] = bad
        with pytest.raises(ValueError, match=r"code|scale"):
            SharedStandIn(spoilt, bases)


def test_bases_travel_as_they_are_whatever_their_order() -> None:
    pairs = [weights() for _ in range(4)]
    one, other = Bases(pairs), Bases(random.sample(pairs, 4) + pairs[:2])
    assert one.to_bytes() == other.to_bytes()
    again = Bases.from_bytes(Bases(pairs[:1]).to_bytes(), Bases(pairs[1:]).to_bytes())
    assert again.to_bytes() == one.to_bytes()
    assert len(again) == 4
    assert set(again) == set(one)
    assert again.nbytes == 2 * 4 * 3 * 24 * 16
    assert not Bases.from_bytes()
    assert not Bases.from_bytes(Bases().to_bytes())


@pytest.mark.parametrize(
    "tensors",
    [
        {"0.gate_up": torch.zeros(8, 4)},
        {"0.gate_up": torch.zeros(8, 4), "0.down": torch.zeros(4, 5)},
        {"0.gate_up": torch.zeros(8, 4), "0.down": torch.full((4, 4), torch.nan)},
        {"0.gate_up": torch.zeros(8, 4), "0.down": torch.zeros(4, 4), "more": torch.zeros(1)},
        {"0.gate_up": torch.zeros(0, 4), "0.down": torch.zeros(4, 0)},
    ],
)
def test_what_are_no_bases_is_refused(tensors: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"base|finite"):
        Bases.from_bytes(save(tensors))
    with pytest.raises(ValueError, match="safetensors"):
        Bases.from_bytes(save(tensors)[:-1])


def test_variants_are_grouped_and_their_means_found() -> None:
    """Experts of a model that was upcycled with some noise: so many groups as there were shards."""
    shards = [weights() for _ in range(random.randint(1, 4))]
    experts = [plus(shard, 0.1) for shard in shards for _ in range(16)]
    random.shuffle(experts)
    means = common_bases(experts, 0.5)
    assert len(means) == len(shards)
    for mean in means:
        assert min(error(mean, shard) for shard in shards) < 0.05
    strangers = [weights() for _ in range(6)]
    assert len(common_bases(strangers, 0.5)) == 6
