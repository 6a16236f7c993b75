"""Routed experts: y_t = Σ_k w_tk · down_e (act(gate_e x_t) ⊙ up_e x_t), e = index_tk, over experts of any width.

Shapes: T tokens, K experts per token, E experts, D hidden, F width of one expert (each may have its own), N rows of one
expert, P = T K pairs.

The (token, k) pairs are sorted by expert once; every expert that was hit does dense products on its own rows; a gather
and a sum over K bring the results back to token order. That sum has a fixed order, so equal inputs give equal bits on a
GPU too, where `index_add_` would not.

Backward, for the rows of one expert, with g = dL/dy of their tokens, h = [hg, hu] the pre-activations, w the gate
weights and a = act(hg) ⊙ hu:

    u  = g down                 dL/dw = Σ_f u ⊙ a     (g · down a = (downᵀ g) · a: the output itself is not needed)
    da = w u                    dhg = da ⊙ hu ⊙ act'(hg),  dhu = da ⊙ act(hg)
    dx = [dhg, dhu] gate_up     d gate_up = [dhg, dhu]ᵀ x,  d down = (w g)ᵀ a

Kept for backward: x (once, not per expert) and h. Autograd over the plain formula keeps about three times as much
(gathered x, act(hg), a, the output before gating). Recomputing h too would add a seventh product to a trained
expert's six, and a composer that has no memory for h checkpoints whole blocks anyway. Weights of stand-ins are never
kept: `dense()` is asked again.

Rejected: one grouped matmul (needs equal widths, and all stand-ins dequantised at once), and padding every expert to
the same number of rows (wastes work exactly when routing is uneven).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_aten = torch.ops.aten

# name -> (act(h), act'(h) * grad)
_ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (torch.nn.functional.silu, _aten.silu_backward),
    "gelu": (torch.nn.functional.gelu, _aten.gelu_backward),
    "gelu_pytorch_tanh": (
        lambda h: torch.nn.functional.gelu(h, approximate="tanh"),
        lambda grad, h: _aten.gelu_backward(grad, h, approximate="tanh"),
    ),
}


class ExpertWeights(Protocol):
    """Anything that can say its weights: an owned expert, or a stand-in that dequantises on the fly."""

    def dense(self) -> tuple[Tensor, Tensor]:
        """Weights gate_up (2F, D), the F gate rows first, and down (D, F). Must give the same values in backward."""
        ...


class OwnedExpert(ABC):
    """An expert that somebody owns, and how it is trained: what of it has gradients, and which.

    Attributes:
        names: of the tensors in `trained`, in their order.
    """

    names: ClassVar[tuple[str, ...]]

    @property
    @abstractmethod
    def trained(self) -> tuple[Tensor, ...]:
        """What an optimizer steps."""

    @abstractmethod
    def dense(self) -> tuple[Tensor, Tensor]:
        """As `ExpertWeights`."""

    def masters(self) -> tuple[Tensor, Tensor]:
        """What another peer goes on with, in the shapes of `dense`."""
        return self.dense()

    @abstractmethod
    def with_trained(self, trained: Sequence[Tensor]) -> Self:
        """The same expert with other tensors in place of `trained`; not copied."""

    def to(self, device: torch.device) -> Self:
        """The same expert with all but `trained` on another device."""
        return self

    def on_cpu(self) -> Self:
        """A copy on the CPU of what it is now, which training it does not change."""
        cpu = torch.device("cpu")
        return self.to(cpu).with_trained([tensor.detach().to(cpu, copy=True) for tensor in self.trained])

    @property
    def nbytes(self) -> int:
        """Memory of all its tensors."""
        return sum(tensor.nbytes for tensor in self.trained)

    @abstractmethod
    def gradients(self, x_ND: Tensor, dh_NH: Tensor, dy_ND: Tensor, a_NF: Tensor) -> tuple[Tensor, ...]:
        """Of `trained`, from rows as `RowTap.backward_rows` has them."""

    @abstractmethod
    def project(self, d_gate_up: Tensor, d_down: Tensor) -> tuple[Tensor, ...]:
        """Of `trained`, from the gradients of what `dense` returns. Linear; may return its arguments."""


@dataclass
class DenseExpert(OwnedExpert):
    """Full weights of one expert: gate_up (2F, D), gate rows first, and down (D, F); trained if they require grad."""

    names = ("gate_up", "down")

    gate_up: Tensor
    down: Tensor

    @property
    def trained(self) -> tuple[Tensor, ...]:
        return self.gate_up, self.down

    def dense(self) -> tuple[Tensor, Tensor]:
        return self.effective(self.gate_up, self.down)

    def masters(self) -> tuple[Tensor, Tensor]:
        return self.gate_up, self.down

    def with_trained(self, trained: Sequence[Tensor]) -> Self:
        return type(self)(*trained)

    def gradients(self, x_ND: Tensor, dh_NH: Tensor, dy_ND: Tensor, a_NF: Tensor) -> tuple[Tensor, ...]:
        return dh_NH.t() @ x_ND, dy_ND.t() @ a_NF

    def project(self, d_gate_up: Tensor, d_down: Tensor) -> tuple[Tensor, ...]:
        return d_gate_up, d_down

    def effective(self, gate_up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        """What the forward computes with, given the masters. Gradients pass straight through to the masters."""
        return gate_up, down


@dataclass
class FrozenExpert(OwnedExpert):
    """Full weights of one expert, which stay as they are."""

    names = ()

    gate_up: Tensor
    down: Tensor

    @property
    def trained(self) -> tuple[Tensor, ...]:
        return ()

    def dense(self) -> tuple[Tensor, Tensor]:
        return self.gate_up, self.down

    def with_trained(self, trained: Sequence[Tensor]) -> Self:
        return self

    def to(self, device: torch.device) -> Self:
        return type(self)(self.gate_up.to(device), self.down.to(device))

    @property
    def nbytes(self) -> int:
        return self.gate_up.nbytes + self.down.nbytes

    def gradients(self, x_ND: Tensor, dh_NH: Tensor, dy_ND: Tensor, a_NF: Tensor) -> tuple[Tensor, ...]:
        return ()

    def project(self, d_gate_up: Tensor, d_down: Tensor) -> tuple[Tensor, ...]:
        return ()


class RowTap(Protocol):
    """Sees the rows of every expert that was hit, owned or not. Tensors are detached and not reused afterwards.

    Forward rows come again when a checkpointed block is recomputed. Backward rows come only if a gradient is taken, in
    the same row order as the forward rows.
    """

    def forward_rows(self, expert: int, x_ND: Tensor, gate_N: Tensor) -> None:
        """The inputs routed to `expert` and their gate weights."""
        ...

    def backward_rows(self, expert: int, x_ND: Tensor, dy_ND: Tensor, a_NF: Tensor, dh_NH: Tensor) -> None:
        """The same inputs with dy = gate * dL/dy, the gradient at the expert's own output; the activations a before
        `down`, and dh (N, 2F) at the outputs of `gate_up`: d down = dyᵀ a, d gate_up = dhᵀ x."""
        ...


def apply_experts(
    x_TD: Tensor,
    top_k_index_TK: Tensor,
    top_k_weights_TK: Tensor,
    experts: Sequence[ExpertWeights],
    *,
    tap: RowTap | None = None,
    act: str = "silu",
) -> Tensor:
    """What transformers' eager experts compute, for experts of any width and kind.

    Args:
        x_TD: inputs. Computation is in their dtype (autocast's, if active): weights of another dtype are cast.
        top_k_index_TK: expert of each pair, int64; E means "dropped": the pair adds nothing and gets no gradient.
        top_k_weights_TK: gate weights.
        experts: E of them. Gradients reach those tensors of an `OwnedExpert` that require grad; of no other expert.
        tap: called with the rows of every hit expert.
        act: name of the activation: silu, gelu or gelu_pytorch_tanh.

    Returns:
        y_TD, in the dtype of x.

    Raises:
        ValueError: shapes disagree, an index is above E, or the activation is unknown.
    """
    shape = top_k_index_TK.shape
    if x_TD.dim() != 2 or len(shape) != 2 or shape != top_k_weights_TK.shape or shape[0] != len(x_TD):
        raise ValueError(
            f"x {tuple(x_TD.shape)}, index {tuple(shape)} and weights {tuple(top_k_weights_TK.shape)} "
            "are not (T, D), (T, K) and (T, K)"
        )
    if act not in _ACTIVATIONS:
        raise ValueError(f"activation {act!r} is not one of {', '.join(_ACTIVATIONS)}")
    # Autograd must see as arguments whatever it may have to give a gradient for; the rest travels as objects.
    trained: list[Tensor] = []
    for expert in experts:
        if isinstance(expert, OwnedExpert):
            trained += expert.trained
    y_TD: Tensor = _Experts.apply(x_TD, top_k_index_TK, top_k_weights_TK, experts, tap, act, *trained)  # type: ignore[no-untyped-call]
    return y_TD


def run_expert(x_ND: Tensor, gate_up: Tensor, down: Tensor, act: str = "silu") -> Tensor:
    """One expert on all rows, ungated, in plain differentiable torch: down (act(gate x) ⊙ up x), (N, D)."""
    hg, hu = torch.nn.functional.linear(x_ND, gate_up).chunk(2, dim=-1)
    return torch.nn.functional.linear(_ACTIVATIONS[act][0](hg) * hu, down)


def drop_over_capacity(top_k_index_TK: Tensor, top_k_weights_TK: Tensor, num_experts: int, capacity: int) -> Tensor:
    """Limits every expert to `capacity` pairs: the highest gate weights stay, earlier tokens win ties.

    Returns:
        index (T, K) with `num_experts` in place of every dropped pair, ready for `apply_experts`.

    Raises:
        ValueError: capacity below 1.
    """
    if capacity < 1:
        raise ValueError(f"capacity must be at least 1 pair per expert, got {capacity}")
    index = top_k_index_TK.reshape(-1)
    by_weight = top_k_weights_TK.detach().reshape(-1).argsort(descending=True, stable=True)
    by_expert = by_weight[index[by_weight].argsort(stable=True)]  # by expert, inside one by falling weight
    counts = index.bincount(minlength=num_experts + 1)
    starts = counts.cumsum(0) - counts
    rank = torch.empty_like(index)
    rank[by_expert] = torch.arange(index.numel(), device=index.device) - starts[index[by_expert]]
    return index.masked_fill(rank >= capacity, num_experts).view_as(top_k_index_TK)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        index_TK: Tensor,
        weights_TK: Tensor,
        experts: Sequence[ExpertWeights],
        tap: RowTap | None,
        act: str,
        *trained: Tensor,
    ) -> Tensor:
        num_tokens, top_k = index_TK.shape
        num_experts = len(experts)
        device = x_TD.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_TD.dtype
        activate, _ = _ACTIVATIONS[act]

        index = index_TK.reshape(-1)
        order = index.argsort(stable=True)
        counts = index.bincount(minlength=num_experts + 1).tolist()
        if len(counts) > num_experts + 1:
            raise ValueError(f"expert index {len(counts) - 1} is above {num_experts}")
        tokens = order.div(top_k, rounding_mode="floor") if top_k > 1 else order
        gates = weights_TK.reshape(-1).index_select(0, order)
        pre_activations: list[Tensor] = []
        y_PD = x_TD.new_empty(len(order), x_TD.shape[1], dtype=dtype)  # pairs, in sorted order

        start = 0
        for expert, count in enumerate(counts[:num_experts]):
            if not count:
                continue
            rows = slice(start, start + count)
            start += count
            x_ND, gate_N = x_TD.index_select(0, tokens[rows]), gates[rows]
            if tap is not None:
                tap.forward_rows(expert, x_ND.detach(), gate_N.detach())
            gate_up, down = _weights(experts[expert], dtype)
            h = x_ND.to(dtype) @ gate_up.t()
            hg, hu = h.chunk(2, dim=-1)
            y = (activate(hg) * hu) @ down.t()
            torch.mul(y, gate_N.to(dtype).unsqueeze(1), out=y_PD[rows])
            pre_activations.append(h)
        y_PD[start:] = 0  # dropped pairs sort last

        ctx.save_for_backward(x_TD, order, tokens, gates, *trained, *pre_activations)
        ctx.experts, ctx.tap, ctx.act, ctx.dtype = experts, tap, act, dtype
        ctx.counts, ctx.shape, ctx.num_trained = counts, (num_tokens, top_k), len(trained)
        return _to_tokens(y_PD, order, (num_tokens, top_k)).to(x_TD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, order, tokens, gates = ctx.saved_tensors[:4]
        trained = ctx.saved_tensors[4 : 4 + ctx.num_trained]
        pre_activations = iter(ctx.saved_tensors[4 + ctx.num_trained :])
        needs_x, needs_gates, needs_trained = ctx.needs_input_grad[0], ctx.needs_input_grad[2], ctx.needs_input_grad[6:]
        tap: RowTap | None = ctx.tap
        dtype: torch.dtype = ctx.dtype
        activate, activate_backward = _ACTIVATIONS[ctx.act]

        grad_TD = grad_TD.to(dtype)
        dx_PD = x_TD.new_empty(len(order), x_TD.shape[1], dtype=dtype) if needs_x else None
        dgates = torch.zeros_like(gates) if needs_gates else None
        dtrained: list[Tensor | None] = [None] * len(trained)

        start = 0
        next_trained = 0
        for expert, count in enumerate(ctx.counts[: len(ctx.experts)]):
            weights = ctx.experts[expert]
            first = next_trained
            if isinstance(weights, OwnedExpert):
                next_trained += len(weights.trained)
            if not count:
                continue
            rows = slice(start, start + count)
            start += count
            gate_up, down = _weights(weights, dtype)
            needs_weights = any(needs_trained[first:next_trained])

            hg, hu = next(pre_activations).chunk(2, dim=-1)
            gate_N1 = gates[rows].to(dtype).unsqueeze(1)
            g_ND = grad_TD.index_select(0, tokens[rows])
            u_NF = g_ND @ down
            act_NF = activate(hg)
            if dgates is not None or needs_weights or tap is not None:
                a_NF = act_NF * hu
                if dgates is not None:
                    dgates[rows] = torch.linalg.vecdot(u_NF, a_NF).to(dgates.dtype)
            if tap is not None or needs_weights:
                dy_ND = g_ND * gate_N1
                x_ND = x_TD.index_select(0, tokens[rows])
            elif dx_PD is None:
                continue
            da_NF = u_NF.mul_(gate_N1)
            dh = torch.cat((activate_backward(da_NF * hu, hg), da_NF * act_NF), dim=-1)
            if tap is not None:
                tap.backward_rows(expert, x_ND, dy_ND, a_NF, dh)
            if dx_PD is not None:
                torch.mm(dh, gate_up, out=dx_PD[rows])
            if needs_weights:
                assert isinstance(weights, OwnedExpert)
                gradients = weights.gradients(x_ND.to(dtype), dh, dy_ND, a_NF)
                for place, gradient in zip(range(first, next_trained), gradients, strict=True):
                    dtrained[place] = gradient.to(trained[place].dtype)

        dx_TD = None
        if dx_PD is not None:
            dx_PD[start:] = 0
            dx_TD = _to_tokens(dx_PD, order, ctx.shape).to(x_TD.dtype)
        dweights_TK = None
        if dgates is not None:
            dweights_TK = torch.empty_like(dgates).index_copy_(0, order, dgates).view(ctx.shape)
        # A trained expert without rows has a zero gradient, as it would as a slice of a fused tensor.
        for place, needed in enumerate(needs_trained):
            if needed and dtrained[place] is None:
                dtrained[place] = torch.zeros_like(trained[place])
        return dx_TD, None, dweights_TK, None, None, None, *dtrained


def _weights(expert: ExpertWeights, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    gate_up, down = expert.dense()
    return gate_up.detach().to(dtype), down.detach().to(dtype)


def _to_tokens(rows_PD: Tensor, order: Tensor, shape: tuple[int, int]) -> Tensor:
    """Rows of pairs in sorted order -> sums over each token's K pairs, (T, D)."""
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return rows_PD.index_select(0, place).view(*shape, rows_PD.shape[1]).sum(1)
