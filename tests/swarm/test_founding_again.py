"""A data directory sees several runs; each goes on when it is founded again."""

import pytest
from harness import START_SECONDS, Swarm, run_id_of

pytestmark = pytest.mark.timeout(300)


def founded(swarm: Swarm, name: str) -> str:
    """Found a run on the one directory, and end its peer. The run's id."""
    peer = swarm.found("--name", name)
    run_id = run_id_of(swarm.invite)
    swarm.wait_for("it is ready", lambda: peer.phase == "ready", START_SECONDS)
    assert swarm.stop([peer]) == {"bootstrap": 0}
    return run_id


def test_a_founder_goes_on_with_its_run_whatever_came_between(swarm: Swarm) -> None:
    first = founded(swarm, "aaa")
    assert founded(swarm, "bbb") != first
    assert founded(swarm, "aaa") == first
