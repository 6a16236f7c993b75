"""Gradient sketches: linear, the same everywhere, exact at full rank, near the best of their rank otherwise."""

from __future__ import annotations

import hashlib
import random

import pytest
import torch
from shoal.kernels.codecs import quantise_rows
from shoal.kernels.experts import DenseExpert
from shoal.kernels.gradient_sketch import LARGEST_VALUE, GradientSketcher, Projections
from shoal.kernels.routed import apply_experts
from torch import Tensor

Rows = tuple[Tensor, Tensor, Tensor, Tensor]


def random_rows(num: int, hidden: int, width: int, dtype: torch.dtype = torch.float32) -> Rows:
    return (
        torch.randn(num, hidden, dtype=dtype),
        torch.randn(num, hidden, dtype=dtype),
        torch.randn(num, width, dtype=dtype),
        torch.randn(num, 2 * width, dtype=dtype),
    )


def sizes() -> tuple[int, int, int]:
    """D, F and a rank that fits; wide and tall, one included."""
    hidden, width = random.randint(1, 40), random.randint(1, 40)
    return hidden, width, random.randint(1, min(2 * width, hidden))


def sketched(projections: Projections, *parts: Rows) -> Tensor:
    sketcher = GradientSketcher(projections)
    for rows in parts:
        sketcher.add(*rows)
    return sketcher.take()


def gradient(rows: Rows) -> tuple[Tensor, Tensor]:
    """d gate_up and d down in float64."""
    x, dy, a, dh = (t.double() for t in rows)
    return dh.t() @ x, dy.t() @ a


@pytest.mark.parametrize("_", range(8))
def test_the_sketch_is_the_projected_gradient(_: int) -> None:
    hidden, width, rank = sizes()
    projections = Projections(hidden, width, rank, random.getrandbits(128))
    rows = random_rows(random.randint(1, 20), hidden, width)
    flat = sketched(projections, rows)
    assert flat.shape == (projections.numel,)
    assert flat.dtype == torch.float32
    want = []
    for plan, matrix in zip((projections.gate_up, projections.down), gradient(rows), strict=True):
        g = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.t()
        want += [(g @ plan.omega.double()).reshape(-1), (plan.psi.double() @ g).reshape(-1)]
    torch.testing.assert_close(flat.double(), torch.cat(want), rtol=1e-4, atol=1e-4 * float(flat.abs().max()))


@pytest.mark.parametrize("_", range(8))
def test_sketches_of_parts_add_up_to_the_sketch_of_the_whole(_: int) -> None:
    hidden, width, rank = sizes()
    seed = random.getrandbits(64)
    parts = [random_rows(random.randint(0, 9), hidden, width) for _ in range(3)]
    joint: Rows = tuple(torch.cat(same) for same in zip(*parts, strict=True))  # type: ignore[assignment]
    want = sketched(Projections(hidden, width, rank, seed), joint)
    tolerance = {"rtol": 1e-4, "atol": 1e-5 * float(want.abs().max()) + 1e-12}
    # Every composer makes its projections for itself.
    merged = torch.stack([sketched(Projections(hidden, width, rank, seed), rows) for rows in parts]).sum(0)
    torch.testing.assert_close(merged, want, **tolerance)
    torch.testing.assert_close(sketched(Projections(hidden, width, rank, seed), *parts), want, **tolerance)
    scaled = tuple(t * (-2.5 if i in (1, 3) else 1.0) for i, t in enumerate(joint))
    torch.testing.assert_close(
        sketched(Projections(hidden, width, rank, seed), scaled),  # type: ignore[arg-type]
        -2.5 * want,
        rtol=1e-4,
        atol=3 * tolerance["atol"],
    )


