"""The status page of a real peer in a real browser, from its start over its restart."""

from pathlib import Path

import pytest
from chromium import DESKTOP, PHONE, chromium
from harness import START_SECONDS, Swarm
from prometheus_server import free_port

pytestmark = pytest.mark.timeout(400)


def test_it_follows_a_peer_that_trains_and_is_restarted(swarm: Swarm, tmp_path: Path) -> None:
    options = ("--role", "composer", "--threads", "1", "--http-port", str(free_port()))
    peer = swarm.found(*options)
    with chromium(tmp_path) as page:
        page.open(peer.url + "/status", size=PHONE)
        page.until("document.title.startsWith('training · tiny-')", START_SECONDS)
        step = "Number(document.querySelector('#step').textContent.split(' ')[0])"
        page.until(f"{step} > 10 && document.querySelector('#loss path.line')", START_SECONDS)
        page.until("document.querySelectorAll('#fidelity li').length === 3", START_SECONDS)
        page.until("document.querySelectorAll('#peers tr.me').length === 1", START_SECONDS)
        page.until("document.querySelectorAll('#map li.mine').length === 16", START_SECONDS)
        page.until("document.querySelectorAll('#bytes tbody tr').length > 1", START_SECONDS)
        page.js(f"before = {step}; 0")
        page.until(f"{step} > before", seconds=20)
        for size, dark in ((PHONE, False), (DESKTOP, True)):
            page.look(size=size, dark=dark)
            page.until(f"innerWidth === {size[0]} && document.documentElement.scrollWidth <= innerWidth", seconds=5)
            assert not page.violations(), (size, dark)
        assert page.js("document.querySelector('#lost').hidden && document.querySelector('#problem').hidden")
        assert not page.noise

        assert swarm.stop() == {"bootstrap": 0}
        page.until("document.querySelector('#lost').textContent.startsWith('Not reachable since')", seconds=20)
        swarm.found(*options)
        page.until(
            "document.querySelector('#back').textContent.endsWith('the peer has been restarted.')", START_SECONDS
        )
        page.until("document.title.startsWith('training') && document.querySelector('#lost').hidden", START_SECONDS)
