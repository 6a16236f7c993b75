"""An owner chooses the form of each of its stand-ins (`standin.kind = "chosen"`), anew every so many publications.

In between every expert is tried once: each form that the menu has is made of it and measured on routed rows that it was
not made from. Trying costs the owner a fit of each narrow form; the choice itself costs composers a fetch of what has
changed, so one that saves little is not made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from ..kernels.experts import OwnedExpert, run_expert
from ..kernels.interface import Publisher, float_weights
from ..kernels.narrow import NarrowPublisher, NarrowStandIn
from ..kernels.standin import Form, Menu, StandIn
from .manifest import ExpertShape, StandInSpec
from .standin_choice import Option, choose

Place = tuple[int, int]  # slot, position

WORTH = 0.9  # another choice is made if the error falls to this part of what it was, at least
JUDGED_ROWS = 16  # of fewer held-out rows all rows judge


class Chooser:
    """Belongs to the training thread.

    Args:
        shape: of the experts.
    """

    def __init__(self, spec: StandInSpec, shape: ExpertShape, menu: Menu) -> None:
        self._spec, self._shape, self._menu = spec, shape, menu
        self._published: Counter[int] = Counter()  # by slot
        self._since = 0  # the last choice, publications of all slots
        self._tried: dict[Place, list[Option]] = {}

    def next_forms(
        self, experts: Mapping[int, Sequence[OwnedExpert]], publishers: Mapping[int, Sequence[Publisher]],
        slots: Collection[int],
    ) -> dict[Place, Form]:  # fmt: skip
        """What is to have another form from now on. Called before each publication of `slots`; tries what is due.

        Args:
            experts, publishers: of all owned slots, by position.
        """
        every = self._spec.choose_every
        for slot in slots:
            if self._published[slot] % every == slot % every:
                for position, (publisher, expert) in enumerate(zip(publishers[slot], experts[slot], strict=True)):
                    self._tried[slot, position] = self._try(publisher, expert)
                    publisher.replay.offered = 0
            self._published[slot] += 1
        self._since += len(slots)
        self._tried = {place: options for place, options in self._tried.items() if place[0] in publishers}
        places = [(slot, position) for slot in sorted(publishers) for position in range(len(publishers[slot]))]
        if self._since < every * len(publishers) or any(place not in self._tried for place in places):
            return {}
        self._since = 0
        return self._choose({place: Form.of(publishers[place[0]][place[1]].published) for place in places})

    def _choose(self, present: Mapping[Place, Form]) -> dict[Place, Form]:
        places = list(present)
        options = [self._tried[place] for place in places]
        weights = 3 * self._shape.hidden * self._shape.width
        everything = sum(max(option.flops for option in each) for each in options)
        budgets = {
            "nbytes": self._spec.bytes_per_weight * weights * len(places),
            "flops": self._spec.flops_fraction * everything,
        }
        found = [each[number] for each, number in zip(options, choose(options, **budgets), strict=True)]
        now = [next(o for o in each if o.form == present[p]) for p, each in zip(places, options, strict=True)]
        fits = all(sum(getattr(option, name) for option in now) <= budget for name, budget in budgets.items())
        before, after = sum(option.error for option in now), sum(option.error for option in found)
        if fits and after > WORTH * before:
            return {}
        return {p: option.form for p, option in zip(places, found, strict=True) if option.form != present[p]}

    def _try(self, publisher: Publisher, expert: OwnedExpert) -> list[Option]:
        """Every form's cost and error on the rows of late."""
        x_ND, gate_N = publisher.replay.held_out_rows()
        if len(x_ND) < JUDGED_ROWS:
            x_ND, gate_N = publisher.replay.all_rows()
        routed = publisher.replay.offered
        wanted_ND = run_expert(x_ND, *float_weights(expert), self._shape.act)
        options = []
        for form in self._menu.forms:
            error = 0.0
            if routed and len(x_ND):
                near = form == Form.of(publisher.published)
                standin = publisher.published if near else self.make(form, publisher, expert)
                gate_up, down = standin.dense()
                missing_ND = wanted_ND - run_expert(x_ND, gate_up.cpu(), down.cpu(), self._shape.act)
                error = routed * float((missing_ND * gate_N.unsqueeze(1)).square().sum(1).mean())
            size = form.nbytes(self._shape.hidden, self._shape.width)
            options.append(Option(form, size, routed * form.flops(self._shape.width), error))
        return options

    def make(self, form: Form, publisher: Publisher, expert: OwnedExpert) -> StandIn:
        """A stand-in of that form for the expert as it is now; a narrow one is fitted to the rows of its publisher."""
        if form.kind != NarrowStandIn.kind:
            return self._menu.make(form, *float_weights(expert))
        rows: tuple[Tensor, Tensor] = publisher.replay.fitting_rows()
        start = NarrowStandIn.of(
            *float_weights(expert), form.size, rows if len(rows[0]) else None, self._shape.act
        )  # fmt: skip
        fit = NarrowPublisher(
            start,
            publisher.replay,
            rank=1,
            refit_steps=self._spec.trial_steps,
            learning_rate=self._spec.refit_learning_rate,
            generator=torch.Generator().manual_seed(0),
            act=self._shape.act,
        )
        fit.refit(expert)
        return fit.fitted
