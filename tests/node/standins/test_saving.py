"""Stand-ins of others, through a checkpoint: who comes back alone has the swarm's experts, not the seed's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from loopback import HANDLE_KEY, Loopback, LoopbackPeer, loopback
from shoal.node.learning.composer import Composer
from shoal.node.learning.persistence import composer_tensors, saved_slots
from shoal.node.learning.trainer import Trainer
from shoal.node.slots.slot_order import LayerOrder
from shoal.node.standins.exchange import Exchange
from shoal.node.standins.saving import FACTS, saved_standins
from shoal.node.storage.checkpoint import Checkpoint, CheckpointStore
from shoal.protocol.experts.handles import Handles
from shoal.protocol.experts.surrogates import state_digest
from tiny import LAYERS, SLOTS, composer_of, manifest_of

UNCLAIMED = SLOTS - 1


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    """Of two, of which the first owns all slots but one, and has published them."""
    manifest = manifest_of(standin={"publish_every": 1}, outer={"every_steps": 1_000_000}, train={"steps": 1_000_000})
    with loopback(tmp_path_factory.mktemp("saving"), manifest, 2) as swarm:
        first, second = swarm.peers
        swarm.call(first.own(range(UNCLAIMED), 7))
        first.step(3)
        swarm.until(
            lambda: (
                all(digest(first.composer, slot) == digest(second.composer, slot) for slot in range(SLOTS))
                and all(second.exchange.owners()[slot].seq == 3 for slot in range(UNCLAIMED))
            ),
            "the second follows",
        )
        yield swarm


def digest(composer: Composer, slot: int) -> bytes:
    return state_digest(composer.standins(slot))


def checkpoint_of(peer: LoopbackPeer, folder: Path, **changes: Any) -> Checkpoint:
    (tensors, facts), own = peer.ask(lambda composer: (peer.exchange.to_save(), composer_tensors(composer)))
    CheckpointStore(folder).save(3, own | tensors, {FACTS: facts, **changes})
    found = CheckpointStore(folder).latest()
    assert found is not None
    return found


def come_back(peer: LoopbackPeer, checkpoint: Checkpoint) -> tuple[Composer, Exchange]:
    """A composer as another process of `peer` would build it, nobody being there."""
    composer = composer_of(peer.links.manifest, owned=(), secret=HANDLE_KEY)
    order = LayerOrder(Handles(HANDLE_KEY), LAYERS)
    exchange = Exchange(peer.links, Trainer(composer, lambda *_: None), composer, order, max_standin_bytes=1 << 20)
    exchange.restore(composer, saved_standins(checkpoint, composer.menu, LAYERS))
    return composer, exchange


def test_who_comes_back_alone_has_what_ran_and_knows_whose_it_was(swarm: Loopback, tmp_path: Path) -> None:
    second = swarm.peers[1]
    seeded = composer_of(second.links.manifest, owned=(), secret=HANDLE_KEY)
    composer, exchange = come_back(second, checkpoint_of(second, tmp_path))
    for slot in range(UNCLAIMED):
        assert digest(composer, slot) == digest(second.composer, slot) != digest(seeded, slot)
    assert digest(composer, UNCLAIMED) == digest(seeded, UNCLAIMED)
    assert {slot: epoch for slot, epoch in exchange.epochs().items() if epoch} == dict.fromkeys(range(UNCLAIMED), 7)
    assert exchange.to_save()[1] == {str(slot): (7, 3) for slot in range(UNCLAIMED)}, "as much is known the next time"


def test_a_slot_without_owner_or_copy_goes_on_from_its_stand_ins(swarm: Loopback, tmp_path: Path) -> None:
    second = swarm.peers[1]
    composer, exchange = come_back(second, checkpoint_of(second, tmp_path))
    exchange.adopt(composer, 1, 8, None, 0, None)
    for expert, standin in zip(composer.experts_of(1), second.composer.standins(1), strict=True):
        for weights, dense in zip(expert.masters(), standin.dense(), strict=True):
            assert torch.equal(weights, dense)


def test_an_owner_that_comes_back_publishes_what_it_had_published(swarm: Loopback, tmp_path: Path) -> None:
    """Else all others would run the seed's stand-ins in place of its experts, until the next publication."""
    first = swarm.peers[0]
    checkpoint = checkpoint_of(first, tmp_path)
    composer, exchange = come_back(first, checkpoint)
    assert exchange.epochs()[0] == 7
    assert exchange.to_save()[1] == {str(slot): (7, 3) for slot in range(UNCLAIMED)}
    for slot, tensors in saved_slots(checkpoint.tensors).items():
        announced = exchange.adopt(composer, slot, 9, exchange.to_wire(slot, 7, tensors), 7, None)
        assert (announced.seq, announced.digest) == (3, digest(first.composer, slot))
    assert exchange.to_save()[1] == {str(slot): (9, 3) for slot in range(UNCLAIMED)}


def test_whoever_owns_a_slot_now_is_followed_whatever_its_epoch(swarm: Loopback, tmp_path: Path) -> None:
    """All others may have begun anew meanwhile."""
    first, second = swarm.peers
    _, exchange = come_back(second, checkpoint_of(second, tmp_path))
    following = exchange._following
    following._learn_leases([(0, first.peer_id, 1)])
    published = first.ask(lambda owner: first.exchange.published(owner, 0))
    assert published is not None
    assert following._install(first.peer_id, msgspec.structs.replace(published.snapshot(), epoch=1))


def test_an_epoch_that_nobody_else_knows_counts_only_while_nobody_has_the_slot(swarm: Loopback, tmp_path: Path) -> None:
    """Else this peer would restart the slot above its owner, from the old stand-ins."""
    second = swarm.peers[1]
    _, exchange = come_back(second, checkpoint_of(second, tmp_path, **{FACTS: {"0": (9, 3), str(UNCLAIMED): (9, 3)}}))
    swarm.network.loop.call_soon_threadsafe(exchange.on_leases)
    swarm.until(lambda: exchange.epochs()[1] == 7, "the leases are known")
    assert (exchange.epochs()[0], exchange.epochs()[UNCLAIMED]) == (7, 9)
    assert exchange.to_save()[1]["0"][0] == 9


@pytest.mark.parametrize("damage", ["a layer is missing", "a tensor is missing", "no numbers"])
def test_what_is_no_stand_in_of_this_run_is_refused(damage: str, swarm: Loopback, tmp_path: Path) -> None:
    second = swarm.peers[1]
    found = checkpoint_of(second, tmp_path, **({FACTS: {"0": [1]}} if damage == "no numbers" else {}))
    for name in list(found.tensors):
        if name.startswith("standin.0.1.") and (damage == "a layer is missing" or name.endswith("codes")):
            del found.tensors[name]
    with pytest.raises((ValueError, KeyError, TypeError)):
        saved_standins(found, second.composer.menu, LAYERS)


def test_checkpoints_that_have_none_are_good(swarm: Loopback, tmp_path: Path) -> None:
    CheckpointStore(tmp_path).save(3, {}, {})
    found = CheckpointStore(tmp_path).latest()
    assert found is not None
    assert saved_standins(found, swarm.peers[1].composer.menu, LAYERS) == {}
