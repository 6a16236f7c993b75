"""The training thread: one composer or worker, stepped in a loop, to which other threads may post work between steps.

Nothing but this thread touches it. The network's side (an asyncio loop on another thread) calls `ask`, and
gets a future; the trainer never waits for it.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from ..standins.fitting import FitThread
from .owning import Owner

T = TypeVar("T")

# How long an idle trainer (not yet started, or finished) sleeps before it looks at its stop flag again, in seconds.
IDLE_SECONDS = 0.2

NICENESS = 5  # of the training thread, as `nice` counts: it gets a third of what others that want the core get


class Trainer(Generic[Owner]):
    """Has a composer or a worker. `run` blocks the calling thread; the other methods may be called from any.

    Args:
        owner: the learner, handed over for good.
        on_step: called with its report after every step, on the training thread; must not block.
    """

    def __init__(self, owner: Owner, on_step: Callable[[Owner, Any], None]) -> None:
        self._owner = owner
        self._on_step = on_step
        self._served_seconds = 0.0
        self.fits = FitThread()
        self.held = False  # no steps are taken meanwhile; for the training thread only
        self._mailbox: queue.SimpleQueue[tuple[Callable[[Owner], Any], Future[Any] | None]] = queue.SimpleQueue()
        self._training = threading.Event()
        self._stop = threading.Event()
        self._closed = False
        self._closing = threading.Lock()

    def ask(self, work: Callable[[Owner], T]) -> Future[T]:
        """Run `work(owner)` between two steps. The future carries its result, error, or cancellation at the end."""
        future: Future[T] = Future()
        with self._closing:
            if self._closed:
                future.cancel()
                return future
            self._mailbox.put((work, future))
        return future

    def require(self, work: Callable[[Owner], None]) -> None:
        """Run `work(owner)` between two steps, as a part of training: an error in it ends `run`."""
        with self._closing:
            if not self._closed:
                self._mailbox.put((work, None))

    def take_served_seconds(self) -> float:
        """Time spent between steps on what was asked for, since the last call. For the training thread only."""
        seconds, self._served_seconds = self._served_seconds, 0.0
        return seconds

    def start_training(self) -> None:
        """Begin, or go on with, inner steps."""
        self._training.set()

    def pause_training(self) -> None:
        """Stop taking inner steps after the current one; work that is asked for still runs."""
        self._training.clear()

    def stop(self) -> None:
        """Make `run` return after the current step."""
        self._stop.set()

    def run(self) -> None:
        """Train until `stop`. Where there is no step to take, it serves requests and looks again.

        The calling thread yields to others from now on: to this peer's own loop and helpers, to peers that are just
        starting here, and to whatever else its owner does with the machine.
        """
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, max(NICENESS, os.getpriority(os.PRIO_PROCESS, thread)))
        try:
            while not self._stop.is_set():
                busy = self._training.is_set() and not self.held and self._owner.has_work()
                self._serve(block=not busy)
                if busy and not self._stop.is_set():
                    self._on_step(self._owner, self._owner.train_step())
        finally:
            with self._closing:
                self._closed = True
            self.fits.close()
            while not self._mailbox.empty():
                _, future = self._mailbox.get_nowait()
                if future is not None:
                    future.cancel()

    def _serve(self, *, block: bool) -> None:
        """Run what is in the mailbox by now; if `block`, wait a little for the first.

        What comes meanwhile waits for the next step: who is asked faster than it answers would never take one.
        """
        try:
            asked = self._mailbox.get(block=block, timeout=IDLE_SECONDS if block else None)
        except queue.Empty:
            return
        began = time.perf_counter()
        for _ in range(self._mailbox.qsize()):  # only this thread takes: they are there
            self._do(*asked)
            asked = self._mailbox.get_nowait()
        self._do(*asked)
        self._served_seconds += time.perf_counter() - began

    def _do(self, work: Callable[[Owner], Any], future: Future[Any] | None) -> None:
        if future is None:
            work(self._owner)
        elif future.set_running_or_notify_cancel():
            try:
                future.set_result(work(self._owner))
            except Exception as error:  # noqa: BLE001 - carried to whoever asked, by the future
                future.set_exception(error)
