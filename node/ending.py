"""How a command ends that cannot do what it was asked: what it says, and its exit code."""

from __future__ import annotations

import logging
import sys
import traceback

from ..protocol.errors import ShoalError
from .errors import exit_code

EXPECTED = (ShoalError, OSError)  # what a user can do something about: no traceback


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
