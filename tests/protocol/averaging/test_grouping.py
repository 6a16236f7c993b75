"""Two rounds over groups give the average over all; who is missing costs its own share and nobody else's."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shoal.protocol.averaging.fragments import Fragment, partition
from shoal.protocol.averaging.grouping import MAX_GROUP, Grid, Sums, add, contributions, plan, sent_bytes
from shoal.protocol.averaging.merging import Facts, weights
from shoal.protocol.averaging.radial import combine, split
from torch import Tensor

(BACKBONE,) = partition({"embed_tokens.weight": (5, 4), "layers.0.q": (12, 10), "layers.1.q": (9, 9)}, 1)


def names(count: int) -> list[str]:
    return [f"peer{number:04}" for number in range(count)]


def told(live: list[str], seed: int, spread: int = 1) -> tuple[dict[str, Facts], dict[str, Tensor]]:
    """Facts and pseudo-gradients; `spread` 1 is equal tokens, up to 3 no weight is ever capped."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    common = torch.randn(BACKBONE.numel, generator=generator)
    vectors = {peer: common + torch.randn(BACKBONE.numel, generator=generator) for peer in live}
    facts = {peer: Facts(peer, rng.randint(100, int(100 * spread**0.5)), 1) for peer in live}
    return facts, vectors


def both_rounds(grid: Grid, facts: dict[str, Facts], sent: dict[str, Tensor], gone: set[str]) -> list[Sums]:
    """What each group of the second half ends with. `gone` have sent their shares, and bring nothing."""
    first = [
        add(contributions([facts[peer] for peer in row if peer in sent], sent))
        for row in grid.rows
        if any(peer in sent for peer in row)
    ]
    if not grid.num_columns:
        return first
    by_peer = {peer: part for part in first for row in grid.rows if part.members[0] in row for peer in row}
    present = {peer for peer in sent if peer not in gone}
    columns = [grid.column(index, present) for index in range(grid.num_columns)]
    return [add([by_peer[peer] for peer in column]) for column in columns]


@settings(max_examples=40)
@given(st.integers(1, MAX_GROUP**2), st.integers(0, 1 << 40))
def test_everybody_stands_in_one_row_and_one_column(count: int, round_: int) -> None:
    live = names(count)
    grid = plan(live, round_)
    assert grid == plan(list(reversed(live)), round_)
    assert sorted(peer for row in grid.rows for peer in row) == live
    groups = [*grid.rows, *(grid.column(index, live) for index in range(grid.num_columns))]
    assert max(map(len, groups)) <= MAX_GROUP
    if count <= MAX_GROUP:
        assert (len(grid.rows), grid.num_columns) == (1, 0)
        return
    assert max(map(len, groups)) <= 2 * count**0.5
    assert sorted(p for index in range(grid.num_columns) for p in grid.standing_in(index)) == live
    for index in range(grid.num_columns):
        column = grid.column(index, live)
        assert set(grid.standing_in(index)) <= set(column)
        assert [peer in row for peer, row in zip(column, grid.rows, strict=True)] == [True] * len(grid.rows)


def test_groups_change_with_the_round() -> None:
    live = names(200)
    assert plan(live, 1).rows != plan(live, 2).rows


@pytest.mark.parametrize("count", [0, MAX_GROUP**2 + 1])
def test_more_than_two_rounds_can_hold_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match="two rounds"):
        plan(names(count), 0)


@pytest.mark.parametrize("count", [1, 2, 64, 65, 100, 150, 1000])
def test_two_rounds_give_the_average_over_all(count: int) -> None:
    live = names(count)
    facts, vectors = told(live, seed=count, spread=3)
    weight = weights(list(facts.values()))
    total = sum(weight.values())
    expected = torch.stack([vectors[peer].double() * (weight[peer] / total) for peer in live]).sum(0)
    results = both_rounds(plan(live, 7), facts, vectors, gone=set())
    for sums in results:
        assert sorted(sums.members) == live
        assert sums.weight == pytest.approx(total, rel=1e-12)
        assert (sums.vector / sums.weight - expected).abs().max() < 1e-12
        assert torch.equal(sums.average(), results[0].average()), "columns differ"


