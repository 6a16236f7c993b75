"""The latest inputs routed to one expert, with their gate weights: what its stand-in is fitted to and judged by.

A ring of rows. Row number n of the stream lies in slot n mod capacity, and the capacity is a multiple of
`HOLD_OUT_EVERY`: so every slot is for life either for fitting or held out, no row is ever in both, and the split
needs no randomness. Rows are kept in bfloat16, half of the memory: a fit does not miss the digits that its inputs
lose.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy

import torch
from torch import Tensor

HOLD_OUT_EVERY = 8  # one row in so many is never fitted to


class ReplayBuffer:
    """A ring of (x, gate) rows.

    Args:
        capacity: rows kept, rounded up to a multiple of `HOLD_OUT_EVERY`.
        hidden: D, values in a row.
    """

    def __init__(self, capacity: int, hidden: int) -> None:
        if capacity < 1:
            raise ValueError(f"a replay buffer must hold at least one row, not {capacity}")
        self.capacity = -(-capacity // HOLD_OUT_EVERY) * HOLD_OUT_EVERY
        self._x_CD = torch.zeros(self.capacity, hidden, dtype=torch.bfloat16)
        self._gate_C = torch.zeros(self.capacity)
        self._held_out_C = torch.arange(self.capacity) % HOLD_OUT_EVERY == HOLD_OUT_EVERY - 1
        self._seen = 0  # rows ever added
        self.offered = 0  # rows that there were since the last `taken`, whether added or not

    def __len__(self) -> int:
        return min(self._seen, self.capacity)

    def add(self, x_ND: Tensor, gate_N: Tensor) -> None:
        """Copies rows in; the oldest fall out. Of more rows than fit, evenly spaced ones are taken.

        Rows that are not finite are left out: one bad batch must not spoil a stand-in.
        """
        self.offered += len(x_ND)
        if len(x_ND) > self.capacity:
            pick = torch.arange(self.capacity, device=x_ND.device) * len(x_ND) // self.capacity
            x_ND, gate_N = x_ND[pick], gate_N[pick]
        x_ND, gate_N = x_ND.detach().to("cpu", torch.bfloat16), gate_N.detach().to("cpu", torch.float32)
        finite = x_ND.isfinite().all(1) & gate_N.isfinite()
        if not bool(finite.all()):
            x_ND, gate_N = x_ND[finite], gate_N[finite]
        slots = (self._seen + torch.arange(len(x_ND))) % self.capacity
        self._x_CD[slots] = x_ND
        self._gate_C[slots] = gate_N
        self._seen += len(x_ND)

    def taken(self) -> ReplayBuffer:
        """A copy as it is now, for another thread. What is offered is counted anew from here on."""
        taken = copy(self)
        taken._x_CD, taken._gate_C = self._x_CD.clone(), self._gate_C.clone()
        self.offered = 0
        return taken

    def fitting_rows(self) -> tuple[Tensor, Tensor]:
        """Rows to fit to: x (N, D) and gate (N,), float32."""
        return self._rows(~self._held_out_C)

    def held_out_rows(self) -> tuple[Tensor, Tensor]:
        """Rows to judge by: x (N, D) and gate (N,), float32."""
        return self._rows(self._held_out_C)

    def all_rows(self) -> tuple[Tensor, Tensor]:
        """Every row held, for whoever fits nothing: x (N, D) and gate (N,), float32."""
        return self._rows(torch.ones_like(self._held_out_C))

    def state_dict(self) -> dict[str, Tensor]:
        return {"x": self._x_CD.clone(), "gate": self._gate_C.clone(), "seen": torch.tensor(self._seen)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes over the rows of a buffer of the same shape.

        Raises:
            ValueError: names, shapes, dtypes or values are not what `state_dict` gives; the buffer is unchanged.
        """
        if set(state) != {"x", "gate", "seen"}:
            raise ValueError(f"a replay state holds x, gate and seen, not {sorted(state)}")
        x, gate, seen = state["x"], state["gate"], state["seen"]
        if x.shape != self._x_CD.shape or x.dtype != torch.bfloat16:
            raise ValueError(f"replay rows are {tuple(x.shape)} {x.dtype}, not {tuple(self._x_CD.shape)} bfloat16")
        if gate.shape != self._gate_C.shape or gate.dtype != torch.float32:
            raise ValueError(f"replay gates are {tuple(gate.shape)} {gate.dtype}, not ({self.capacity},) float32")
        if seen.shape != () or seen.dtype != torch.int64 or int(seen) < 0:
            raise ValueError("replay count is not one non-negative int64")
        if not bool(x.isfinite().all() & gate.isfinite().all()):
            raise ValueError("replay rows are not finite")
        self._x_CD, self._gate_C, self._seen = x.cpu().clone(), gate.cpu().clone(), int(seen)

    def _rows(self, wanted_C: Tensor) -> tuple[Tensor, Tensor]:
        wanted_C = wanted_C & (torch.arange(self.capacity) < self._seen)
        return self._x_CD[wanted_C].float(), self._gate_C[wanted_C]
