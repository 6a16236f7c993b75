"""Writing checkpoints beside training, one at a time. A failure is told; it ends nothing."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Collection, Mapping
from concurrent.futures import Future, wait
from typing import Any

from torch import Tensor

from ..logs import get_logger
from ..watching.state import PeerState
from .checkpoint import CheckpointError, CheckpointStore

log = get_logger(__name__)

FINISH_SECONDS = 60.0


class CheckpointWriter:
    """`store` is its own; what it did is told to `state`."""

    def __init__(self, store: CheckpointStore, state: PeerState) -> None:
        self.store, self._state = store, state
        self._writing: Future[CheckpointError | None] | None = None
        self._one_at_a_time = threading.Lock()  # who leaves may find one that `write_soon` began still being written

    @property
    def busy(self) -> bool:
        """Whether the one that `write_soon` began is still being written."""
        return self._writing is not None and not self._writing.done()

    def write_soon(
        self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], loop: asyncio.AbstractEventLoop
    ) -> None:
        """Write in a thread of `loop`'s; from any thread."""
        self._writing = asyncio.run_coroutine_threadsafe(asyncio.to_thread(self.write, tensors, meta), loop)

    def finish(self) -> None:
        """Wait for what `write_soon` began, for some seconds; from any thread but its loop's."""
        if self._writing is not None:
            wait([self._writing], FINISH_SECONDS)

    def write_last(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], untaken: Collection[int]) -> None:
        """As a peer leaves, with slots that nobody has taken from it. Raises CheckpointError if they are lost so."""
        error = self.write(tensors, meta)
        if untaken and error is not None:
            raise error
        if untaken:
            log.warning("slot.not_taken", slots=sorted(untaken), kept_in=str(self.store.folder))

    def write(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> CheckpointError | None:
        """Write now, after what is being written. `meta` has the `step`. Returns why it could not be done, if so."""
        with self._one_at_a_time:
            began, step = time.monotonic(), int(meta["step"])
            try:
                self.store.save(step, tensors, meta)
            except CheckpointError as error:
                log.error("checkpoint.failed", error=str(error))
                self._state.note_error(error)
                return error
            nbytes = sum(tensor.nbytes for tensor in tensors.values())
            self._state.record_checkpoint(step=step, seconds=time.monotonic() - began, nbytes=nbytes)
            return None
