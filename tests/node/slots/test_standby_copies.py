"""Which copies a standby takes from an owner, and how long it keeps them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from loopback import Loopback, LoopbackPeer, loopback
from shoal.node.slots.copies import CopyStore, Snapshot
from shoal.node.slots.slot_state import SlotTensors
from shoal.node.storage.blobs import to_bytes
from shoal.protocol import messages
from shoal.protocol.experts.ownership import Copy, TakeOver
from shoal.protocol.messages import SlotState, StandInSnapshot
from shoal.protocol.transport.downloads import FetchQuery, Resource
from tiny import SLOTS, manifest_of


@pytest.mark.parametrize("epoch", [3, 1 << 40])
def test_a_copy_of_another_lease_than_its_owners_is_not_kept(epoch: int, tmp_path: Path) -> None:
    """After a restart the standby would take the slot over above it, for a liar that nobody believes any more."""
    with loopback(tmp_path, manifest_of(), 2) as swarm:
        owner, standby = swarm.peers
        slot = next(s for s in range(SLOTS) if standby.keeper._situation().desired[s][0] == owner.peer_id)

        async def give(query: FetchQuery) -> Resource | None:
            standin = StandInSnapshot(slot, 3, 1, (b"layer",), bytes(16))
            return Resource(messages.encode(SlotState(slot, epoch, 7, to_bytes({"0.down": torch.ones(2)}), standin)))

        owner.links.transport.serve(give)
        swarm.call(owner.claim([slot], 3))
        copies = standby.keeper._copies
        swarm.until(lambda: slot in standby.links.view().leases, "the standby knows whose the slot is")
        swarm.call(standby.keeper.tick())
        assert slot in copies._refreshing
        swarm.until(lambda: slot not in copies._refreshing, "the copy was asked for")
        assert copies.held.get(slot) == (Copy(3, 7) if epoch == 3 else None)


def test_a_copy_stays_on_disk_until_a_checkpoint_has_the_slot(tmp_path: Path) -> None:
    """Who took the slot over from it may be killed before that, with nobody else left who has it."""
    with loopback(tmp_path / "swarm", manifest_of(), 1) as swarm:
        [peer] = swarm.peers
        peer.step()
        swarm.call(peer.own([0], 3))
        published = peer.ask(lambda composer: peer.exchange.published(composer, 0))
        assert published is not None
        tensors = peer.ask(lambda composer: peer.exchange.snapshot(composer, 0, 3))
        peer.ask(lambda composer: peer.exchange.release(composer, 0))
        keeper, copy = peer.keeper, Copy(3, 7)
        swarm.call(keeper._copies.store(0, Snapshot(copy, tensors, published.snapshot())))
        folder = keeper._copies._folder

        swarm.call(keeper._take_over(TakeOver(0, 5, copy, ())))
        assert keeper.held == {0: 5}
        assert not keeper._copies.held
        saved = {0: Snapshot(Copy(5, 1), tensors)}
        shutil.copytree(folder, tmp_path / "copied")
        assert CopyStore(folder, {}).held == {0: copy}
        assert CopyStore(folder, saved).held == {0: Copy(5, 1, mine=True)}
        assert not list(folder.iterdir()), "the checkpoint has a newer one"

        shutil.copytree(tmp_path / "copied", folder, dirs_exist_ok=True)
        keeper._leaving = True
        assert swarm.call(keeper._let_go(0, "somebody", 7)) is None
        assert not CopyStore(folder, {}).held, "whoever has it now goes on"


def at_epoch_3(swarm: Loopback, owner: LoopbackPeer) -> tuple[SlotTensors, StandInSnapshot]:
    """Slot 0 of a peer that owns it since then, and what it has published."""
    swarm.call(owner.own([0], 3))
    published = owner.ask(lambda composer: owner.exchange.published(composer, 0))
    assert published is not None
    return owner.ask(lambda composer: owner.exchange.snapshot(composer, 0, 3)), published.snapshot()


@pytest.mark.parametrize(("version", "kept_epoch"), [(60, 3), (10, 3), (60, 5), (0, 0)])
def test_an_owner_that_comes_back_in_time_goes_on_from_the_newer_of_its_checkpoint_and_a_standbys_copy(
    version: int, kept_epoch: int, tmp_path: Path
) -> None:
    """Checkpoints are ten times as far apart as copies: who comes back late would lose less."""
    with loopback(tmp_path, manifest_of(), 2) as swarm:
        owner, standby = swarm.peers
        saved, published = at_epoch_3(swarm, owner)
        later = {name: value + 1 if value.is_floating_point() else value for name, value in saved.items()}
        if version:
            copy = Snapshot(Copy(kept_epoch, version), later, published)
            swarm.call(standby.keeper._copies.store(0, copy))

        owner.ask(lambda composer: owner.exchange.release(composer, 0))
        own = Copy(3, 40, mine=True)
        copies = owner.keeper._copies = CopyStore(tmp_path / "owner", {0: Snapshot(own, saved)})
        assert copies.held == {0: own}
        swarm.call(owner.keeper._take_over(TakeOver(0, 5, own, ("nobody", standby.peer_id), outdone=True)))
        expected = later if (version, kept_epoch) == (60, 3) else saved
        state = owner.ask(lambda composer: owner.exchange.snapshot(composer, 0, 3))
        weights = [name for name in state if name.endswith((".gate_up", ".down"))]
        assert weights
        assert all(torch.equal(state[name], expected[name]) for name in weights)


def test_a_copy_that_nothing_can_go_on_from_is_dropped(tmp_path: Path) -> None:
    """Whoever gave it meant to keep the slot from being taken over."""
    with loopback(tmp_path, manifest_of(), 1) as swarm:
        [peer] = swarm.peers
        swarm.call(peer.own([0], 3))
        for _ in range(3):  # so that its experts have an optimizer's state
            peer.step()
        state = peer.ask(lambda composer: peer.exchange.snapshot(composer, 0, 3))
        peer.ask(lambda composer: peer.exchange.release(composer, 0))
        assert any(name.endswith(".step") for name in state)
        bad = {
            name: torch.ones((), dtype=torch.int8) if name.endswith(".step") else value for name, value in state.items()
        }
        copy = Copy(3, 1_000_000)
        swarm.call(peer.keeper._copies.store(0, Snapshot(copy, bad)))
        with pytest.raises(ValueError, match="optimizer"):
            swarm.call(peer.keeper._take_over(TakeOver(0, 5, copy, ())))
        assert 0 not in peer.keeper._copies.held


def test_a_newer_copy_that_nothing_can_go_on_from_costs_an_owner_nothing(tmp_path: Path) -> None:
    """A standby that lies must not part an owner that comes back from its own checkpoint."""
    with loopback(tmp_path, manifest_of(), 2) as swarm:
        owner, liar = swarm.peers
        saved, published = at_epoch_3(swarm, owner)
        bad = {name: value[..., :1].clone() if value.dim() > 1 else value for name, value in saved.items()}
        swarm.call(liar.keeper._copies.store(0, Snapshot(Copy(3, 60), bad, published)))
        owner.ask(lambda composer: owner.exchange.release(composer, 0))
        own = Copy(3, 40, mine=True)
        owner.keeper._copies = CopyStore(tmp_path / "owner", {0: Snapshot(own, saved)})
        swarm.call(owner.keeper._take_over(TakeOver(0, 5, own, (liar.peer_id,), outdone=True)))
        assert owner.keeper.held == {0: 5}
        state = owner.ask(lambda composer: owner.exchange.snapshot(composer, 0, 3))  # in the order of before
        assert all(torch.equal(state[name], saved[name]) for name in saved if name.endswith((".gate_up", ".down")))
