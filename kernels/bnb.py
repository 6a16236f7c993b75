"""bitsandbytes without torch's compiler.

Its CPU fallbacks are decorated with `torch.compile`, and the decorator alone imports the whole compiler: 1.3 to 2.6
seconds and 40 MB of every process that holds a 4-bit copy; a first call of one would then look for a C++ compiler. They
compute the same without. Everybody who needs bitsandbytes takes it from here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch


def _uncompiled(function: Callable[..., Any] | None = None, **_: object) -> Callable[..., Any]:
    return _uncompiled if function is None else function


# It warns that an optional package for faster 4-bit products is missing; we multiply in float32.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

_compile = torch.compile
torch.compile = _uncompiled  # type: ignore[assignment]
try:
    import bitsandbytes
    import bitsandbytes.functional as functional
finally:
    torch.compile = _compile

__all__ = ["bitsandbytes", "functional"]
