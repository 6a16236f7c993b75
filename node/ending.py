"""How a command ends that cannot do what it was asked, is told to stop, or whose output nobody reads any more."""

from __future__ import annotations

import logging
import math
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cyclopts import CycloptsError

from ..protocol.errors import ShoalError
from .errors import exit_code

EXPECTED = (ShoalError, OSError)  # what a user can do something about: no traceback
UNREAD = 128 + signal.SIGPIPE
# `timeout` sends two signals, and the second must not end the cleaning up. Later ones may: a library that was being
# imported may have taken the first for an error of its own.
AGAIN_SECONDS = 5.0
_AS_CTRL_C = {signal.SIGTERM, signal.SIGHUP}


def stop_signals() -> list[signal.Signals]:
    """Those by which people and supervisors end a process in good order. A terminal that is closed sends SIGHUP, which
    `nohup` keeps from what it starts."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT, *([] if ignored else [signal.SIGHUP])]


def tell(error: ShoalError | OSError) -> int:
    """Say it on standard error. Returns the exit code. Call it where `error` is caught."""
    if isinstance(error, ShoalError):
        what, code = str(error), exit_code(error)
    else:  # a full disk, a folder of somebody else's: where is all that a user needs to know
        where = "" if error.filename is None else f": {error.filename}"
        what, code = f"{error.strerror or error}{where}", 1
    if logging.getLogger().isEnabledFor(logging.DEBUG):
        traceback.print_exc()
    print(f"shoal: {what}", file=sys.stderr, flush=True)
    return code


def ended(command: Callable[[], int | None]) -> int:
    """Exit code of a command that leaves nothing half done when it is told to stop."""
    try:
        with _cleaned_up():
            code = command()
            sys.stdout.flush()
        return code or 0
    except CycloptsError:
        return 2  # cyclopts has printed what is wrong
    except BrokenPipeError as error:
        return UNREAD if _is_unread() else tell(error)
    except EXPECTED as error:
        return tell(error)
    except SystemExit as stopped:
        if isinstance(stopped.__context__, BrokenPipeError):  # from rich, which has put /dev/null in the pipe's place
            return UNREAD
        raise


def as_a_peer(live: Callable[[], int]) -> int:
    """Exit code of what handles signals by itself, and to which a broken pipe is a helper process that is gone."""
    if threading.current_thread() is threading.main_thread():
        for number in _AS_CTRL_C & set(stop_signals()):
            signal.signal(number, signal.SIG_DFL)
    try:
        return live()
    except BrokenPipeError as error:
        return tell(error)


@contextmanager
def _cleaned_up() -> Iterator[None]:
    """Other signals leave the block as Ctrl-C does, so that what it made on the way is removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    told = -math.inf

    def end(number: int, _frame: object) -> None:
        nonlocal told
        if time.monotonic() > told + AGAIN_SECONDS:
            told = time.monotonic()
            raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in _AS_CTRL_C & set(stop_signals())}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_unread() -> bool:
    """Whether who reads standard output has gone, like `head`; if so, nothing more is written to it."""
    try:
        output = sys.stdout.fileno()
    except OSError:  # captured
        return False
    reader = select.poll()
    reader.register(output, 0)  # tells only that the other end is closed
    if not reader.poll(0):
        return False
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), output)  # Python writes what is left when it ends
    return True
