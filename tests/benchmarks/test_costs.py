"""What is counted, against what it must come to; and the table of results."""

import random
import re

import pytest
import torch
from shoal.benchmarks.costs import counting, expert_bytes, held_bytes, peak_bytes, state_bytes
from shoal.benchmarks.results import Result, markdown
from shoal.kernels.gradient_sketch import GradientSketcher, Projections
from shoal.node.learning.composer import Composer
from shoal.node.model.presets import preset
from shoal.node.run.manifest import Manifest


def test_products_are_counted_forward_and_backward() -> None:
    x, w = torch.randn(7, 5, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    with counting() as flops:
        (x @ w).relu().sum().backward()
    assert flops.total == 3 * 2 * 7 * 5 * 3


def test_attention_is_counted_forward_and_backward() -> None:
    batch, heads, tokens, size = (random.randrange(2, 20) for _ in range(4))
    q, k, v = torch.randn(3, batch, heads, tokens, size, requires_grad=True).unbind()
    product = 2 * batch * heads * tokens * tokens * size
    with counting() as flops:
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert flops.total == 2 * product, "of queries with keys, and of what comes out with values"
    with counting() as flops:
        attended.sum().backward()
    assert flops.total == 5 * product, "the scores anew, and gradients to these, to queries, keys and values"


def test_what_is_added_up_in_place_is_counted() -> None:
    rows, hidden, width, rank = random.randrange(1, 50), random.randrange(6, 20), random.randrange(4, 20), 3
    sketcher = GradientSketcher(Projections(hidden, width, rank, seed=0))
    with counting() as flops:
        sketcher.add(*(torch.randn(rows, size) for size in (hidden, hidden, width, 2 * width)))
    # Of each matrix leftᵀ right: right Ω and leftᵀ with it, of k columns; Ψ leftᵀ and right with it, of 2k rows.
    sides = ((2 * width, hidden), (hidden, width))
    assert flops.total == sum(2 * rows * 3 * rank * (long + short) for long, short in sides)


def test_every_storage_is_held_once_and_code_holds_nothing() -> None:
    n, m, far = (random.randrange(10, 1000) for _ in range(3))
    x, y, elsewhere = torch.randn(n), torch.randn(m), torch.randn(far)

    class Holder:
        def __init__(self) -> None:
            self.all = {"x": [x, x[3:]], "model": torch.nn.ParameterList([y])}
            self.source = lambda: elsewhere

    assert held_bytes(Holder()) == 4 * (n + m)
    assert held_bytes(Holder(), x, without=[x]) == 4 * (n + m), "its view holds it too"
    holder = Holder()
    assert held_bytes(holder, without=[holder.all["x"]]) == 4 * m


def test_the_peak_is_what_is_there_at_one_time() -> None:
    n = random.randrange(1000, 100_000)
    x = torch.randn(n)

    def one_after_the_other() -> None:
        for _ in range(5):
            x.neg()

    def together() -> None:
        assert len([x.neg() for _ in range(5)]) == 5

    assert 4 * n <= peak_bytes(one_after_the_other) < 4 * n + 500
    assert 5 * 4 * n <= peak_bytes(together) < 5 * 4 * n + 500


def composer_of(owned: int) -> Composer:
    manifest = Manifest(name="costs", founder="none", created_at=0, model=preset("tiny").model)
    return Composer(manifest, owned=range(owned), next_batch=lambda: torch.randint(0, 256, (4, 256)))


def test_the_state_of_a_composer_that_owns_all() -> None:
    composer = composer_of(16)
    backbone = sum(p.numel() for p in composer.backbone.values())
    experts = sum(p.numel() for p in composer.model.parameters()) - backbone
    before = state_bytes(composer, publishes=False)
    # Of the backbone: weights, as last merged, and momentum; all that is not counted by hand are a few small buffers.
    assert before == pytest.approx(4 * (experts + 3 * backbone), rel=0.01)
    for _ in range(5):  # an expert has moments from the first step on in which it gets a token
        composer.train_step()
    moments = state_bytes(composer, publishes=False) - before
    assert moments == pytest.approx(2 * 4 * (experts + backbone), rel=0.01), "two of each weight, and step counters"
    assert expert_bytes(composer, publishes=False) == pytest.approx(3 * 4 * experts, rel=0.01)


def test_who_publishes_holds_what_was_published() -> None:
    composer = composer_of(4)
    before, experts = state_bytes(composer), expert_bytes(composer)
    assert before > state_bytes(composer, publishes=False)
    for _ in range(2):
        composer.train_step()
        composer.publish()
    own = sum(tensor.nbytes for slot in range(4) for expert in composer.experts_of(slot) for tensor in expert.trained)
    grown = expert_bytes(composer) - experts
    assert grown > 2 * own * 0.99, "moments of its own experts"
    assert grown < 2 * own + own, "and past versions, in a few bits a weight"
    composer.publish()
    assert expert_bytes(composer) - experts > grown


def test_who_owns_less_holds_less() -> None:
    composers = [composer_of(n) for n in (0, 8, 16)]
    held = [state_bytes(composer, publishes=False) for composer in composers]
    assert held[0] < held[1] < held[2]
    assert [expert_bytes(c) < state_bytes(c) for c in composers] == [True] * 3


def cells(table: str, method: str) -> dict[str, str]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    [line] = [line for line in lines if line[0] == method]
    return dict(zip(lines[0], line, strict=True))


def test_the_table_takes_gaps_seed_by_seed() -> None:
    runs = [("a", 2.0, 0), ("b:x.y=1", 2.2, 0), ("a", 1.0, 1), ("b:x.y=1", 1.0, 1)]
    table = markdown([Result(name, loss, 1.0, seed=seed) for name, loss, seed in runs])
    assert cells(table, "a")["nats/byte"] == "1.5000 ± 0.5000"
    assert cells(table, "b:x.y=1")["vs a"] == "+5.0% ± 5.0"


def test_the_table_says_bytes_by_kind_and_leaves_out_what_was_not_measured() -> None:
    up, down = {"sketches": 25, "snapshot": 10, "news": 5}, {"sketches": 30, "deltas": 1}
    table = markdown([Result("a", 2.0, 3.0, tokens=10, up=up, down=down, blocked_share=0.125), Result("b", 2.0, 3.0)])
    node, process = cells(table, "a"), cells(table, "b")
    told = {head: cell for head, cell in node.items() if re.search("B/token|blocked|MB|vs", head) and cell}
    assert told == {
        "vs a": "+0.0%",
        "sketches, B/token": "2.5 / 3.0",
        "deltas, B/token": "0.0 / 0.1",
        "other, B/token": "1.5 / 0.0",
        "blocked": "12.5%",
    }
    assert {head for head, cell in process.items() if cell} == {"method", "nats/byte", "bits/byte", "vs a", "seconds"}
