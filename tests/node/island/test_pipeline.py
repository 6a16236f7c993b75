"""Real processes compute stages of one composer's steps: what comes out is what one process makes of the same batch."""

from __future__ import annotations

import os
import random
import signal
from typing import Any

import pytest
import tiny
import torch
from comparing import same, same_gradient_sketches, same_rows, same_signs
from shoal.node.errors import ConfigError
from shoal.node.island import leader
from shoal.node.island.leader import Island
from shoal.node.island.pipeline import Pipeline, microbatches
from shoal.node.learning.composer import Composer
from shoal.node.learning.expert_mode import ExpertMode
from shoal.node.model.stages import spans
from shoal.node.run.manifest import Manifest, ModelSpec
from shoal.node.sketches.gradient_collecting import GradientCollector, GradientForm
from shoal.node.sketches.sign_collecting import SignCollector
from shoal.node.sketches.sketching import SketchCollector

pytestmark = pytest.mark.timeout(180)

BATCH = 4  # so that there are microbatches


def manifest_of(layers: int = 2, capacity_factor: float = 0.0, private_layers: int = 0, **config: Any) -> Manifest:
    manifest = tiny.manifest_of(train={"balance_coef": 0.5, "z_coef": 0.1, "batch_size": BATCH})
    config = tiny.CONFIG | {"num_hidden_layers": layers} | config
    model = ModelSpec(config=config, capacity_factor=capacity_factor, private_layers=private_layers)
    return Manifest(**{field: getattr(manifest, field) for field in manifest.__struct_fields__} | {"model": model})


def pair(manifest: Manifest, islands: list[Island], stages: int = 2, **more: Any) -> tuple[Composer, Composer]:
    """One process, and a pipeline, on the same random batches and with the same routing of other composers."""
    seed = random.randrange(1 << 30)
    composers = []
    for _ in range(2):
        text = tiny.batches(seed)
        torch.manual_seed(seed)
        composer = Composer(manifest, next_batch=lambda text=text: torch.cat([text(), text()]), **more)
        composer.swarm_counts = torch.randint(0, 60, (composer.shape.num_layers + manifest.model.private_layers, 4))
        composers.append(composer)
    island = Pipeline(stages, ["cpu"] * stages, 1, spans=spans(manifest.model, stages))
    composers[1].island = island
    islands.append(island)
    return composers[0], composers[1]


def test_a_model_that_does_more_around_its_layers_is_refused_at_the_start() -> None:
    config = {
        name: value for name, value in tiny.CONFIG.items() if name not in ("num_experts", "moe_intermediate_size")
    }
    config |= {"model_type": "granitemoe", "num_local_experts": 4, "intermediate_size": 24}
    for multiplier, makes_stages in ((1.0, True), (12.0, False)):
        model = ModelSpec(config=config | {"embedding_multiplier": multiplier})
        manifest = Manifest(name="tiny", founder="12D3KooWtiny", created_at=0, model=model)
        composer = Composer(manifest, owned=(0,), next_batch=tiny.batches())
        island = Pipeline(2, ["cpu"] * 2, 1, spans=spans(model, 2))
        if makes_stages:
            island.serve(composer)
            assert (composer.island, composer.processes) == (island, 2)
        else:
            with pytest.raises(ConfigError, match="layers of granitemoe do not make stages"):
                island.serve(composer)
            assert composer.island is None


def step_alike(one: Composer, many: Composer) -> None:
    a, b = one.train_step(), many.train_step()
    assert many.island is not None
    assert many.island.together
    assert (b.tokens, b.processes) == (a.tokens, many.island.size)
    assert b.loss == pytest.approx(a.loss, rel=1e-5)
    torch.testing.assert_close(one.last_counts, many.last_counts)


