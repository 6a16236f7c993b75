"""Wall clocks that step at run time: in every Python process of a peer, `time.time` is off by what a file says.

A folder on PYTHONPATH brings a `sitecustomize` that calls `install` before any other module is there to take hold of
`time.time`. So records, leases, DHT and matchmaking see another time, and monotonic clocks go on, as when a real clock
is set. Who keeps the true time: the daemon under the DHT, a static Go program that only carries bytes; time stamps of
logs and files; and the deadlines that the C library makes of wall clocks, in semaphores of processes.

libfaketime would shift those too, but its release 0.9.10 breaks what it is not to touch: an absolute sleep on the
monotonic clock fails with EINVAL, so that `time.sleep` raises.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from pathlib import Path

VARIABLE = "SHOAL_CHAOS_CLOCK"
_SECONDS = struct.Struct("=d")


def environment(folder: Path) -> dict[str, str]:
    """Of a peer whose clock `set_clock(folder, ...)` sets; it is right until then. Makes the folder."""
    if not folder.exists():
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(f"from {__name__} import install\n\ninstall()\n")
        (folder / "ahead").write_bytes(_SECONDS.pack(0.0))
    paths = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": f"{folder}:{paths}" if paths else str(folder), VARIABLE: str(folder / "ahead")}


def set_clock(folder: Path, seconds: float) -> None:
    """Let it be `seconds` ahead of the true one from now on; below 0, behind."""
    with (folder / "ahead").open("r+b") as file, mmap.mmap(file.fileno(), _SECONDS.size) as ahead:
        _SECONDS.pack_into(ahead, 0, seconds)


def install() -> None:
    """Shift this process's `time.time` and `time.time_ns`, and those of the processes that it forks."""
    with Path(os.environ[VARIABLE]).open("rb") as file:
        ahead = mmap.mmap(file.fileno(), _SECONDS.size, access=mmap.ACCESS_READ)
    true, true_ns = time.time, time.time_ns
    setattr(time, "time", lambda: true() + _SECONDS.unpack_from(ahead)[0])  # noqa: B010 - mypy rightly refuses these
    setattr(time, "time_ns", lambda: true_ns() + round(1e9 * _SECONDS.unpack_from(ahead)[0]))  # noqa: B010