def test_projections_have_the_same_bits_on_every_machine() -> None:
    projections = Projections(7, 5, 3, 2**127 + 12345)
    data = b"".join(
        t.numpy().astype("<f4").tobytes()
        for plan in (projections.gate_up, projections.down)
        for t in (plan.omega, plan.psi)
    )
    assert hashlib.sha256(data).hexdigest() == "990113ce34a7dcfeecf8a7333831d3818d6c94db62d716d0d1d5a175b842f737"
    again = Projections(7, 5, 3, 2**127 + 12345)
    assert torch.equal(again.gate_up.psi, projections.gate_up.psi)
    other = Projections(7, 5, 3, 2**127 + 12346)
    assert not torch.equal(other.gate_up.psi, projections.gate_up.psi)


def test_projections_are_centred_with_unit_variance_and_uncorrelated() -> None:
    projections = Projections(300, 200, 100, random.getrandbits(64))
    values = torch.cat([t.reshape(-1).double() for t in (projections.gate_up.omega, projections.gate_up.psi)])
    count = len(values)
    # Six standard errors: about one failure in 10⁸ runs each.
    assert abs(float(values.mean())) < 6 * count**-0.5
    assert abs(float((values**2).mean()) - 1) < 6 * (0.8 / count) ** 0.5  # var of x² is 9/5 - 1
    assert abs(float((values[1:] * values[:-1]).mean())) < 6 * count**-0.5
    assert float(values.abs().max()) < 3**0.5
    # Streams differ: the first values of each are not shared.
    assert not torch.equal(projections.gate_up.omega[0, :50], projections.gate_up.psi[0, :50])
    assert not torch.equal(projections.gate_up.omega[0, :50], projections.down.omega[0, :50])


def assert_exact(projections: Projections, flat: Tensor, wanted: tuple[Tensor, Tensor]) -> None:
    """Equal but for float32 rounding, which a badly conditioned Y makes larger: now and then a random one is."""
    plans = projections.gate_up, projections.down
    for plan, got, want in zip(plans, projections.rebuild(flat), wanted, strict=True):
        assert got.dtype == torch.float32
        tall = want.double().t() if plan.transposed else want.double()
        values = torch.linalg.svdvals(tall @ plan.omega.double())
        condition = float(values[0] / values[int(torch.linalg.matrix_rank(tall)) - 1])
        assert (got - want).norm() < (1e-5 + 1e-6 * condition) * want.norm()


@pytest.mark.parametrize("_", range(8))
def test_full_rank_gives_the_gradient_itself(_: int) -> None:
    hidden, width, _rank = sizes()
    rows = random_rows(random.randint(1, 60), hidden, width)
    projections = Projections(hidden, width, min(2 * width, hidden), random.getrandbits(64))
    assert_exact(projections, sketched(projections, rows), gradient(rows))


@pytest.mark.parametrize("_", range(8))
def test_no_more_rows_than_the_rank_come_back_exactly(_: int) -> None:
    hidden, width, rank = sizes()
    rows = random_rows(random.randint(1, rank), hidden, width)
    projections = Projections(hidden, width, rank, random.getrandbits(64))
    assert_exact(projections, sketched(projections, rows), gradient(rows))


def test_nothing_added_is_a_gradient_of_zero() -> None:
    projections = Projections(6, 4, 2, 1)
    sketcher = GradientSketcher(projections)
    sketcher.add(*random_rows(0, 6, 4))
    d_gate_up, d_down = projections.rebuild(sketcher.flat())
    assert d_gate_up.shape == (8, 6)
    assert d_down.shape == (6, 4)
    assert not d_gate_up.any()
    assert not d_down.any()


def test_taking_starts_again() -> None:
    projections = Projections(6, 4, 2, 1)
    sketcher = GradientSketcher(projections)
    rows = random_rows(5, 6, 4)
    sketcher.add(*rows)
    kept = sketcher.flat()
    first = sketcher.take()
    assert torch.equal(kept, first)
    assert not sketcher.flat().any()
    sketcher.add(*rows)
    assert torch.equal(sketcher.take(), first)
    assert torch.equal(kept, first)  # copies, not views


