"""Sketches in the in-process swarm: owners learn what one process learns from all tokens together.

Experts and stand-ins are ternary, so stand-ins are exact. Nothing is clipped, and the learning rate is so small that no
weight moves: the optimizer's first moment then holds the gradients of the last steps, and nothing else differs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from shoal.benchmarks.inprocess import InProcessSwarm
from shoal.benchmarks.seeding import Seed
from shoal.kernels.standin import initial_standin
from shoal.node.learning.composer import Composer
from shoal.node.learning.owning import ExpertOwner
from shoal.node.model.presets import preset
from shoal.node.run.manifest import Manifest, with_settings
from torch import Tensor

CONTEXT, SLOTS, LAYERS, STEPS, COMPOSERS = 32, 16, 3, 2, 3
STILL = (
    "train.learning_rate=1e-12",
    "train.grad_clip=1e9",
    "train.balance_coef=0",
    "train.expert_weights=ternary",
    "standin.kind=ternary",
    "sketch.kappa=0",
)
Batches = list[Callable[[], Tensor]]


def manifest_of(*settings: str) -> Manifest:
    manifest = Manifest(name="tiny", founder="12D3KooWtiny", created_at=0, model=preset("tiny").model)
    return with_settings(manifest, settings)


def batches_of(tokens: list[list[Tensor]]) -> Batches:
    """One source per composer; `tokens` is by step, then by composer."""
    streams = [iter(composer) for composer in zip(*tokens, strict=True)]
    return [lambda stream=stream: next(stream) for stream in streams]  # type: ignore[misc]


def random_tokens() -> list[list[Tensor]]:
    return [[torch.randint(256, (4, CONTEXT)) for _ in range(COMPOSERS)] for _ in range(STEPS)]


def split(owners: int) -> list[list[int]]:
    return [list(range(i, SLOTS, owners)) for i in range(owners)]


def gradients(owners: list[ExpertOwner]) -> dict[tuple[int, int, str], Tensor]:
    """The first moment of every expert's weights, by slot, layer and name."""
    return {
        (slot, layer, name): owner.optimizer.state[weights]["exp_avg"].clone()
        for owner in owners
        for slot in owner.owned
        for layer, expert in enumerate(owner.experts_of(slot))
        for name, weights in (("gate_up", expert.gate_up), ("down", expert.down))
        if weights in owner.optimizer.state
    }


def difference(got: Mapping[tuple[int, int, str], Tensor], wanted: Mapping[tuple[int, int, str], Tensor]) -> float:
    """Norm of what differs over the norm of what is wanted, over all experts."""
    assert set(got) == set(wanted)
    assert len(wanted) > SLOTS * LAYERS  # of twice as many: hardly an expert got no token
    wrong = sum(float((got[key] - wanted[key]).square().sum()) for key in wanted)
    return (wrong / sum(float(value.square().sum()) for value in wanted.values())) ** 0.5


def run(swarm: InProcessSwarm) -> InProcessSwarm:
    assert len(list(swarm.run(STEPS))) == STEPS
    return swarm


def trained_jointly(manifest: Manifest, tokens: list[list[Tensor]]) -> Composer:
    joint = iter([torch.cat(step) for step in tokens])
    composer = Composer(manifest, owned=range(SLOTS), next_batch=lambda: next(joint))
    for _ in range(STEPS):
        composer.train_step()
    return composer


@pytest.mark.parametrize(("codec", "tolerance"), [("float16", 2e-3), ("int8", 2e-2), ("int4", 0.2)])
@pytest.mark.parametrize("workers", [0, 2])
def test_owners_learn_what_one_process_learns_from_the_joint_batch(codec: str, tolerance: float, workers: int) -> None:
    manifest = manifest_of(*STILL, f"sketch.codec={codec}", f"train.steps={STEPS}")
    tokens = random_tokens()
    wanted = gradients([trained_jointly(manifest, tokens)])
    owned, working = ([[]] * COMPOSERS, split(workers)) if workers else (split(COMPOSERS), [])
    swarm = run(InProcessSwarm(manifest, batches_of(tokens), owned, workers=working))
    assert difference(gradients(swarm.owners), wanted) < tolerance
    assert swarm.bytes.sketches > 0


