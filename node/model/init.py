"""Initial weights: a pure function of the run's seed and the tensor's name, equal on every machine, expert by expert.

A newcomer needs no download to start, and nobody ever needs all experts at once to know any one of them.

Randomness is Philox, keyed by a BLAKE2b hash of (seed, name). Normal variates come from a table: 16 raw bits pick one
of 65536 equally likely quantiles, rescaled to unit variance. numpy's own `standard_normal` is not used, because numpy
keeps raw bit streams stable between versions but not its distributions, and their tails call the machine's libm; a
table of float64 quantiles rounded to float32 has neither problem. Variates are bounded by 4.4 sigma.

The backbone is initialised by the family's own `_init_weights`, whose random fills are intercepted and answered from
the streams above: every family keeps its rules (norms at one, padding rows at zero, state-space biases) without a table
of them here. Routed experts are drawn from N(0, initializer_range^2), as all families do, each from a stream named by
its place in the whole network: making layers private changes no initial weight.

Seed and config are public, and who knows all first weights can tell by them, for long, which expert is which. Peers
that train experts shall not know it; so the streams of a swarm's experts are keyed with a secret of its composers.
"""

from __future__ import annotations

import functools
import hashlib
import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..run.manifest import ExpertShape, ModelSpec
from .families import MoEBlock, initializer_range, moe_blocks, selection_bias, skeleton
from .shard import parameter_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CHUNK = 1 << 18  # variates at a time: bounds the temporaries beside the tensor itself


def expert_shape(spec: ModelSpec) -> ExpertShape:
    """Shape of the routed experts of `spec`, as stated or else as built. Raises ValueError where it cannot be."""
    return spec.experts or built_expert_shape(spec)


def built_expert_shape(spec: ModelSpec) -> ExpertShape:
    """The same from the config alone, whatever `spec` states."""
    return _expert_shape(msgspec.json.encode(spec.config), spec.private_layers)


@functools.lru_cache(maxsize=16)
def _expert_shape(config: bytes, private_layers: int) -> ExpertShape:
    network = skeleton(msgspec.json.decode(config))
    _, shared = split_blocks(moe_blocks(network), private_layers)
    first = shared[0]
    return ExpertShape(
        num_layers=len(shared),
        num_experts=first.num_experts,
        hidden=first.hidden,
        width=first.width,
        act=first.act,
        std=initializer_range(network.config),
    )


def experts_per_token(spec: ModelSpec) -> int:
    """K of every router. Families name it in many ways, or leave it to their default; transformers knows all of them.

    Raises ValueError for a model that cannot be built.
    """
    return _experts_per_token(msgspec.json.encode(spec.config))


@functools.lru_cache(maxsize=16)
def _experts_per_token(config: bytes) -> int:
    found = getattr(skeleton(msgspec.json.decode(config)).config.get_text_config(), "num_experts_per_tok", None) or 1
    return max(found) if isinstance(found, list) else int(found)  # a list says it layer by layer


def has_selection_biases(spec: ModelSpec) -> bool:
    """Whether routers select experts by more than their scores. Raises ValueError for a model that cannot be built."""
    return all(selection_bias(block) is not None for block in moe_blocks(skeleton(spec.config)))


def split_blocks(blocks: list[MoEBlock], private_layers: int) -> tuple[list[MoEBlock], list[MoEBlock]]:
    """The MoE layers whose experts are backbone, and those that have slots. ValueError if none would have."""
    if not 0 <= private_layers < len(blocks):
        raise ValueError(f"{private_layers} private layers of {len(blocks)} MoE layers: from 0 up, one must have slots")
    return blocks[:private_layers], blocks[private_layers:]


def private_names(block: MoEBlock) -> list[tuple[str, str]]:
    """What gate_up and down of a private layer's experts are called in the backbone, by expert."""
    named = [parameter_names(expert) for expert in range(block.num_experts)]
    return [(f"{block.name}.experts.{gate_up}", f"{block.name}.experts.{down}") for gate_up, down in named]


