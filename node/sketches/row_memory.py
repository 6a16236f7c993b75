"""Memory that sketches take in a composer while owners take none: bounded, for all experts together.

A large model has thousands of experts. Were each to collect up to its own bound, a composer that starts before the
owners do would fill tens of GiB.
"""

from __future__ import annotations

from ...kernels.gradient_sketch import sketch_numel
from ...kernels.rows import RowCodec
from ...kernels.sign_sketch import sign_sum_nbytes
from ...kernels.sketch import row_bytes
from ...protocol.messages import MAX_SKETCH_BYTES
from ..model.init import expert_shape, experts_per_token
from ..run.manifest import Manifest

MAX_ROWS = 2048  # of one expert. 8 MiB at hidden size 2048
MAX_BYTES = MAX_SKETCH_BYTES - 4096  # of one expert: what travels in one message
MAX_TOTAL_BYTES = 2 << 30  # of all experts, but for
INTERVALS = 4  # this many times what is sent of one interval, so that a swarm with owners loses nothing by it
BESIDE = 16  # bytes of a row: weight and size, float64


def rows_held(manifest: Manifest) -> int:
    """Rows that a composer collects of one expert at most; beyond that they thin themselves out."""
    shape, codec = expert_shape(manifest.model), manifest.sketch.codec
    total = max(MAX_TOTAL_BYTES, INTERVALS * _interval_bytes(manifest))
    share = total // (shape.num_layers * shape.num_experts * (row_bytes(shape.hidden, codec) + BESIDE))
    return max(1, min(rows_of_a_message(shape.hidden, codec), share))


def rows_of_a_message(hidden: int, codec: RowCodec) -> int:
    """Rows of one expert that one message can carry, or `MAX_ROWS` if it could carry more."""
    return max(1, min(MAX_ROWS, MAX_BYTES // row_bytes(hidden, codec)))


def _interval_bytes(manifest: Manifest) -> int:
    """Of rows that one composer sends in an interval."""
    shape, sketch, train = expert_shape(manifest.model), manifest.sketch, manifest.train
    if sketch.budget_bytes:
        return sketch.budget_bytes
    pairs = train.batch_size * manifest.data.context_length * experts_per_token(manifest.model)
    return pairs * shape.num_layers * sketch.every * (row_bytes(shape.hidden, sketch.codec) + BESIDE)


def collected_bytes(manifest: Manifest) -> int:
    """Memory that what a composer collects takes at most, be it rows, or gradients in whatever form."""
    shape, sketch = expert_shape(manifest.model), manifest.sketch
    of_one = 0
    if sketch.kind == "rows":
        of_one = rows_held(manifest) * (row_bytes(shape.hidden, sketch.codec) + BESIDE)
    elif sketch.kind == "signs":
        of_one = sign_sum_nbytes(shape.hidden, shape.width)
    elif sketch.kind == "gradient":
        of_one = 4 * sketch_numel(shape.hidden, shape.width, sketch.rank)
    return shape.num_layers * shape.num_experts * of_one
