"""Which copies a standby takes from an owner."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from loopback import loopback
from shoal.node.storage.blobs import to_bytes
from shoal.protocol import messages
from shoal.protocol.experts.ownership import Copy
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
