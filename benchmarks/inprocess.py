"""A swarm in one process: the node's own composers, workers, codecs and merging, with function calls for a network.

Every composer takes one inner step in turn; deltas and sketches pass through their wire bytes, and rounds through the
pure merging code: each is under way for exactly `outer.overlap_steps`, which the node only tries to keep. Sketches of a
step reach the owner before it takes that step, and nothing is lost. So what this shows is the method, and what the real
node loses against it is the network's doing; `late` is a part of that.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.interface import float_weights
from ..kernels.narrow import NarrowStandIn
from ..node.learning.composer import Composer, Entry
from ..node.learning.expert_mode import ExpertMode
from ..node.learning.owning import ExpertOwner
from ..node.learning.worker import Worker
from ..node.model.cut import cadences
from ..node.run.manifest import Manifest
from ..protocol.averaging import radial
from ..protocol.averaging.fragments import Fragment
from ..protocol.averaging.merging import Facts, outer_step, shares, weights
from ..protocol.averaging.parts import PartCodec
from ..protocol.averaging.robust import robust_mean
from .delivery import DirectDelivery, GradientDelivery, Sent
from .seeding import Seed

NextBatch = Callable[[], Tensor]


class Published(NamedTuple):
    """One slot's stand-ins: deltas by layer; or, where one has another form now, all of them whole, to be fetched."""

    slot: int
    deltas: list[bytes]
    whole: list[bytes]


@dataclass
class Bytes:
    """What would have crossed the wire, summed over composers."""

    deltas: int = 0  # published once each; gossip's copies are not counted, fetches of whole stand-ins are
    deltas_received: int = 0  # by all who run that stand-in
    outer: int = 0  # pseudo-gradients in and averages out, at the codec's width: half of it up, half of it down
    sketches: int = 0  # each sent once, to one owner


