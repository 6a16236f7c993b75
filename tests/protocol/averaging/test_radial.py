"""Norms and directions apart: against a float64 reference, its published properties, and what a member may claim."""

from __future__ import annotations

import math
import random
import secrets
import struct

import pytest
import torch
from shoal.protocol.averaging.facts import MAX_NORMS, RoundFacts, open_facts, pack_norms, sign_facts
from shoal.protocol.averaging.fragments import Fragment, partition, unflatten
from shoal.protocol.averaging.merging import Facts, shares, weights
from shoal.protocol.averaging.radial import _FOLD, ELEMENT, _length, combine, num_norms, split
from shoal.protocol.errors import Refused
from shoal.protocol.identity import Identity
from torch import Tensor

RUN = "test-0123456789ab"
NOW = 1_700_000_000.0
ME = Identity.generate()

(BACKBONE,) = partition(
    {
        "embed_tokens.weight": (11, 7),
        "lm_head.weight": (11, 7),
        "layers.0.q": (40, 30),
        "layers.1.q": (9, 9),
        "n": (1,),
    },
    1,
)
RADIAL = ("layers.0.q", "layers.1.q", "n")
MEAN = ("embed_tokens.weight", "lm_head.weight")


def one(numel: int) -> Fragment:
    return Fragment(0, ("w",), (numel,), numel)


@pytest.fixture
def generator() -> torch.Generator:
    seed = secrets.randbits(48)
    print(f"{seed=}")
    return torch.Generator().manual_seed(seed)


def merge(fragment: Fragment, vectors: list[Tensor], tokens: list[int] | None = None) -> Tensor:
    """As a round does it: split, averaged in float32, combined."""
    sent = [split(fragment, vector) for vector in vectors]
    tokens = tokens or [100] * len(vectors)
    facts = [Facts(f"peer{i}", t, 10, norms) for i, (t, (_, norms)) in enumerate(zip(tokens, sent, strict=True))]
    share = shares(weights(facts))
    average = torch.zeros(fragment.numel)
    for fact, (vector, _) in zip(facts, sent, strict=True):
        average += vector * (share[fact.peer_id] / sum(share.values()))
    return combine(fragment, average, facts)


def reference(vectors: list[Tensor], weight: list[float]) -> Tensor:
    """One tensor, none of the members' zero and none much longer than the others."""
    w = torch.tensor(weight, dtype=torch.float64) / sum(weight)
    v = torch.stack(vectors).double()
    norms = v.norm(dim=1)
    direction = ((v / norms[:, None]) * w[:, None]).sum(0)
    return (norms * w).sum() * direction / direction.norm()


def test_against_float64(generator: torch.Generator) -> None:
    vectors = [0.01 * torch.randn(BACKBONE.numel, generator=generator) for _ in range(4)]
    for vector in vectors:
        unflatten(BACKBONE, vector)["n"].abs_().clamp_(0.01, 0.02)  # two of one element are degenerate if they differ
    tokens = [100, 120, 90, 150]
    weight = [t * t / 10.0 for t in tokens]
    merged = unflatten(BACKBONE, merge(BACKBONE, vectors, tokens))
    pieces = [unflatten(BACKBONE, vector) for vector in vectors]
    for name in RADIAL:
        expected = reference([piece[name] for piece in pieces], weight)
        torch.testing.assert_close(merged[name].double(), expected, rtol=2e-5, atol=1e-7)  # shares are 20 bits
    for name in MEAN:
        mean = sum(piece[name].double() * w for piece, w in zip(pieces, weight, strict=True)) / sum(weight)
        torch.testing.assert_close(merged[name].double(), mean, rtol=2e-5, atol=1e-7)  # shares are 20 bits


def test_what_travels_is_as_large_as_pseudo_gradients_are(generator: torch.Generator) -> None:
    vector = torch.randn(BACKBONE.numel, generator=generator) * 10.0 ** random.randint(-8, 4)
    sent, norms = split(BACKBONE, vector)
    assert len(norms) == num_norms(BACKBONE) == len(RADIAL)
    before, after = unflatten(BACKBONE, vector), unflatten(BACKBONE, sent)
    for name in MEAN:
        assert torch.equal(before[name], after[name])
    for name, norm in zip(RADIAL, norms, strict=True):
        assert norm == pytest.approx(before[name].double().norm().item(), rel=1e-6)
        assert after[name].double().square().mean().sqrt().item() == pytest.approx(ELEMENT, rel=1e-6)
    assert struct.unpack(f"<{len(norms)}f", pack_norms(norms)) == norms, "float32 in everybody's hands"


@pytest.mark.parametrize("peers", [1, 2, 3, 7])
def test_equal_members_give_their_mean(generator: torch.Generator, peers: int) -> None:
    vector = torch.randn(BACKBONE.numel, generator=generator) * 10.0 ** random.randint(-20, 10)
    torch.testing.assert_close(merge(BACKBONE, [vector] * peers), vector, rtol=1e-6, atol=0)