def backbone_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Shapes of every parameter of `MoEModel.backbone`, by name, tied weights once; nothing is materialised."""
    network = skeleton(spec.config)
    blocks = moe_blocks(network)
    private, _ = split_blocks(blocks, spec.private_layers)
    experts = {id(p) for block in blocks for p in block.block.get_submodule("experts").parameters()}
    shapes = {name: tuple(p.shape) for name, p in network.named_parameters() if id(p) not in experts}
    for block in private:
        for gate_up, down in private_names(block):
            shapes |= {gate_up: (2 * block.width, block.hidden), down: (block.hidden, block.width)}
    return shapes


def expert_weights(spec: ModelSpec, layer: int, slot: int, secret: bytes = b"") -> tuple[Tensor, Tensor]:
    """Initial gate_up (2F, D), gate rows first, and down (D, F) of one expert, float32.

    `layer` counts the MoE layers that have slots, `secret` is the run's (64 bytes at most). Raises ValueError for an
    expert that does not exist.
    """
    shape = expert_shape(spec)
    if not (0 <= layer < shape.num_layers and 0 <= slot < shape.num_experts):
        raise ValueError(f"no expert {slot} in layer {layer}: {shape.num_experts} slots, {shape.num_layers} layers")
    return _seeded(shape, spec.seed, spec.private_layers + layer, slot, secret)


def private_weights(spec: ModelSpec, layer: int, expert: int, secret: bytes = b"") -> tuple[Tensor, Tensor]:
    """Like `expert_weights`, for the private layers, which `layer` counts from 0."""
    shape = expert_shape(spec)
    if not (0 <= layer < spec.private_layers and 0 <= expert < shape.num_experts):
        raise ValueError(f"no expert {expert} in private layer {layer} of {spec.private_layers}")
    return _seeded(shape, spec.seed, layer, expert, secret)


def _seeded(shape: ExpertShape, seed: int, moe_layer: int, expert: int, secret: bytes) -> tuple[Tensor, Tensor]:
    """`moe_layer` counts all MoE layers."""
    gate_up = torch.empty(2 * shape.width, shape.hidden)
    down = torch.empty(shape.hidden, shape.width)
    fill_normal(gate_up, 0.0, shape.std, random_stream(seed, f"expert/{moe_layer}/{expert}/gate_up", secret))
    fill_normal(down, 0.0, shape.std, random_stream(seed, f"expert/{moe_layer}/{expert}/down", secret))
    return gate_up, down


def materialise(network: PreTrainedModel, seed: int, *, only: str | None = None) -> None:
    """Give memory and initial values to everything in `network` that is still on the meta device.

    Tied tensors stay tied. `only` names one module to materialise, itself without its children.
    Raises ValueError if the family leaves a tensor without an initial value.
    """
    modules = dict(network.named_modules()) if only is None else {only: network.get_submodule(only)}
    replaced: dict[int, Tensor] = {}
    for module in modules.values():
        for store in (module._parameters, module._buffers):
            for name, old in store.items():
                if old is not None and old.is_meta:
                    if id(old) not in replaced:
                        replaced[id(old)] = _blank(old)
                    store[name] = replaced[id(old)]
    created = {id(tensor) for tensor in replaced.values()}
    for name, module in modules.items():
        with torch.no_grad(), _SeededFills(seed, name):
            network._init_weights(module)
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        if id(tensor) in created and tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{type(network).__name__} does not say how to initialise {name}")


def _blank(old: Tensor) -> Tensor:
    """Like `old`, in memory, and not a number wherever nothing is written later."""
    new = torch.empty_like(old, device="cpu")
    new = new.fill_(torch.nan) if new.is_floating_point() else new.zero_()
    return nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new


class _SeededFills(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answers in-place random fills from the streams of one module, in the order in which they are asked for."""

    def __init__(self, seed: int, module: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seed = seed
        self._module = module
        self._calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        fill = {torch.ops.aten.normal_.default: fill_normal, torch.ops.aten.uniform_.default: fill_uniform}.get(func)
        if fill is not None:
            # The dispatcher leaves out trailing arguments that have their default: mean 0, std 1 and from 0, to 1.
            given: tuple[float, ...] = args[1:3]
            first, second = (*given, *(0.0, 1.0)[len(given) :])
            return fill(args[0], first, second, self._next_stream())
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise ValueError(f"initialisation of {self._module} draws by {func}, which is not equal on all machines")
        return func(*args, **(kwargs or {}))

    def _next_stream(self) -> np.random.Philox:
        self._calls += 1
        return random_stream(self._seed, f"backbone/{self._module}/{self._calls}")


def random_stream(seed: int, name: str, secret: bytes = b"") -> np.random.Philox:
    """The raw random bits that belong to one tensor of a run."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), key=secret, digest_size=16, person=b"shoal init").digest()
    return np.random.Philox(key=int.from_bytes(digest, "little"))


@functools.cache
def _quantiles() -> np.ndarray:
    """65536 equally likely standard normal values, float32: value i is the quantile at (i + 1/2) / 65536."""
    normal = statistics.NormalDist()
    upper = np.array([normal.inv_cdf(0.5 + (i + 0.5) / 65536) for i in range(32768)])
    upper /= np.sqrt(np.mean(np.square(upper)))
    table: np.ndarray = np.concatenate([-upper[::-1], upper]).astype(np.float32)
    return table


def fill_normal(out: Tensor, mean: float, std: float, stream: np.random.Philox) -> Tensor:
    """Fill float tensor `out` in place, in row-major order, with N(mean, std^2) variates of `stream`."""
    table = _quantiles() * np.float32(std) + np.float32(mean)

    def draw(count: int) -> np.ndarray:
        raw = np.asarray(stream.random_raw(-(-count // 4)), dtype="<u8").view("<u2")
        drawn: np.ndarray = table[raw[:count]]
        return drawn

    return _fill(out, draw)


def fill_uniform(out: Tensor, low: float, high: float, stream: np.random.Philox) -> Tensor:
    """Fill float tensor `out` in place, in row-major order, with variates of `stream` uniform on [low, high)."""

    def draw(count: int) -> np.ndarray:
        raw = np.asarray(stream.random_raw(-(-count // 2)), dtype="<u8").view("<u4")
        unit = (raw[:count] >> np.uint32(8)).astype(np.float32) * np.float32(2**-24)
        drawn: np.ndarray = unit * np.float32(high - low) + np.float32(low)
        return drawn

    return _fill(out, draw)


def _fill(out: Tensor, draw: Callable[[int], np.ndarray]) -> Tensor:
    flat = out.view(-1) if out.is_contiguous() else torch.empty(out.numel(), dtype=out.dtype)
    for start in range(0, flat.numel(), _CHUNK):
        part = flat[start : start + _CHUNK]
        part.copy_(torch.from_numpy(draw(part.numel())))
    if not out.is_contiguous():
        out.copy_(flat.view(out.shape))
    return out
