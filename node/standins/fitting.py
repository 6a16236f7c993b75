"""A thread beside training on which publications are made, one at a time.

torch lets go of the interpreter while it computes, so training goes on wherever there is a core to spare.
"""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from ..learning.owning import ExpertOwner
from .publication import Publication


def threads_beside(owner: ExpertOwner) -> int:
    """Threads of torch that training leaves to fits, one at least: what it computes with lies idle beside a GPU."""
    own = torch.get_num_threads()
    if owner.device.type != "cpu":
        return own
    return max(1, len(os.sched_getaffinity(0)) - own * owner.processes)


class FitThread:
    """Begins on first use, as a child of the training thread, whose niceness it inherits."""

    def __init__(self) -> None:
        self._executor: ThreadPoolExecutor | None = None
        self._stopped = threading.Event()

    def begin(self, publication: Publication, owner: ExpertOwner) -> Future[float]:
        """Make it. The result is the seconds that it took; what `Publication.make` raises is the future's.

        On the training thread, once the last one is done.
        """
        if self._executor is None:
            own = torch.get_num_threads()
            self._executor = ThreadPoolExecutor(
                1, thread_name_prefix="fits", initializer=torch.set_num_threads, initargs=(threads_beside(owner),)
            )
            self._executor.submit(int).result()
            torch.set_num_threads(own)  # for threads that begin later; those that there are keep what they were told
        return self._executor.submit(self._make, publication)

    def _make(self, publication: Publication) -> float:
        began = time.perf_counter()
        publication.make(self._stopped.is_set)
        return time.perf_counter() - began

    def close(self) -> None:
        """Stop what is being made at the next expert, and end the thread."""
        self._stopped.set()
        if self._executor is not None:
            self._executor.shutdown()