@pytest.mark.parametrize("peers", [1, 2, 5, 16])
def test_of_orthogonal_members_the_norm_does_not_depend_on_their_number(generator: torch.Generator, peers: int) -> None:
    basis, _ = torch.linalg.qr(torch.randn(400, peers, generator=generator))
    vectors = [3.0 * column.contiguous() for column in basis.T]
    merged = merge(one(400), vectors)
    assert merged.norm().item() == pytest.approx(3.0, rel=1e-5)
    torch.testing.assert_close(merged, sum(vectors, torch.zeros(400)) / math.sqrt(peers), rtol=1e-4, atol=1e-5)


def test_weights_count_in_norm_and_direction(generator: torch.Generator) -> None:
    a, b = torch.eye(2)
    merged = merge(one(2), [a, 2.0 * b], [100, 100])
    torch.testing.assert_close(merged, torch.tensor([1.5, 1.5]) / math.sqrt(2))
    merged = merge(one(2), [a, 2.0 * b], [200, 300])  # 4 : 9
    torch.testing.assert_close(merged, (4 + 18) / 13 * torch.tensor([4.0, 9.0]) / math.sqrt(97), rtol=1e-5, atol=0)


def test_who_has_nothing_to_say_shortens_the_step_and_turns_nothing(generator: torch.Generator) -> None:
    """A composer that has finished brings zeros. They must not be the median, nor make what is left degenerate."""
    vector, zero = torch.randn(50, generator=generator), torch.zeros(50)
    assert torch.equal(merge(one(50), [zero, zero]), zero)
    torch.testing.assert_close(merge(one(50), [vector, zero, zero, zero]), vector / 4, rtol=1e-5, atol=0)
    orthogonal = merge(one(2), [*torch.eye(2), *torch.zeros(6, 2)])
    torch.testing.assert_close(orthogonal, torch.full((2,), 2 / 8 / math.sqrt(2)), rtol=1e-5, atol=0)
    assert split(one(50), zero)[1] == (0.0,)
    assert torch.equal(split(one(50), zero)[0], zero)
    # As little as float32 has: a norm above 0 goes with a direction, 0 with none.
    sent, (norm,) = split(one(50), torch.full((50,), 1e-45))
    assert norm > 0
    assert sent.norm().item() == pytest.approx(ELEMENT * math.sqrt(50), rel=1e-6)


def test_one_norm_is_worth_three_medians_at_most(generator: torch.Generator) -> None:
    v = torch.randn(64, generator=generator)
    merged = merge(one(64), [v, 1.1 * v, 1.2 * v, 1e6 * v])
    torch.testing.assert_close(merged, v * (1 + 1.1 + 1.2 + 3 * 1.1) / 4, rtol=1e-5, atol=0)
    merged = merge(one(64), [v, 1e6 * v])  # of two, the smaller one is the median
    torch.testing.assert_close(merged, v * (1 + 3) / 2, rtol=1e-5, atol=0)


def test_members_that_contradict_each_other_take_no_long_step(generator: torch.Generator) -> None:
    v = torch.randn(100, generator=generator)
    merged = merge(one(100), [v, -v])
    assert torch.isfinite(merged).all()
    assert merged.norm() < 1e-5 * v.norm()
    nearly = -v + 0.01 * torch.randn(100, generator=generator)
    merged = merge(one(100), [v, nearly])
    assert merged.norm() < 0.02 * v.norm(), "what is left of them is noise"
    torch.testing.assert_close(merged, (v / v.norm() + nearly / nearly.norm()) * (v.norm() + nearly.norm()) / 4)
    idle = merge(one(100), [v, nearly, torch.zeros(100), torch.zeros(100)])
    torch.testing.assert_close(idle, merged / 2, rtol=1e-4, atol=1e-5)  # who has no news shortens it, as ever
    apart = merge(one(2), [torch.tensor([1.0, 0.0]), torch.tensor([-0.5, math.sqrt(0.75)])])  # 120 degrees
    assert apart.norm().item() == pytest.approx(1.0, rel=1e-5), "that far apart is not degenerate"


def test_a_lie_about_the_direction_does_not_lengthen_the_step(generator: torch.Generator) -> None:
    fragment = one(100)
    sent = [split(fragment, torch.randn(100, generator=generator)) for _ in range(3)]
    facts = [Facts(f"peer{i}", 100, 10, norms) for i, (_, norms) in enumerate(sent)]
    average = (sent[0][0] + sent[1][0] + 1e6 * sent[2][0]) / 3
    longest = max(norms[0] for _, norms in sent)
    assert combine(fragment, average, facts).norm().item() <= longest * (1 + 1e-6)


def test_same_bytes_same_bits(generator: torch.Generator) -> None:
    """In any order of members, any alignment in memory and with any number of threads: sums must not be torch's own."""
    numel = 300_001  # more than is folded at a time
    fragment = one(numel)
    vectors = [torch.randn(numel, generator=generator) for _ in range(3)]
    facts = [Facts(f"peer{i}", 100 + i, 10, split(fragment, vector)[1]) for i, vector in enumerate(vectors)]
    average = sum(split(fragment, vector)[0] for vector in vectors) / 3
    expected = combine(fragment, average, facts)
    untouched = average.clone()
    threads = torch.get_num_threads()
    try:
        for offset in (1, 2, 3):
            moved = torch.empty(numel + offset)[offset:].copy_(average)
            torch.set_num_threads(offset)
            assert torch.equal(combine(fragment, moved, random.sample(facts, 3)), expected)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(average, untouched)


