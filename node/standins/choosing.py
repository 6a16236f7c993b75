"""An owner chooses the form of each of its stand-ins (`standin.kind = "chosen"`), anew every so many publications.

In between every expert is tried once: each form that the menu has is made of it and measured on routed rows that it was
not made from. Trying costs the owner a fit of each narrow form; the choice itself costs composers a fetch of what has
changed, so one that saves little is not made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from copy import copy

import torch
from torch import Tensor

from ...kernels.experts import OwnedExpert, run_expert
from ...kernels.interface import Publisher, float_weights
from ...kernels.narrow import NarrowPublisher, NarrowStandIn
from ...kernels.standin import Form, Menu, StandIn
from ..run.manifest import ExpertShape, StandInSpec
from .standin_choice import Option, choose

Place = tuple[int, int]  # slot, position

WORTH = 0.9  # another choice is made if the error falls to this part of what it was, at least
FEWEST_HELD_OUT = 16  # where fewer rows are held out, all rows judge


class Chooser:
    """Belongs to whoever makes a publication; for the next one there is a `successor`.

    Args:
        shape: of the experts.
    """

    def __init__(self, spec: StandInSpec, shape: ExpertShape, menu: Menu) -> None:
        self._spec, self._shape, self._menu = spec, shape, menu
        self._published: Counter[int] = Counter()  # by slot
        self._since = 0  # the last choice, publications of all slots
        self._routed: Counter[Place] = Counter()  # rows since it was last tried
        self._tried: dict[Place, list[Option]] = {}
        self._wanted: dict[Place, Form] = {}  # chosen, and not published yet

    def successor(self) -> Chooser:
        """One that goes on from here. What it does changes nothing here."""
        successor = copy(self)
        successor._published, successor._routed = self._published.copy(), self._routed.copy()
        successor._tried, successor._wanted = dict(self._tried), dict(self._wanted)
        return successor

    def forget(self, slot: int) -> None:
        """The slot is not owned any more."""
        for of_place in (self._routed, self._tried, self._wanted):
            for place in [place for place in of_place if place[0] == slot]:
                del of_place[place]

    def next_forms(
        self,
        experts: Mapping[int, Sequence[OwnedExpert]],
        publishers: Mapping[int, Sequence[Publisher]],
        check: Callable[[], None] = lambda: None,
    ) -> dict[Place, Form]:
        """Which of `experts` are to have another form from now on; what was chosen for others waits for their turn.
        Called for each publication; tries what is due.

        Args:
            experts: of the slots to publish, by position.
            publishers: of all owned slots, by position.
            check: called before each try; what it raises ends this.
        """
        every = self._spec.choose_every
        for slot, of_slot in experts.items():
            for position, (publisher, expert) in enumerate(zip(publishers[slot], of_slot, strict=True)):
                place = slot, position
                self._routed[place] += publisher.replay.offered
                if self._published[slot] % every == slot % every:
                    check()
                    self._tried[place] = self._try(publisher, expert, self._routed.pop(place))
            self._published[slot] += 1
        self._since += len(experts)
        present = {
            (slot, position): Form.of(publisher.published)
            for slot in sorted(publishers)
            for position, publisher in enumerate(publishers[slot])
        }
        if self._since >= every * len(publishers) and all(place in self._tried for place in present):
            self._since = 0
            self._wanted |= self._choose(present)
        return {place: self._wanted.pop(place) for place in list(self._wanted) if place[0] in experts}

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

    def _try(self, publisher: Publisher, expert: OwnedExpert, routed: int) -> list[Option]:
        """Every form's cost and error on the rows of late, of which there were `routed`."""
        x_ND, gate_N = publisher.replay.held_out_rows()
        if len(x_ND) < FEWEST_HELD_OUT:
            x_ND, gate_N = publisher.replay.all_rows()
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
        seen = rows if len(rows[0]) else None
        start = NarrowStandIn.of(*float_weights(expert), form.size, seen, self._shape.act)
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
