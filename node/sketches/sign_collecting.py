"""Collecting sign sketches: a composer sums up what its tokens teach each expert of others, two bytes a weight.

Lives on the training thread. A slot whose sketch cannot leave goes on collecting, and its tokens go on counting.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ...kernels.sign_sketch import SignSum
from ..run.manifest import ExpertShape
from .sketching import Collected, Tally

SignSums = dict[tuple[int, int], SignSum]  # by slot and layer


class SignCollector:
    """Sums since each slot's last `take`.

    Args:
        seed: of rounding; every composer has its own.
    """

    def __init__(self, shape: ExpertShape, *, seed: int) -> None:
        self._shape, self._seed = shape, seed
        self._generators: dict[torch.device, torch.Generator] = {}
        self._sums: SignSums = {}
        self._tally = Tally()
        self._of_step = self._refused = 0

    def begin_step(self, tokens: int, batches: int = 1) -> None:
        """A forward over `tokens` tokens, of whose losses the mean is taken, comes next."""
        self._of_step = tokens
        self._tally.count(tokens, batches)

    def also(self, tokens: int) -> None:
        """Another process's batch of `tokens` tokens, with a mean of its own; rows of it come next."""
        self.begin_step(tokens)

    def withdraw(self, tokens: int, batches: int = 1) -> None:
        """The step that has begun has taught nothing: its tokens do not count. Rows that are not finite never do."""
        self._tally.count(-tokens, -batches)

    def add(self, layer: int, slot: int, x_ND: Tensor, dy_ND: Tensor, a_NF: Tensor, dh_NH: Tensor) -> None:
        """Rows of one expert; the shard's `SketchTap`. dy and dh are of the mean loss."""
        generator = self._generator(x_ND.device)
        self._sum(slot, layer, x_ND.device).add(x_ND, dy_ND * self._of_step, a_NF, dh_NH * self._of_step, generator)

    def drain(self) -> SignSums:
        """All sums; there are none here then. For a collector that collects for another one."""
        sums, self._sums = self._sums, {}
        return sums

    def merge(self, drained: SignSums, device: torch.device) -> None:
        """Take in what another collector has drained, of steps that have begun here, into sums on `device`."""
        for (slot, layer), sum_ in drained.items():
            self._sum(slot, layer, device).merge(sum_, self._generator(device))

    def take_refused(self) -> int:
        """Rows left out of what was taken since the last call: not finite, or too large."""
        refused, self._refused = self._refused, 0
        return refused

    def take(self, slots: Iterable[int]) -> dict[int, Collected]:
        """What has come together for `slots`; their sums begin anew."""
        return {slot: self._take(slot) for slot in slots}

    def _take(self, slot: int) -> Collected:
        sketches = []
        for layer in range(self._shape.num_layers):
            sum_ = self._sums.pop((slot, layer), None) or SignSum(self._shape.hidden, self._shape.width)
            self._refused += sum_.refused
            sketches.append(sum_.sketch())
        return Collected(tuple(sketches), *self._tally.take(slot))

    def forget(self, slot: int) -> None:
        """Drop what has been collected for a slot: it is owned here now, or its sums are of another expert."""
        for layer in range(self._shape.num_layers):
            self._sums.pop((slot, layer), None)
        self._tally.take(slot)

    def _sum(self, slot: int, layer: int, device: torch.device) -> SignSum:
        sum_ = self._sums.get((slot, layer))
        if sum_ is None:
            sum_ = self._sums[slot, layer] = SignSum(self._shape.hidden, self._shape.width, device)
        return sum_

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]