@pytest.mark.parametrize(("numel", "times"), [(1, 1), (2, 1), (1023, 30), (_FOLD + 999, 1)])
def test_the_order_of_additions_is_fixed(generator: torch.Generator, numel: int, times: int) -> None:
    """Another order would part peers from each other: here it is once more, one number at a time."""
    for _ in range(times):
        vector = torch.randn(numel, generator=generator)
        squares = [x * x for x in vector.tolist()]
        sums = []
        for start in range(0, numel, _FOLD):
            block = squares[start : start + _FOLD]
            while len(block) > 1:
                half = (len(block) + 1) // 2
                block = [a + b for a, b in zip(block, block[half:], strict=False)] + block[len(block) - half : half]
            sums += block
        assert _length(vector) == math.sqrt(math.fsum(sums))


def test_what_is_not_finite_is_not_hidden() -> None:
    for bad in (math.nan, math.inf, -math.inf):
        vector = torch.ones(10)
        vector[secrets.randbelow(10)] = bad
        sent, _ = split(one(10), vector)
        assert not torch.isfinite(sent).all()
    _, (norm,) = split(one(10), torch.full((10,), 3e38))
    assert norm == math.inf  # more than float32 has


def test_bad_arguments() -> None:
    fragment, average = one(10), torch.ones(10)
    fine = Facts("a", 100, 10, (1.0,))
    for norms in ((), (1.0, 1.0), (math.nan,), (math.inf,), (-1.0,)):
        with pytest.raises(ValueError, match="b has not 1 finite norms"):
            combine(fragment, average, [fine, Facts("b", 100, 10, norms)])
    with pytest.raises(ValueError, match="no members"):
        combine(fragment, average, [])
    with pytest.raises(ValueError, match="twice"):
        combine(fragment, average, [fine, fine])
    for wrong in (average.double(), torch.ones(11)):
        with pytest.raises(ValueError, match="needs 10 float32"):
            combine(fragment, wrong, [fine])
        with pytest.raises(ValueError, match="needs 10 float32"):
            split(fragment, wrong)


# -- in facts ------------------------------------------------------------------------------------------------------


def facts(packed: bytes) -> RoundFacts:
    return RoundFacts(ME.peer_id, 3, 0, 1, 10, 2, bytes(32), True, NOW, packed)


def opened(packed: bytes, own: bytes) -> RoundFacts:
    return open_facts(sign_facts(ME, RUN, facts(packed)), RUN, ME.peer_id, like=facts(own), now=NOW)


def test_norms_come_back() -> None:
    norms = tuple(struct.unpack("<f", struct.pack("<f", random.expovariate(1)))[0] for _ in range(MAX_NORMS))
    assert opened(pack_norms(norms), bytes(4 * MAX_NORMS)).norms == norms
    assert opened(b"", b"").norms == ()


@pytest.mark.parametrize(
    "packed",
    [
        b"",
        pack_norms([1.0]),
        pack_norms([1.0, 2.0, 3.0]),
        pack_norms([1.0, 2.0])[:-1],
        pack_norms([1.0, math.nan]),
        pack_norms([math.inf, 1.0]),
        pack_norms([1.0, -0.5]),
    ],
    ids=["none", "too few", "too many", "half of one", "nan", "inf", "negative"],
)
def test_wrong_norms_are_refused(packed: bytes) -> None:
    with pytest.raises(Refused) as refused:
        opened(packed, pack_norms([1.0, 1.0]))
    assert refused.value.reason == "facts_norms"


def test_norms_where_none_belong_are_refused() -> None:
    for count, reason in ((1, "facts_norms"), (MAX_NORMS, "facts_size")):
        with pytest.raises(Refused) as refused:
            opened(pack_norms([1.0] * count), b"")
        assert refused.value.reason == reason
    beyond = struct.pack(f"<{MAX_NORMS + 1}f", *[1.0] * (MAX_NORMS + 1))
    with pytest.raises(Refused) as refused:
        opened(beyond, bytes(4 * MAX_NORMS))
    assert refused.value.reason == "facts_malformed"
    with pytest.raises(ValueError, match="more fragments"):
        pack_norms([1.0] * (MAX_NORMS + 1))
    with pytest.raises(ValueError, match="float32"):
        pack_norms([1e39])


def test_facts_without_norms_are_what_they_always_were() -> None:
    """Golden: runs that merge by the mean must not part into old and new peers."""
    plain = RoundFacts("1" * 52, 3, 0, 1, 10, 2, bytes(32), True, NOW)
    assert sign_facts(ME, RUN, plain)[64:].hex() == "99d934" + "31" * 52 + "0300010a02c420" + "00" * 32 + (
        "c3cb41d954fc40000000"
    )
