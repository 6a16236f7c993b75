"""Which forms a run's stand-ins may have: what its manifest says of them, in the kernels' terms."""

from __future__ import annotations

from ...kernels.bases import Bases
from ...kernels.standin import Form, Menu
from ..run.manifest import StandInSpec

_PARTS = (2, 4, 8, 16)  # of an expert's width, for narrow stand-ins that are chosen


def menu_of(spec: StandInSpec, hidden: int, width: int, bases: Bases) -> Menu:
    """The menu of a run whose experts have D = `hidden` and F = `width`.

    Where forms are chosen, all begin with the one that is likely the best of those that every expert could have within
    the budgets: an upcycled expert is its base at first, and a copy in 4 bits is nearly exact.

    Raises:
        ValueError: not one form is within the budgets.
    """
    ranks = [max(1, min(rank, hidden, width)) for rank in (spec.base_rank, spec.base_rank // 4)]
    if spec.kind == "narrow":
        forms = [Form("narrow", max(1, round(spec.width_fraction * width)))]
    elif spec.kind == "shared":
        forms = [Form("shared", ranks[0])]
    elif spec.kind == "chosen":
        narrow = [Form("narrow", width // part) for part in _PARTS if width >= part]
        shared = [Form("shared", rank) for rank in ranks] if bases else []
        forms = list(dict.fromkeys([*shared, Form("lowbit"), *narrow]))
        affordable = [form for form in forms if within(spec, form, hidden, width)]
        if not affordable:
            raise ValueError(
                f"no stand-in takes {spec.bytes_per_weight:g} bytes a weight and {spec.flops_fraction:g} of the FLOPs"
            )
        forms = [affordable[0], *(form for form in forms if form != affordable[0])]
    else:
        forms = [Form(spec.kind)]
    return Menu(hidden, width, tuple(forms), bases)


def within(spec: StandInSpec, form: Form, hidden: int, width: int) -> bool:
    """Whether every expert could have it."""
    each = form.nbytes(hidden, width) / (3 * hidden * width)
    return each <= spec.bytes_per_weight and form.flops(width) <= spec.flops_fraction
