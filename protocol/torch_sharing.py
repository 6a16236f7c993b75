"""torch's shared memory, started out of the reach of signals."""

from __future__ import annotations

import signal

import torch

_ENDING = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


def start_sharing() -> None:
    """Start the process that serves torch's shared memory, if there is none yet; it ends with those that it serves.

    torch waits for it in a loop that never ends if a signal comes meanwhile: Ctrl-C at that moment would leave what
    spins until it is killed. Here a signal waits until it is there. Call it from the main thread.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        torch.zeros(1, dtype=torch.uint8).share_memory_()  # type: ignore[no-untyped-call]
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