@pytest.mark.parametrize("count", [3, 70, 300])
def test_radial_merging_over_two_rounds_is_that_over_one(count: int) -> None:
    live = names(count)
    facts, vectors = told(live, seed=count, spread=3)
    vectors[live[1]] = torch.zeros(BACKBONE.numel)  # one without news
    parts = {peer: split(BACKBONE, vector) for peer, vector in vectors.items()}
    sent = {peer: vector for peer, (vector, _) in parts.items()}
    facts = {p: Facts(p, facts[p].tokens, 1, norms) for p, (_, norms) in parts.items()}
    weight = weights(list(facts.values()))
    total = sum(weight.values())
    average = torch.stack([sent[peer].double() * (weight[peer] / total) for peer in live]).sum(0).float()
    expected = combine(BACKBONE, average, list(facts.values()))
    results = both_rounds(plan(live, 7), facts, sent, gone=set())
    merged = [sums.average(BACKBONE) for sums in results]
    assert all(torch.equal(each, merged[0]) for each in merged)
    torch.testing.assert_close(merged[0], expected, rtol=2e-6, atol=1e-7)  # shares are rounded to 2^-20 there


@settings(max_examples=40)
@given(st.integers(65, 300), st.randoms(use_true_random=False), st.floats(0.0, 0.6), st.floats(0.0, 0.6))
def test_who_is_missing_costs_its_own_share_only(
    count: int, rng: random.Random, silent_share: float, gone_share: float
) -> None:
    """Some never send, others send and die before the second half."""
    live = names(count)
    facts, vectors = told(live, seed=count)
    sent = {peer: vector for peer, vector in vectors.items() if rng.random() >= silent_share}
    gone = {peer for peer in sent if rng.random() < gone_share}
    grid = plan(live, 3)
    dead_rows = [row for row in grid.rows if all(peer not in sent or peer in gone for peer in row)]
    if len(dead_rows) == len(grid.rows):
        return
    expected = sorted(peer for row in grid.rows if row not in dead_rows for peer in row if peer in sent)
    results = both_rounds(grid, facts, sent, gone)
    mean = torch.stack([vectors[peer].double() for peer in expected]).mean(0)
    for sums in results:
        assert sorted(sums.members) == expected
        assert sums.weight == pytest.approx(100.0**2 * len(expected), rel=1e-12)
        assert (sums.vector / sums.weight - mean).abs().max() < 1e-12
        assert torch.equal(sums.average(), results[0].average())


def test_a_row_caps_what_one_member_can_weigh() -> None:
    live = names(100)
    facts, vectors = told(live, seed=5)
    liar = live[50]
    facts[liar] = Facts(liar, 1_000_000, 1)
    vectors = {peer: torch.zeros(BACKBONE.numel) for peer in live} | {liar: torch.ones(BACKBONE.numel)}
    (average, *_) = [sums.average() for sums in both_rounds(plan(live, 0), facts, vectors, gone=set())]
    assert average.max() <= 3 / 102 + 1e-6


def test_what_has_no_sum_is_refused() -> None:
    a, b = contributions([Facts("a", 5, 1), Facts("b", 5, 1)], {"a": torch.ones(3), "b": torch.ones(3)})
    other = contributions([Facts("c", 5, 1)], {"c": torch.ones(4)})
    with pytest.raises(ValueError, match="twice"):
        add([a, b, a])
    with pytest.raises(ValueError, match="different fragments"):
        add([a, *other])
    with pytest.raises(ValueError, match="nobody"):
        add([])
    with pytest.raises(ValueError, match="number of norms"):
        contributions([Facts("a", 5, 1), Facts("b", 5, 1, (1.0,))], {})


def test_what_a_peer_sends_does_not_grow_with_the_swarm() -> None:
    one = sent_bytes(plan(names(64), 0), member_bytes=2, sum_bytes=4)
    assert one == pytest.approx(2 * 63 / 64 * 2)
    for count in (65, 100, 1000, 4096):
        assert sent_bytes(plan(names(count), 0), member_bytes=2, sum_bytes=4) < 2 * (2 + 4) * 1.2


def test_a_fragment_without_tensors_merged_by_norm() -> None:
    embedding = Fragment(0, ("embed_tokens.weight",), (6,), 6)
    (sums,) = contributions([Facts("a", 5, 1)], {"a": torch.arange(6.0)})
    assert torch.equal(sums.average(embedding), torch.arange(6.0))
