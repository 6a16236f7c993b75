"""Stand-ins: what a composer runs in place of an expert it does not own. The kinds and how to make them.

lowbit   the whole expert in 4 bits: nearly exact, no FLOPs saved             (lowbit.py)
narrow   a fitted expert of a fraction of the width: saves FLOPs and bytes    (narrow.py)
ternary  the whole expert in 1.6 bits: exact if it is trained ternary         (ternary_standin.py)
"""

from __future__ import annotations

import torch
from torch import Tensor

from .copies import CopyPublisher, CopyStandIn
from .experts import OwnedExpert
from .interface import Publisher, StandIn, read_tensors
from .lowbit import LowbitPublisher, LowbitStandIn
from .narrow import NarrowPublisher, NarrowStandIn
from .ternary_standin import TernaryPublisher, TernaryStandIn

__all__ = ["KINDS", "Publisher", "StandIn", "initial_standin", "make_publisher", "standin_from_bytes"]

KINDS = (LowbitStandIn.kind, NarrowStandIn.kind, TernaryStandIn.kind)
_COPIES: dict[str, tuple[type[CopyStandIn], type[CopyPublisher]]] = {
    LowbitStandIn.kind: (LowbitStandIn, LowbitPublisher),
    TernaryStandIn.kind: (TernaryStandIn, TernaryPublisher),
}


def initial_standin(kind: str, gate_up: Tensor, down: Tensor, width: int) -> StandIn:
    """The stand-in that everybody starts with: a pure function of the seeded expert, the same on every machine.

    Args:
        kind: one of `KINDS`.
        gate_up: (2F, D), the F gate rows first; masters, where experts are trained ternary.
        down: (D, F).
        width: F of a narrow stand-in; a copy has that of the expert.

    Raises:
        ValueError: unknown kind, impossible width, or weights that are not finite.
    """
    _check_kind(kind)
    if kind in _COPIES:
        return _COPIES[kind][0].of(gate_up, down)
    return NarrowStandIn.of(gate_up, down, width)


def standin_from_bytes(data: bytes, *, like: StandIn | None = None) -> StandIn:
    """A stand-in of whichever kind `StandIn.to_bytes` wrote; names of tensors tell.

    Args:
        data: the bytes.
        like: what the result must equal in kind and size. Bytes of a peer are only known to be *some* valid stand-in.

    Raises:
        ValueError: no kind, malformed, not finite, too large, or not like `like`.
    """
    tensors = read_tensors(data)
    standin: StandIn
    if "codes" in tensors:
        standin = LowbitStandIn(tensors)
    elif "down_trits" in tensors:
        standin = TernaryStandIn(tensors)
    else:
        standin = NarrowStandIn(tensors)
    if like is not None and _form(standin) != _form(like):
        raise ValueError(f"got a stand-in of {_form(standin)} where {_form(like)} is expected")
    return standin


def make_publisher(
    kind: str,
    expert: OwnedExpert,
    *,
    width: int,
    rank: int = 8,
    replay_rows: int = 2048,
    refit_steps: int = 8,
    refit_learning_rate: float = 3e-3,
    generator: torch.Generator,
    published: StandIn | None = None,
    act: str = "silu",
) -> Publisher:
    """The owner's side of one expert's stand-in.

    Args:
        kind: one of `KINDS`.
        expert: as it is now.
        width: F of a narrow stand-in; ignored for copies.
        rank: of a narrow one's deltas.
        replay_rows: routed inputs kept (copies keep a few, to measure fidelity).
        refit_steps: optimizer steps of a refit.
        refit_learning_rate: of that optimizer.
        generator: draws the rows of refits.
        published: what composers already hold, where ownership was taken over; it is copied. By default the initial
            stand-in of `expert`, which is right only while the expert still has its seeded weights.
        act: the expert's activation.

    Raises:
        ValueError: unknown kind, impossible sizes, or `published` is not of this kind and size.
    """
    _check_kind(kind)
    down = expert.masters()[1]
    if published is not None and (published.kind != kind or published.hidden != down.shape[0]):
        raise ValueError(f"a {published.kind} stand-in of {published.hidden} is not one of kind {kind} for this expert")
    copy = None if published is None else standin_from_bytes(published.to_bytes())
    if kind in _COPIES:
        if copy is not None and copy.width != down.shape[1]:
            raise ValueError(f"a copy of width {copy.width} for an expert of width {down.shape[1]}")
        assert copy is None or isinstance(copy, CopyStandIn)
        return _COPIES[kind][1](expert, replay_rows=replay_rows, published=copy, act=act)
    if copy is not None and copy.width != width:
        raise ValueError(f"a stand-in of width {copy.width} where {width} is wanted")
    assert copy is None or isinstance(copy, NarrowStandIn)
    return NarrowPublisher(
        expert,
        width=width,
        rank=rank,
        replay_rows=replay_rows,
        refit_steps=refit_steps,
        learning_rate=refit_learning_rate,
        generator=generator,
        published=copy,
        act=act,
    )


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"unknown kind of stand-in {kind!r}; there are {', '.join(KINDS)}")


def _form(standin: StandIn) -> tuple[str, int, int]:
    return standin.kind, standin.hidden, standin.width
