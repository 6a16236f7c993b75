"""The optimizer is torch's own to the bit, and brings no compiler."""

import copy
import subprocess
import sys

import pytest
import torch
from shoal.kernels.adamw import AdamW


@pytest.mark.parametrize("fused", [False, True])
def test_it_does_what_torch_does(fused: bool) -> None:
    weights = [torch.randn(5, 7), torch.randn(3), torch.randn(4, 4)]
    made = []
    for kind in (torch.optim.AdamW, AdamW):
        parameters = [weight.clone().requires_grad_() for weight in weights]
        optimizer = kind(parameters[:2], lr=0.02, betas=(0.8, 0.9), weight_decay=0.1, fused=fused)
        optimizer.add_param_group({"params": parameters[2:], "weight_decay": 0.0})
        made.append((parameters, optimizer))
    for step in range(6):
        gradients = [torch.randn_like(weight) for weight in weights]
        for parameters, optimizer in made:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient.clone()
            if step == 3:  # in the middle, from what was saved
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            optimizer.step()
            optimizer.zero_grad()
            assert all(parameter.grad is None for parameter in parameters)
    for theirs, ours in zip(made[0][0], made[1][0], strict=True):
        assert torch.equal(theirs, ours)
    for theirs, ours in zip(*(optimizer.state_dict()["state"].values() for _, optimizer in made), strict=True):
        assert all(torch.equal(theirs[name], ours[name]) for name in ("step", "exp_avg", "exp_avg_sq"))


def test_no_compiler_is_imported() -> None:
    code = (
        "import sys, torch; from shoal.kernels.adamw import AdamW;"
        "parameter = torch.nn.Parameter(torch.ones(3)); optimizer = AdamW([parameter], fused=True);"
        "parameter.grad = torch.ones(3); optimizer.step(); optimizer.zero_grad();"
        "optimizer.load_state_dict(optimizer.state_dict());"
        "assert parameter.max() < 1; assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
