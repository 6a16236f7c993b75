"""Muon: momentum of matrices, made orthogonal before it is stepped by; AdamW for everything else.

A matrix's momentum M = U S V^T is replaced by about U V^T, so that every direction in which it points moves the weights
equally far (Jordan et al. 2024). Update and weight decay are scaled as in Moonlight (Liu et al. 2025), to the size of
AdamW's. It needs one moment a weight where AdamW needs two.

torch's own Muon takes one matrix at a time, and only matrices; experts are many of one shape, which are done together
here, and the rest of a model needs AdamW beside it. `tests/kernels/test_muon.py` compares both.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .adamw import AdamW

# Jordan's quintic: it brings singular values from 0.002 on into about [0.7, 1.2] in five iterations.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5
_RMS = 0.2  # of AdamW's updates, about
ORTHOGONAL = "orthogonal"  # of a group
_TOGETHER = 1 << 21  # numbers of matrices that are done at once: their copies are what it costs in memory


class Muon(AdamW):
    """Groups whose `orthogonal` is true hold matrices only, and have one moment, `momentum`; others are AdamW's.

    Args:
        momentum: of `orthogonal` groups; Nesterov's, an average as AdamW's first moment is.
        groups, kwargs: as of `torch.optim.AdamW`.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, momentum: float = 0.95, **kwargs: Any) -> None:
        super().__init__(groups, **kwargs)
        self._momentum = momentum

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closures
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group.get(ORTHOGONAL)]
        try:
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if group.get(ORTHOGONAL):
                self._step_matrices(group)

    def _step_matrices(self, group: dict[str, Any]) -> None:
        alike: defaultdict[tuple[torch.Size, torch.device], list[Tensor]] = defaultdict(list)
        for matrix in group["params"]:
            if matrix.grad is not None:
                alike[matrix.shape, matrix.device].append(matrix)
        for (shape, _), matrices in alike.items():
            number = max(1, _TOGETHER // shape.numel())
            for first in range(0, len(matrices), number):
                self._step_alike(matrices[first : first + number], group["lr"], group["weight_decay"])

    def _step_alike(self, matrices: list[Tensor], rate: float, decay: float) -> None:
        for matrix in matrices:
            if not self.state[matrix]:
                self.state[matrix] |= {"step": torch.zeros(()), "momentum": torch.zeros_like(matrix)}
        moments = [self.state[matrix]["momentum"] for matrix in matrices]
        gradients = [matrix.grad for matrix in matrices if matrix.grad is not None]
        torch._foreach_lerp_(moments, gradients, 1 - self._momentum)
        updates = orthogonal(torch.stack(torch._foreach_lerp(gradients, moments, self._momentum)))
        torch._foreach_mul_(matrices, 1 - rate * decay)
        scale = _RMS * max(updates.shape[1:]) ** 0.5
        torch._foreach_add_(matrices, updates.to(matrices[0].dtype).unbind(), alpha=-rate * scale)
        for matrix in matrices:
            self.state[matrix]["step"] += 1


def orthogonal(matrices: Tensor) -> Tensor:
    """Of each M = U S V^T about U V^T, by Newton-Schulz iterations: singular values from 0.7 to 1.2 instead of ones.

    Everywhere in float32, and not in bfloat16 as in the publication: who audits a step takes it again on another
    machine, and these products are few beside those of a batch that keeps a machine busy.

    Args:
        matrices: (N, R, C), finite. What is all zeros stays so.

    Returns:
        (N, R, C) float32.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x.to(torch.float32)
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)  # then no singular value is above 1
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.mT if tall else x
