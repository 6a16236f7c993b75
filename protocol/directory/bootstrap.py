"""Which of the peers that one knows take a connection: asked before the daemon is, which names no cause."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from ..addresses import Address
from .p2pd import BootstrapFailed

logger = logging.getLogger(__name__)

_DIAL_SECONDS = 3.0
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 5.0  # between two tries; each is twice the one before


def answering(peers: Sequence[str], deadline: float) -> list[str]:
    """Those of `peers` that accept a TCP connection; waits for one until the deadline, then raises BootstrapFailed."""
    pause = FIRST_PAUSE_SECONDS
    while True:
        with ThreadPoolExecutor(len(peers)) as dialling:  # over before anything forks
            problems = dict(zip(peers, dialling.map(_dial, peers), strict=True))
        answering = [peer for peer, problem in problems.items() if not problem]
        if answering:
            return answering
        reasons = "; ".join(problems.values())
        if time.monotonic() + pause > deadline:
            raise BootstrapFailed(
                f"no bootstrap peer can be reached ({reasons})",
                fix="check that it runs and that its TCP port is open to you, or ask for a fresh invite",
            )
        logger.warning("no bootstrap peer answers, trying again in %.1f s: %s", pause, reasons)
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


def _dial(peer: str) -> str:
    """Why it takes no TCP connection; empty if it does, or if its address is not plain TCP: libp2p will tell."""
    try:
        address = Address.parse(peer)
    except ValueError:
        return ""
    try:
        socket.create_connection((address.host, address.port), timeout=_DIAL_SECONDS).close()
    except OSError as error:
        return f"{address.host} port {address.port}: {error.strerror or error}"
    return ""
