"""Collecting sketches: a composer notes what its tokens teach the experts that others own, until it is sent.

Lives on the training thread. Rows are quantised as they come and sampled to the budget when they leave. A slot whose
rows cannot leave (nobody owns it, its owner is busy) goes on collecting: its buffers are bounded and thin themselves
out without bias, and its tokens go on counting, so that late rows still give the mean over all tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from ...kernels.sign_sketch import SignSketch
from ...kernels.sketch import RowBuffer, RowSketch, add_rows, row_bytes
from ..run.manifest import ExpertShape, SketchSpec
from .row_memory import rows_of_a_message

# Values of x that wait to be encoded together, with as many of dy: few on a CPU, which still has them in its cache; 64
# MB on a GPU, where every operation costs its launch.
MAX_WAITING = {"cpu": 1 << 16, "cuda": 1 << 24}


Sketch = RowSketch | SignSketch  # what travels from a composer to an owner, of one expert
MAX_ROWS = 1 << 16  # of one expert in one sketch


def reader_of(spec: SketchSpec, shape: ExpertShape) -> Callable[[bytes], Sketch]:
    """Reads what composers of a run send; it raises ValueError for anything else."""
    if spec.kind == "signs":
        return partial(SignSketch.from_bytes, hidden=shape.hidden, width=shape.width)
    return partial(RowSketch.from_bytes, hidden=shape.hidden, max_rows=MAX_ROWS)


class Collector(Protocol):
    """What a composer tells of its steps, whatever becomes of it: rows, or sketches of gradients."""

    def begin_step(self, tokens: int, batches: int = 1) -> None:
        """A forward over `tokens` tokens, of whose losses the mean is taken, comes next; in batches of the usual size,
        one for each process that has one."""
        ...

    def also(self, tokens: int) -> None:
        """Another process's batch of `tokens` tokens, with a mean of its own, in a step that has begun; its rows come
        next."""
        ...

    def withdraw(self, tokens: int, batches: int = 1) -> None:
        """The step that has begun has taught nothing: its tokens do not count."""
        ...

    def add(self, layer: int, slot: int, x_ND: Tensor, dy_ND: Tensor, a_NF: Tensor, dh_NH: Tensor) -> None:
        """Rows of one expert; the shard's `SketchTap`."""
        ...

    def forget(self, slot: int) -> None:
        """A slot is owned here from now on, or no longer: what was collected for it is of no use."""
        ...


@dataclass(frozen=True)
class Collected:
    """One slot's sketches, by layer, and the tokens and inner steps that they stand for."""

    layers: tuple[Sketch, ...]
    tokens: int
    steps: int


class Tally:
    """Tokens and inner steps since each slot's last `take`."""

    def __init__(self) -> None:
        self._tokens = self._steps = 0  # ever
        self._taken: dict[int, tuple[int, int]] = {}  # by slot, both at its last take

    def count(self, tokens: int, steps: int) -> None:
        """More of both, for all slots; or fewer."""
        self._tokens += tokens
        self._steps += steps

    def take(self, slot: int) -> tuple[int, int]:
        """Those of a slot, which begin anew."""
        tokens, steps = self._taken.get(slot, (0, 0))
        self._taken[slot] = self._tokens, self._steps
        return self._tokens - tokens, self._steps - steps


