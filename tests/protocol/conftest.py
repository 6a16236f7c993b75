"""What the protocol's tests share."""

import random
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path

import hivemind
import pytest
from shoal.protocol.directory.dht import start_dht, visible_addresses
from shoal.protocol.identity import Identity

sys.path.insert(0, str(Path(__file__).parent))  # importlib mode leaves it out; helpers are there

from averaging_swarm import Swarm
from directory_nodes import RUN, Node


@pytest.fixture
def rng() -> random.Random:
    """New draws on every run; a failure prints the seed that repeats them."""
    seed = secrets.randbits(48)
    print(f"{seed=}")
    return random.Random(seed)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Node]]:
    """Two nodes that know each other."""
    directory = tmp_path_factory.mktemp("nodes")
    made: list[Node] = []
    try:
        for name in ("first", "second"):
            path = directory / name
            known = visible_addresses(made[0].dht) if made else []
            dht = start_dht(path, initial_peers=known, host="127.0.0.1", port=0, announce=[], run_id=RUN)
            made.append(Node(dht, Identity.load(path)))
        yield made
    finally:
        for node in made:
            node.dht.shutdown()


@pytest.fixture(scope="module")
def rogue(nodes: list[Node]) -> Iterator[hivemind.DHT]:
    """A node of the same DHT that runs stock hivemind: it stores and returns anything."""
    dht = hivemind.DHT(visible_addresses(nodes[0].dht), start=True, host_maddrs=["/ip4/127.0.0.1/tcp/0"])
    yield dht
    dht.shutdown()


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    """A process that forks peers. In the end none of their processes may be left."""
    swarm = Swarm(tmp_path_factory.mktemp("averaging"))
    yield swarm
    left = swarm.outlived()
    swarm.close()
    assert not left, f"processes outlived their peers: {left}"


@pytest.fixture
def swarm(template: Swarm) -> Iterator[Swarm]:
    """Peers of one test."""
    yield template
    template.retire_peers()
