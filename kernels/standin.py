"""Stand-ins: what a composer runs in place of an expert it does not own. The kinds and how to make them.

lowbit   the whole expert in 4 bits: nearly exact, no FLOPs saved             (lowbit.py)
narrow   a fitted expert of a fraction of the width: saves FLOPs and bytes    (narrow.py)
ternary  the whole expert in 1.6 bits: exact if it is trained ternary         (ternary_standin.py)
shared   a base that many experts have, and low-rank corrections of each      (shared.py)

A `Form` is a kind with its size; a `Menu` says which forms the stand-ins of one run may have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .bases import Bases
from .copies import JUDGED_ROWS, CopyPublisher, CopyStandIn
from .interface import Publisher, StandIn, read_tensors
from .lowbit import LowbitStandIn
from .narrow import NarrowPublisher, NarrowStandIn
from .replay import ReplayBuffer
from .shared import SharedStandIn
from .ternary_standin import TernaryStandIn

__all__ = [
    "KINDS",
    "Form",
    "Menu",
    "Publisher",
    "StandIn",
    "initial_standin",
    "make_publisher",
    "standin_from_bytes",
    "standin_of",
]

KINDS = (LowbitStandIn.kind, NarrowStandIn.kind, TernaryStandIn.kind, SharedStandIn.kind)
_NO_BASES = Bases()


@dataclass(frozen=True)
class Form:
    """What decides the sizes of a stand-in, beside its expert: kind, and F of a narrow or R of a shared one, else 0."""

    kind: str
    size: int = 0

    @classmethod
    def of(cls, standin: StandIn) -> Form:
        """That which it has."""
        if isinstance(standin, NarrowStandIn):
            return cls(standin.kind, standin.width)
        return cls(standin.kind, standin.rank if isinstance(standin, SharedStandIn) else 0)

    def nbytes(self, hidden: int, width: int) -> float:
        """Memory of one, of an expert of D and F. A shared one's base is not counted."""
        if self.kind == NarrowStandIn.kind:
            return 4 * 3 * hidden * self.size
        if self.kind == SharedStandIn.kind:
            return (3 * width + 2 * hidden) * (self.size + 2)
        return 3 * hidden * width * (0.5 + 4 / 64 if self.kind == LowbitStandIn.kind else 1.6 / 8)

    def flops(self, width: int) -> float:
        """What one costs per token, over its expert of F."""
        return self.size / width if self.kind == NarrowStandIn.kind else 1.0

    def __str__(self) -> str:
        return f"{self.kind}-{self.size}" if self.size else self.kind


@dataclass(frozen=True)
class Menu:
    """The forms that stand-ins of a run may have; the first is what all of them begin with.

    Raises:
        ValueError: there is none.
    """

    hidden: int
    width: int  # F of the experts
    forms: Sequence[Form]
    bases: Bases = field(default_factory=Bases)

    def __post_init__(self) -> None:
        if not self.forms:
            raise ValueError("a menu without forms")

    def make(self, form: Form, gate_up: Tensor, down: Tensor) -> StandIn:
        """See `initial_standin`."""
        return initial_standin(form.kind, gate_up, down, form.size, bases=self.bases)

    def load(self, data: bytes) -> StandIn:
        """A stand-in out of bytes of some peer. ValueError if it is malformed, or not on the menu."""
        return self.check(standin_from_bytes(data, bases=self.bases))

    def check(self, standin: StandIn) -> StandIn:
        """ValueError if it is not on the menu."""
        form, full = Form.of(standin), standin.kind != NarrowStandIn.kind
        if form not in self.forms or standin.hidden != self.hidden or (full and standin.width != self.width):
            raise ValueError(
                f"got a stand-in of {form} {standin.hidden} x {standin.width}, "
                f"where one of {', '.join(map(str, self.forms))} for {self.hidden} x {self.width} is expected"
            )
        return standin


def initial_standin(kind: str, gate_up: Tensor, down: Tensor, size: int, *, bases: Bases = _NO_BASES) -> StandIn:
    """The stand-in that everybody starts with: a pure function of the seeded expert, the same on every machine.

    Args:
        kind: one of `KINDS`.
        gate_up: (2F, D), the F gate rows first; masters, where experts are trained ternary.
        down: (D, F).
        size: F of a narrow stand-in, R of a shared one. A copy has the sizes of the expert.
        bases: of shared ones.

    Raises:
        ValueError: unknown kind, impossible size, no base, or weights that are not finite.
    """
    if kind == LowbitStandIn.kind:
        return LowbitStandIn.of(gate_up, down)
    if kind == TernaryStandIn.kind:
        return TernaryStandIn.of(gate_up, down)
    if kind == SharedStandIn.kind:
        return SharedStandIn.near(gate_up, down, size, bases)
    if kind != NarrowStandIn.kind:
        raise ValueError(f"unknown kind of stand-in {kind!r}; there are {', '.join(KINDS)}")
    return NarrowStandIn.of(gate_up, down, size)


def standin_from_bytes(data: bytes, *, bases: Bases = _NO_BASES) -> StandIn:
    """A stand-in of whichever kind `StandIn.to_bytes` wrote; names of tensors tell.

    Of bytes of a peer it is only known to be *some* valid stand-in: see `Menu.load`.

    Raises:
        ValueError: no kind, malformed, not finite, too large, or on a base that is not among `bases`.
    """
    return standin_of(read_tensors(data), bases=bases)


def standin_of(tensors: Mapping[str, Tensor], *, bases: Bases = _NO_BASES) -> StandIn:
    """The same of the state itself, which is taken over."""
    if "codes" in tensors:
        return LowbitStandIn(tensors)
    if "down_trits" in tensors:
        return TernaryStandIn(tensors)
    if "base" in tensors:
        return SharedStandIn(tensors, bases)
    return NarrowStandIn(tensors)


def make_publisher(
    published: StandIn,
    *,
    rank: int = 8,
    replay_rows: int = 2048,
    refit_steps: int = 8,
    refit_learning_rate: float = 3e-3,
    generator: torch.Generator,
    act: str = "silu",
    replay: ReplayBuffer | None = None,
) -> Publisher:
    """The owner's side of one expert's stand-in.

    Args:
        published: what composers hold; it is copied.
        rank: of a narrow one's deltas.
        replay_rows: routed inputs kept; a copy keeps a few, to measure fidelity.
        refit_steps: optimizer steps of a refit.
        refit_learning_rate: of that optimizer.
        generator: draws the rows of refits.
        act: the expert's activation.
        replay: taken over from another publisher of the same expert.

    Raises:
        ValueError: impossible sizes.
    """
    copy = published.with_state({name: tensor.cpu().clone() for name, tensor in published.tensors.items()})
    if replay is None:
        rows = min(replay_rows, JUDGED_ROWS) if isinstance(copy, CopyStandIn) else replay_rows
        replay = ReplayBuffer(rows, copy.hidden)
    if isinstance(copy, CopyStandIn):
        return CopyPublisher(copy, replay, act=act)
    assert isinstance(copy, NarrowStandIn)
    return NarrowPublisher(
        copy,
        replay,
        rank=rank,
        refit_steps=refit_steps,
        learning_rate=refit_learning_rate,
        generator=generator,
        act=act,
    )