class SketchCollector:
    """Rows since each slot's last `take`.

    Args:
        seed: of sampling; every composer has its own.
        max_rows: held of one expert: `rows_held` of a run. None: as many as one message carries.
    """

    def __init__(self, spec: SketchSpec, shape: ExpertShape, *, seed: int, max_rows: int | None = None) -> None:
        self._spec, self._shape = spec, shape
        self._max_rows = rows_of_a_message(shape.hidden, spec.codec) if max_rows is None else max_rows
        self._generator = torch.Generator().manual_seed(seed)
        self._buffers: dict[tuple[int, int], RowBuffer] = {}  # by slot and layer
        self._tally = Tally()
        self._of_step = 0
        self._waiting: list[tuple[int, int, Tensor, Tensor]] = []  # (slot, layer, x, dy), not encoded yet
        self._waiting_rows = 0

    def begin_step(self, tokens: int, batches: int = 1) -> None:
        """A forward over `tokens` tokens, of whose losses the mean is taken, comes next. Every batch counts as a step:
        owners bound the tokens of one by the batch that the run states."""
        self._encode()  # what a backward pass has left
        self._of_step = tokens
        self._tally.count(tokens, batches)

    def also(self, tokens: int) -> None:
        """Another process's batch of `tokens` tokens, with a mean of its own; rows of it come next."""
        self.begin_step(tokens)

    def withdraw(self, tokens: int, batches: int = 1) -> None:
        """The step that has begun has taught nothing: its tokens do not count. Rows that are not finite never do."""
        self._tally.count(-tokens, -batches)

    def add(self, layer: int, slot: int, x_ND: Tensor, dy_ND: Tensor, a_NF: Tensor, dh_NH: Tensor) -> None:
        """Rows of one expert; the shard's `SketchTap`. They are encoded with those of the layer's other experts."""
        if self._waiting and (
            self._waiting[-1][1] != layer or self._waiting_rows * x_ND.shape[1] > MAX_WAITING[x_ND.device.type]
        ):
            self._encode()
        self._waiting.append((slot, layer, x_ND, dy_ND))
        self._waiting_rows += len(x_ND)

    def _encode(self) -> None:
        if not self._waiting:
            return
        buffers = [self._buffer(slot, layer) for slot, layer, _, _ in self._waiting]
        counts = [len(x_ND) for _, _, x_ND, _ in self._waiting]
        x_PD, dy_PD = (torch.cat(rows) for rows in zip(*((x, dy) for _, _, x, dy in self._waiting), strict=True))
        add_rows(buffers, counts, x_PD, dy_PD * self._of_step)
        self._waiting, self._waiting_rows = [], 0

    def _buffer(self, slot: int, layer: int) -> RowBuffer:
        buffer = self._buffers.get((slot, layer))
        if buffer is None:
            buffer = self._buffers[slot, layer] = RowBuffer(
                self._shape.hidden, self._spec.codec, max_rows=self._max_rows, generator=self._generator
            )
        return buffer

    def drain(self) -> dict[tuple[int, int], RowBuffer]:
        """All buffers by slot and layer; there are none here then. For a collector that collects for another one."""
        self._encode()
        buffers, self._buffers = self._buffers, {}
        return buffers

    def merge(self, drained: Mapping[tuple[int, int], RowBuffer]) -> None:
        """Take in what another collector has drained, of steps that have begun here."""
        for (slot, layer), buffer in drained.items():
            self._buffer(slot, layer).merge(buffer)

    def take(self, slots: Mapping[int, float]) -> dict[int, Collected]:
        """What has come together for `slots`, cut to the budget; their buffers are empty then.

        Args:
            slots: by slot, the share of its rows that its owner can take.
        """
        self._encode()
        wanted = {
            slot: [rate * len(self._buffer(slot, layer)) for layer in self._layers] for slot, rate in slots.items()
        }
        total = sum(map(sum, wanted.values()))
        share = 1.0
        if self._spec.budget_bytes and total:
            rows = max(1, self._spec.budget_bytes // row_bytes(self._shape.hidden, self._spec.codec))
            share = min(1.0, rows / total)
        # Whole rows: each buffer's number is rounded up or down by chance, right on average, so that together they keep
        # to the budget. Rounding all of them up would not, where buffers are many and their rows few.
        upto = float(torch.rand((), generator=self._generator, dtype=torch.float64))
        taken = {}
        for slot, counts in wanted.items():
            keep = []
            for count in counts:
                before, upto = math.floor(upto), upto + share * count
                keep.append(math.floor(upto) - before)
            taken[slot] = self._take(slot, None if share * slots[slot] >= 1.0 else keep)
        return taken

    def _take(self, slot: int, keep: list[int] | None) -> Collected:
        layers = [
            self._buffer(slot, layer).take(None if keep is None else keep[layer], self._generator)
            for layer in self._layers
        ]
        return Collected(tuple(layers), *self._tally.take(slot))

    def forget(self, slot: int) -> None:
        """Drop what has been collected for a slot: it is owned here now, or its rows are of another expert."""
        self._encode()
        for layer in self._layers:
            self._buffers.pop((slot, layer), None)
        self._tally.take(slot)

    @property
    def _layers(self) -> range:
        return range(self._shape.num_layers)