def test_faulty_rows_are_left_out_and_counted() -> None:
    projections = Projections(6, 4, 3, random.getrandbits(64))
    clean = random_rows(12, 6, 4)
    spoilt: Rows = tuple(t.clone() for t in clean)  # type: ignore[assignment]
    values = (torch.nan, torch.inf, -torch.inf, 2 * LARGEST_VALUE)
    bad = random.sample(range(12), 4)
    for which, (row, value) in enumerate(zip(bad, values, strict=True)):
        spoilt[which][row, random.randrange(spoilt[which].shape[1])] = value
    keep = [i for i in range(12) if i not in bad]
    sketcher = GradientSketcher(projections)
    sketcher.add(*spoilt)
    assert sketcher.refused == 4
    want = sketched(projections, tuple(t[keep] for t in clean))  # type: ignore[arg-type]
    torch.testing.assert_close(sketcher.take(), want, rtol=1e-4, atol=1e-4)


def test_the_largest_rows_stay_finite() -> None:
    projections = Projections(6, 4, 3, random.getrandbits(64))
    flat = sketched(projections, tuple(t.sign() * LARGEST_VALUE for t in random_rows(100, 6, 4)))  # type: ignore[arg-type]
    for matrix in projections.rebuild(flat):
        assert bool(matrix.isfinite().all())


def test_faulty_sketches_are_refused() -> None:
    projections = Projections(6, 4, 2, 1)
    good = sketched(projections, random_rows(5, 6, 4))
    for value in (torch.nan, torch.inf):
        bad = good.clone()
        bad[random.randrange(len(bad))] = value
        with pytest.raises(ValueError, match="not finite"):
            projections.rebuild(bad)
    for wrong in (good[:-1], torch.cat([good, good[:1]]), good.view(1, -1), good.long(), good[:0]):
        with pytest.raises(ValueError, match="is not a sketch"):
            projections.rebuild(wrong)


def test_a_sketch_whose_gradient_overflows_is_refused() -> None:
    # With Ψ's column ψ within (-1, 1), the fit of Z = largest ψ / max|ψ| is exact, and above the largest.
    candidates = (Projections(1, 1, 1, random.getrandbits(64)) for _ in range(10_000))
    projections = next(p for p in candidates if float(p.gate_up.psi[:, 0].abs().max()) < 0.9)
    flat = torch.zeros(projections.numel)
    y, z = projections.gate_up.parts(flat)
    y[0] = 1.0
    psi = projections.gate_up.psi[:, :1]
    z.copy_(psi / psi.abs().max() * torch.finfo(torch.float32).max)
    with pytest.raises(ValueError, match="too large"):
        projections.rebuild(flat)


def test_rows_of_another_expert_are_refused() -> None:
    sketcher = GradientSketcher(Projections(6, 4, 2, 1))
    x, dy, a, dh = random_rows(5, 6, 4)
    for rows in ((x[:4], dy, a, dh), (a, dy, a, dh), (x, dy, a, a), (x, dy, dh, dh), (x, dy[0], a, dh)):
        with pytest.raises(ValueError, match="not those of an expert"):
            sketcher.add(*rows)
    assert not sketcher.flat().any()


