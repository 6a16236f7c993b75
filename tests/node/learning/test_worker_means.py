"""A worker that hears means over all composers' tokens, and not of each composer by itself."""

from __future__ import annotations

import pytest
import torch
from shoal.node.learning.worker import Worker
from tiny import HIDDEN, LAYERS, WIDTH, composer_of, manifest_of
from torch import Tensor

SLOT = 1
Means = dict[int, tuple[Tensor, Tensor]]


def worker_of(composers: dict[str, int]) -> Worker:
    """Owns `SLOT`, in a run without weight decay."""
    manifest = manifest_of(train={"weight_decay": 0.0})
    worker = Worker(manifest, composers=lambda: composers, clock=lambda: 0.0)
    origin = composer_of(manifest)
    worker.adopt(SLOT, origin.snapshot(SLOT), origin.standins(SLOT))
    return worker


def means() -> Means:
    return {position: (torch.randn(2 * WIDTH, HIDDEN), torch.randn(HIDDEN, WIDTH)) for position in range(LAYERS)}


def test_one_mean_is_enough_for_a_step_however_many_composers_there_are() -> None:
    worker = worker_of({"a": 40, "b": 56, "c": 48})
    assert not worker.has_work()
    worker.hear_mean("b", SLOT, means(), tokens=96.0, step=64)
    assert worker.ready() == [SLOT]
    assert worker.step == 48  # the composers' median
    before = [expert.down.detach().clone() for expert in worker.experts_of(SLOT)]
    report = worker.train_step()
    assert (report.slots, report.tokens, report.rows, report.skipped) == ((SLOT,), 96.0, 0, False)
    assert all(not torch.equal(b, e.down) for b, e in zip(before, worker.experts_of(SLOT), strict=True))
    assert not worker.has_work()


def test_means_weigh_as_many_tokens_as_they_are_over() -> None:
    worker = worker_of({"a": 4})
    first, second = means(), means()
    worker.hear_mean("a", SLOT, first, tokens=300.0, step=4)
    worker.hear_mean("a", SLOT, second, tokens=100.0, step=8)
    worker._set_gradients(0, [SLOT])
    for position, expert in enumerate(worker.experts_of(SLOT)):
        for i, weights in enumerate((expert.gate_up, expert.down)):
            assert weights.grad is not None
            torch.testing.assert_close(weights.grad, 0.75 * first[position][i] + 0.25 * second[position][i])


def test_an_expert_that_no_token_came_to_is_left_alone() -> None:
    worker = worker_of({"a": 4})
    silent = means()
    silent[0] = torch.zeros(2 * WIDTH, HIDDEN), torch.zeros(HIDDEN, WIDTH)
    worker.hear_mean("a", SLOT, means(), tokens=10.0, step=2)
    worker.train_step()  # there is momentum from now on
    before = [expert.down.detach().clone() for expert in worker.experts_of(SLOT)]
    worker.hear_mean("a", SLOT, silent, tokens=10.0, step=4)
    worker.train_step()
    moved = [not torch.equal(b, e.down) for b, e in zip(before, worker.experts_of(SLOT), strict=True)]
    assert moved == [False, True]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_what_is_no_gradient_is_refused(bad: float) -> None:
    worker = worker_of({"a": 4})
    broken = means()
    broken[0][0][3, 4] = bad
    with pytest.raises(ValueError, match="norm"):
        worker.hear_mean("a", SLOT, broken, tokens=10.0, step=2)
    with pytest.raises(ValueError, match="not owned"):
        worker.hear_mean("a", SLOT + 1, means(), tokens=10.0, step=2)
    assert not worker.has_work()
