"""Invites by the address of a peer that shows one: it is waited for, and what it said once is kept."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from shoal.node.config import PeerConfig
from shoal.node.doctor.network import network_checks
from shoal.node.errors import InviteError, NoPeerHere
from shoal.node.run import asking
from shoal.node.run.asking import invite_of
from shoal.node.run.invite import Invite
from shoal.node.watching.http import StatusServer
from shoal.node.watching.state import PeerState
from shoal.protocol.addresses import Address
from shoal.protocol.identity import Identity


def an_invite(name: str) -> Invite:
    return Invite(
        addresses=(Address.of_host("127.0.0.1", 1, Identity.generate().peer_id),), run_id=f"{name}-0123456789ab"
    )


@contextmanager
def shown(invite: Invite | None, port: int = 0) -> Iterator[str]:
    state = PeerState("bootstrap")
    if invite is not None:
        state.identify(invite=str(invite))
    with StatusServer(state, port=port) as server:
        yield server.url


def test_an_invite_is_itself(tmp_path: Path) -> None:
    invite = an_invite("a")
    assert invite_of(str(invite), keep_in=tmp_path) == invite
    with pytest.raises(InviteError):
        invite_of("ftp://h", keep_in=tmp_path)
    assert not list(tmp_path.iterdir())


def test_who_starts_while_that_peer_is_down_comes_back_by_what_it_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[tuple[str, object]] = []
    monkeypatch.setattr(asking.log, "warning", lambda event, **facts: said.append((event, facts.get("before"))))
    before, after = an_invite("before"), an_invite("after")
    with shown(before) as url:
        assert invite_of(url, keep_in=tmp_path) == before
        assert invite_of(f"{url}/status", keep_in=tmp_path) == before
        assert invite_of(url, keep_in=tmp_path) == before
    assert invite_of(url, keep_in=tmp_path) == before
    with pytest.raises(NoPeerHere):
        invite_of(url)
    with pytest.raises(NoPeerHere):
        invite_of("http://127.0.0.1:1", keep_in=tmp_path)
    port = int(url.rpartition(":")[2])
    with shown(None, port):  # it is starting
        assert invite_of(url, keep_in=tmp_path) == before
    assert {event for event, _ in said} == {"invite.kept"}
    with shown(after, port):
        assert invite_of(url, keep_in=tmp_path) == after
        assert said[-1] == ("invite.other_run", before.run_id)
        said.clear()
        assert invite_of(url, keep_in=tmp_path) == after
        assert not said
    assert invite_of(url, keep_in=tmp_path) == after


def test_a_peer_that_starts_later_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "ASK_AGAIN_SECONDS", 0.01)
    with shown(None) as url:
        port, invite, asked = int(url.rpartition(":")[2]), an_invite("a"), threading.Event()
    monkeypatch.setattr(asking.log, "warning", lambda *_, **__: asked.set())
    done, beats = threading.Event(), list[str]()

    def start() -> None:
        assert asked.wait(30)
        with shown(invite, port):
            done.wait(30)

    later = threading.Thread(target=start)
    later.start()
    try:
        assert invite_of(url, keep_in=tmp_path, seconds=30, beat=lambda: beats.append(url)) == invite
    finally:
        done.set()
        later.join()
    assert len(beats) > 1, "/healthz would call it stalled"


@pytest.mark.parametrize("damaged", ["", "[]", '{"http://127.0.0.1:1": 1}', '{"http://127.0.0.1:1": "shoal://x"}'])
def test_a_damaged_file_is_as_good_as_none(tmp_path: Path, damaged: str) -> None:
    (tmp_path / "invites.json").write_text(damaged)
    with pytest.raises(NoPeerHere):
        invite_of("http://127.0.0.1:1", keep_in=tmp_path)
    invite = an_invite("a")
    with shown(invite) as url:
        assert invite_of(url, keep_in=tmp_path) == invite
    assert invite_of(url, keep_in=tmp_path) == invite


def test_doctor_takes_what_join_takes(tmp_path: Path) -> None:
    invite = an_invite("a")
    with shown(invite) as url:
        first = next(iter(network_checks(PeerConfig(data_dir=tmp_path), url)))
    assert first.verdict.value == "ok"
    assert invite.run_id in str(first)
