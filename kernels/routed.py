"""Routed experts: y_t = Σ_k w_tk · down_e (act(gate_e x_t) ⊙ up_e x_t), e = index_tk, over experts of any width.

Shapes: T tokens, K experts per token, E experts, D hidden, F width of one expert (each may have its own), N rows of one
expert, P = T K pairs.

The (token, k) pairs are sorted by expert once, those of one kind side by side; every expert that was hit does dense
products on its own rows; a gather and a sum over K in one operation bring the results back to token order. That sum has
a fixed order, so equal inputs give equal bits on a GPU too, where `index_add_` would not.

Experts of one kind and width form groups, of which all but the products is done together (grouped.py).

Backward, for the rows of one expert, with g = dL/dy of their tokens, h = [hg, hu] the pre-activations, w the gate
weights and a = act(hg) ⊙ hu:

    u  = g down                 dL/dw = Σ_f u ⊙ a     (g · down a = (downᵀ g) · a: the output itself is not needed)
    da = w u                    dhg = da ⊙ hu ⊙ act'(hg),  dhu = da ⊙ act(hg)
    dx = [dhg, dhu] gate_up     d gate_up = [dhg, dhu]ᵀ x,  d down = (w g)ᵀ a

Kept for backward: x (once, not per expert) and h. Autograd over the plain formula keeps about three times as much
(gathered x, act(hg), a, the output before gating). Recomputing h too would add a seventh product to a trained
expert's six, and a composer that has no memory for h checkpoints whole blocks anyway. Weights of stand-ins are never
kept: `dense()` is asked again.

Rejected: one grouped matmul on a CPU (transformers' own is no faster than one product after the other but for experts
of about 64 x 64, where either may win: `./dev bench kernels`), and padding every expert to the same number of rows
(wastes work exactly when routing is uneven).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .activations import ACTIVATIONS, check_activation, gated_backward
from .experts import ExpertWeights, OwnedExpert
from .grouped import Group, arranged, groups_of, products, weights_of


class RowTap(Protocol):
    """Sees the rows of every expert that was hit, owned or not. Tensors are detached and not reused afterwards, and in
    the dtype of x.

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
    dtype: torch.dtype | None = None,
) -> Tensor:
    """What transformers' eager experts compute, for experts of any width and kind.

    Args:
        x_TD: inputs.
        top_k_index_TK: expert of each pair, int64; E means "dropped": the pair adds nothing and gets no gradient.
        top_k_weights_TK: gate weights.
        experts: E of them. Gradients reach those tensors of an `OwnedExpert` that require grad; of no other expert.
        tap: called with the rows of every hit expert.
        act: name of the activation: silu, gelu or gelu_pytorch_tanh.
        dtype: to compute in; by default autocast's, if active, or that of x. Weights of another dtype are cast.

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
    check_activation(act)
    # Autograd must see as arguments whatever it may have to give a gradient for; the rest travels as objects.
    trained: list[Tensor] = []
    for expert in experts:
        if isinstance(expert, OwnedExpert):
            trained += expert.trained
    y_TD: Tensor = _Experts.apply(x_TD, top_k_index_TK, top_k_weights_TK, experts, tap, act, dtype, *trained)  # type: ignore[no-untyped-call]
    return y_TD


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
        dtype: torch.dtype | None,
        *trained: Tensor,
    ) -> Tensor:
        num_experts, hidden = len(experts), x_TD.shape[1]
        top_k = index_TK.shape[1]
        device = x_TD.device.type
        dtype = dtype or (torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_TD.dtype)

        index = index_TK.reshape(-1)
        counts = index.bincount(minlength=num_experts + 1).tolist()
        if len(counts) > num_experts + 1:
            raise ValueError(f"expert index {len(counts) - 1} is above {num_experts}")
        arrangement = arranged(experts)
        order = _in_order(index, arrangement).argsort(stable=True)
        tokens = order.div(top_k, rounding_mode="floor") if top_k > 1 else order
        gates = weights_TK.reshape(-1).index_select(0, order)
        groups = groups_of(arrangement, counts, experts, hidden, x_TD.device, dtype)
        pre_activations: list[Tensor] = []
        y_PD = x_TD.new_empty(len(order), hidden, dtype=dtype)  # pairs, in sorted order

        for group in groups:
            x_ND, gate_N = x_TD.index_select(0, tokens[group.rows]), gates[group.rows]
            if tap is not None:
                for expert, part in zip(group.experts, group.parts, strict=True):
                    tap.forward_rows(expert, x_ND[part].detach(), gate_N[part].detach())
            gate_up, down = weights_of(group, experts, dtype)
            h_NH = products(group, x_ND.to(dtype), gate_up, transposed=True)
            hg, hu = h_NH.chunk(2, dim=-1)
            a_NF = ACTIVATIONS[act](hg).mul_(hu).mul_(gate_N.to(dtype).unsqueeze(1))
            products(group, a_NF, down, transposed=True, out=y_PD[group.rows])
            pre_activations.append(h_NH)
        y_PD[groups[-1].rows.stop if groups else 0 :] = 0  # dropped pairs sort last

        ctx.save_for_backward(x_TD, order, tokens, gates, *trained, *pre_activations)
        ctx.experts, ctx.tap, ctx.act, ctx.dtype, ctx.groups = experts, tap, act, dtype, groups
        ctx.shape, ctx.num_trained = tuple(index_TK.shape), len(trained)
        return _to_tokens(y_PD, order, ctx.shape).to(x_TD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, order, tokens, gates = ctx.saved_tensors[:4]
        trained = ctx.saved_tensors[4 : 4 + ctx.num_trained]
        pre_activations = ctx.saved_tensors[4 + ctx.num_trained :]
        needs_x, needs_gates, needs_trained = ctx.needs_input_grad[0], ctx.needs_input_grad[2], ctx.needs_input_grad[7:]
        tap: RowTap | None = ctx.tap
        dtype: torch.dtype = ctx.dtype

        grad_TD = grad_TD.to(dtype)
        dx_PD = x_TD.new_empty(len(order), x_TD.shape[1], dtype=dtype) if needs_x else None
        dgates = torch.zeros_like(gates) if needs_gates else None
        dtrained: list[Tensor | None] = [None] * len(trained)
        places = _places(ctx.experts)

        group: Group
        for group, h_NH in zip(ctx.groups, pre_activations, strict=True):
            rows = group.rows
            learning = [any(needs_trained[place] for place in places[expert]) for expert in group.experts]
            tells = tap is not None or any(learning)
            gate_up, down = weights_of(group, ctx.experts, dtype)

            hg, hu = h_NH.chunk(2, dim=-1)
            gate_N1 = gates[rows].to(dtype).unsqueeze(1)
            g_ND = grad_TD.index_select(0, tokens[rows])
            u_NF = products(group, g_ND, down)
            act_NF = ACTIVATIONS[ctx.act](hg)
            if dgates is not None or tells:
                a_NF = act_NF * hu
                if dgates is not None:
                    dgates[rows] = torch.linalg.vecdot(u_NF, a_NF).to(dgates.dtype)
            if dx_PD is None and not tells:
                continue
            dh_NH = gated_backward(u_NF.mul_(gate_N1), hg, hu, act_NF, ctx.act)
            if dx_PD is not None:
                products(group, dh_NH, gate_up, out=dx_PD[rows])
            if not tells:
                continue
            x_ND, dy_ND = x_TD.index_select(0, tokens[rows]), g_ND.mul_(gate_N1)
            told = [rows.to(x_TD.dtype) for rows in (dy_ND, a_NF, dh_NH)] if tap is not None else []
            for expert, part, learns in zip(group.experts, group.parts, learning, strict=True):
                if tap is not None:
                    tap.backward_rows(expert, x_ND[part], *(rows[part] for rows in told))
                if learns:
                    dy, a, dh = dy_ND[part], a_NF[part], dh_NH[part]
                    gradients = ctx.experts[expert].gradients(x_ND[part].to(dtype), dh, dy, a)
                    for place, gradient in zip(places[expert], gradients, strict=True):
                        dtrained[place] = gradient.to(trained[place].dtype)

        dx_TD = None
        if dx_PD is not None:
            dx_PD[ctx.groups[-1].rows.stop if ctx.groups else 0 :] = 0
            dx_TD = _to_tokens(dx_PD, order, ctx.shape).to(x_TD.dtype)
        dweights_TK = None
        if dgates is not None:
            dweights_TK = torch.empty_like(dgates).index_copy_(0, order, dgates).view(ctx.shape)
        # A trained expert without rows has a zero gradient, as it would as a slice of a fused tensor.
        for place, needed in enumerate(needs_trained):
            if needed and dtrained[place] is None:
                dtrained[place] = torch.zeros_like(trained[place])
        return dx_TD, None, dweights_TK, None, None, None, None, *dtrained


def _places(experts: Sequence[ExpertWeights]) -> list[range]:
    """Of each expert's trained tensors among those of all."""
    places, start = [], 0
    for expert in experts:
        end = start + (len(expert.trained) if isinstance(expert, OwnedExpert) else 0)
        places.append(range(start, end))
        start = end
    return places


def _in_order(index_P: Tensor, arrangement: list[int]) -> Tensor:
    """Places of experts in the arrangement in place of their numbers; "dropped" stays last."""
    if arrangement == sorted(arrangement):
        return index_P
    places = [0] * len(arrangement) + [len(arrangement)]
    for place, expert in enumerate(arrangement):
        places[expert] = place
    return torch.tensor(places, device=index_P.device).index_select(0, index_P)


def _to_tokens(rows_PD: Tensor, order: Tensor, shape: tuple[int, int]) -> Tensor:
    """Rows of pairs in sorted order -> sums over each token's K pairs, (T, D)."""
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return torch.nn.functional.embedding_bag(place.view(shape), rows_PD, mode="sum")  # never holds them in token order
