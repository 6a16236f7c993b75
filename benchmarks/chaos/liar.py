"""A composer that lies in outer rounds: the real node, with what it hands to the average exchanged.

    python -m shoal.benchmarks.chaos.liar sign-flipper join INVITE ...

All else is the node's: its votes are honest, and so is what it proposes. The node itself has no hook for this.
"""

from __future__ import annotations

import sys
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from ...node import cli
from ...node.peer import composing
from ...protocol.averaging.averaging import Outcome, OuterAverager

CLAIMED_MORE = 1_000_000


class SignFlipper(OuterAverager):
    """Pulls everybody back the way they came."""

    def submit(self, round_: int, attempt: int, pseudo_gradient: Tensor, **facts: Any) -> Future[Outcome]:
        return super().submit(round_, attempt, -pseudo_gradient, **facts)


class NanSender(OuterAverager):
    """Sends what the node would refuse to send."""

    @staticmethod
    def _may_send(vector: Tensor) -> bool:
        return True

    def submit(self, round_: int, attempt: int, pseudo_gradient: Tensor, **facts: Any) -> Future[Outcome]:
        return super().submit(round_, attempt, torch.full_like(pseudo_gradient, torch.nan), **facts)


class WeightLiar(OuterAverager):
    """Claims more tokens than it has seen."""

    def submit(
        self, round_: int, attempt: int, pseudo_gradient: Tensor, *, tokens: int, **facts: Any
    ) -> Future[Outcome]:
        return super().submit(round_, attempt, pseudo_gradient, tokens=tokens * CLAIMED_MORE, **facts)


LIES = {"sign-flipper": SignFlipper, "nan": NanSender, "weight-liar": WeightLiar}


def main() -> int:
    """Run the node's command line as a liar; returns its exit code."""
    setattr(composing, "OuterAverager", LIES[sys.argv[1]])  # noqa: B010 - mypy rightly refuses the assignment
    return cli.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
