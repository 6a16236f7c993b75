"""A data directory sees several runs; each goes on when it is founded again."""

import pytest
from harness import START_SECONDS, Swarm, run_id_of
from shoal.node.run.kept_manifests import ONE_FOR_ALL, manifest_file

pytestmark = pytest.mark.timeout(300)


def founded(swarm: Swarm, name: str) -> str:
    """Found a run on the one directory, and end its peer. The run's id."""
    peer = swarm.found("--name", name)
    run_id = run_id_of(swarm.invite)
    swarm.wait_for("it is ready", lambda: peer.phase == "ready", START_SECONDS)
    assert swarm.stop([peer]) == {"bootstrap": 0}
    return run_id


def test_a_founder_goes_on_with_its_run_whatever_came_between(swarm: Swarm) -> None:
    first, second = founded(swarm, "aaa"), founded(swarm, "bbb")
    folder = swarm.folder / "bootstrap"

    stranger = swarm.start("stranger", "found", "--preset", "tiny", "--name", "ccc")
    swarm.wait_for("its invite", lambda: bool(stranger.status().get("invite")), START_SECONDS)
    guest = swarm.start("bootstrap", "join", stranger.last["invite"], "--role", "observer")
    swarm.wait_for("the founder is a guest elsewhere", lambda: guest.phase == "ready", START_SECONDS)
    swarm.stop([guest, stranger])

    assert founded(swarm, "aaa") == first
    assert founded(swarm, "bbb") == second
    manifest_file(folder, first).rename(folder / ONE_FOR_ALL)  # as earlier versions kept it
    assert founded(swarm, "aaa") == first
