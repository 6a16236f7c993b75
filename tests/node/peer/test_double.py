"""Two peers with one key, as when a data directory was copied: who comes second ends, who was there says so."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from loopback import loopback
from shoal.node.errors import IdentityInUse
from shoal.node.watching.state import Phase
from shoal.protocol.directory.records import seal_record
from tiny import manifest_of


def test_two_peers_with_one_key_do_not_go_unnoticed(tmp_path: Path) -> None:
    with loopback(tmp_path, manifest_of(), 1) as swarm:
        links = swarm.peers[0].links

        async def hear_a_copy() -> None:
            mine = links.view().peers[links.peer_id]
            said = msgspec.structs.replace(mine, issued_at=links.clock() + 2, expires_at=links.clock() + 20)
            assert not links.directory.receive(seal_record(links.identity, links.run_id, said))

        assert links.state.snapshot()["last_error"] is None
        swarm.call(hear_a_copy())
        swarm.until(lambda: links.state.snapshot()["last_error"], "it says so")
        error = links.state.snapshot()["last_error"]
        assert error["code"] == "SHOAL-225"
        assert links.peer_id in error["cause"]
        links.check()  # it trains on: it was here first
        for phase in (Phase.JOINING, Phase.SYNCING):
            links.state.enter(phase)
            with pytest.raises(IdentityInUse, match="is a copy"):
                links.check()
