"""What is counted, against what it must come to; and the table of results."""

import pytest
import torch
from shoal.benchmarks.costs import counting, state_bytes
from shoal.benchmarks.results import Result, markdown
from shoal.node.composer import Composer
from shoal.node.manifest import Manifest
from shoal.node.model.presets import preset


def test_products_are_counted_forward_and_backward() -> None:
    x, w = torch.randn(7, 5, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    with counting() as flops:
        (x @ w).relu().sum().backward()
    assert flops.total == 3 * 2 * 7 * 5 * 3


def test_the_state_of_a_composer_that_owns_all() -> None:
    manifest = Manifest(name="costs", founder="none", created_at=0, model=preset("tiny").model)
    composer = Composer(manifest, owned=range(16), next_batch=lambda: torch.randint(0, 256, (4, 256)))
    weights = sum(p.numel() for p in composer.model.parameters())
    backbone = sum(p.numel() for p in composer.backbone.values())
    before = state_bytes(composer)
    assert before >= 4 * weights + 2 * 4 * backbone
    for _ in range(5):  # an expert has moments from the first step on in which it gets a token
        composer.train_step()
    moments = state_bytes(composer) - before
    assert moments == pytest.approx(2 * 4 * weights, rel=0.01), "two moments of each weight, and a few step counters"


def test_who_owns_less_holds_less() -> None:
    manifest = Manifest(name="costs", founder="none", created_at=0, model=preset("tiny").model)
    held = [state_bytes(Composer(manifest, owned=range(n), next_batch=lambda: torch.empty(0))) for n in (0, 8, 16)]
    assert held[0] < held[1] < held[2]


def test_the_table_takes_gaps_seed_by_seed() -> None:
    runs = [("a", 2.0, 0), ("b", 2.2, 0), ("a", 1.0, 1), ("b", 1.0, 1)]
    table = markdown([Result(name, loss, 1.0, seed=seed) for name, loss, seed in runs], tokens=10).splitlines()
    assert table[2].startswith("| a | 1.5000 ± 0.5000 |")
    assert "| +5.0% ± 5.0 |" in table[3]


def test_the_table_of_one_seed_has_no_spread() -> None:
    table = markdown([Result("a", 2.0, 3.0, sketch_bytes=25)], tokens=10).splitlines()
    assert table[2] == "| a | 2.0000 | 2.8854 | +0.0% | 0.00 | 0.0 | 2.5 | 0.0 | 0.0 | 3 |"
