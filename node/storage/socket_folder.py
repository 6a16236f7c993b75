"""Where a peer and its children keep their sockets: a folder of its own, which no later one has to share.

hivemind, multiprocessing and the directory's daemon put sockets into the temporary directory, under names that nobody
finds again; a peer that is killed leaves them there. So each peer has a folder for them, and holds a lock in it. The
kernel drops that with the last process of the peer, however it ends. Folders whose lock is free are removed by the next
peer that starts. torch's sockets stay outside: what serves them ends after the peer, removes them, and fails without.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from multiprocessing.util import Finalize
from pathlib import Path

PREFIX = "shoal-sockets-"
LOCK = "in-use"
_PATH_BYTES = 107  # of a socket, at most
_BELOW_BYTES = (
    len(PREFIX) + 8 + len("/hivemind-p2pclient-0123456789a.sock")
)  # such a folder's name, and the longest in it


@contextlib.contextmanager
def own_sockets() -> Iterator[Path]:
    """Within the block Python's temporary directory, in this process and its forks, is such a folder.

    It is gone when the process ends in good order, as multiprocessing's sockets serve until then. Where TMPDIR is so
    long that the kernel would refuse sockets in it, the folder is in /tmp, and torch's are too.
    """
    asked, variable = Path(tempfile.gettempdir()), os.environ.get("TMPDIR")
    shared = asked
    if len(os.fsencode(asked)) + 1 + _BELOW_BYTES > _PATH_BYTES:
        shared = Path("/tmp")
        os.environ["TMPDIR"] = str(shared)
    for folder in shared.glob(f"{PREFIX}*"):
        _remove_if_left(folder)
    own = Path(tempfile.mkdtemp(prefix=PREFIX, dir=shared))
    _hold(own)
    Finalize(None, shutil.rmtree, args=(own, True), exitpriority=-200)  # after multiprocessing's own, which has -100
    tempfile.tempdir = str(own)
    try:
        yield own
    finally:
        tempfile.tempdir = str(asked)
        if variable is None:
            os.environ.pop("TMPDIR", None)
        else:
            os.environ["TMPDIR"] = variable


def _hold(folder: Path) -> None:
    """Lock it for as long as this process and its forks live. The lock has its name only once it is held."""
    descriptor = os.open(folder / "new", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    (folder / "new").rename(folder / LOCK)


def _remove_if_left(folder: Path) -> None:
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:  # another user's, or just being made or removed
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        pass  # in use
    finally:
        os.close(descriptor)
