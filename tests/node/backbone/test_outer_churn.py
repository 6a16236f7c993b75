"""A hundred outer rounds while peers miss them, return with old states and lose what they learned."""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Iterator

import pytest
from loopback import Loopback, LoopbackPeer, loopback
from shoal.node.backbone.common_state import Held
from shoal.node.learning.composer import Composer
from shoal.protocol.averaging.merging import digest
from tiny import manifest_of
from torch import Tensor

PEERS, ROUNDS, PARTS = 4, 100, 2


@pytest.fixture
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    manifest = manifest_of(outer={"every_steps": 8, "fragments": PARTS}, train={"steps": 1})
    with loopback(tmp_path_factory.mktemp("churn"), manifest, PEERS) as swarm:
        tasks: list[asyncio.Task[None]] = []
        loop = swarm.network.loop
        loop.call_soon_threadsafe(lambda: tasks.extend(loop.create_task(peer.outer.run()) for peer in swarm.peers))
        yield swarm
        assert tasks
        assert not any(task.done() for task in tasks)


def digests(peer: LoopbackPeer) -> list[bytes]:
    return peer.ask(lambda c: [digest(f, m) for f, m in zip(c.common, c.momentum, strict=True)])


class Disk:
    """A peer's checkpoint."""

    def __init__(self, peer: LoopbackPeer) -> None:
        def save(composer: Composer) -> tuple[list[Held], list[tuple[Tensor, Tensor]]]:
            states = [(f.clone(), m.clone()) for f, m in zip(composer.common, composer.momentum, strict=True)]
            return list(peer.common.held), states

        self.held, self.states = peer.ask(save)

    def restore(self, peer: LoopbackPeer) -> None:
        def load(composer: Composer) -> None:
            for index, (fragment, momentum) in enumerate(self.states):
                composer.reset_fragment(index, fragment, momentum)
                peer.common.held[index] = self.held[index]

        peer.ask(load)


@pytest.mark.timeout(300)
def test_after_a_hundred_rounds_with_churn_all_hold_the_same_bits(swarm: Loopback) -> None:
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    checkpoints: dict[str, list[Disk]] = {peer.peer_id: [Disk(peer)] for peer in swarm.peers}
    committed: dict[tuple[int, int], bytes] = {}  # by fragment and round
    missed = returned = 0

    def note() -> int:
        for peer in swarm.peers:
            for index, held in enumerate(list(peer.common.held)):
                assert committed.setdefault((index, held.round), held.digest) == held.digest, f"a fork, seed {seed}"
        return sum(number >= 0 for _, number in committed)

    def newest() -> list[int]:
        return [max(peer.common.held[index].round for peer in swarm.peers) for index in range(PARTS)]

    while note() < ROUNDS:
        absent = chance.choice(swarm.peers) if chance.random() < 0.4 else None
        swarm.meeting.absent = {absent.peer_id} if absent else set()
        missed += absent is not None
        if chance.random() < 0.3:
            returning = chance.choice(swarm.peers)
            chance.choice(checkpoints[returning.peer_id]).restore(returning)
            returned += 1
        before = newest()
        for peer in swarm.peers:
            peer.ask(lambda composer: composer.train_step())
        swarm.until(
            lambda then=before: note() and all(a > b for a, b in zip(newest(), then, strict=True)),  # type: ignore[misc]
            f"both fragments go on, seed {seed}",
        )
        saving = chance.choice(swarm.peers)
        checkpoints[saving.peer_id].append(Disk(saving))
    assert missed > 5
    assert returned > 3

    swarm.meeting.absent = set()
    swarm.until(
        lambda: all(peer.ask(lambda c, p=peer: p.outer.unmerged_steps(c)) == 0 for peer in swarm.peers),
        f"everybody's last steps are merged, seed {seed}",
    )
    swarm.until(lambda: len({tuple(digests(peer)) for peer in swarm.peers}) == 1, f"all hold the same, seed {seed}")
    assert digests(swarm.peers[0]) == [held.digest for held in swarm.peers[0].common.held]
