"""Imports without the garbage collector.

What imports make stays: hundreds of thousands of objects, which the collector would look through again and again while
they are made, a fifth of a peer's start, and in every full collection of its life.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Around imports that take seconds. What is alive at the end is left alone by the collector for good."""
    collected = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collected:
            gc.enable()
