"""Where an island's members come from: a process that has imported what takes seconds, and forks one when asked.

    leader --one end of a pipe--> nursery --fork--> member
           <----process id-------

It imports while the leader builds its model; after that a member is there, or replaced, as fast as its own model is
built, and all members share the memory of what was imported.

A fork keeps neither threads nor a GPU that somebody has looked at, and libraries look when they are imported. So
nothing here starts threads, and members that will use GPUs are forked before anything is imported.
"""

from __future__ import annotations

import atexit
import gc
import os
import signal
import socket
import subprocess
import sys
import traceback
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import NoReturn

import psutil

from ...protocol.process_death import end_with_parent

LOAD_SECONDS = 300.0  # until the first member, at a low priority on a busy machine
PID_BYTES = 8
_MODULE = "shoal.node.island.nursery"
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}  # numpy would start threads; members set their own number for torch


class Nursery:
    """The leader's side. Belongs to its main thread, with which it ends.

    Args:
        imports: before the first fork; not for GPUs.
    """

    def __init__(self, imports: bool = True) -> None:
        self.imports = imports
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(LOAD_SECONDS)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", _MODULE, str(theirs.fileno()), str(os.getpid()), str(int(imports))],
                pass_fds=[theirs.fileno()],
                env=os.environ | ENVIRONMENT,
            )

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def fork(self) -> tuple[psutil.Process, Connection]:
        """A new member's process and a pipe to it. OSError if that does not work: then the nursery has ended, too."""
        try:
            ours, theirs = Pipe()
            with theirs:
                socket.send_fds(self._socket, [b"."], [theirs.fileno()])
            told = self._socket.recv(PID_BYTES, socket.MSG_WAITALL)
            if len(told) < PID_BYTES:
                raise ChildProcessError("what members are forked from has ended")
            return psutil.Process(int.from_bytes(told)), ours
        except psutil.NoSuchProcess as error:
            raise ChildProcessError("a member has ended at once") from error
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """End it, and all members with it."""
        self._socket.close()
        self._process.kill()
        self._process.wait()


_nursery: Nursery | None = None


def nursery(gpus: bool = False) -> Nursery:
    """This process's one, for members with or without GPUs, started if there is none. Does not wait for it."""
    global _nursery
    if _nursery is None or _nursery.ended or _nursery.imports is gpus:
        _nursery = Nursery(imports=not gpus)
        atexit.register(_nursery.close)
    return _nursery


def load() -> None:
    """Import what members need that others wrote."""
    import hivemind  # noqa: F401
    import torch.distributed.pipelining  # noqa: F401

    from ..model.families import load_families

    load_families()


def main() -> None:
    """`python -m shoal.node.island.nursery FD PARENT IMPORTS`: fork until the leader's end is closed."""
    end_with_parent(int(sys.argv[2]), signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGHUP):  # Ctrl-C is for the leader, which hands over first
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for members
    leader = socket.socket(fileno=int(sys.argv[1]))
    if int(sys.argv[3]):
        load()
    gc.collect()
    gc.freeze()  # the collector would write into pages that members share
    here = os.getpid()
    with suppress(ConnectionError):
        while True:
            message, pipes, *_ = socket.recv_fds(leader, 1, 1)
            if not message:
                return
            pid = os.fork()
            if pid == 0:
                leader.close()
                _live(pipes[0], here)
            os.close(pipes[0])
            leader.sendall(pid.to_bytes(PID_BYTES))


def _live(pipe: int, parent: int) -> NoReturn:
    """A member's life."""
    code = 1
    try:
        end_with_parent(parent, signal.SIGKILL)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        from .member import serve

        serve(Connection(pipe))
        code = 0
    except BaseException:  # noqa: BLE001  # of a process of its own, which must not go on as the nursery
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
