"""What we need to know of a transformers MoE family, found by looking at the model rather than by a table of names.

transformers 5 writes every MoE block alike: a module with a child `experts`, called as
`experts(hidden_states, top_k_index, top_k_weights)`, and a router beside it. So a family works here if its experts are
gated MLPs stored as `gate_up_proj (E, 2F, D)` and `down_proj (E, D, F)` and nothing else (Qwen2/3-MoE, Qwen3-Next,
Mixtral, OLMoE, DeepSeek-V2/V3, GLM-4-MoE and more); families with biases or interleaved rows (GPT-OSS), with another
gate than act(gate x) ⊙ up x (MiniMax-M3), or whose routers choose among more than the experts (ZAYA), are refused.

Shapes: T tokens, K experts per token, D hidden, F expert width, E experts per layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ...kernels.activations import ACTIVATIONS, check_activation
from ...protocol.imports import importing

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Scoring = Literal["softmax", "sigmoid"]

# Where families keep the module that yields the router logits.
_ROUTER_NAMES = ("gate", "router")

# What a config.json says of the file it came with, or of one use of the model.
_BESIDE_THE_MODEL = (
    "transformers_version", "architectures", "dtype", "torch_dtype", "_name_or_path", "use_cache", "id2label",
    "label2id",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MoEBlock:
    """One MoE layer of a network: where it is and how its experts look."""

    name: str  # of the block, as in `named_modules`
    block: nn.Module  # has the children `experts` and the router
    router: nn.Module
    num_experts: int
    hidden: int
    width: int
    act: str  # of the gate, a transformers activation name


@cache
def load_families() -> None:
    """Import what `skeleton` does, for any family: seconds, which somebody may have to spare before."""
    with importing():
        import transformers.modeling_layers
        import transformers.models.auto.modeling_auto  # noqa: F401


def skeleton(config: Mapping[str, Any]) -> PreTrainedModel:
    """The family's own causal language model on the meta device: shapes and names, no memory.

    `config` is a transformers config by value, with its `model_type`. Raises ValueError for one that cannot be built.
    """
    # Not above: seconds that only who builds a model need spend.
    load_families()
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(config)
    model_type = values.pop("model_type", None)
    if not isinstance(model_type, str):
        raise ValueError("the model's config has no `model_type`")
    try:
        parsed: PreTrainedConfig = AutoConfig.for_model(model_type, **values)
        with torch.device("meta"):
            network: PreTrainedModel = AutoModelForCausalLM.from_config(
                parsed, attn_implementation="sdpa", dtype=torch.float32
            )
    except (StrictDataclassError, TypeError, KeyError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"transformers makes no {model_type} of this config: {error}") from error
    return with_weights_only(network)


def with_weights_only(network: PreTrainedModel) -> PreTrainedModel:
    """`network`, whose float buffers that belong into checkpoints have become parameters without gradients.

    Those are the biases by which DeepSeek-V3 and its like select experts. They are weights like others: merged, saved,
    handed to newcomers and exported.
    """
    for module in network.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_floating_point() and name not in module._non_persistent_buffers_set:
                delattr(module, name)
                module.register_parameter(name, nn.Parameter(buffer, requires_grad=False))
    return network


def selection_bias(block: MoEBlock) -> nn.Parameter | None:
    """What a layer adds to its experts' scores (E) to select them, and not to weigh them; None in most families."""
    found = [
        parameter
        for name, parameter in block.block.named_parameters()
        if not name.startswith("experts.") and not parameter.requires_grad and parameter.shape == (block.num_experts,)
    ]
    return found[0] if len(found) == 1 else None


