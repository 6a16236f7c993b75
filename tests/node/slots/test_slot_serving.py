"""What a standby gives of a copy: with it go the newest stand-ins that it knows."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from loopback import loopback
from shoal.node.slots.copies import Snapshot
from shoal.protocol import messages
from shoal.protocol.experts.ownership import Copy
from shoal.protocol.messages import SlotState
from tiny import manifest_of

EPOCH = 7


@pytest.mark.parametrize("seq", [2, 4])
def test_a_copy_goes_out_with_the_newest_stand_ins(seq: int, tmp_path: Path) -> None:
    """Since a restart the peer may run older ones than the copy came with, the seed's at worst."""
    manifest = manifest_of(standin={"publish_every": 1}, outer={"every_steps": 1_000_000}, train={"steps": 1_000_000})
    with loopback(tmp_path, manifest, 2) as swarm:
        owner, standby = swarm.peers
        swarm.call(owner.own([0], EPOCH))
        owner.step(3)
        swarm.until(lambda: (t := standby.exchange.owners().get(0)) is not None and t.seq == 3, "the standby follows")
        published = owner.ask(lambda composer: owner.exchange.published(composer, 0))
        assert published is not None
        came_with = msgspec.structs.replace(published.snapshot(), seq=seq)
        tensors = owner.ask(lambda composer: owner.exchange.snapshot(composer, 0, EPOCH))
        swarm.call(standby.keeper._copies.store(0, Snapshot(Copy(EPOCH, 3), tensors, came_with)))
        given = swarm.call(standby.keeper.serving.snapshot(0))
        assert messages.decode(given.data, SlotState).standin.seq == max(seq, 3)
