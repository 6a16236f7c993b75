"""`./dev demo` watches its peers by HTTP; that the swarm itself works is for tests/swarm."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from shoal.node.demo import Peer
from shoal.node.watching.http import StatusServer
from shoal.node.watching.state import PeerState


def test_peers_are_asked_directly_whatever_proxy_the_environment_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    waits = [sys.executable, "-c", "input()"]
    with (
        StatusServer(PeerState("composer")) as server,
        subprocess.Popen(waits, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as process,
    ):
        (tmp_path / "peer.json").write_text(json.dumps({"url": server.url}))
        peer = Peer("composer-0", process, tmp_path, tmp_path / "log")
        peer.poll()
        assert peer.get("role") == "composer"
