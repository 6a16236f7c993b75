"""AdamW without torch's compiler.

torch's optimizers ask its compiler to leave them alone, and import it to ask: 1.2 s of every process that makes one,
though nothing here is ever compiled. The methods beneath that request are the same and compute the same.
"""

from __future__ import annotations

from inspect import unwrap

import torch
from torch.optim import Optimizer


class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW`, which cannot be compiled or differentiated through."""

    add_param_group = unwrap(Optimizer.add_param_group)
    zero_grad = unwrap(Optimizer.zero_grad)
    state_dict = unwrap(Optimizer.state_dict)
    load_state_dict = unwrap(Optimizer.load_state_dict)
    step = torch.no_grad()(unwrap(torch.optim.AdamW.step))