def test_without_sketches_they_learn_something_else() -> None:
    manifest = manifest_of(*STILL, "sketch.kind=none")
    tokens = random_tokens()
    wanted = gradients([trained_jointly(manifest, tokens)])
    got = gradients(run(InProcessSwarm(manifest, batches_of(tokens), split(COMPOSERS))).owners)
    assert difference(got, {key: wanted[key] for key in got}) > 0.3


def test_gradient_sketches_of_several_composers_add_up_to_that_of_the_joint_batch() -> None:
    settings = [*STILL, "sketch.kind=gradient", f"sketch.gradient_every={STEPS}", "train.z_coef=0"]
    tokens = random_tokens()
    together = [[torch.cat(step)] for step in tokens]

    def learned(rank: int, batches: Batches) -> dict[tuple[int, int, str], Tensor]:
        manifest = manifest_of(*settings, f"sketch.rank={rank}")
        return gradients(run(InProcessSwarm(manifest, batches, [[]] * len(batches), workers=split(2))).owners[-2:])

    apart, joint = learned(8, batches_of(tokens)), learned(8, batches_of(together))
    assert difference(apart, joint) < 1e-3
    full = learned(64, batches_of(tokens))  # of full rank nothing is lost
    assert difference(full, learned(64, batches_of(together))) < 1e-3
    assert difference(apart, full) > 0.1  # while rank 8 did lose something


def test_owners_learn_from_signs_what_is_in_them() -> None:
    """Not the joint batch's gradient, but nearer to it than their own tokens' is."""
    tokens = random_tokens()
    wanted = gradients([trained_jointly(manifest_of(*STILL), tokens)])

    def learned(kind: str) -> dict[tuple[int, int, str], Tensor]:
        manifest = manifest_of(*STILL, f"sketch.kind={kind}", "sketch.gradient_every=1")
        return gradients(run(InProcessSwarm(manifest, batches_of(tokens), split(COMPOSERS))).owners)

    signs, alone = learned("signs"), learned("none")
    of_both = {key: wanted[key] for key in alone}
    assert difference({key: signs[key] for key in alone}, of_both) < 0.8 * difference(alone, of_both)


def test_sketches_keep_to_the_budget_and_to_their_interval() -> None:
    tokens, budget = random_tokens(), 20_000
    headers = 24 * SLOTS * LAYERS
    everything = run(InProcessSwarm(manifest_of(*STILL), batches_of(tokens), split(COMPOSERS))).bytes.sketches
    some = manifest_of(*STILL, f"sketch.budget_bytes={budget}")
    sampled = run(InProcessSwarm(some, batches_of(tokens), split(COMPOSERS))).bytes.sketches
    assert 0.5 * STEPS * COMPOSERS * budget < sampled <= STEPS * COMPOSERS * (budget + headers) < everything
    rarely = manifest_of(*STILL, f"sketch.every={STEPS + 1}")
    assert run(InProcessSwarm(rarely, batches_of(tokens), split(COMPOSERS))).bytes.sketches == 0


@pytest.mark.parametrize("kind", ["lowbit", "narrow"])
def test_everybody_goes_on_from_one_seed(kind: str) -> None:
    manifest = manifest_of(f"standin.kind={kind}", "standin.refit_steps=1")
    tokens = random_tokens()
    trained = trained_jointly(manifest_of("train.learning_rate=1e-2", "train.warmup_steps=0"), tokens)
    seed = Seed.of(trained)
    owned = [list(range(8)), [], []]
    swarm = InProcessSwarm(manifest, batches_of(tokens), owned, workers=[list(range(8, SLOTS))], seed=seed)
    probe = torch.randint(256, (1, CONTEXT))
    assert torch.equal(swarm.merged().model(probe), trained.model(probe))
    assert {owner.step for owner in swarm.owners} == {STEPS}
    width = max(1, round(manifest.standin.width_fraction * trained.shape.width))
    for slot in range(SLOTS):
        for layer, expert in enumerate(trained.experts_of(slot)):
            wanted = initial_standin(kind, expert.gate_up.detach(), expert.down.detach(), width).digest()
            assert all(composer.standins(slot)[layer].digest() == wanted for composer in swarm.composers)
