"""The same model on the same tokens, trained in several ways: what is compared, and how each way is run.

    centralized        one process, the joint batch of all composers
    lone               one composer, its own share of the tokens
    diloco             full replicas, everything merged every H steps
    spes               full models, each peer trains its own experts, takes the others' from their owners every H steps
                       (SPES, from its paper's description)
    shoal-KIND         experts split among composers, stand-ins of that kind    (in one process, the node's own code)
    extreme-KIND       experts split among workers; composers own none          (the same)

KIND is lowbit, narrow, ternary or chosen; ternary trains experts ternary too, whose copies are then exact. `+rows`,
`+signs` or `+gradient` after it sends sketches to owners, without it there are none. `@lora` or `@frozen` after that:
owners train low-rank factors beside 4-bit weights, or nothing; `@lora4` names a rank. Facts of the manifest that differ
for one method alone stand behind it: `shoal-narrow+rows:sketch.kappa=0:sketch.codec=float16`.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch

from ..node.config import ExpertModeName
from ..node.learning.composer import Composer
from ..node.learning.data import Batches, load_corpus
from ..node.learning.evaluate import HELDOUT_SEED, heldout_loss
from ..node.learning.expert_mode import ExpertMode
from ..node.run.manifest import Manifest, OuterSpec, SketchSpec, StandInSpec, canonical_bytes, with_settings
from .costs import counting, expert_bytes, peak_bytes, state_bytes
from .inprocess import Bytes, InProcessSwarm
from .results import Result
from .seeding import Seed

PLAIN = ("centralized", "lone", "diloco", "spes")
METHODS = (*PLAIN, "shoal-lowbit", "shoal-lowbit+rows", "shoal-narrow", "shoal-narrow+rows")
STANDINS = ("lowbit", "narrow", "ternary", "chosen")  # shared ones need a checkpoint to start from
_METHOD = re.compile(
    rf"(?P<plain>{'|'.join(PLAIN)})|(?P<who>shoal|extreme)-(?P<kind>{'|'.join(STANDINS)})(\+(?P<sketch>rows|signs|gradient))?"
    r"(@(?P<mode>frozen|lora(?P<rank>\d+)?))?"
)
NO_TOKENS = torch.empty(0)
COUNTED_STEPS = 24  # whose FLOPs are counted: every cadence of a run comes in them
MAX_COMPOSERS = 1000  # so that no two seeds share batches


@dataclass(frozen=True)
class Method:
    """One way of training."""

    name: str
    plain: str | None  # centralized, lone, diloco, spes; None for a swarm of owners
    extreme: bool
    manifest: Manifest
    mode: ExpertMode

    @property
    def merges(self) -> bool:
        """Whether there are outer steps."""
        return self.plain not in ("centralized", "lone")

    @classmethod
    def parse(cls, text: str, manifest: Manifest) -> Method:
        """Raises ValueError: no such method; ConfigError: a setting that is not possible."""
        name, *settings = text.split(":")
        found = _METHOD.fullmatch(name)
        if found is None:
            raise ValueError(f"no method {name!r}: {', '.join(PLAIN)}, shoal-KIND or extreme-KIND, see --help")
        if found["kind"] is not None:
            own = [f"standin.kind={found['kind']}", f"sketch.kind={found['sketch'] or 'none'}"]
            if found["kind"] == "ternary":
                own.append("train.expert_weights=ternary")
            settings = own + settings
        if found["plain"] == "spes":
            settings = ["sketch.kind=none", *settings]
        own_facts = with_settings(manifest, settings)
        mode: ExpertModeName = "frozen" if found["mode"] == "frozen" else "lora" if found["mode"] else "full"
        how = ExpertMode(own_facts.train, mode, int(found["rank"] or 16))
        return cls(text, found["plain"], found["who"] == "extreme", own_facts, how)


class Comparison:
    """All methods share model, seeds, data, schedule and evaluation.

    Args:
        windows: held-out windows.
        workers: that share the experts where composers own none.
        flippers: composers that send the opposite of what they learned.
        late: steps that sketches and deltas are under way.
        chance: what initial weights and batches are drawn by.
        seed_steps: centralized steps before anybody starts. `manifest.train.steps` has them too; optimizers start anew.
        folder: keeps what they came to, for the next comparison that starts there.
    """

    def __init__(
        self,
        manifest: Manifest,
        composers: int,
        windows: int,
        *,
        workers: int = 2,
        seed_steps: int = 0,
        flippers: int = 0,
        late: int = 0,
        chance: int = 0,
        folder: Path | None = None,
    ) -> None:
        model = msgspec.structs.replace(manifest.model, seed=manifest.model.seed + chance)
        self.manifest = msgspec.structs.replace(manifest, model=model)
        self.flippers, self.late, self.chance = flippers, late, chance
        self.num_composers, self.num_workers = composers, workers
        self.seed_steps, self._folder = seed_steps, folder
        corpus = load_corpus(manifest.data.corpus)
        self.heldout = corpus.heldout(windows, manifest.data.context_length, seed=HELDOUT_SEED)
        self._shards = [corpus.shard(i, composers) for i in range(composers)]
        self.num_slots = Composer(manifest, owned=(), next_batch=lambda: NO_TOKENS).num_slots
        self._seed: Seed | None = None

    @property
    def steps(self) -> int:
        """Of each method."""
        return self.manifest.train.steps - self.seed_steps

    @property
    def tokens(self) -> int:
        """That all composers of a method train on together."""
        batch = self.manifest.train.batch_size * self.manifest.data.context_length
        return self.num_composers * self.steps * batch

    def batches(self, index: int, start: int) -> Batches:
        """Composer `index`'s batches from number `start` on."""
        train = self.manifest.train
        seed = index + MAX_COMPOSERS * self.chance
        batches = Batches(self._shards[index], train.batch_size, self.manifest.data.context_length, seed=seed)
        batches.position = start
        return batches

    def _alone(self, manifest: Manifest, shards: int, *, seed: Seed | None) -> Composer:
        """A composer that owns everything and reads the first `shards` composers' batches."""
        everything = range(self.num_slots)
        start = 0 if seed is None else seed.step
        sources = [self.batches(i, start) for i in range(shards)]
        composer = Composer(
            manifest,
            owned=everything if seed is None else (),
            next_batch=lambda: torch.cat([source.next() for source in sources]),
        )
        if seed is not None:
            seed.start(composer, everything)
        return composer

    def seed(self, report: Callable[[int, float], None]) -> Seed | None:
        """The common start, trained once: by `manifest`, whatever a method's own facts are."""
        if not self.seed_steps or self._seed is not None:
            return self._seed
        kept = None if self._folder is None else self._folder / f"seed-{self._seed_key()}.pt"
        if kept is not None and kept.exists():
            self._seed = Seed.load(kept)
            return self._seed
        composer = self._alone(self.manifest, self.num_composers, seed=None)
        for step in range(1, self.seed_steps + 1):
            report(step, composer.train_step().loss)
        self._seed = Seed.of(composer)
        if kept is not None:
            self._seed.save(kept)
        return self._seed

    def key(self, text: str) -> str:
        """Names what one method's result follows from; the same on every machine that has the same text."""
        method = Method.parse(text, self.manifest)
        facts = method.manifest if method.merges else _unmerged(method.manifest)
        who = [self.num_composers, self.num_workers, self.flippers, self.late, self.chance]
        return _digest(text.split(":")[0], *who, self._seed_key(), len(self.heldout), canonical_bytes(facts).hex())

    def _seed_key(self) -> str:
        if not self.seed_steps:
            return ""
        facts = canonical_bytes(_unmerged(self.manifest)).hex()
        return _digest(self.seed_steps, self.num_composers, self.chance, facts)

    def run(self, text: str, report: Callable[[int, float], None], *, costs: bool = True) -> Result:
        """Train with one method and evaluate; `report(step, loss)` after every step. Costs are measured unless told."""
        method = Method.parse(text, self.manifest)
        seed = self.seed(report)
        began = time.monotonic()
        swarm: InProcessSwarm | None = None
        if not method.merges:
            shards = self.num_composers if method.plain == "centralized" else 1
            merged = self._alone(method.manifest, shards, seed=seed)
            losses: Iterator[float] = (merged.train_step().loss for _ in range(self.steps))
        else:
            swarm = self._swarm(method, seed)
            shards = self.num_composers
            losses = swarm.run(self.steps)
        uncounted = max(0, self.steps - COUNTED_STEPS) if costs else self.steps
        for step in range(1, uncounted + 1):
            report(step, next(losses))
        with counting() as flops:
            for step, loss in enumerate(losses, start=uncounted + 1):
                report(step, loss)
        seconds = time.monotonic() - began
        whole = merged if swarm is None else swarm.composers[0] if swarm.replicas else swarm.merged()
        batch = self.manifest.train.batch_size * self.manifest.data.context_length
        sent = Bytes() if swarm is None else swarm.bytes
        up = {"sketches": sent.sketches, "deltas": sent.deltas, "rounds": sent.outer // 2}
        result = Result(
            method=text,
            loss=heldout_loss(whole.model, self.heldout),
            seconds=seconds,
            seed=self.chance,
            tokens=batch * shards * self.steps,
            up=up,
            down=up | {"deltas": sent.deltas_received},
        )
        if not costs:
            return result
        memory = _memory_alone(merged) if swarm is None else _memory(swarm)
        return replace(
            result,
            flops_per_token=flops.total / (batch * shards * (self.steps - uncounted)),
            state_bytes=memory.state,
            expert_bytes=memory.experts,
            peak_bytes=memory.peak,
        )

    def _swarm(self, method: Method, seed: Seed | None) -> InProcessSwarm:
        everything = list(range(self.num_slots))
        workers: list[list[int]] = []
        if method.plain == "diloco":
            owned = [everything] * self.num_composers
        elif method.extreme:
            owned = [[]] * self.num_composers
            workers = [everything[i :: self.num_workers] for i in range(self.num_workers)]
        else:
            owned = [everything[i :: self.num_composers] for i in range(self.num_composers)]
        start = 0 if seed is None else seed.step
        sources = [self.batches(i, start).next for i in range(self.num_composers)]
        return InProcessSwarm(
            method.manifest,
            sources,
            owned,
            workers=workers,
            seed=seed,
            flippers=self.flippers,
            late=self.late,
            frozen=method.plain == "spes",
            mode=method.mode,
        )


def _unmerged(manifest: Manifest) -> Manifest:
    """Without what matters only where something is merged, fitted or sketched."""
    return msgspec.structs.replace(manifest, outer=OuterSpec(), standin=StandInSpec(), sketch=SketchSpec())


def _digest(*facts: object) -> str:
    return hashlib.sha256(" ".join(map(str, facts)).encode()).hexdigest()[:16]


class _Memory(NamedTuple):
    state: int
    experts: int
    peak: int


def _memory_alone(composer: Composer) -> _Memory:
    state = state_bytes(composer, publishes=False)
    experts = expert_bytes(composer, publishes=False)
    return _Memory(state, experts, state + peak_bytes(composer.train_step))


def _memory(swarm: InProcessSwarm) -> _Memory:
    """Of the participant that holds most; the peak is the first composer's in one step more, with all that it does for
    others: sketches, a publication, its entry for a round. What it hears from others meanwhile is not in it."""
    composer, outer, publishes = swarm.composers[0], swarm.outer_expert_bytes, swarm.publishes

    def step() -> None:
        composer.compute()
        if swarm.delivery is not None:
            swarm.delivery.send()
        composer.apply()
        if publishes:
            composer.publish()
        composer.begin_round(0)

    if swarm.delivery is not None and swarm.delivery.every > 1:  # in the middle of an interval
        composer.compute()
        composer.apply()
    state = max(state_bytes(owner, publishes=publishes) for owner in swarm.owners)
    experts = max(expert_bytes(owner, publishes=publishes) for owner in swarm.owners)
    before = state_bytes(composer, publishes=publishes)
    return _Memory(outer + state, outer + experts, outer + before + peak_bytes(step))
