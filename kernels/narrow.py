"""`narrow` stand-ins: an expert of the same form, a fraction as wide, fitted to the outputs on the tokens routed to it.

Start: the expert's own neurons that matter most. Neuron j adds act(gate_j x) (up_j x) down_j to the output; without
data its energy is taken as ||gate_j||² ||up_j||² ||down_j||² (inputs of no preferred direction), with data it is the
gate-weighted mean of its squared contribution. Every peer makes the first stand-in of a seeded expert by itself, so
the choice must not depend on how a machine sums floats: norms are computed in integers (`_square_norms`).

Fit: minimise Σ w² ||E(x) - S(x)||² over replayed rows, w the gate, by an AdamW of its own. (Trained inside the model,
with its optimizer and its gradient clip, stand-ins were useless.)

Delta: fitted - published of each matrix in rank-R int8 factors that expand to the same bits everywhere (lowrank.py).
`published` is the sum of what was sent, so whatever rank and rounding cut off is still in the next difference: that
is the error feedback, and it needs no buffer.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import ClassVar, Self

import torch
from torch import Tensor

from .adamw import AdamW
from .experts import DenseExpert, OwnedExpert, run_expert
from .interface import Publisher, StandIn, check_tensor, float_weights, output_fidelity, prefixed, take
from .lowrank import MAX_RANK, Factors, factor, factors_nbytes
from .replay import ReplayBuffer

_RANK_BYTES = 2  # a delta's payload starts with its rank, little-endian
_FIT_ROWS = 512  # rows of one optimizer step
_MATRICES = ("gate_up", "down")


class NarrowStandIn(StandIn):
    """A narrow SwiGLU. State: gate_up float32 (2F, D), the F gate rows first, and down float32 (D, F)."""

    kind: ClassVar[str] = "narrow"

    @classmethod
    def of(
        cls, gate_up: Tensor, down: Tensor, width: int, rows: tuple[Tensor, Tensor] | None = None, act: str = "silu"
    ) -> Self:
        """The `width` neurons of an expert with the highest output energy, in their old order.

        Args:
            gate_up: (2F, D).
            down: (D, F).
            width: neurons to keep.
            rows: x (N, D) and gate (N,) to measure energy on; without them it is a pure function of the weights.
            act: the expert's activation.

        Raises:
            ValueError: width is not within 1 and F, or weights are not finite.
        """
        gate_up, down = float_weights(DenseExpert(gate_up, down))
        full = down.shape[1]
        if not 1 <= width <= full:
            raise ValueError(f"a stand-in of width {width} for an expert of width {full}")
        check_tensor("gate_up", gate_up, torch.float32, (2 * full, down.shape[0]))
        check_tensor("down", down, torch.float32, tuple(down.shape))
        gate, up = gate_up.chunk(2)
        if rows is None:
            energy = _square_norms(gate) * _square_norms(up) * _square_norms(down.t())
        else:
            x_ND, weight_N = rows
            # With `down` the identity, an expert's output is its neurons' activations.
            a_NF = run_expert(x_ND, gate_up, torch.eye(full), act) * weight_N.unsqueeze(1)
            energy = a_NF.double().square().mean(0) * down.double().square().sum(0)
        kept = energy.argsort(descending=True, stable=True)[:width].sort().values
        return cls({"gate_up": torch.cat((gate[kept], up[kept])), "down": down[:, kept].contiguous()})

    @property
    def hidden(self) -> int:
        return self._tensors["down"].shape[0]

    @property
    def width(self) -> int:
        return self._tensors["down"].shape[1]

    def dense(self) -> tuple[Tensor, Tensor]:
        return self._tensors["gate_up"], self._tensors["down"]

    def payload_to(self, gate_up: Tensor, down: Tensor, rank: int) -> bytes:
        """Rank-`rank` factors of what is missing to other weights of the same shapes; ValueError if not finite."""
        missing = [new.cpu() - old.cpu() for new, old in zip((gate_up, down), self.dense(), strict=True)]
        rank = min(rank, *(min(matrix.shape) for matrix in missing))
        parts = [factor(matrix, rank).to_bytes() for matrix in missing]
        return rank.to_bytes(_RANK_BYTES, "little") + b"".join(parts)

    @classmethod
    def _check(cls, tensors: Mapping[str, Tensor]) -> None:
        if set(tensors) != set(_MATRICES):
            raise ValueError(f"a narrow stand-in holds gate_up and down, not {sorted(tensors)}")
        if tensors["down"].dim() != 2 or not tensors["down"].numel():
            raise ValueError(f"down is {tuple(tensors['down'].shape)}, not (D, F)")
        hidden, width = tensors["down"].shape
        check_tensor("down", tensors["down"], torch.float32, (hidden, width))
        check_tensor("gate_up", tensors["gate_up"], torch.float32, (2 * width, hidden))

    def _advanced(self, payload: bytes) -> dict[str, Tensor]:
        rank = int.from_bytes(payload[:_RANK_BYTES], "little")
        shapes = {name: (self._tensors[name].shape[0], self._tensors[name].shape[1]) for name in _MATRICES}
        if not 1 <= rank <= min(MAX_RANK, *(min(shape) for shape in shapes.values())):
            raise ValueError(f"a delta of rank {rank} does not fit this stand-in")
        if len(payload) != _RANK_BYTES + sum(factors_nbytes(shape, rank) for shape in shapes.values()):
            raise ValueError(f"a delta payload of {len(payload)} bytes is not of rank {rank} for this stand-in")
        advanced = {}
        start = _RANK_BYTES
        for name, shape in shapes.items():
            end = start + factors_nbytes(shape, rank)
            advanced[name] = self._tensors[name].cpu() + Factors.from_bytes(payload[start:end], shape, rank).expand()
            start = end
        return advanced


class NarrowPublisher(Publisher):
    """Fits and publishes a narrow stand-in.

    Args:
        published: what composers hold: the fit goes on from there.
        replay: of rows to fit to.
        rank: of deltas; at most the rank that the matrices can have.
        refit_steps: optimizer steps of one `refit`.
        learning_rate: of that optimizer.
        generator: draws the rows of each optimizer step; its state is part of `state_dict`.
        act: the expert's activation.
    """

    def __init__(
        self,
        published: NarrowStandIn,
        replay: ReplayBuffer,
        *,
        rank: int,
        refit_steps: int,
        learning_rate: float,
        generator: torch.Generator,
        act: str = "silu",
    ) -> None:
        if not 1 <= rank <= MAX_RANK:
            raise ValueError(f"rank {rank} is not within 1 and {MAX_RANK}")
        self.published: NarrowStandIn = published
        self._fitted = [matrix.cpu().clone().requires_grad_() for matrix in self.published.dense()]
        # Weight decay would pull towards a smaller expert than the one to be imitated.
        self._optimizer = AdamW(self._fitted, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
        self.replay = replay
        self._rank, self._refit_steps, self._generator, self._act = rank, refit_steps, generator, act

    @property
    def fitted(self) -> NarrowStandIn:
        """The fit as it is now, of which `published` may lack a part."""
        return NarrowStandIn({n: m.detach().clone() for n, m in zip(_MATRICES, self._fitted, strict=True)})

    def refit(self, expert: OwnedExpert) -> None:
        x_ND, gate_N = self.replay.fitting_rows()
        gate_up, down = float_weights(expert)
        wanted_ND = run_expert(x_ND, gate_up, down, self._act) * gate_N.unsqueeze(1)
        scale = float(wanted_ND.square().mean()) if len(x_ND) else 0.0
        if not 0.0 < scale < float("inf"):  # nothing to fit to, or an expert that has diverged
            return
        gate_up_fit, down_fit = self._fitted
        for _ in range(self._refit_steps):
            rows = torch.randperm(len(x_ND), generator=self._generator)[:_FIT_ROWS]
            with torch.enable_grad():
                got = run_expert(x_ND[rows], gate_up_fit, down_fit, self._act) * gate_N[rows].unsqueeze(1)
                loss = (got - wanted_ND[rows]).square().mean() / scale
            for matrix, grad in zip(self._fitted, torch.autograd.grad(loss, self._fitted), strict=True):
                matrix.grad = grad
            self._optimizer.step()
        self._optimizer.zero_grad()

    def delta(self, expert: OwnedExpert) -> bytes:
        gate_up, down = (matrix.detach() for matrix in self._fitted)
        return self.published.delta(self.published.payload_to(gate_up, down, self._rank))

    def fidelity(self, expert: OwnedExpert) -> float:
        return output_fidelity(expert, self.published, *self.replay.held_out_rows(), self._act)

    def successor(self, replay: ReplayBuffer) -> Self:
        successor = type(self)(
            copy(self.published),
            replay,
            rank=self._rank,
            refit_steps=self._refit_steps,
            learning_rate=self._optimizer.defaults["lr"],
            generator=torch.Generator().set_state(self._generator.get_state()),
            act=self._act,
        )
        for mine, theirs in zip(self._fitted, successor._fitted, strict=True):
            theirs.data.copy_(mine.data)
            if mine in self._optimizer.state:
                moments = {key: value.clone() for key, value in self._optimizer.state[mine].items()}
                successor._optimizer.state[theirs] = moments
        return successor

    def state_dict(self, *, replay: bool = True) -> dict[str, Tensor]:
        state = prefixed("published", {name: t.cpu().clone() for name, t in self.published.tensors.items()})
        state["generator"] = self._generator.get_state()
        for name, matrix in zip(_MATRICES, self._fitted, strict=True):
            state[f"fitted.{name}"] = matrix.detach().clone()
            moments = self._optimizer.state.get(matrix, {})
            state |= prefixed(f"adam.{name}", {key: value.clone() for key, value in moments.items()})
        if replay:
            state |= prefixed("replay", self.replay.state_dict())
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        published = NarrowStandIn({name: t.cpu().clone() for name, t in take(state, "published").items()})
        if (published.hidden, published.width) != (self.published.hidden, self.published.width):
            raise ValueError(f"the state is of a {published.hidden} x {published.width} stand-in")
        fitted = NarrowStandIn(take(state, "fitted"))
        moments = {name: _checked_moments(take(state, f"adam.{name}"), fitted.tensors[name]) for name in _MATRICES}
        replay = take(state, "replay")
        known = 1 + 2 * len(_MATRICES) + sum(map(len, moments.values())) + len(replay)
        if "generator" not in state or known != len(state):
            raise ValueError("the state lacks a generator, or holds more than a narrow publisher has")
        present = self._generator.get_state()
        check_tensor("generator", state["generator"], torch.uint8, tuple(present.shape))
        try:
            self._generator.set_state(state["generator"].cpu())
        except RuntimeError as error:
            raise ValueError(f"not the state of a random generator: {error}") from error
        if replay:
            try:
                self.replay.load_state_dict(replay)
            except ValueError:
                self._generator.set_state(present)
                raise
        self.published = published
        for name, matrix in zip(_MATRICES, self._fitted, strict=True):
            matrix.data.copy_(fitted.tensors[name])
            self._optimizer.state.pop(matrix, None)
            if moments[name]:
                self._optimizer.state[matrix] = {key: value.cpu().clone() for key, value in moments[name].items()}


def _checked_moments(moments: dict[str, Tensor], matrix: Tensor) -> dict[str, Tensor]:
    """AdamW's state of one matrix, or none before its first step."""
    if not moments:
        return moments
    if set(moments) != {"step", "exp_avg", "exp_avg_sq"}:
        raise ValueError(f"AdamW keeps step, exp_avg and exp_avg_sq, not {sorted(moments)}")
    for name, moment in moments.items():
        shape = () if name == "step" else tuple(matrix.shape)
        if moment.dtype != torch.float32 or tuple(moment.shape) != shape or not bool(moment.isfinite().all()):
            raise ValueError(f"AdamW's {name} is not finite float32 {shape}")
    if float(moments["step"]) < 1 or bool((moments["exp_avg_sq"] < 0).any()):
        raise ValueError("AdamW's step or second moment is negative")
    return moments


def _square_norms(matrix_ND: Tensor) -> Tensor:
    """Squared norm of every row up to one common factor, as float64 that is the same on every machine.

    Rows become integers of at most 15 bits by a power of two, which rounds elementwise; their squares sum without
    rounding in int64 for any D below 2³³. A near-tie of two neurons so falls the same way everywhere.
    """
    largest = float(matrix_ND.abs().max())
    if largest == 0.0:
        return torch.zeros(len(matrix_ND), dtype=torch.float64)
    _, exponent = torch.frexp(torch.tensor(largest, dtype=torch.float64))
    integers = torch.ldexp(matrix_ND.double(), 15 - exponent).round().to(torch.int64)
    return integers.square().sum(1).double()