def about_the_model(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of what a config.json says, what makes the model: a config by value.

    With what is null: left out, it would be the family's default, and DeepSeek-V2-Lite would get a `q_lora_rank`.
    """
    return {name: value for name, value in config.items() if name not in _BESIDE_THE_MODEL}


def moe_blocks(network: nn.Module) -> list[MoEBlock]:
    """All MoE layers in order of depth. Raises ValueError if there are none or we cannot run their experts."""
    found = [
        _describe(name, module)
        for name, module in network.named_modules()
        if isinstance(getattr(module, "experts", None), nn.Module)
    ]
    if not found:
        raise ValueError(f"{type(network).__name__} has no MoE layer with an `experts` module")
    if len({(block.num_experts, block.hidden, block.width, block.act) for block in found}) > 1:
        raise ValueError("MoE layers differ in number or shape of experts: a slot must be the same in every layer")
    return found


def _describe(name: str, block: nn.Module) -> MoEBlock:
    experts = block.experts
    assert isinstance(experts, nn.Module)
    shapes = {key: tuple(value.shape) for key, value in experts.named_parameters()}
    gate_up, down = shapes.get("gate_up_proj", ()), shapes.get("down_proj", ())
    plain = (
        shapes.keys() == {"gate_up_proj", "down_proj"}
        and len(gate_up) == len(down) == 3
        and gate_up == (down[0], 2 * down[2], down[1])
        and getattr(experts, "is_concatenated", True)
    )
    if not plain:
        raise ValueError(f"{name}.experts is not a set of plain gated MLPs (gate_up_proj, down_proj): {shapes}")
    routers = [getattr(block, key) for key in _ROUTER_NAMES if isinstance(getattr(block, key, None), nn.Module)]
    if len(routers) != 1:
        raise ValueError(f"{name} has {len(routers)} routers named {' or '.join(_ROUTER_NAMES)}")
    act = _activation(experts)
    _check_gate(name, experts, act)
    described = MoEBlock(
        name=name,
        block=block,
        router=routers[0],
        num_experts=down[0],
        hidden=down[1],
        width=down[2],
        act=act,
    )
    _check_router(described)
    return described


def _activation(experts: nn.Module) -> str:
    config = getattr(experts, "config", None)
    act = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    if not isinstance(act, str):
        raise ValueError(f"{type(experts).__name__} does not say which activation it uses")
    check_activation(act)
    return act


@torch.no_grad()
def _check_gate(name: str, experts: nn.Module, act: str) -> None:
    """Raises ValueError unless these experts make act(gate) ⊙ up of [gate, up], as what they do with some values tells.

    Shapes and names do not tell it: some families clamp both, or add one to what is up. Experts that transformers has
    not given a gate of their own are plain.
    """
    apply_gate: Callable[[Tensor], Tensor] | None = getattr(experts, "_apply_gate", None)
    if apply_gate is None:
        return
    values = torch.linspace(-100.0, 100.0, 40, device="cpu")
    gate, up = (grid.flatten() for grid in torch.meshgrid(values, values, indexing="ij"))
    if not torch.allclose(apply_gate(torch.cat((gate, up)).unsqueeze(0))[0], ACTIVATIONS[act](gate) * up, rtol=1e-3):
        raise ValueError(f"{name}.experts are not gated by {act} alone: {type(experts).__name__} has a gate of its own")


class _Routed(Exception):
    """Ends a forward where the experts would begin."""


@torch.no_grad()
def _check_router(block: MoEBlock) -> None:
    """Raises ValueError unless the router scores the experts and nothing else, as what it does with a token tells.

    Families compute scores in many ways, and some have classes for what is no expert, such as leaving a token as it is.
    """
    experts = block.block.get_submodule("experts")
    found: list[Tensor] = []

    def stop(_experts: nn.Module, _inputs: object) -> None:
        raise _Routed

    def keep(_router: nn.Module, _inputs: object, output: object) -> None:
        found.append(router_logits(output))

    hooks = experts.register_forward_pre_hook(stop), block.router.register_forward_hook(keep)
    try:
        block.block(experts.get_parameter("down_proj").new_zeros(1, 1, block.hidden))
    except _Routed:
        pass
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"{block.name} cannot route a token of this config: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
    classes = [logits.shape[-1] for logits in found]
    if classes != [block.num_experts]:
        raise ValueError(
            f"{block.name} does not route each token among its {block.num_experts} experts: its router has {classes} "
            "classes"
        )


def initializer_range(config: PreTrainedConfig) -> float:
    """Standard deviation of initial weights, by transformers' own rule."""
    return float(getattr(config.get_text_config(), "initializer_range", None) or 0.02)


def router_logits(output: object) -> Tensor:
    """The logits (T, E) in what a router module returned: families return them alone or first in a tuple."""
    logits = output[0] if isinstance(output, tuple) else output
    assert isinstance(logits, Tensor)
    return logits


@torch.no_grad()
def scoring(logits: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Scoring:
    """How a router turned logits (T, E) into the gate weights (T, K) of the experts at index (T, K).

    Told from what it did with some tokens: under softmax the ratio of two gate weights is exp(l_i - l_j), under sigmoid
    sigma(l_i) / sigma(l_j), whether or not weights are normalised over the top-k or scaled. Where neither can be told
    (one expert a token has no ratio; some routers do something else), the answer is softmax. Only the balance loss
    depends on it.
    """
    chosen = logits.double().gather(1, top_k_index)
    ratios = top_k_weights.double().log().diff(dim=1)
    misfit_softmax = (ratios - chosen.diff(dim=1)).abs().sum()
    misfit_sigmoid = (ratios - chosen.sigmoid().log().diff(dim=1)).abs().sum()
    return "sigmoid" if misfit_sigmoid < 0.01 * misfit_softmax else "softmax"
