"""`shoal runs`: real status servers are asked."""

from __future__ import annotations

import json

import pytest
from prometheus_server import free_port
from shoal.node.cli import main
from shoal.node.errors import NoPeerHere
from shoal.node.run.runs import look
from shoal.node.watching.http import StatusServer
from shoal.node.watching.state import PeerSeen, PeerState

INVITE = "shoal://12D3KooWA4Xop1JaT3MHxwYMkCepYsv4iPVopMXwCz5iHYdBfeSB@203.0.113.5:4001/demo-0123456789ab?v=1"


@pytest.fixture
def state() -> PeerState:
    state = PeerState("bootstrap")
    state.identify(run_id="demo-0123456789ab", invite=INVITE, steps_total=500)
    state.set_peers(
        [
            PeerSeen(peer_id="a", role="composer", phase="training", step=40, loss=2.0),
            PeerSeen(peer_id="b", role="composer", phase="training", step=42, loss=2.5),
            PeerSeen(peer_id="c", role="composer", phase="syncing"),
            PeerSeen(peer_id="d", role="worker", phase="training"),
            PeerSeen(peer_id="e", role="bootstrap", phase="ready"),
        ]
    )
    return state


def test_a_run_is_listed_once_with_what_it_is(state: PeerState) -> None:
    with StatusServer(state) as one, StatusServer(state) as other:
        [run], silent = look([one.url, other.url])
    assert not silent
    assert (run.run_id, run.at, run.invite) == ("demo-0123456789ab", one.url, INVITE)
    assert (run.composers, run.workers, run.step, run.steps_total, run.loss) == (3, 1, 42, 500, 2.0)


def test_who_is_in_no_run_and_who_is_not_there_are_named(state: PeerState) -> None:
    nobody = f"127.0.0.1:{free_port()}"
    with StatusServer(state) as peer, StatusServer(PeerState("composer")) as starting:
        [run], silent = look([nobody, starting.url, peer.url])
    assert run.at == peer.url
    assert [nobody in str(silent[0]), "in no run yet" in str(silent[1])] == [True, True]
    with pytest.raises(NoPeerHere):
        look([])


def test_from_the_command_line(state: PeerState, capsys: pytest.CaptureFixture[str]) -> None:
    with StatusServer(state) as peer:
        assert main(["runs", "--bootstrap", peer.url]) == 0
        told = capsys.readouterr().out
        assert "demo-0123456789ab" in told
        assert f"shoal join {INVITE}" in told
        assert main(["runs", "--bootstrap", peer.url.removeprefix("http://"), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)[0]["workers"] == 1
        nobody = f"127.0.0.1:{free_port()}"
        assert main(["runs", "--bootstrap", peer.url, "--bootstrap", nobody, "--json"]) == 0
        out, err = capsys.readouterr()
        assert len(json.loads(out)) == 1, "and nothing after it"
        assert nobody in err
    assert main(["runs", "--bootstrap", peer.url]) == 1
    out, err = capsys.readouterr()
    assert "nobody answers" in err
    assert not out


def test_an_invite_with_an_ipv6_address_is_shown_whole(state: PeerState, capsys: pytest.CaptureFixture[str]) -> None:
    invite = INVITE.replace("203.0.113.5", "[fd12:3456:789a::1]")
    state.identify(invite=invite)
    with StatusServer(state) as peer:
        assert main(["runs", "--bootstrap", peer.url]) == 0
    assert f"shoal join {invite}" in capsys.readouterr().out