@pytest.mark.parametrize(
    ("hidden", "width", "rank", "seed", "message"),
    [
        (0, 4, 1, 0, "no gradient"),
        (4, 0, 1, 0, "no gradient"),
        (4, 4, 0, 0, "rank"),
        (4, 4, 5, 0, "rank"),
        (8, 2, 5, 0, "rank"),
        (4, 4, 1, -1, "seed"),
        (4, 4, 1, 1 << 128, "seed"),
    ],
)
def test_impossible_projections_are_refused(hidden: int, width: int, rank: int, seed: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Projections(hidden, width, rank, seed)


def powers(rows: int, columns: int, decay: float) -> Tensor:
    """A matrix with singular values i ** -decay."""
    count = min(rows, columns)
    u, v = (torch.linalg.qr(torch.randn(n, count)).Q for n in (rows, columns))
    return (u * torch.arange(1, count + 1).float() ** -decay) @ v.t()


def rows_of(d_gate_up: Tensor, d_down: Tensor) -> tuple[Rows, Rows]:
    """Rows whose gradient is (d_gate_up, 0), and others for (0, d_down)."""
    hidden, width = d_down.shape
    no_x, no_dh = torch.zeros(hidden, hidden), torch.zeros(hidden, 2 * width)
    first = (torch.eye(hidden), no_x, torch.zeros(hidden, width), d_gate_up.t())
    return first, (no_x, torch.eye(hidden), d_down, no_dh)


def squared_errors(wanted: tuple[Tensor, Tensor], rank: int, repeats: int) -> list[float]:
    """Mean squared error over seeds of d gate_up and of d down."""
    sums = [0.0, 0.0]
    for _ in range(repeats):
        projections = Projections(wanted[1].shape[0], wanted[1].shape[1], rank, random.getrandbits(64))
        rebuilt = projections.rebuild(sketched(projections, *rows_of(*wanted)))
        for i, (got, want) in enumerate(zip(rebuilt, wanted, strict=True)):
            sums[i] += float((got - want).square().sum()) / repeats
    return sums


def bound(matrix: Tensor, k: int) -> float:
    """Theorem 4.3 of the source for l = 2k."""
    tails = torch.linalg.svdvals(matrix.double()).square().flip(0).cumsum(0).flip(0)
    return (1 + k / (k - 1)) * min((1 + p / (k - p - 1)) * float(tails[p]) for p in range(k - 1))


@pytest.mark.parametrize("rank", [4, 12])
@pytest.mark.parametrize("decay", [0.5, 1.0, 1.5])
def test_error_is_within_the_bound_of_the_source(rank: int, decay: float) -> None:
    hidden, width = random.randint(30, 60), random.randint(30, 60)
    wanted = powers(2 * width, hidden, decay), powers(hidden, width, decay)
    for error, matrix in zip(squared_errors(wanted, rank, 12), wanted, strict=True):
        assert error < 1.3 * bound(matrix, rank)  # a mean over few seeds: above 1.0 once in 1000


def test_a_flat_spectrum_costs_hardly_more_than_no_gradient() -> None:
    wanted = powers(120, 60, 0.0), powers(60, 60, 0.0)
    for error, matrix in zip(squared_errors(wanted, 8, 12), wanted, strict=True):
        assert error < 1.2 * float(matrix.square().sum())


def test_damping_leaves_the_length_that_has_least_error() -> None:
    wanted = powers(160, 80, 0.5), powers(80, 80, 0.5)
    along = lengths = 0.0
    for _ in range(12):
        projections = Projections(80, 80, 16, random.getrandbits(64))
        rebuilt = projections.rebuild(sketched(projections, *rows_of(*wanted)))
        along += sum(float((got * want).sum()) for got, want in zip(rebuilt, wanted, strict=True))
        lengths += sum(float(got.square().sum()) for got in rebuilt)
    assert 0.8 < along / lengths < 1.25  # exactly 1 at the best length; about 0.4 without damping


def test_errors_of_intervals_average_out_under_new_seeds() -> None:
    wanted = powers(80, 40, 0.5)
    rows = rows_of(wanted, torch.zeros(40, 40))[0]
    estimates = []
    for _ in range(40):
        projections = Projections(40, 40, 4, random.getrandbits(64))
        estimates.append(projections.rebuild(sketched(projections, rows))[0])
    mean = torch.stack(estimates).mean(0)
    cosine = float((mean * wanted).sum() / (mean.norm() * wanted.norm()))
    single = [float((e * wanted).sum() / (e.norm() * wanted.norm()).clamp(min=1e-12)) for e in estimates]
    assert cosine > 1.5 * sum(single) / len(single)


def test_a_sketch_in_int8_rows_rebuilds_nearly_as_well() -> None:
    wanted = powers(120, 60, 1.0), powers(60, 60, 1.0)
    projections = Projections(60, 60, 8, random.getrandbits(64))
    flat = sketched(projections, *rows_of(*wanted))
    parts = [part for plan in (projections.gate_up, projections.down) for part in plan.parts(flat)]
    rounded = torch.cat([quantise_rows(part).dense().reshape(-1) for part in parts])
    for a, b, want in zip(projections.rebuild(flat), projections.rebuild(rounded), wanted, strict=True):
        assert (a - b).norm() < 0.1 * want.norm()


class SketchingTap:
    """Sketches expert 0 under all projections at once."""

    def __init__(self, *projections: Projections) -> None:
        self.sketchers = [GradientSketcher(p) for p in projections]

    def forward_rows(self, expert: int, x_ND: Tensor, gate_N: Tensor) -> None:
        pass

    def backward_rows(self, expert: int, x_ND: Tensor, dy_ND: Tensor, a_NF: Tensor, dh_NH: Tensor) -> None:
        if expert == 0:
            for sketcher in self.sketchers:
                sketcher.add(x_ND, dy_ND, a_NF, dh_NH)


def random_experts(hidden: int, width: int) -> list[DenseExpert]:
    return [
        DenseExpert(
            (torch.randn(2 * width, hidden) / hidden**0.5).requires_grad_(),
            (torch.randn(hidden, width) / width**0.5).requires_grad_(),
        )
        for _ in range(3)
    ]


def gradients(expert: DenseExpert) -> tuple[Tensor, Tensor]:
    assert expert.gate_up.grad is not None
    assert expert.down.grad is not None
    return expert.gate_up.grad.clone(), expert.down.grad.clone()


def test_real_gradients_come_back_within_the_bound() -> None:
    hidden, width, tokens = 48, 32, 300
    projections = [Projections(hidden, width, 8, random.getrandbits(64)) for _ in range(12)]
    experts, tap = random_experts(hidden, width), SketchingTap(*projections)
    # Inputs of a network fill few of their dimensions.
    x = torch.randn(tokens, hidden) @ powers(hidden, hidden, 1.0) * 4
    gates, index = torch.randn(tokens, 3).softmax(-1).topk(2)
    y = apply_experts(x, index, gates, experts, tap=tap)
    ((y - torch.randn(tokens, hidden)) ** 2).sum().backward()  # type: ignore[no-untyped-call]
    rebuilt = [p.rebuild(s.take()) for p, s in zip(projections, tap.sketchers, strict=True)]
    for i, want in enumerate(gradients(experts[0])):
        error = sum(float((pair[i] - want).square().sum()) for pair in rebuilt) / len(rebuilt)
        assert error < 1.3 * bound(want, 8)


def test_real_gradients_of_two_composers_merge_to_that_of_the_joint_batch() -> None:
    hidden, width, tokens = 24, 10, 60
    projections = Projections(hidden, width, min(2 * width, hidden), random.getrandbits(64))
    experts = random_experts(hidden, width)
    x, target = torch.randn(tokens, hidden), torch.randn(tokens, hidden)
    gates, index = torch.randn(tokens, 3).softmax(-1).topk(2)

    def backward(part: slice) -> Tensor:
        tap = SketchingTap(projections)
        y = apply_experts(x[part], index[part], gates[part], experts, tap=tap)
        ((y - target[part]) ** 2).sum().backward()  # type: ignore[no-untyped-call]
        return tap.sketchers[0].take()

    merged = backward(slice(0, 25)) + backward(slice(25, tokens))
    wanted = gradients(experts[0])  # both parts summed
    joint = backward(slice(0, tokens))
    torch.testing.assert_close(merged, joint, rtol=1e-4, atol=1e-5 * float(joint.abs().max()))
    assert_exact(projections, merged, wanted)
    # Rounding of the division, as rebuilding may amplify it: most often 1e-7, once in thousands 1e-4.
    for mean, total in zip(projections.rebuild(merged / tokens), projections.rebuild(merged), strict=True):
        torch.testing.assert_close(mean * tokens, total, rtol=1e-2, atol=1e-2 * float(total.abs().max()))
