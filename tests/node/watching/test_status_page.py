"""The status page in a real browser, with what a peer's own server says: errors, silence, large swarms."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from chromium import DESKTOP, PHONE, Page, chromium
from shoal.node.watching.http import StatusServer
from shoal.node.watching.state import Count, Lease, PeerSeen, PeerState, Phase, StepPart
from shoal.protocol.errors import PeerUnreachable

VIEWS = [(size, dark) for size in (PHONE, DESKTOP) for dark in (False, True)]
FITS = "document.documentElement.scrollWidth <= innerWidth"


class Clock:
    """Seconds that pass when told to, for ages and rates."""

    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with chromium(tmp_path_factory.mktemp("chromium")) as page:
        yield page


def trained(*, peers: int = 3, slots: int = 12, steps: int = 200, clock: Clock | None = None) -> PeerState:
    """One of `peers` composers after `steps` steps of one second; slot 0 has no owner, each other one has."""
    clock = clock or Clock()
    state = PeerState("composer", clock=clock, wall=clock)
    me = f"12D3KooWpeer{1:05d}"
    state.identify(
        run_id="r-0123456789ab", peer_id=me, steps_total=1000, slots_total=slots, invite=f"shoal://{me}@h:1/r?v=1"
    )
    state.enter(Phase.TRAINING)
    for step in range(1, steps + 1):
        clock.now += 1
        state.record_step(step=step, tokens=512, loss=2 + 4 * math.exp(-step / 50), seconds={StepPart.OPTIMIZER: 0.1})
    state.set_peers(
        PeerSeen(
            peer_id=f"12D3KooWpeer{i:05d}", role="composer", phase="training", version="0.1.0", step=steps, loss=2.5,
            tokens_per_second=100, fidelity=0.9, slots=tuple(range(i or peers, slots, peers)),
        )
        for i in range(peers)
    )  # fmt: skip
    state.set_slots(leases=[Lease(slot=n, epoch=2, version=190) for n in range(1, slots, peers)], standby=[2, 3])
    state.set_fidelity({0: 0.93, 1: 0.87})
    state.record_round(outcome="committed", round=7, fragment=1, members=3, seconds=2.0)
    state.set_held([(6, b"\1" * 32), (7, b"\2" * 32)])
    state.count(Count.BYTES, "outer", "out", by=8e9)
    state.count(Count.BYTES, "news", "in", by=12_000)
    return state


def text(page: Page, selector: str) -> str:
    return str(page.js(f"document.querySelector({selector!r}).innerText"))


def test_all_that_a_peer_knows_is_shown(page: Page) -> None:
    with StatusServer(trained()) as server:
        page.open(server.url + "/status")
        page.until("document.title === 'training · r-0123456789ab'")
        assert page.js("document.querySelector('#lost').hidden && document.querySelector('#problem').hidden")
        for selector, words in {
            "#now": ("200 of 1,000", "20%", "13 min 20 s to go", "300", "11 / 12", "1 owned by nobody"),
            "#life [aria-current]": ("training",),
            "#loss figcaption": ("at step 1 to", "at step 200"),
            "#speed figcaption": ("512 at step 200",),
            "#peers .me": ("this peer", "1, 4, 7, 10", "0.90"),
            "#map .none": ("0", "?"),
            "#map .copy": ("2", "C"),
            "#legend": ("owned by this peer (1, 4, 7, 10)", "copies kept here: 2"),
            "#fidelity": ("layer 0", "0.930", "layer 1", "0.870"),
            "#outer": ("committed", "fragment 1", "round 7, 020202", "2.0 s"),
            "#bytes": ("8.00 GB", "12.0 kB"),
            "#invite": ("shoal join shoal://12D3KooWpeer00001@h:1/r?v=1",),
        }.items():
            shown = text(page, selector)
            assert not [word for word in words if word not in shown], f"{selector} shows {shown!r}"
        assert page.js("document.querySelectorAll('#map li').length") == 12
        page.js("document.querySelector('#leases').open = true; document.querySelector('#loss details').open = true")
        assert "190" in text(page, "#leases .table")
        assert 8 < page.js("document.querySelectorAll('#loss tbody tr').length") < 20
    assert not page.noise


def test_who_takes_no_steps_shows_how_far_the_run_is(page: Page) -> None:
    state = PeerState("bootstrap")
    state.identify(run_id="r-0123456789ab", steps_total=100, slots_total=4)
    state.set_peers([PeerSeen(peer_id="a", role="composer", phase="training", step=40, slots=(0, 1, 2))])
    with StatusServer(state) as server:
        page.open(server.url + "/status")
        page.until("document.querySelector('#step').innerText === '40 of 100'")
        assert "40% done" in text(page, "#tokens")
        assert "3 / 4" in text(page, "#now")


@pytest.mark.parametrize(("peers", "slots"), [(3, 12), (60, 384)])
def test_every_view_is_accessible_and_fits(page: Page, peers: int, slots: int) -> None:
    state = trained(peers=peers, slots=slots)
    state.note_error(PeerUnreachable("nobody answers at 203.0.113.9:31337", fix="check that the peer runs"))
    with StatusServer(state) as server:
        page.open(server.url + "/status")
        page.until(f"document.querySelectorAll('#peers tr').length === {peers}")
        page.js("for (const more of document.querySelectorAll('details')) more.open = true")
        for size, dark in VIEWS:
            page.look(size=size, dark=dark)
            page.until(f"innerWidth === {size[0]} && {FITS}", seconds=5)
            assert not page.violations(), (size, dark)


def test_axe_would_find_poor_contrast_and_missing_names(page: Page) -> None:
    with StatusServer(trained()) as server:
        page.open(server.url + "/status")
        page.until("document.title.startsWith('training')")
        page.js("document.querySelector('#who').style.color = '#bbb'; document.querySelector('#bar').ariaLabel = ''")
        assert {found.split(":")[0] for found in page.violations()} == {"color-contrast", "aria-progressbar-name"}


def test_charts_are_read_with_the_keyboard(page: Page) -> None:
    with StatusServer(trained()) as server:
        page.open(server.url + "/status")
        page.until("document.querySelector('#loss path.line')")
        page.press("Tab")
        focused = "document.activeElement"
        assert page.js(f"{focused}.getAttribute('aria-label')") == "Loss by step"
        assert page.js(f"getComputedStyle({focused}).outlineStyle") == "solid"
        assert page.js(f"{focused}.getAttribute('aria-valuetext')").startswith("step 200: ")
        page.press("ArrowLeft")
        assert text(page, "#loss .read").startswith("step 199: ")
        page.press("Home")
        assert re.fullmatch(r"step 1: 5\.92\d", text(page, "#loss .read"))
        stops = []
        while "status.json" not in stops[-1:]:
            page.press("Tab")
            stops.append(page.js(f"{focused}.getAttribute('aria-label') ?? {focused}.textContent"))
            assert len(stops) < 20, stops
        assert stops == [
            "Loss as a table", "Tokens a second by step", "Throughput as a table", "Peers of the swarm", "Map of slots",
            "Leases of this peer (4)", "Copy", "metrics", "status.json",
        ]  # fmt: skip
        assert text(page, "#loss .read") == "nats a token, by step"


def test_errors_show_their_code_and_fix(page: Page) -> None:
    clock = Clock()
    state = trained(clock=clock)
    with StatusServer(state) as server:
        page.open(server.url + "/status")
        page.until("document.title.startsWith('training')")
        assert page.js("document.querySelector('#problem').hidden")
        state.note_error(PeerUnreachable("nobody answers at <b>203.0.113.9</b>", fix="check that the peer runs"))
        page.until("!document.querySelector('#problem').hidden", seconds=10)
        assert text(page, "#cause") == "SHOAL-103 nobody answers at <b>203.0.113.9</b>"
        assert text(page, "#fix") == "What to do: check that the peer runs"
        clock.now += 700  # an old error is no alarm, silence is
        page.until("document.querySelector('#problem').className === ''", seconds=10)
        assert "silent for over a minute, in phase training" in text(page, "#stalled")
        state.enter(Phase.FAILED, "no disk")
        page.until("document.querySelector('#problem.now') && document.querySelector('#stalled').hidden", seconds=10)
        assert text(page, "#phase") == "failed"
        assert "failed: no disk" in text(page, "#life")


class _Broken(BaseHTTPRequestHandler):
    answers = ((500, b"oops"), (200, b"<html>"), (200, b"{}"))
    asked = 0

    def do_GET(self) -> None:
        code, body = self.answers[min(type(self).asked // 2, 2)]
        type(self).asked += 1
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output clean."""


