"""What reaches a worker over real transports while composers train on text: no text, and nothing by layer.

And what docs/privacy.md says that a worker can find out all the same.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import loopback as loopback_module
import msgspec
import numpy as np
import pytest
import torch
from eavesdropping import WIDTHS, WINDOW, Ear, Text, ears, found_text, gossiped, lists_of, structs_in, tensors_of
from loopback import HANDLE_KEY, RUN, Loopback, loopback
from loopback_workers import LEASE_SECONDS, LoopbackWorker
from scipy.stats import chi2
from shoal.node.model.init import expert_weights
from shoal.node.peer.links import NEWS_TOPIC
from shoal.node.run.manifest import Manifest, ModelSpec, OwnershipSpec, SketchSpec
from shoal.protocol.directory.records import LeaseRecord, PeerRecord
from shoal.protocol.experts.handles import Handles, new_key
from shoal.protocol.messages import DeltaBatch, ExpertCounts, HandleTable, SketchBatch, SlotState
from tiny import BATCH, CONFIG, CONTEXT, SLOTS, manifest_of

MIN_STEPS = 5  # under each distribution of slots
PRIVATE, LAYERS = 1, 5  # no list of anything else has five entries
ALL = set(range(SLOTS))
HANDLES = Handles(HANDLE_KEY)

# All that a worker is told. None of it is a layer; a new field belongs here once somebody has made sure of that.
FIELDS: dict[str, tuple[str, ...]] = {
    "PeerRecord": (
        "issued_at", "expires_at", "peer_id", "role", "phase", "capacity", "transport_addrs", "dht_addrs",
        "metrics_url", "version", "protocol_version", "step", "tokens", "tokens_per_second", "loss", "slots", "round",
        "fidelity",
    ),
    "LeaseRecord": ("issued_at", "expires_at", "owner", "leases"),
    "Lease": ("slot", "epoch", "version"),
    "SketchBatch": ("step", "tokens", "steps", "slots"),
    "SlotSketch": ("slot", "epoch", "seq", "experts"),
    "ExpertSketch": ("handle", "rows"),
    "SlotState": ("slot", "epoch", "version", "tensors", "standin"),
    "StandInSnapshot": ("slot", "epoch", "seq", "layers", "digest"),
    "HandleTable": ("slot", "epoch", "entries"),
}  # fmt: skip
# By expert of a slot, all in handle order: each is checked below.
BY_EXPERT = {"SketchBatch.slots.experts", "SlotState.standin.layers", "HandleTable.entries"}


def manifest() -> Manifest:
    base = manifest_of(
        outer={"every_steps": 1_000_000},
        train={"steps": 1_000_000, "learning_rate": 0.01},
        standin={"publish_every": 1},
    )
    return msgspec.structs.replace(
        base,
        model=ModelSpec(
            config=CONFIG | {"num_hidden_layers": PRIVATE + LAYERS},
            seed=secrets.randbits(30),
            private_layers=PRIVATE,
        ),
        ownership=OwnershipSpec(lease_seconds=LEASE_SECONDS, snapshot_every=1),
        sketch=SketchSpec(patience_seconds=0.3, max_age=4),
    )


@dataclass
class Scene:
    """What was said, and to whom."""

    spec: ModelSpec
    text: list[Text]
    workers: list[Ear]
    composers: list[Ear]
    subscribed: list[set[str]]  # by worker
    epochs: dict[int, set[int]]  # by slot, of the workers' leases
    final: list[tuple[int, int, dict[str, torch.Tensor]]]  # slot, epoch, weights by place, after training

    def told(self, kind: type) -> list[Any]:
        """Messages of one type that a worker got."""
        return [m for ear in self.workers for m in ear.decoded(RUN) if type(m) is kind]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """Two composers train on random printable text; one worker claims all slots, hands some to another, then leaves."""
    folder, spec = tmp_path_factory.mktemp("privacy"), manifest()
    with pytest.MonkeyPatch.context() as patch, ears() as heard:
        patch.setattr(loopback_module, "LAYERS", LAYERS)
        with loopback(folder / "swarm", spec, 2) as swarm:
            workers: list[LoopbackWorker] = []
            texts = [Text(BATCH, CONTEXT) for _ in swarm.peers]
            tasks: list[asyncio.Task[None]] = []
            try:
                _seat(swarm, texts, tasks)
                epochs: dict[int, set[int]] = {slot: set() for slot in ALL}
                workers.append(LoopbackWorker(swarm, folder / "first", capacity=SLOTS))
                swarm.until(lambda: set(workers[0].held) == ALL, "the worker owns every slot")
                _train(swarm, workers, epochs)
                workers.append(LoopbackWorker(swarm, folder / "second", capacity=SLOTS))
                swarm.until(lambda: set(workers[1].held), "it hands over")
                _train(swarm, workers, epochs)
                workers[0].leave()
                swarm.until(lambda: set(workers[1].held) == ALL, "the other owns every slot")
                _train(swarm, workers[1:], epochs)
                final = [(s, e, workers[1].ask(lambda w, s=s: w.weights(s))) for s, e in workers[1].held.items()]
                yield Scene(
                    spec.model,
                    texts,
                    [heard[worker.peer_id] for worker in workers],
                    [heard[peer.peer_id] for peer in swarm.peers],
                    [set(worker.links.transport._topics) for worker in workers],
                    epochs,
                    final,
                )
            finally:
                for worker in workers:
                    worker.close()
                swarm.call(_cancel(tasks))


def _seat(swarm: Loopback, texts: list[Text], tasks: list[asyncio.Task[None]]) -> None:
    async def follow(peer: Any) -> None:
        tasks.extend(asyncio.create_task(work) for work in (peer.exchange.run(), peer.keeper.run()))

    for peer, text in zip(swarm.peers, texts, strict=True):
        peer.ask(lambda c, text=text: setattr(c, "next_batch", text.next_batch))
        peer.send_sketches()
        assert peer.member is not None
        assert peer.library is not None
        peer.library.handle_key = HANDLE_KEY
        peer.member.capacity = peer.keeper.capacity = 0
        swarm.call(peer.member.announce())
        swarm.call(follow(peer))


async def _cancel(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _train(swarm: Loopback, workers: list[LoopbackWorker], epochs: dict[int, set[int]]) -> None:
    """Steps until every slot was stepped under its present lease."""

    def known() -> bool:
        held = {slot: (worker.peer_id, epoch) for worker in workers for slot, epoch in worker.held.items()}
        views = [{slot: (t.owner, t.epoch) for slot, t in p.exchange.owners().items()} for p in swarm.peers]
        return set(held) == ALL and all(view == held for view in views)

    swarm.until(known, "composers know the owners")
    before = _steps(workers)

    def step() -> None:
        for peer in swarm.peers:
            peer.step()
        swarm.until(lambda: not any(peer.sender._under_way for peer in swarm.peers), "all were answered")

    for _ in range(MIN_STEPS):
        step()

    def stepped() -> bool:
        step()
        return {slot for slot, _ in _steps(workers) - before} == ALL and known()

    swarm.until(stepped, "every slot was stepped")
    for worker in workers:
        for slot, epoch in worker.held.items():
            epochs[slot].add(epoch)


def _steps(workers: list[LoopbackWorker]) -> set[tuple[int, int]]:
    return {pair for worker in workers for pair in worker.ask(lambda w: set(w.slot_steps.items()))}


# -- text --------------------------------------------------------------------------------------------------------------


def test_no_window_of_the_text_reaches_a_worker(scene: Scene) -> None:
    """By chance, were the bytes random: 4 widths x 10 MB x 1500 windows / 2^48, once in five thousand runs."""
    windows = np.unique(np.concatenate([text.windows() for text in scene.text]))
    assert len(windows) > 600
    for ear in scene.workers:
        assert all((ear.calls, ear.fetched, ear.gossip, ear.records))
        assert sum(map(len, ear.bytes)) > 50_000
        for data in set(ear.bytes):  # records come again and again
            assert not found_text(data, windows), data[:80]


@pytest.mark.parametrize("width", WIDTHS)
def test_the_search_finds_text_where_it_is(scene: Scene, width: int) -> None:
    """Six tokens of the text, in each width and at any offset, inside what a worker got."""
    windows = np.unique(np.concatenate([text.windows() for text in scene.text]))
    row = scene.text[1].drawn[0][1]
    for offset in range(width):
        carrier = max(scene.workers[0].calls, key=len)
        at = 8 * (len(carrier) // 16) + offset
        planted = carrier[:at] + row[3 : 3 + WINDOW].astype(f"<u{width}").tobytes() + carrier[at:]
        assert found_text(planted, windows) == {width}
        short = carrier[:at] + row[3 : 2 + WINDOW].astype(f"<u{width}").tobytes() + b"\xff" * 8 + carrier[at:]
        assert not found_text(short, windows)


# -- layers ------------------------------------------------------------------------------------------------------------


def layer_talk(message: Any) -> list[str]:
    """What in a message goes by layer, or has not been looked at."""
    talk = [
        f"{type(part).__name__}.{name}"
        for part in structs_in(message)
        for name in part.__struct_fields__
        if name not in FIELDS.get(type(part).__name__, ())
    ]
    return talk + [path for path, _ in lists_of(message, LAYERS) if path not in BY_EXPERT]


def test_a_worker_is_told_nothing_by_layer(scene: Scene) -> None:
    for ear in scene.workers:
        told = ear.decoded(RUN)
        assert {SketchBatch, SlotState, HandleTable, PeerRecord, LeaseRecord} == {type(message) for message in told}
        assert not [talk for message in told for talk in layer_talk(message)]
        assert HANDLE_KEY not in b"".join(ear.bytes)
        assert not [name for name in ear.names if any(word in name for word in ("layer", "count", "backbone"))]


def test_counts_and_deltas_would_tell_and_workers_do_not_hear_them(scene: Scene) -> None:
    """What composers got by gossip would fail the test above."""
    heard = [message for ear in scene.composers for message in gossiped(ear.gossip, RUN)]
    counts = [message for message in heard if isinstance(message, ExpertCounts)]
    deltas = [message for message in heard if isinstance(message, DeltaBatch)]
    assert counts
    assert deltas
    assert all("ExpertCounts.counts" in layer_talk(message) for message in counts)
    assert all(layer_talk(message) for message in deltas)
    assert all(topics == {NEWS_TOPIC} for topics in scene.subscribed)


def test_experts_travel_in_the_order_of_handles(scene: Scene) -> None:
    batches, tables = scene.told(SketchBatch), scene.told(HandleTable)
    for sketch in itertools.chain.from_iterable(batch.slots for batch in batches):
        handles = [expert.handle for expert in sketch.experts]
        assert handles == list(HANDLES.sorted_handles(sketch.slot, sketch.epoch, LAYERS))
    for table in tables:
        assert [h for h, _ in table.entries] == list(HANDLES.sorted_handles(table.slot, table.epoch, LAYERS))
    for state, tensors in tensors_of(scene.told(SlotState)):
        assert {name.split(".")[0] for name in tensors} == set(map(str, range(LAYERS)))
        if state.epoch == 0:  # as seeded: what is at each place is known
            for place, layer in enumerate(HANDLES.order(state.slot, 0, LAYERS)):
                seeded = expert_weights(scene.spec, layer, state.slot, HANDLE_KEY)[0]
                assert torch.equal(tensors[f"{place}.gate_up"], seeded)


def test_names_change_with_the_lease(scene: Scene) -> None:
    """Every slot changed hands, and no handle was used under two leases."""
    assert all(len(epochs) > 1 for epochs in scene.epochs.values())
    used: dict[bytes, set[tuple[int, int]]] = {}
    for sketch in itertools.chain.from_iterable(batch.slots for batch in scene.told(SketchBatch)):
        for expert in sketch.experts:
            used.setdefault(expert.handle, set()).add((sketch.slot, sketch.epoch))
    assert {place for places in used.values() for place in places} >= {
        (slot, epoch) for slot, epochs in scene.epochs.items() for epoch in epochs
    }
    assert all(len(places) == 1 for places in used.values())


def p_value(orders: list[tuple[int, ...]]) -> float:
    """Chance that orders drawn at random spread items over places less evenly than these.

    Pearson's statistic of the table items x places. Rows and columns all sum up to the number of orders, which leaves
    (L-1)^2 degrees of freedom, and one entry an order a row: (L-1)/L of it is chi-squared for many orders.
    """
    size = len(orders[0])
    table = np.zeros((size, size))
    for order in orders:
        table[np.arange(size), order] += 1
    expected = len(orders) / size
    statistic = ((table - expected) ** 2).sum() / expected * (size - 1) / size
    return float(chi2.sf(statistic, (size - 1) ** 2))


def test_places_say_nothing_of_layers_over_many_leases() -> None:
    """Each check fails by chance once in a million runs, and would see an order that is by layer one time in ten."""
    handles, size, leases = Handles(new_key()), 6, range(4000)
    orders = [handles.order(slot, epoch, size) for epoch in leases for slot in range(2)]
    assert p_value(orders) > 1e-6
    # Nor does the place under one lease say anything of that under the next.
    places = [np.argsort(order) for order in orders]
    onward = [
        tuple(int(after[item]) for item in np.argsort(now)) for now, after in zip(places, places[2:], strict=False)
    ]
    assert p_value(onward) > 1e-6
    biased = [tuple(range(size)) if random.random() < 0.1 else order for order in orders]
    assert p_value(biased) < 1e-6


# -- what is not hidden ------------------------------------------------------------------------------------------------


def likeness(a: torch.Tensor, b: torch.Tensor) -> float:
    value = float(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0))
    assert math.isfinite(value)
    return value


def test_the_seed_in_the_manifest_does_not_tell_a_worker_its_layers(scene: Scene) -> None:
    """Trained experts still resemble their first weights; but those cannot be recomputed without the handle key."""
    for slot, epoch, weights in scene.final:
        for place, layer in enumerate(HANDLES.order(slot, epoch, LAYERS)):
            trained = weights[f"{place}.gate_up"]
            assert likeness(trained, expert_weights(scene.spec, layer, slot, HANDLE_KEY)[0]) > 0.2
            public = [likeness(trained, expert_weights(scene.spec, other, slot)[0]) for other in range(LAYERS)]
            assert max(map(abs, public)) < 0.15  # 1536 independent weights: nearly 6 standard deviations
