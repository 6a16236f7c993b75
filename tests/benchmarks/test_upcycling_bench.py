"""`./dev bench upcycling` starts every recipe where the dense model ended, and says what each cost."""

from __future__ import annotations

import pytest
from shoal.benchmarks.upcycling import RECIPES, Study, markdown
from shoal.node.learning.data import load_corpus


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return Study(tmp_path_factory.mktemp("study"), load_corpus("stdlib"), dense_steps=12, steps=4, windows=4)


def test_recipes_go_on_from_the_dense_model(study: Study) -> None:
    outcomes = [study.run(recipe) for recipe in ("dense@minimum", "dense@flops", "E4G1T2", "E8G4T8", "E8G1T2@reinit")]
    dense, longer, coarse, fine, anew = outcomes
    assert dense.loss < dense.start
    assert (dense.steps, coarse.steps) == (4, 4)
    assert coarse.start == pytest.approx(dense.start, rel=1e-4)
    assert fine.start == pytest.approx(dense.start, rel=1e-4)
    assert abs(anew.start / dense.start - 1) > 1e-4
    assert coarse.flops_per_token > 1.3 * dense.flops_per_token  # two experts of the whole width
    assert longer.steps == round(4 * coarse.flops_per_token / dense.flops_per_token)
    assert fine.flops_per_token == pytest.approx(coarse.flops_per_token, rel=0.05)
    assert coarse.weights > 2 * dense.weights
    table = markdown(outcomes)
    assert table.count("\n| `") == 5
    assert "E8G1T2@reinit" in RECIPES


@pytest.mark.parametrize("recipe", ["E8", "sparse", "E8G1T2@everything"])
def test_other_recipes_are_refused(study: Study, recipe: str) -> None:
    with pytest.raises(ValueError, match="no recipe"):
        study.run(recipe)
