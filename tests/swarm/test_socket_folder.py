"""What a real peer leaves in the temporary directory: nothing, or what the next one removes."""

import signal
import tempfile
from pathlib import Path

from harness import START_SECONDS, Peer, Swarm

KINDS = ("hivemind-p2pclient-", "listener-", "shoal-p2pd-")  # listener: multiprocessing's


def kinds(folder: Path) -> set[str]:
    """Of the sockets below it."""
    names = [path.name for path in folder.rglob("*") if path.is_socket()]
    return {kind for kind in KINDS if any(name.startswith(kind) for name in names)}


def lying_in(shared: Path) -> list[Path]:
    """All but what is torch's: a cache, one for all of a user's processes, and what its helper removes by itself."""
    return [path for path in shared.iterdir() if not path.name.startswith("torch")]


def test_a_killed_peers_sockets_go_when_it_starts_again_and_who_leaves_takes_its_own_along(swarm: Swarm) -> None:
    with tempfile.TemporaryDirectory(prefix="t-") as short:  # sockets' paths may not be long
        shared = Path(short)

        def start() -> Peer:
            options = ["--preset", "tiny", "--min-composers", "1", "--role", "composer", "--host", "127.0.0.1"]
            peer = swarm.launch("founder", ["found", *options, "--threads", "1"], TMPDIR=short)
            swarm.wait_for("it trains", lambda: peer.phase == "training", 3 * START_SECONDS)
            return peer

        killed = start()
        [left] = lying_in(shared)
        assert kinds(left) == set(KINDS)
        killed.signal(signal.SIGKILL)
        killed.process.wait()
        swarm.wait_for("its children end", lambda: not swarm.processes(), 30.0)
        assert left.is_dir()

        again = start()
        [own] = lying_in(shared)
        assert own != left
        assert swarm.stop([again]) == {"founder": 0}
        assert not again.said("terminate called")  # in the helper's voice: somebody took away what was its own
        assert lying_in(shared) == []
