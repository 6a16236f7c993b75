"""Several sketches at once give what each gives by itself."""

from __future__ import annotations

import pytest
import torch
from shoal.kernels.experts import run_expert
from shoal.kernels.rows import RowCodec
from shoal.kernels.sketch import FOLLOWS_FIDELITY, Curvature, RowBuffer, RowSketch, kappa_for
from shoal.kernels.sketch_gradient import Taught, expert_gradient, sum_gradients

HIDDEN, WIDTH = 12, 7


def sketch_of(num: int, codec: RowCodec = "int8", keep: int | None = None) -> RowSketch:
    buffer = RowBuffer(HIDDEN, codec)
    buffer.add(torch.randn(num, HIDDEN), torch.randn(num, HIDDEN) * 0.3)
    return buffer.take(keep)


@pytest.mark.parametrize("curvature", ["isotropic", "diagonal", "full"])
@pytest.mark.parametrize("codecs", [("int8",), ("float16",), ("int4",), ("int8", "float16", "int4")])
def test_the_sum_over_sketches_is_the_sum_of_their_gradients(
    codecs: tuple[RowCodec, ...], curvature: Curvature
) -> None:
    """Whatever each counts as, however each was sampled, with second moments and stand-ins of their own."""
    expert = torch.randn(2 * WIDTH, HIDDEN).double(), torch.randn(HIDDEN, WIDTH).double()
    first, second = (
        (torch.randn(2 * width, HIDDEN).double(), torch.randn(HIDDEN, width).double()) for width in (3, WIDTH)
    )
    taught = [
        Taught(sketch_of(num, codecs[i % len(codecs)], keep), kappa, factor, standin)
        for i, (num, keep, kappa, factor, standin) in enumerate(
            [
                (9, None, 0.0, 1.0, None),
                (30, 8, 2.5, 0.3, first),
                (6, None, 1.5, 1.0, first),
                (5, None, 0.0, 1.0, first),
                (0, None, 4.0, 1.0, second),
                (1, None, 7.0, 0.5, second),
                (20, 0, 1.0, 0.0, first),
            ]
        )
    ]
    together = sum_gradients(*expert, taught, curvature=curvature)
    for part, got in enumerate(together):
        each = [
            t.factor * expert_gradient(*expert, t.sketch, kappa=t.kappa, standin=t.standin, curvature=curvature)[part]
            for t in taught
        ]
        torch.testing.assert_close(got, torch.stack(each).sum(0), rtol=1e-10, atol=1e-12)


def test_one_sketch_of_many_that_is_not_finite_fails_the_sum() -> None:
    expert = torch.rand(2 * WIDTH, HIDDEN), torch.rand(HIDDEN, WIDTH)  # positive: nothing is gated away
    buffer = RowBuffer(HIDDEN, "int8")
    buffer.add(torch.full((4, HIDDEN), 1e16), torch.full((4, HIDDEN), 1e16))
    with pytest.raises(ValueError, match="not finite"):
        sum_gradients(*expert, [Taught(sketch_of(5)), Taught(buffer.take(None))])


def test_kappa_follows_each_sketchs_own_fidelity() -> None:
    """Of the stand-in that it was taken at, on its own rows: one is rough there and the other exact."""
    expert = torch.randn(2 * WIDTH, HIDDEN).double(), torch.randn(HIDDEN, WIDTH).double()
    rough = expert[0] + 0.1 * torch.randn(2 * WIDTH, HIDDEN), expert[1] + 0.1 * torch.randn(HIDDEN, WIDTH)
    sketches = [sketch_of(40), sketch_of(40)]
    standins = [rough, expert]
    kappas = []
    for sketch, standin in zip(sketches, standins, strict=True):
        x_ND = sketch.x.dense().double()
        y_ND = run_expert(x_ND, *expert)
        kappas.append(kappa_for(1.0 - float((y_ND - run_expert(x_ND, *standin)).norm() / y_ND.norm())))
    assert kappas[0] > 0.0
    assert kappas[1] == 0.0
    both = list(zip(sketches, standins, kappas, strict=True))
    found = sum_gradients(*expert, [Taught(sketch, FOLLOWS_FIDELITY, 1.0, standin) for sketch, standin, _ in both])
    wanted = sum_gradients(*expert, [Taught(sketch, kappa, 1.0, standin) for sketch, standin, kappa in both])
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
