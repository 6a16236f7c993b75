"""Bandwidth limits: a token bucket for each direction, shared by the processes that make up a peer.

A bucket lies in a file of 16 bytes. Who sends or has received takes its bytes out at once, also more than are there,
and then waits until the debt is paid back: so waits are in the order of takers, and no taker needs to know of another.
Bytes that have come are past stopping; to wait before reading on lets TCP slow the sender down.

    before = pace.up(len(data))       seconds to sleep before sending
    after = pace.down(len(data))      seconds to sleep before reading on
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

BURST_SECONDS = 0.25  # that an idle link saves up
SMALL = 2048  # bytes of a message that does not wait: votes and records go ahead of bulk data, at its expense
_STATE = struct.Struct("=dd")  # bytes there, negative for debt; the moment of that, in monotonic seconds


class Bucket:
    """Lets `rate` bytes through a second, over any time that is longer than a burst.

    Forks and other processes share it by its path. One thread of each process may use it.

    Args:
        path: made if it is not there.
        rate: bytes per second.
        clock: the same in all processes; Linux's monotonic one is.
    """

    def __init__(self, path: Path, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        if not rate > 0:
            raise ValueError(f"a rate of {rate} bytes per second")
        self.path, self.rate, self._clock = path, rate, clock
        self._opened: tuple[int, int, mmap.mmap] | None = None  # by process: locks do not outlive a fork
        self._open()

    def take(self, nbytes: int) -> float:
        """Take bytes out. Returns the seconds after which the bucket is out of debt."""
        descriptor, memory = self._open()
        fcntl.lockf(descriptor, fcntl.LOCK_EX)
        try:
            level, at = _STATE.unpack_from(memory)
            now = self._clock()
            level = min(self.rate * BURST_SECONDS, level + max(0.0, now - at) * self.rate) - nbytes
            _STATE.pack_into(memory, 0, level, now)
        finally:
            fcntl.lockf(descriptor, fcntl.LOCK_UN)
        return 0.0 if nbytes < SMALL else max(0.0, -level / self.rate)

    def _open(self) -> tuple[int, mmap.mmap]:
        if self._opened is None or self._opened[0] != os.getpid():
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            if os.fstat(descriptor).st_size < _STATE.size:
                os.ftruncate(descriptor, _STATE.size)  # zeros: empty, long ago, and so full
            self._opened = os.getpid(), descriptor, mmap.mmap(descriptor, _STATE.size)
        return self._opened[1], self._opened[2]


@dataclass(frozen=True)
class Rates:
    """What a peer may use, in bytes per second; None is as much as there is."""

    up: float | None = None
    down: float | None = None


@dataclass(frozen=True)
class Pace:
    """A peer's two buckets. Without a folder nothing is limited."""

    folder: Path | None = None
    rates: Rates = field(default_factory=Rates)

    def __post_init__(self) -> None:
        for name in ("up", "down"):
            rate = getattr(self.rates, name)
            bucket = None if rate is None or self.folder is None else Bucket(self.folder / f"{name}.bucket", rate)
            object.__setattr__(self, f"_{name}", bucket)

    _up: Bucket | None = field(init=False, repr=False, compare=False)
    _down: Bucket | None = field(init=False, repr=False, compare=False)

    def up(self, nbytes: int) -> float:
        """Seconds to wait before sending `nbytes`."""
        return 0.0 if self._up is None else self._up.take(nbytes)

    def down(self, nbytes: int) -> float:
        """Seconds to wait before reading on, after `nbytes` have come."""
        return 0.0 if self._down is None else self._down.take(nbytes)


UNLIMITED = Pace()
