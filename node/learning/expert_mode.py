"""How a peer trains the experts that it owns: its own choice, which nobody else need know.

    full      all weights, with optimizer state
    lora      low-rank factors beside a base in 4 bits (`kernels/lora.py`)
    frozen    not at all: it keeps them, hands them on and serves them

What travels is an expert's weights, whoever trained them how; only a peer's own checkpoint has more. Weights that come
from a peer that trains in full come with optimizer state, which the others leave aside.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ...kernels.experts import DenseExpert, FrozenExpert, OwnedExpert
from ...kernels.lora import LoraExpert
from ...kernels.ternary import TernaryExpert
from ..config import ExpertModeName, PeerConfig
from ..errors import ConfigError
from ..run.manifest import TrainSpec

SAVED = "lora."  # before the names of a low-rank expert's tensors, in a checkpoint


def expert_type(train: TrainSpec) -> type[DenseExpert]:
    """What an expert that is trained in full computes with: its masters, or their ternary form."""
    return TernaryExpert if train.expert_weights == "ternary" else DenseExpert


@dataclass(frozen=True)
class ExpertMode:
    """Calling it makes an owned expert of gate_up (2F, D) and down (D, F).

    `rank`, and `alpha`, by default twice that, are of `lora` alone.
    """

    train: TrainSpec
    mode: ExpertModeName = "full"
    rank: int = 16
    alpha: float | None = None

    @classmethod
    def of(cls, config: PeerConfig, train: TrainSpec) -> ExpertMode:
        """Raises ConfigError where a run's experts cannot be trained so."""
        return cls(train, config.expert_mode, config.lora_rank, config.lora_alpha)

    def __post_init__(self) -> None:
        if self.mode != "full" and self.train.expert_weights != "full":
            raise ConfigError(
                f"expert_mode = {self.mode!r} is not possible where a run trains {self.train.expert_weights} experts",
                fix="leave --expert-mode at full",
            )

    def require_rank(self, hidden: int, width: int) -> None:
        """Raises ConfigError for a rank that experts of this size have not."""
        if self.mode == "lora" and not 1 <= self.rank <= min(hidden, width):
            raise ConfigError(
                f"lora_rank = {self.rank} is not one that experts of {hidden} x {width} have",
                fix=f"give --lora-rank {min(hidden, width)} at most, and at least 1",
            )

    def __call__(self, gate_up: Tensor, down: Tensor) -> OwnedExpert:
        if self.mode == "full":
            return expert_type(self.train)(gate_up, down)
        if self.mode == "frozen":
            return FrozenExpert(gate_up.detach().clone(), down.detach().clone())
        return LoraExpert.of(gate_up, down, rank=self.rank, alpha=self.alpha or 2.0 * self.rank)

    def read(self, saved: Mapping[str, Tensor], hidden: int, width: int) -> OwnedExpert:
        """An expert that was low-rank when it was saved. Raises ValueError: it is damaged."""
        expert = LoraExpert.read(saved, hidden, width)
        return expert if self.mode == "lora" else self(*expert.dense())
