"""The HTTP server and the status it shows: answers, health, slow and many clients, closing."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import io
import json
import math
import re
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from rich.console import Console
from shoal.node.cli import main
from shoal.node.errors import ConfigError, NoPeerHere
from shoal.node.watching.http import IDLE_SECONDS, MAX_CONNECTIONS, StatusServer
from shoal.node.watching.state import Count, Lease, PeerSeen, PeerState, Phase, StepPart
from shoal.node.watching.status import fetch_status, page, print_invite, render, seconds_text, step_text
from shoal.protocol.errors import PeerUnreachable


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def state(clock: Clock) -> PeerState:
    state = PeerState("composer", clock=clock, wall=clock)
    state.identify(
        run_id="r-0123456789ab", peer_id="12D3KooWme", steps_total=100, slots_total=4, invite="shoal://h/r?v=1"
    )
    return state


@pytest.fixture
def server(state: PeerState) -> Iterator[StatusServer]:
    with StatusServer(state, stall_seconds=60) as server:
        yield server


def ask(server: StatusServer, path: str, method: str = "GET") -> tuple[int, http.client.HTTPMessage, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


def test_health_follows_the_heartbeat_and_failure(state: PeerState, server: StatusServer, clock: Clock) -> None:
    assert ask(server, "/healthz")[::2] == (200, b"ok\n")
    clock.now += 61
    status, _, body = ask(server, "/healthz")
    assert status == 503
    assert b"silent for 61 s in phase starting" in body
    state.beat()
    assert ask(server, "/healthz")[0] == 200
    clock.now += 61
    state.record_step(step=1, tokens=1, loss=1.0, seconds={})
    assert ask(server, "/healthz")[0] == 200
    state.note_error(PeerUnreachable("nobody there", fix="look"))
    assert ask(server, "/healthz")[0] == 200
    state.enter(Phase.FAILED)
    assert ask(server, "/healthz")[::2] == (503, b"failed: nobody there\n")


def test_ready_means_in_the_run(state: PeerState, server: StatusServer) -> None:
    ready = {}
    for phase in Phase:
        state.enter(phase)
        status, _, body = ask(server, "/readyz")
        assert body.decode().strip() == phase.value
        ready[phase] = status
    assert {phase for phase, status in ready.items() if status == 200} == {Phase.READY, Phase.TRAINING, Phase.FINISHED}
    assert set(ready.values()) == {200, 503}


def test_paths_methods_and_headers(server: StatusServer) -> None:
    for path, kind in (
        ("/metrics", "text/plain"), ("/status", "text/html"), ("/", "text/html"),
        ("/status.json?x=1", "application/json"),
    ):  # fmt: skip
        status, headers, body = ask(server, path)
        assert (status, headers.get_content_type()) == (200, kind)
        assert int(headers["Content-Length"]) == len(body) > 0
        assert headers["Cache-Control"] == "no-store"
        assert headers["X-Content-Type-Options"] == "nosniff"
        status, headers, nothing = ask(server, path, "HEAD")
        assert (status, nothing) == (200, b"")
        assert int(headers["Content-Length"]) > 0
    for path in ("/nope", "/status/../metrics", "/metrics/", "/etc/passwd"):
        assert ask(server, path)[0] == 404, path
    for method in ("POST", "PUT", "DELETE"):
        status, headers, _ = ask(server, "/status.json", method)
        assert (status, headers["Allow"]) == (405, "GET, HEAD")


def test_status_json_is_strict_json_whatever_peers_say(state: PeerState, server: StatusServer) -> None:
    state.record_step(step=1, tokens=10, loss=math.nan, seconds={StepPart.OPTIMIZER: 0.1})
    state.set_peers([PeerSeen(peer_id="a", role="composer", phase="training", loss=math.inf, fidelity=math.nan)])
    state.set_fidelity({0: math.nan})
    state.set_clock_offset(-math.inf)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in JSON")

    told = json.loads(ask(server, "/status.json")[2], parse_constant=refuse)
    assert told["loss"] is None
    assert told["peers"][0]["loss"] is None
    assert told["history"]["loss"] == [None]
    assert told["step"] == 1


def test_page_is_self_contained_and_its_policy_lets_only_its_own_code_run(server: StatusServer) -> None:
    _, headers, body = ask(server, "/status")
    text = body.decode()
    assert not re.findall(r"""(?:src|href)=["'](?!data:|metrics"|status\.json")[^"']*""", text)
    assert "innerHTML" not in text
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in text
    assert not re.findall(r"\son\w+=|\sstyle=", text)
    policy = headers["Content-Security-Policy"]
    for tag in ("style", "script"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        assert base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() in policy
    assert "unsafe" not in policy
    assert (body, policy) == page()
    for landmark in (
        "<header>",
        "<main>",
        "<footer",
        '<html lang="en">',
        'name="viewport"',
        "prefers-color-scheme: dark",
    ):
        assert landmark in text
    ids = re.findall(r'\sid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'\$\("([^"]+)"\)', text)) <= set(ids)
    assert set(re.findall(r'aria-labelledby="([^"]+)"', text)) <= set(ids)


def test_slow_clients_do_not_hold_up_others(server: StatusServer) -> None:
    slow = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(10)]
    try:
        for client in slow:
            client.sendall(b"GET /status HTTP/1.1\r\nHos")
        started = time.monotonic()
        assert ask(server, "/healthz")[0] == 200
        assert time.monotonic() - started < 4  # less than the patience with a slow client
    finally:
        for client in slow:
            client.close()


def test_a_flood_of_connections_is_bounded_and_passes(server: StatusServer) -> None:
    flood = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(MAX_CONNECTIONS + 20)]
    refused = 0
    try:
        for client in flood[MAX_CONNECTIONS:]:
            client.settimeout(IDLE_SECONDS / 2)  # an admitted one is only dropped after IDLE_SECONDS
            refused += client.recv(1) == b""
        ours = [thread for thread in threading.enumerate() if thread.name == "status-http-client"]
        assert len(ours) <= MAX_CONNECTIONS
    finally:
        for client in flood:
            client.close()
    assert refused == 20
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            assert ask(server, "/healthz")[0] == 200
            return
        except (ConnectionError, http.client.HTTPException):
            continue  # the server has not yet noticed that the flood is over
    pytest.fail("did not recover from the flood")


