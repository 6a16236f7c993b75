"""The network thread: one asyncio loop beside the training thread."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

CLOSE_SECONDS = 10.0


class NetworkThread:
    """Runs an asyncio loop on a thread of its own from construction until `close`."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="network", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def call(self, work: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
        """Run a coroutine on the loop and wait for its result; for the main thread before and after training."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout)

    def check(self) -> None:
        """Raise RuntimeError if the loop has died."""
        if not self._thread.is_alive():
            raise RuntimeError("the network thread has ended")

    def last(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine, for `CLOSE_SECONDS` at most. An error is logged: whoever is closing goes on closing."""
        if not self._thread.is_alive():
            work.close()
            return
        try:
            self.call(work, CLOSE_SECONDS)
        except Exception:
            logging.getLogger(__name__).warning("close.failed", exc_info=True)

    def close(self) -> None:
        """Cancel every task and end the loop."""
        if not self._thread.is_alive():
            return
        self.last(self._cancel_all())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(CLOSE_SECONDS)
        if not self._thread.is_alive():
            self.loop.close()

    async def _cancel_all(self) -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