def test_it_says_what_is_wrong_while_another_program_has_the_port_and_recovers(page: Page) -> None:
    state = trained()
    with StatusServer(state) as server:
        port = server.port
        page.open(server.url + "/status", size=PHONE, dark=True)
        page.until("document.title.startsWith('training')")
    page.until("!document.querySelector('#lost').hidden", seconds=10)
    assert re.match(r"Not reachable since \d\d:\d\d:\d\d, retrying every second", text(page, "#lost"))
    assert text(page, "#phase") == "not reachable"
    assert "200 of 1,000" in text(page, "#now")
    assert page.js(FITS)
    assert not page.violations()
    with HTTPServer(("127.0.0.1", port), _Broken) as other:
        thread = Thread(target=other.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        for why in ("the answer is HTTP 500", "the answer is no status", "cannot show the peer's answer"):
            page.until(f"document.querySelector('#lost').textContent.includes({why!r})", seconds=15)
        other.shutdown()
        thread.join()
    with StatusServer(state, port=port):
        page.until("document.querySelector('#lost').hidden", seconds=10)
        assert re.fullmatch(r"Reachable again since \d\d:\d\d:\d\d\.", text(page, "#back"))
        assert text(page, "#phase") == "training"
    page.noise.clear()  # the browser logs each failed request


def test_peers_cannot_put_markup_into_the_page(page: Page, tmp_path: Path) -> None:
    evil = "<img src=x onerror=document.title='taken'>"
    state = trained()
    state.set_peers([PeerSeen(peer_id=evil, role=evil, phase=evil, version=evil, slots=(0, 10**9), loss=-math.inf)])
    with StatusServer(state) as server:
        page.open(server.url + "/status", size=PHONE)
        page.until("document.querySelector('#peers tr')")
        assert evil in text(page, "#peers")
        assert page.js("document.images.length") == 0
        assert page.js(FITS)
        page.picture(tmp_path / "page.png")
        assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
