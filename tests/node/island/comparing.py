"""Two composers that should have learned the same."""

from __future__ import annotations

import torch
from shoal.kernels.sign_sketch import SignSketch
from shoal.node.learning.composer import Composer
from shoal.node.sketches.gradient_collecting import GradientCollector
from shoal.node.sketches.sign_collecting import SignCollector
from shoal.node.sketches.sketching import SketchCollector


def same(one: Composer, other: Composer, tolerance: float = 2e-5, strays: float = 1e-3) -> None:
    """All that both hold, but for a share of `strays`, or one value of a tensor: where a gradient is nothing but
    rounding, Adam makes a step of it, and that may go either way; it is no larger than a step."""
    assert one.owned == other.owned
    pairs = [(name, parameter, other.backbone[name]) for name, parameter in one.backbone.items()]
    for slot in one.owned:
        for layer, (mine, theirs) in enumerate(zip(one.experts_of(slot), other.experts_of(slot), strict=True)):
            pairs += [(f"{slot}.{layer}", a, b) for a, b in zip(mine.trained, theirs.trained, strict=True)]
    for name, a, b in ((name, a.detach(), b.detach()) for name, a, b in pairs):
        off = (a - b).abs() > tolerance * (1 + a.abs())
        assert int(off.sum()) <= max(1, strays * off.numel()), f"{name}: {int(off.sum())} of {off.numel()}"
        assert float((a - b).abs().max()) <= max(tolerance * (1 + float(a.abs().max())), one.train.learning_rate), name


def same_rows(one: Composer, other: Composer, batches: int = 1) -> None:
    """Rows for experts of others, of steps that `other` took in so many batches each. They are gone then."""
    assert isinstance(one.collector, SketchCollector)
    assert isinstance(other.collector, SketchCollector)
    slots = {slot: 1.0 for slot in range(one.num_slots) if slot not in one.owned}
    mine, theirs = one.collector.take(slots), other.collector.take(slots)
    for slot in slots:
        assert (theirs[slot].tokens, theirs[slot].steps) == (mine[slot].tokens, batches * mine[slot].steps)
        for a, b in zip(mine[slot].layers, theirs[slot].layers, strict=True):
            assert a.num_rows == b.num_rows
            left, right = (rows.x.dense().T @ rows.dy.dense() for rows in (a, b))
            torch.testing.assert_close(right, left, rtol=0.0, atol=0.02 * float(left.abs().max()))


def same_gradient_sketches(one: Composer, other: Composer) -> None:
    """The same of sketches of gradients."""
    assert isinstance(one.collector, GradientCollector)
    assert isinstance(other.collector, GradientCollector)
    layers = range(one.shape.num_layers)
    slots = [slot for slot in range(one.num_slots) if slot not in one.owned]
    mine, theirs = (composer.collector.take(dict.fromkeys(slots, layers)) for composer in (one, other))
    assert mine.keys() == theirs.keys()
    for slot, sketch in mine.items():
        assert theirs[slot].tokens == sketch.tokens
        torch.testing.assert_close(
            theirs[slot].flat, sketch.flat, rtol=1e-3, atol=1e-4 * float(sketch.flat.abs().max())
        )


def same_signs(one: Composer, other: Composer, batches: int = 1) -> None:
    """The same of sign sketches, but for what rounding decides."""
    assert isinstance(one.collector, SignCollector)
    assert isinstance(other.collector, SignCollector)
    slots = [slot for slot in range(one.num_slots) if slot not in one.owned]
    mine, theirs = one.collector.take(slots), other.collector.take(slots)
    for slot in slots:
        assert (theirs[slot].tokens, theirs[slot].steps) == (mine[slot].tokens, batches * mine[slot].steps)
        for a, b in zip(mine[slot].layers, theirs[slot].layers, strict=True):
            assert isinstance(a, SignSketch)
            assert isinstance(b, SignSketch)
            assert a.num_rows == b.num_rows > 0
            for left, right in zip(a.dense(), b.dense(), strict=True):
                alike = torch.nn.functional.cosine_similarity(left.flatten(), right.flatten(), dim=0)
                assert float(alike) > 0.95