@pytest.mark.parametrize(
    ("stages", "facts"),
    [
        (2, {}),
        (2, {"layers": 3, "private_layers": 1, "tie_word_embeddings": True}),
        (4, {"layers": 4}),
        (2, {"capacity_factor": 0.8}),
    ],
)
def test_a_pipeline_learns_what_one_process_learns(stages: int, facts: dict[str, Any], islands: list[Island]) -> None:
    one, many = pair(manifest_of(**facts), islands, stages, owned={0, 2})
    for step in range(6):
        if step == 2:  # what the network's side does between steps
            for composer in (one, many):
                assert composer.publish()
                composer.release(2)
                composer.adopt(1, None)
        if step == 4:
            for composer in (one, many):
                snapshot = composer.snapshot(1)
                composer.release(1)
                composer.adopt(1, snapshot)  # other tensors in the same slot
                composer.reset_fragment(0, composer.common[0], composer.momentum[0])
                other = composer.standins(3)
                composer.set_standins(2, other)
        step_alike(one, many)
    same(one, many)
    for slot in one.owned:  # rows to fit stand-ins to: bfloat16, of inputs that differ in their last bits
        for mine, theirs in zip(one.publishers[slot], many.publishers[slot], strict=True):
            a, b = mine.state_dict(), theirs.state_dict()
            assert torch.equal(a["replay.seen"], b["replay.seen"])
            torch.testing.assert_close(b["replay.x"], a["replay.x"], rtol=2e-2, atol=1e-3)
            torch.testing.assert_close(b["replay.gate"], a["replay.gate"], rtol=1e-3, atol=1e-4)


def test_low_rank_experts(islands: list[Island]) -> None:
    manifest = manifest_of()
    one, many = pair(manifest, islands, owned=set(), mode=ExpertMode(manifest.train, "lora", rank=2))
    start, seed = one.standins(3), random.randrange(1 << 30)
    for composer in (one, many):
        torch.manual_seed(seed)
        composer.adopt(3, None, start)
    for _ in range(3):
        step_alike(one, many)
    same(one, many)


def test_rows_for_others_come_from_all_stages(islands: list[Island]) -> None:
    manifest = manifest_of()
    one, many = pair(manifest, islands, owned={0})
    for composer in (one, many):
        composer.collector = SketchCollector(manifest.sketch, composer.shape, seed=0)
    step_alike(one, many)
    step_alike(one, many)
    same_rows(one, many)


@pytest.mark.parametrize("owned", [{0}, set(range(tiny.SLOTS))])
def test_sketches_of_gradients_come_from_all_stages(owned: set[int], islands: list[Island]) -> None:
    one, many = pair(manifest_of(), islands, owned=owned)
    for composer in (one, many):
        composer.collector = GradientCollector(GradientForm(run_id="r", shape=composer.shape, rank=4))
    step_alike(one, many)
    same_gradient_sketches(one, many)


def test_signs_come_from_all_stages(islands: list[Island]) -> None:
    one, many = pair(manifest_of(), islands, owned={0})
    for composer in (one, many):
        composer.collector = SignCollector(composer.shape, seed=1)
    step_alike(one, many)
    same_signs(one, many)


def test_a_lost_stage_costs_a_batch_and_is_replaced(islands: list[Island], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leader, "FIRST_PAUSE_SECONDS", 0.0)
    one, many = pair(manifest_of(), islands, owned={0})
    island = many.island
    assert island is not None
    island._pause = 0.0
    step_alike(one, many)
    os.kill(island.members[0].process.pid, signal.SIGKILL)
    island.members[0].process.wait()
    one.next_batch()  # it went with the stage
    assert many.train_step().loss == pytest.approx(one.train_step().loss, rel=1e-5)
    assert not island.together, "this one it took alone"
    step_alike(one, many)
    same(one, many)
    pids = [member.process.pid for member in island.members]
    island.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_microbatches_are_of_one_size() -> None:
    assert [microbatches(n, 2, 0.0) for n in (1, 2, 7, 8, 12, 32)] == [1, 2, 1, 2, 2, 2]
    assert [microbatches(n, 4, 0.0) for n in (1, 2, 7, 8, 12, 30)] == [1, 2, 1, 4, 4, 3]
    assert microbatches(8, 2, 1.25) == 1, "what is dropped depends on all tokens of a batch"
