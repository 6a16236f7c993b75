"""Serving at some hours of the day: a small parent that starts the peer when they begin, and drains it when they end.

The peer is a fork made before anything heavy is imported, so each start is like the first. Between the hours the
parent shows the status page in the phase `resting`, and holds the data directory.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import datetime

from ...protocol.process_death import end_with_parent
from ..config import PeerConfig
from ..ending import EXPECTED, stop_signals, tell
from ..logs import get_logger
from ..storage.last_ports import keep_ports, with_last_ports
from ..storage.presence import announce_here, hold_data_dir
from ..watching.http import StatusServer
from ..watching.state import PeerState, Phase
from .hours import Hours
from .reviving import EXIT_START_OVER, StartOver, may_start_over

log = get_logger(__name__)

POLL_SECONDS = 0.5


class ByHours:
    """Runs `peer` in a child whenever the hours are open.

    Args:
        peer: a peer's whole life, from start to exit code; called in the child.
        clock: local time.
    """

    def __init__(
        self, config: PeerConfig, hours: Hours, peer: Callable[[], int], clock: Callable[[], datetime] = datetime.now
    ) -> None:
        self._config, self._hours, self._peer, self._clock = config, hours, peer, clock
        self._stopping = False
        self._child: int | None = None

    def run(self) -> int:
        """Until told to stop, or the peer ends by itself while the hours are open. Returns the exit code."""
        before = {number: signal.signal(number, self._on_signal) for number in stop_signals()}
        try:
            while self._rest():
                code, ended_by_us = self._serve()
                if code == EXIT_START_OVER and not ended_by_us:
                    if may_start_over("a helper process of it ended"):
                        continue
                    return 1
                if ended_by_us and not self._stopping and code == 128 + signal.SIGTERM:
                    continue  # it had not joined yet when the hours ended
                if code or not ended_by_us:
                    return code
            return 0
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _rest(self) -> bool:
        """Wait for the hours. False if told to stop before they came."""
        if self._stopping or self._hours.now_open(self._clock()):
            return not self._stopping
        opens = self._hours.opens(self._clock())
        state = PeerState(self._config.role)
        state.enter(Phase.RESTING, f"until {opens:%H:%M}")
        log.info("hours.resting", until=opens.isoformat(timespec="minutes"))
        config = with_last_ports(self._config)
        with (
            hold_data_dir(config.data_dir),
            StatusServer(state, host=config.http_host, port=config.http_port) as server,
            announce_here(config.data_dir, server.url),
        ):
            keep_ports(config.data_dir, http_port=server.port)
            while not self._stopping and not self._hours.now_open(self._clock()):
                state.beat()
                time.sleep(POLL_SECONDS)
        return not self._stopping

    def _serve(self) -> tuple[int, bool]:
        """Exit code of the peer, and whether it was this parent that ended it."""
        parent = os.getpid()
        # Signals wait until the parent knows whom to pass them on to, and the child what to do about them.
        signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals())
        child = None if self._stopping else os.fork()
        if child == 0:
            end_with_parent(parent, signal.SIGKILL)  # its own children go with it
            os.setsid()  # Ctrl-C reaches the parent only, which passes it on once
            os._exit(_code_of(self._peer))
        self._child = child
        signal.pthread_sigmask(signal.SIG_UNBLOCK, stop_signals())
        if child is None:
            return 0, True
        ended = False
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                self._child = None
                code = os.waitstatus_to_exitcode(status)
                return (code if code >= 0 else 128 - code), ended or self._stopping
            if not ended and not self._stopping and not self._hours.now_open(self._clock()):
                log.info("hours.over")
                os.kill(child, signal.SIGTERM)
                ended = True
            time.sleep(POLL_SECONDS)

    def _on_signal(self, number: int, _frame: object) -> None:
        """The first drains, a second one ends the peer at once, as without hours."""
        self._stopping = True
        if self._child is not None:
            os.kill(self._child, number)


def _code_of(peer: Callable[[], int]) -> int:
    """What a process that does nothing but `peer` would exit with."""
    for number in stop_signals():
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, stop_signals())
    try:
        return peer()
    except StartOver as over:
        print(f"shoal: {over.error}", file=sys.stderr, flush=True)
        return EXIT_START_OVER
    except EXPECTED as error:
        return tell(error)
    except SystemExit as stopped:
        return stopped.code if isinstance(stopped.code, int) else 1
    except BaseException:  # noqa: BLE001 - whatever it was, the fork must not go on as the parent
        sys.excepthook(*sys.exc_info())
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