def test_close_ends_every_thread_and_frees_the_port(state: PeerState) -> None:
    server = StatusServer(state).start()
    port = server.port
    with socket.create_connection(("127.0.0.1", port)) as half_open:
        half_open.sendall(b"GET /")
        assert ask(server, "/healthz")[0] == 200  # so the one before has been accepted
        server.close()
        server.close()
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("status-http")]
    with StatusServer(state, port=port) as again:
        assert ask(again, "/healthz")[0] == 200


def test_a_taken_port_is_explained(server: StatusServer, state: PeerState) -> None:
    with pytest.raises(ConfigError, match=str(server.port)) as caught:
        StatusServer(state, port=server.port)
    assert "--http-port" in caught.value.fix


def test_closing_before_starting_is_fine(state: PeerState) -> None:
    StatusServer(state).close()


def test_urls(state: PeerState) -> None:
    with StatusServer(state, host="0.0.0.0") as everywhere:
        assert everywhere.url == f"http://127.0.0.1:{everywhere.port}"
        for form in (everywhere.url, everywhere.url + "/", everywhere.url + "/status", f"127.0.0.1:{everywhere.port}"):
            assert fetch_status(form)["run_id"] == "r-0123456789ab"


@contextlib.contextmanager
def answering(said: bytes) -> Iterator[str]:
    """Where one client is answered so."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            client, _ = listener.accept()
            with client:
                client.recv(4096)
                client.sendall(said)

        thread = threading.Thread(target=answer)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        thread.join()


@pytest.mark.parametrize(
    "said", [b"HTTP/1.0 200 OK\r\n\r\n[1, 2]", b"\x13/multistream/1.0.0\n"], ids=["other JSON", "a DHT's port"]
)
def test_asking_what_is_no_peer(said: bytes) -> None:
    with answering(said) as address, pytest.raises(NoPeerHere, match="did not answer with a status"):
        fetch_status(address)


@pytest.mark.parametrize("command", [["status"], ["runs", "--bootstrap"]], ids=" ".join)
def test_a_status_of_another_version_is_named_and_no_traceback(
    command: list[str], state: PeerState, capsys: pytest.CaptureFixture[str]
) -> None:
    told = {name: value for name, value in state.snapshot().items() if name not in ("history", "peers")}
    with answering(b"HTTP/1.0 200 OK\r\n\r\n" + json.dumps(told).encode()) as address:
        assert main([*command, address]) == 1
    said = capsys.readouterr()
    assert "lacks history, peers" in said.out + said.err


def test_asking_at_what_is_no_address() -> None:
    with pytest.raises(NoPeerHere, match="not an HTTP address"):
        fetch_status("file:///etc/passwd")
    with pytest.raises(NoPeerHere, match="did not answer with a status"):
        fetch_status("http://127.0.0.1:port")


def test_terminal_view_shows_what_matters_and_peers_cannot_style_it(state: PeerState, clock: Clock) -> None:
    state.enter(Phase.TRAINING)
    state.note_error(PeerUnreachable("[red]nobody", fix="look"))
    for step in range(1, 51):
        clock.now += 1
        state.record_step(step=step, tokens=100, loss=2.5, seconds={})
    state.record_round(outcome="committed", round=4, fragment=0, members=3, seconds=1.0)
    clock.now += 12
    state.set_slots(leases=[Lease(slot=1, epoch=2, version=40)], standby=[0])
    evil = PeerSeen(peer_id="12D3KooWevil[/red]", role="[bold]boss", phase="training", slots=(0,), step=1234)
    state.set_peers([evil, PeerSeen(peer_id="12D3KooWme", role="composer", phase="training", slots=(1,))])
    state.count(Count.REFUSALS, "x")
    state.set_clock_offset(-601.2)
    console = Console(file=io.StringIO(), width=120)
    console.print(render(state.snapshot()))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for shown in (
        "r-0123456789ab", "50 of 100 (50%)", "1 m 2 s to go", "2.5000 nats", "owns 1, stands by for 1, of 4",
        "committed, 3 members, 12 s ago", "[bold]boss", "1,234", "(this)", "1 m 2 s ago: [red]nobody - look",
        "-601 s against its peers'", "shoal://h/r?v=1",
    ):  # fmt: skip
        assert shown in text, f"{shown} not in\n{text}"


def test_who_takes_no_steps_shows_how_far_the_run_is() -> None:
    state = PeerState("bootstrap")
    state.identify(steps_total=100, slots_total=4)
    peers = [("composer", 40), ("composer", 25), ("worker", 60)]
    state.set_peers(
        [PeerSeen(peer_id=f"{n}", role=role, phase="training", step=step) for n, (role, step) in enumerate(peers)]
    )
    assert step_text(state.snapshot()) == "40 of 100 (40%), the furthest composer's"


def test_scripts_get_the_bare_invite(capsys: pytest.CaptureFixture[str]) -> None:
    invite = "shoal://198.51.100.7:31337/" + "x" * 200
    print_invite(invite, http_url="http://127.0.0.1:1", only_this_machine=False)
    assert capsys.readouterr().out == invite + "\n"


def test_people_get_the_status_page_too(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    print_invite("shoal://198.51.100.7:31337/x", http_url="http://127.0.0.1:4711", only_this_machine=True)
    shown = capsys.readouterr().out
    assert "shoal join shoal://198.51.100.7:31337/x" in shown
    assert [word for word in shown.split() if "4711" in word] == ["http://127.0.0.1:4711/status"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59.6, "1 m 0 s"), (3600, "1 h 0 m"), (90061, "1 d 1 h"), (-5, "0 s")]
)
def test_seconds_text(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text
