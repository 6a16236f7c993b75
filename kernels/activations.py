"""What stands between an expert's two products: a = act(hg) ⊙ hu, of its pre-activations h = [hg, hu] (SwiGLU: Shazeer
2020), and its backward.

Shapes: N rows, F width of the expert.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_aten = torch.ops.aten

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_pytorch_tanh": lambda h: torch.nn.functional.gelu(h, approximate="tanh"),
}
# act'(h) * grad, given grad and h, into the third
_BACKWARD: dict[str, Callable[[Tensor, Tensor, Tensor], object]] = {
    "silu": lambda grad, h, into: _aten.silu_backward.grad_input(grad, h, grad_input=into),
    "gelu": lambda grad, h, into: _aten.gelu_backward.grad_input(grad, h, grad_input=into),
    "gelu_pytorch_tanh": lambda grad, h, into: _aten.gelu_backward.grad_input(
        grad, h, approximate="tanh", grad_input=into
    ),
}


def check_activation(act: str) -> None:
    """Raises ValueError: no activation of that name."""
    if act not in ACTIVATIONS:
        raise ValueError(f"activation {act!r} is not one of {', '.join(ACTIVATIONS)}")


def gated_backward(da_NF: Tensor, hg_NF: Tensor, hu_NF: Tensor, act_NF: Tensor, act: str) -> Tensor:
    """dh (N, 2F): of hg da ⊙ hu ⊙ act'(hg), of hu da ⊙ act(hg).

    Args:
        da_NF: overwritten.
        act_NF: act(hg).
    """
    dh = da_NF.new_empty(len(da_NF), 2 * da_NF.shape[1])
    dhg, dhu = dh.chunk(2, dim=-1)
    torch.mul(da_NF, act_NF, out=dhu)
    _BACKWARD[act](da_NF.mul_(hu_NF), hg_NF, dhg)
    return dh
