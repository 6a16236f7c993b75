"""Weights, the outer step against float64, digests."""

from __future__ import annotations

import secrets

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shoal.protocol.averaging.merging import SHARE_TOTAL, Facts, Weighting, digest, outer_step, shares, weights

# Of two zeros and two zeros: a change would part old peers from new.
GOLDEN = "898a64e5e168880b6c531d78e00fd79beaaae9a14a084079d86b4450ac7127e2"


@pytest.fixture
def generator():
    seed = secrets.randbits(48)
    print(f"{seed=}")
    return torch.Generator().manual_seed(seed)


def test_weights_by_hand():
    facts = [Facts("a", 100, 10), Facts("b", 200, 10), Facts("c", 300, 10)]
    assert weights(facts) == {"a": 1000, "b": 4000, "c": 9000}
    assert weights([*facts[:2], Facts("liar", 10**12, 1)]) == {"a": 1000, "b": 4000, "liar": 12000}
    assert weights([Facts("a", 100, 10), Facts("liar", 10**12, 1)]) == {"a": 1000, "liar": 3000}


def test_who_has_finished_weighs_nothing_beside_those_who_have_not():
    done = [Facts(name, 1, 1) for name in "xyz"]
    trains = [Facts("a", 100, 10), Facts("b", 200, 10)]
    assert weights(done) == {"x": 1, "y": 1, "z": 1}
    assert weights([*done, trains[0]]) == {"x": 0, "y": 0, "z": 0, "a": 1000}
    assert weights([*done, *trains]) == {"x": 0, "y": 0, "z": 0, **weights(trains)}


@pytest.mark.parametrize(
    "facts", [[], [Facts("a", 1, 1)] * 2, [Facts("a", 0, 1)], [Facts("a", 1, 0)], [Facts("a", -5, 1)]]
)
def test_impossible_facts_are_refused(facts):
    with pytest.raises(ValueError, match=r"members|twice|claims"):
        weights(facts)


def test_tokens_count_linearly_and_receivers_not_at_all():
    facts = [Facts("a", 100, 7), Facts("owner", 0, 1), Facts("b", 200, 1), Facts("liar", 10**9, 1)]
    found = weights(facts, weighting=Weighting.TOKENS)
    assert found == {"a": 100, "owner": 0, "b": 200, "liar": 600}
    assert shares(found)["owner"] == 0
    assert abs(shares(found)["a"] - SHARE_TOTAL / 9) <= 1
    for wrong in ([], facts[1:2], [Facts("a", -1, 1)], facts[:1] * 2):
        with pytest.raises(ValueError, match=r"members|twice|claims"):
            weights(wrong, weighting=Weighting.TOKENS)


counts = st.integers(1, 2**53)


@given(honest=st.lists(st.integers(50, 200), min_size=1, max_size=8), lies=st.lists(counts, max_size=7))
def test_up_to_half_the_members_lying_is_bounded_by_the_honest(honest, lies):
    lies = lies[: len(honest)]
    facts = [Facts(f"h{i}", tokens, 1) for i, tokens in enumerate(honest)]
    facts += [Facts(f"l{i}", tokens, 1) for i, tokens in enumerate(lies)]
    found = weights(facts)
    largest = max(tokens**2 for tokens in honest)
    assert all(0 <= weight <= 3 * largest for weight in found.values())


@given(st.dictionaries(st.text(min_size=1), st.floats(1e-3, 1e30), min_size=1, max_size=50))
def test_shares_are_positive_exact_and_proportional(by_peer):
    result = shares(by_peer)
    total = sum(by_peer.values())
    assert all(share >= 1 for share in result.values())
    assert abs(sum(result.values()) - SHARE_TOTAL) <= len(by_peer)
    assert all(abs(share / SHARE_TOTAL - by_peer[peer] / total) <= 1 / SHARE_TOTAL for peer, share in result.items())
    assert all(sum(result.values()) - share < sum(result.values()) for share in result.values())


def test_the_plain_step_is_the_weighted_mean_of_the_locals(generator):
    common = torch.randn(1000, generator=generator)
    local = [common + 0.1 * torch.randn(1000, generator=generator) for _ in range(3)]
    by_peer = weights([Facts(str(i), 100 * (i + 1), 10) for i in range(3)])
    total = sum(by_peer.values())
    average = sum((common - x).double() * by_peer[str(i)] / total for i, x in enumerate(local)).float()
    merged, momentum = outer_step(common, average, torch.zeros(1000), lr=1.0, mu=0.0)
    mean = sum(x.double() * by_peer[str(i)] / total for i, x in enumerate(local))
    torch.testing.assert_close(merged.double(), mean, atol=1e-6, rtol=1e-6)
    assert torch.equal(momentum, average)


@pytest.mark.parametrize(("lr", "mu"), [(0.7, 0.9), (0.4, 0.9), (1.0, 0.5)])
def test_nesterov_against_torch_in_float64(generator, lr, mu):
    common = torch.randn(64, generator=generator)
    reference = torch.nn.Parameter(common.double())
    optimizer = torch.optim.SGD([reference], lr=lr, momentum=mu, nesterov=True)
    momentum = torch.zeros(64)
    for _ in range(5):
        average = torch.randn(64, generator=generator)
        before = common.clone(), average.clone(), momentum.clone()
        new_common, new_momentum = outer_step(common, average, momentum, lr, mu)
        assert all(torch.equal(a, b) for a, b in zip((common, average, momentum), before, strict=True))
        common, momentum = new_common, new_momentum
        reference.grad = average.double()
        optimizer.step()
        torch.testing.assert_close(common.double(), reference.detach(), atol=1e-5, rtol=1e-5)


def test_the_step_rounds_each_element_on_its_own(generator):
    """The same bits for any length, offset and vector width: no element may meet a fused or reordered kernel."""
    vectors = [torch.randn(1031, generator=generator) for _ in range(3)]
    whole = outer_step(*vectors, lr=0.7, mu=0.9)
    pieces = [outer_step(*(v[i : i + 1].clone() for v in vectors), lr=0.7, mu=0.9) for i in range(1031)]
    for result, parts in zip(whole, zip(*pieces, strict=True), strict=True):
        assert torch.equal(result, torch.cat(parts))


def test_bad_input_to_the_step():
    x = torch.zeros(3)
    with pytest.raises(ValueError, match="float32"):
        outer_step(x, x.double(), x, 1.0, 0.0)
    with pytest.raises(ValueError, match="like common"):
        outer_step(x, torch.zeros(4), x, 1.0, 0.0)
    with pytest.raises(ValueError, match="overflowed"):
        outer_step(x, torch.full((3,), 3e38), x, 2.0, 0.0)


def test_digest_sees_every_bit(generator):
    fragment, momentum = torch.randn(100, generator=generator), torch.zeros(100)
    original = digest(fragment, momentum)
    assert len(original) == 32
    assert digest(fragment.clone(), momentum.clone()) == original
    changed = momentum.clone()
    changed[7] = -0.0
    assert digest(fragment, changed) != original
    assert digest(momentum, fragment) != original
    assert digest(torch.zeros(2), torch.zeros(2)).hex() == GOLDEN