class InProcessSwarm:
    """`len(batches)` composers; composer i owns the slots of `owned[i]`, worker j those of `workers[j]`.

    If every composer owns every slot this is DiLoCo with full replicas: experts are then merged every H steps too, by
    the same codec and outer step as the backbone.
    Sketches are as `manifest.sketch` has them; without any, experts learn from their owner's tokens alone.

    Args:
        seed: what everybody starts from; by default the run's initial weights.
        flippers: so many composers, the first ones, bring the opposite of what they learned into every round.
        late: steps that sketches and deltas are under way.
        frozen: instead of stand-ins, experts of others are float32 copies, taken from their owners with each merge of
            the first fragment, at two bytes a weight on the wire.
        mode: how all owners train experts; by default in full.
    """

    def __init__(
        self,
        manifest: Manifest,
        batches: Sequence[NextBatch],
        owned: Sequence[Sequence[int]],
        *,
        workers: Sequence[Sequence[int]] = (),
        seed: Seed | None = None,
        flippers: int = 0,
        late: int = 0,
        frozen: bool = False,
        mode: ExpertMode | None = None,
    ) -> None:
        self.manifest, self.frozen = manifest, frozen
        self.replicas = bool(owned[0]) and all(set(slots) == set(owned[0]) for slots in owned)
        self.composers = [
            Composer(manifest, owned=slots if seed is None else (), next_batch=batch, fit_seed=i, mode=mode)
            for i, (slots, batch) in enumerate(zip(owned, batches, strict=True))
        ]
        if seed is not None:
            for slots, composer in zip(owned, self.composers, strict=True):
                seed.start(composer, slots)
        self.workers = [
            Worker(manifest, composers=self._steps, fit_seed=len(owned) + j, mode=mode) for j in range(len(workers))
        ]
        if self.workers:
            start = seed or Seed.of(self.composers[0])
            for slots, worker in zip(workers, self.workers, strict=True):
                start.start_worker(worker, slots, self.composers[0])
        self.flippers = flippers
        self.bytes = Bytes()
        self._late = late
        self._sketches: deque[tuple[int, int, list[Sent]]] = deque()  # due step, version that they were taken at
        self._deltas: deque[tuple[int, list[Published]]] = deque()  # due step
        self._rounds: deque[tuple[int, int, list[Entry]]] = deque()  # due step, fragment, what was sent
        self._published = self._applied = 0  # versions of all stand-ins
        self._experts: dict[tuple[int, int, str], tuple[Tensor, Tensor]] = {}  # of replicas: last merged, momentum
        if self.replicas:
            self._note_experts()
        if frozen:
            self._copy_experts()
        self.delivery: DirectDelivery | GradientDelivery | None = None
        if manifest.sketch.kind != "none" and not self.replicas:
            delivery = DirectDelivery if manifest.sketch.goes_to_owners else GradientDelivery
            owners = {slot: owner for owner in self.owners for slot in owner.owned}
            self.delivery = delivery(manifest, self.composers, owners)

    @property
    def publishes(self) -> bool:
        """Whether there are stand-ins that owners send."""
        return not self.replicas and not self.frozen

    @property
    def outer_expert_bytes(self) -> int:
        """What each replica needs for outer steps of its experts; none where experts are no more than averaged."""
        outer = self.manifest.outer
        if outer.merge == "mean" and outer.learning_rate == 1.0 and outer.momentum == 0.0:
            return 0
        return sum(tensor.nbytes for state in self._experts.values() for tensor in state)

    @property
    def owners(self) -> list[ExpertOwner]:
        """Whoever may own slots."""
        return [*self.composers, *self.workers]

    def _steps(self) -> dict[str, int]:
        return {str(i): composer.step for i, composer in enumerate(self.composers)}

    def run(self, steps: int) -> Iterator[float]:
        """Train for `steps` inner steps each; yields the composers' mean loss after every step."""
        publish_every = self.manifest.standin.publish_every
        cadence = cadences(self.composers[0].fragments, self.manifest)
        for step in range(1, steps + 1):
            losses = self._step(step)
            self._share_counts()
            if step % publish_every == 0 and self.publishes:
                self._publish(step)
            self._apply_deltas(step)
            if len(self.composers) > 1:
                for index, due in enumerate(cadence):
                    if due.before(step) == step:
                        self._begin_round(index, step)
            self._end_rounds(step)
            yield sum(losses) / len(losses)
        self._end_rounds(math.inf)
        for fragment in range(len(self.composers[0].fragments)):
            if len(self.composers) > 1 and self.composers[0].steps_since_commit(fragment):
                self._begin_round(fragment, steps)
        self._end_rounds(math.inf)

    def _step(self, step: int) -> list[float]:
        for composer in self.composers:
            composer.compute()
        if self.delivery is not None and step % self.delivery.every == 0:
            nbytes, sent = self.delivery.send()
            self.bytes.sketches += nbytes
            self._sketches.append((step + self._late, self._applied, sent))
        while self._sketches and self._sketches[0][0] <= step:
            _, version, arrived = self._sketches.popleft()
            for each in arrived:
                each.arrive(self._published - version)
        losses = [composer.apply().loss for composer in self.composers]
        for worker in self.workers:
            if worker.has_work():
                worker.train_step()
        return losses

    def _share_counts(self) -> None:
        counts = [c.last_counts for c in self.composers]
        known = [c for c in counts if c is not None]
        if len(known) == len(counts):
            total = torch.stack(known).sum(0)
            for composer, own in zip(self.composers, known, strict=True):
                composer.swarm_counts = total - own

    def _publish(self, step: int) -> None:
        self._published += 1
        published = []
        for sender in self.owners:
            for slot, deltas in sender.publish().items():
                whole = [] if deltas else [standin.to_bytes() for standin in sender.standins(slot)]
                published.append(Published(slot, deltas, whole))
                self.bytes.deltas += sum(map(len, deltas)) + sum(map(len, whole)) * (len(self.composers) - 1)
        self._deltas.append((step + self._late, published))

    def _apply_deltas(self, step: int) -> None:
        while self._deltas and self._deltas[0][0] <= step:
            self._applied += 1
            for slot, deltas, whole in self._deltas.popleft()[1]:
                for receiver in self.composers:
                    if slot in receiver.owned:
                        continue
                    self.bytes.deltas_received += sum(map(len, deltas)) + sum(map(len, whole))
                    if whole:
                        receiver.set_standins(slot, [receiver.menu.load(data) for data in whole])
                        continue
                    for standin, delta in zip(receiver.standins(slot), deltas, strict=True):
                        standin.apply(delta)

    def _begin_round(self, index: int, step: int) -> None:
        if any(index == under_way for _, under_way, _ in self._rounds):
            return  # as in the node, a fragment has one round at a time
        entries = [c.begin_round(index) for c in self.composers]
        for i in range(self.flippers):
            entries[i] = entries[i]._replace(vector=-entries[i].vector)
        self._rounds.append((step + self.manifest.outer.overlap_steps, index, entries))

    def _end_rounds(self, step: float) -> None:
        while self._rounds and self._rounds[0][0] <= step:
            self._end_round(*self._rounds.popleft()[1:])

    def _end_round(self, index: int, entries: list[Entry]) -> None:
        average, facts = self._average(entries)
        for composer in self.composers:
            composer.commit_round(index, *composer.propose(index, average, facts))
        if index != self._experts_with:
            return
        if self.frozen:
            self._copy_experts()
        if self.replicas:
            self._merge_experts(entries)

    @property
    def _experts_with(self) -> int:
        """The fragment in whose rounds experts go, where they go in rounds: the first that is due every H steps."""
        due = cadences(self.composers[0].fragments, self.manifest)
        return next(index for index, each in enumerate(due) if each.every == self.manifest.outer.every_steps)

    def _copy_experts(self) -> None:
        for owner in self.owners:
            for slot in owner.owned:
                weights = [float_weights(expert) for expert in owner.experts_of(slot)]
                copies = [NarrowStandIn({"gate_up": w.clone(), "down": v.clone()}) for w, v in weights]
                nbytes = sum(2 * (w.numel() + v.numel()) for w, v in weights)
                self.bytes.deltas += nbytes
                for composer in self.composers:
                    if slot not in composer.owned:
                        self.bytes.deltas_received += nbytes
                        composer.set_standins(slot, copies)

    def _average(self, entries: Sequence[Entry]) -> tuple[Tensor, list[Facts]]:
        """What the all-reduce makes of the composers' entries, and who brought how much."""
        codec = PartCodec(self.manifest.outer.codec)
        facts = [Facts(str(i), entry.tokens, entry.steps, entry.norms) for i, entry in enumerate(entries)]
        share = shares(weights(facts))
        received = [codec.as_received(entry.vector) for entry in entries]
        if self.manifest.outer.robust:
            average = robust_mean(received, list(share.values()))
        else:
            total = sum(share.values())
            average = torch.zeros_like(received[0])
            for vector, part in zip(received, share.values(), strict=True):
                average += vector * (part / total)
        self.bytes.outer += 2 * codec.encoded_bytes(average.numel()) * len(entries)
        return codec.as_received(average), facts

    def _note_experts(self) -> None:
        for slot in range(self.composers[0].num_slots):
            for layer, expert in enumerate(self.composers[0].experts_of(slot)):
                for name in ("gate_up", "down"):
                    common = getattr(expert, name).detach().clone()
                    self._experts[slot, layer, name] = common, torch.zeros(common.numel())

    @torch.no_grad()
    def _merge_experts(self, entries: Sequence[Entry]) -> None:
        """As the backbone is merged, each expert's matrices on their own; by the weights of `entries`."""
        outer = self.manifest.outer
        for (slot, layer, name), (common, momentum) in self._experts.items():
            copies = [getattr(composer.experts_of(slot)[layer], name) for composer in self.composers]
            learned = [(common - copy).flatten() for copy in copies]
            matrix = Fragment(0, (name,), (common.numel(),), common.numel())
            if outer.merge == "radial":
                split = [radial.split(matrix, each) for each in learned]
            else:
                split = [(each, entry.norms) for each, entry in zip(learned, entries, strict=True)]
            sent = [e._replace(vector=v, norms=norms) for e, (v, norms) in zip(entries, split, strict=True)]
            average, facts = self._average(sent)
            if outer.merge == "radial":
                average = radial.combine(matrix, average, facts)
            merged, moved = outer_step(common.flatten(), average, momentum, outer.learning_rate, outer.momentum)
            self._experts[slot, layer, name] = merged.view_as(common), moved
            for copy in copies:
                copy.copy_(merged.view_as(copy))

    def merged(self) -> Composer:
        """One composer that holds the merged model: the common backbone and every expert from its owner."""
        whole = Composer(self.manifest, owned=range(self.composers[0].num_slots), next_batch=lambda: torch.empty(0))
        for index, flat in enumerate(self.composers[0].common):
            whole.reset_fragment(index, flat, self.composers[0].momentum[index])
        with torch.no_grad():
            for owner in self.owners:
                for slot in owner.owned:
                    for ours, theirs in zip(whole.model.experts_of(slot), owner.experts_of(slot), strict=True):
                        for into, weights in zip(ours.masters(), theirs.masters(), strict=True):
                            into.copy_(weights)
        return whole
