"""One publication: new stand-ins of some slots and the deltas that lead to them, made of copies, on any thread.

The training thread copies what a publication needs (`StandInOwner.begin_publication`) and may train on. A publisher
that an owner holds takes in rows and changes in nothing else: what is made here are successors of them, which the
training thread later puts in their place, all of a slot at once (`finish_publication`). So whatever is asked of an
owner meanwhile sees the last publication whole and nothing of this one, and one that comes to nothing leaves no trace.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from ...kernels.experts import OwnedExpert
from ...kernels.interface import Publisher
from ...kernels.replay import ReplayBuffer
from ...kernels.standin import StandIn
from .choosing import Chooser

MakePublisher = Callable[[int, int, StandIn, ReplayBuffer], Publisher]  # of a slot, a position, what is published, rows


class Stopped(Exception):
    """What was being made is not wanted any more."""


@dataclass(frozen=True)
class Source:
    """One expert whose stand-in is to be published. Nobody changes the expert or the rows meanwhile."""

    publisher: Publisher
    expert: OwnedExpert
    rows: ReplayBuffer


@dataclass(frozen=True)
class Made:
    """A slot's next publishers, by position, and what leads to what they have published."""

    publishers: list[Publisher]
    deltas: list[bytes]  # none: a stand-in has another form now, others are to fetch what is published
    fidelity: tuple[float, ...]  # of what was published before; none if it was not measured


class Publication:
    """Made once, by `make`.

    Args:
        step: the owner's, of which the sources are.
        sources: of the slots to publish, by position.
        held: the publishers of all slots that the owner has.
        measured: slots of which the fidelity is due.
        chooser: of forms, not used by anybody else; None where all have one form.
        publisher: makes one for a stand-in of another form.
    """

    def __init__(
        self,
        step: int,
        sources: Mapping[int, Sequence[Source]],
        held: Mapping[int, Sequence[Publisher]],
        *,
        measured: Collection[int],
        chooser: Chooser | None,
        publisher: MakePublisher,
    ) -> None:
        self.step, self.sources, self.held, self.chooser = step, sources, held, chooser
        self._measured, self._publisher = measured, publisher
        self.made: dict[int, Made] = {}

    def make(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Fit, choose forms, make deltas.

        Raises:
            ValueError: an expert's weights are not finite.
            Stopped: `stopped`, which is asked before each expert's turn, said so.
        """

        def check() -> None:
            if stopped():
                raise Stopped

        experts = {slot: [each.expert for each in sources] for slot, sources in self.sources.items()}
        publishers = {
            slot: [each.publisher.successor(each.rows) for each in sources] for slot, sources in self.sources.items()
        }
        fidelity: dict[int, tuple[float, ...]] = {}
        for slot in self._measured:
            check()
            pairs = zip(publishers[slot], experts[slot], strict=True)
            fidelity[slot] = tuple(publisher.fidelity(expert) for publisher, expert in pairs)
        changed = self._change_forms(publishers, experts, check)
        for slot in self.sources:
            deltas = []
            for publisher, expert in zip(publishers[slot], experts[slot], strict=True):
                if slot not in changed:
                    check()
                    publisher.refit(expert)
                    deltas.append(publisher.delta(expert))
            self.made[slot] = Made(publishers[slot], deltas, fidelity.get(slot, ()))

    def _change_forms(
        self, publishers: dict[int, list[Publisher]], experts: dict[int, list[OwnedExpert]], check: Callable[[], None]
    ) -> set[int]:
        """Slots of which a stand-in has another form now."""
        if self.chooser is None:
            return set()
        changed = set()
        forms = self.chooser.next_forms(experts, {**self.held, **publishers}, check)
        for (slot, position), form in forms.items():
            check()
            old, expert = publishers[slot][position], experts[slot][position]
            standin = self.chooser.make(form, old, expert)
            publishers[slot][position] = self._publisher(slot, position, standin, old.replay)
            changed.add(slot)
        return changed
