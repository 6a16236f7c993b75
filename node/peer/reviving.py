"""A peer that lost a helper process which cannot be replaced starts over in place, and goes on where it stood.

The DHT process and the averagers are forked before the peer has threads, so a running peer cannot fork them again. It
writes a checkpoint, lets go of everything, and replaces itself by the same command: same process id, same identity,
same ports (`last_ports.py`). To the swarm that is a peer which was away for some seconds.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

from ...protocol.errors import AveragerEnded, DirectoryEnded, ShoalError
from ..logs import get_logger

log = get_logger(__name__)

HELPER_ENDED = (AveragerEnded, DirectoryEnded)
MOST, WITHIN_SECONDS = 3, 600.0
HISTORY = "_SHOAL_STARTED_OVER"  # in the environment: when this process started over, in Unix seconds
EXIT_START_OVER = 75  # EX_TEMPFAIL of sysexits.h, from a child whose parent is to start it again


class StartOver(Exception):
    """A peer has ended in good order, for the one reason that a helper process did; raised by `run_peer`."""

    def __init__(self, error: ShoalError) -> None:
        super().__init__(str(error))
        self.error = error


def may_start_over(reason: str) -> bool:
    """Whether this process has not done so too often lately; the answer is noted, logged, and outlives an exec."""
    now = time.time()
    past = [at for at in map(float, os.environ.get(HISTORY, "").split()) if 0 <= now - at < WITHIN_SECONDS]
    if len(past) >= MOST:
        log.error("peer.ends", reason=reason, started_over=len(past), within_seconds=WITHIN_SECONDS)
        return False
    os.environ[HISTORY] = " ".join(map(str, [*past, now]))
    log.warning("peer.starts_over", reason=reason, times=len(past) + 1)
    return True


def reviving(live: Callable[[], int]) -> int:
    """Exit code of a peer's life. Does not return, but replaces the process, where the peer is to start over.

    Raises what `live` raises, and the error behind a StartOver where there have been too many.
    """
    try:
        return live()
    except StartOver as over:
        if not may_start_over(over.error.cause):
            raise over.error from None
        sys.stdout.flush()
        sys.stderr.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def reap() -> None:
    """Forget children of the process that this one replaced: it can no longer wait for them."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
