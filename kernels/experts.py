"""What an expert is to who computes with it: its weights, and where it is owned, how it is trained.

Shapes: N rows, D hidden, F width of one expert (each may have its own), H = 2F.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, Self

import torch
from torch import Tensor

from .activations import ACTIVATIONS


class ExpertWeights(Protocol):
    """Anything that can say its weights: an owned expert, or a stand-in that dequantises on the fly."""

    @property
    def width(self) -> int:
        """F."""
        ...

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
    def width(self) -> int:
        """F."""

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
    def width(self) -> int:
        return self.down.shape[1]

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
    def width(self) -> int:
        return self.down.shape[1]

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


def run_expert(x_ND: Tensor, gate_up: Tensor, down: Tensor, act: str = "silu") -> Tensor:
    """One expert on all rows, ungated, in plain differentiable torch: down (act(gate x) ⊙ up x), (N, D)."""
    hg, hu = torch.nn.functional.linear(x_ND, gate_up).chunk(2, dim=-1)
    return torch.nn.functional.linear(ACTIVATIONS[act](hg) * hu, down)
