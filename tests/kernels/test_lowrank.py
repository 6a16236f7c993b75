"""Int8 factors: exact expansion, error near the best of their rank, refusals."""

from __future__ import annotations

import random

import pytest
import torch
from shoal.kernels.codecs import LARGEST_CODE, Int8Rows
from shoal.kernels.lowrank import MAX_RANK, Factors, factor, factors_nbytes


def random_factors(rows: int, columns: int, rank: int) -> Factors:
    def side(num: int) -> Int8Rows:
        codes = torch.randint(-LARGEST_CODE, LARGEST_CODE + 1, (num, rank), dtype=torch.int8)
        return Int8Rows(codes, (torch.rand(num) * 1e-2 + 1e-6).to(torch.bfloat16))

    return Factors(side(rows), side(columns))


@pytest.mark.parametrize("rank", [1, 8, 100, MAX_RANK])
def test_expansion_equals_integer_arithmetic_for_any_shape_and_thread_count(rank: int) -> None:
    factors = random_factors(random.randint(1, 150), random.randint(1, 150), rank)
    if rank == MAX_RANK:  # the worst case there is
        factors.left.codes.fill_(LARGEST_CODE)
        factors.right.codes.fill_(-LARGEST_CODE)
    exact = factors.left.codes.long() @ factors.right.codes.long().t()
    assert int(exact.abs().max()) < 1 << 24
    want = exact.float() * factors.left.scales.float().unsqueeze(1) * factors.right.scales.float()
    whole = factors.expand()
    assert torch.equal(whole, want)

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(factors.expand(), whole)
    finally:
        torch.set_num_threads(threads)
    # Other shapes take other matmul kernels and other orders of summation: the same bits come out, row by row ...
    for i in range(0, len(whole), 37):
        row = Factors(Int8Rows(factors.left.codes[i : i + 1], factors.left.scales[i : i + 1]), factors.right)
        assert torch.equal(row.expand()[0], whole[i])
    # ... and summed over the rank in a shuffled order.
    order = torch.randperm(rank)
    shuffled = Factors(
        Int8Rows(factors.left.codes[:, order], factors.left.scales),
        Int8Rows(factors.right.codes[:, order], factors.right.scales),
    )
    assert torch.equal(shuffled.expand(), whole)


@pytest.mark.parametrize("_", range(5))
def test_error_is_near_that_of_the_best_of_its_rank(_: int) -> None:
    rows, columns = random.randint(2, 120), random.randint(2, 120)
    rank = random.randint(1, min(rows, columns, 12))
    decay = torch.arange(1, min(rows, columns) + 1) ** -random.uniform(0.3, 1.5)
    u, v = (torch.linalg.qr(torch.randn(n, len(decay))).Q for n in (rows, columns))
    matrix = (u * decay) @ v.t()
    best = float(decay[rank:].norm())
    error = float((factor(matrix, rank).expand() - matrix).norm())
    assert error <= 1.05 * best + 0.015 * float(matrix.norm())


def test_a_matrix_of_low_rank_comes_back() -> None:
    matrix = torch.randn(200, 3) @ torch.randn(3, 90)
    assert (factor(matrix, 3).expand() - matrix).norm() < 0.015 * matrix.norm()
    assert not factor(torch.zeros(5, 4), 2).expand().any()


def test_factors_travel_exactly() -> None:
    rows, columns, rank = (random.randint(1, 40) for _ in range(3))
    factors = random_factors(rows, columns, rank)
    data = factors.to_bytes()
    assert len(data) == factors_nbytes((rows, columns), rank)
    assert torch.equal(Factors.from_bytes(data, (rows, columns), rank).expand(), factors.expand())
    for bad in (data[:-1], data + b"\0"):
        with pytest.raises(ValueError, match="bytes are not"):
            Factors.from_bytes(bad, (rows, columns), rank)


@pytest.mark.parametrize("rank", [0, 5, -1])
def test_impossible_ranks_are_refused(rank: int) -> None:
    with pytest.raises(ValueError, match="rank"):
        factor(torch.randn(4, 9), rank)
    with pytest.raises(ValueError, match="rank"):
        Factors.from_bytes(b"", (1, 1), rank if rank != 5 else MAX_RANK + 1)


def test_matrices_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        factor(torch.full((3, 3), torch.nan), 1)
