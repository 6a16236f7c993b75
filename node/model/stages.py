"""A model cut into stages: decoder layers in a row, for processes that pass activations on (pipeline parallelism).

    stage 0: embedding, layers      ...      last stage: layers, norm, head

A stage is the family's own network in which the layers of other stages are replaced by nothing, under their own
numbers: masks, rotary angles and whatever else a family makes of positions is made by its own code, in every stage.
Between stages travels what leaves a decoder layer, (B, S, D).

The router losses arise in every stage, and are means over all tokens of a batch, of which a stage sees one microbatch
at a time. The balance loss (`balance.py`) also weighs every expert with its share f of the whole batch's pairs, which
has no gradient. So a stage keeps its routers' logits until their backward pass, and adds these losses' gradients there:
by then, in a schedule that takes all microbatches forward before the first goes back (GPipe, not 1F1B), all counts are
known, and the gradient is exactly the whole batch's. Rejected: f of each microbatch (another, noisier loss), f of the
step before (a late one), and scalars handed from stage to stage (a graph that spans processes, for nothing).

Shapes: B sequences of a microbatch, S tokens each, T = B S, D hidden, V vocabulary, E experts per layer, L MoE layers
of all stages.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...kernels.bases import Bases
from ...kernels.experts import DenseExpert
from ..run.manifest import ModelSpec, StandInSpec
from ..standins.standin_menu import menu_of
from .balance import router_losses
from .build import MoEModel, put_shard
from .families import Scoring, moe_blocks, skeleton
from .init import materialise
from .shard import Form
from .start import Seeded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CHECKED_TOKENS = 8
_CHECKED_ERROR = 1e-3  # of logits, relative: the same operations in the same order have next to none


@dataclass(frozen=True)
class Span:
    """One stage's part: decoder layers `first` up to, not including, `end`, of `layers`; the same of MoE layers."""

    first: int
    end: int
    layers: int
    moe_first: int
    moe_end: int
    moe_layers: int

    @property
    def is_first(self) -> bool:
        return self.first == 0

    @property
    def is_last(self) -> bool:
        return self.end == self.layers


def spans(spec: ModelSpec, stages: int) -> list[Span]:
    """The layers of each stage: as many in each, or one more in the first ones, for the last has the head.

    Raises ValueError if a stage would have no MoE layer that has slots.
    """
    network = skeleton(spec.config)
    layers = len(network.base_model.layers)
    moe = [_depth(block.name) for block in moe_blocks(network)]
    ends = [-(-layers * (stage + 1) // stages) for stage in range(stages)]
    upto = [sum(layer < end for layer in moe) for end in ends]
    cut = [
        Span(first, end, layers, moe_first, moe_end, len(moe))
        for first, end, moe_first, moe_end in zip([0, *ends], ends, [0, *upto], upto, strict=False)
    ]
    if any(max(span.moe_first, spec.private_layers) >= span.moe_end for span in cut):
        slots = len(moe) - spec.private_layers
        raise ValueError(
            f"{layers} layers, of which {slots} have slots, do not make {stages} stages with slots in each"
        )
    return cut


def _depth(name: str) -> int:
    """The decoder layer of a MoE block called like `model.layers.3.mlp`."""
    return next(int(part) for part in name.split(".") if part.isdigit())


class _NoLayer(nn.Module):
    """In place of another stage's decoder layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        for name in ("layer_type", "attention_type"):  # by which some families choose a layer's mask
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))

    def forward(self, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        return hidden_states


def cut_out(network: PreTrainedModel, span: Span) -> PreTrainedModel:
    """`network` with nothing in place of what other stages compute. What it keeps are the same modules, not copies."""
    cut, body = _another(network), _another(network.base_model)
    layers = enumerate(network.base_model.layers)
    body.layers = nn.ModuleList(layer if span.first <= n < span.end else _NoLayer(layer) for n, layer in layers)
    if not span.is_first:
        body.embed_tokens = nn.Identity()
    if not span.is_last:
        body.norm = nn.Identity()
        cut.lm_head = nn.Identity()
    setattr(cut, network.base_model_prefix, body)
    return cut


def _another(module: Any) -> Any:
    """The same module, of which children can be replaced."""
    other = copy.copy(module)
    other.__dict__["_modules"] = dict(module._modules)
    return other


def build_stage(spec: ModelSpec, span: Span, *, expert: Form = DenseExpert) -> MoEModel:
    """Of a run's model only what one stage computes with. The values of its backbone mean nothing, and its slots are
    empty: somebody else tells all of them before the first forward."""
    network = cut_out(skeleton(spec.config), span)
    blocks = moe_blocks(network)
    shards = [
        put_shard(block, layer - spec.private_layers, spec, expert)
        for layer, block in enumerate(blocks, start=span.moe_first)
    ]
    materialise(network, spec.seed)
    for shard in shards:
        if shard.layer < 0:
            for number in range(shard.num_experts):
                blank = torch.zeros(2 * shard.width, shard.hidden), torch.zeros(shard.hidden, shard.width)
                shard.adopt(number, *blank)
    menu = menu_of(StandInSpec(), blocks[0].hidden, blocks[0].width, Bases())
    return MoEModel(spec, network, blocks, shards, Seeded(spec), menu)


@dataclass(frozen=True)
class Weighing:
    """How one batch's losses are weighed."""

    swarm_counts: Tensor | None  # (L, E), see `balance.router_losses`
    balance_coef: float
    z_coef: float
    microbatches: int  # all of one size


class Stage(nn.Module):
    """What one process of a pipeline computes, one microbatch at a time. Its parameters are the model's own.

    Args:
        model: the whole one, or what `build_stage` makes.
    """

    def __init__(self, model: MoEModel, span: Span) -> None:
        super().__init__()
        self.span = span
        self.network = cut_out(model.network, span)
        whole = len(model.all_shards) == span.moe_layers
        self._all_shards = model.all_shards[span.moe_first : span.moe_end] if whole else model.all_shards
        self.shards = [shard for shard in self._all_shards if shard.layer >= 0]  # those of layers that have slots
        self._routed = model.routed
        self._scoring: Callable[[], Scoring] = lambda: model.scoring
        self.begin(Weighing(None, 0.0, 0.0, 1))

    @functools.cached_property
    def backbone(self) -> dict[str, nn.Parameter]:
        """Like `MoEModel.backbone`, of this stage. Weights that are tied across stages have other names in the last."""
        slots = {id(parameter) for shard in self.shards for parameter in shard.parameters()}
        return {name: p for name, p in self.network.named_parameters() if id(p) not in slots}

    def begin(self, weighing: Weighing) -> None:
        """A batch comes next."""
        self._weighing = weighing
        self.counts_LE = torch.zeros(len(self._all_shards), self._all_shards[0].num_experts, dtype=torch.int64)

    def forward(self, x: Tensor) -> Tensor:
        """Of one microbatch: tokens (B, S) int64, or what the stage before made of them (B, S, D), to the same for the
        next stage, or logits (B, S, V). Its backward adds the gradients of this stage's router losses."""
        y, logits = self._routed(lambda: self._run(x))
        counts_LE = torch.stack([shard.counts for shard in self._all_shards])
        self.counts_LE = self.counts_LE.to(counts_LE.device) + counts_LE
        carried: Tensor = _Carry.apply(y, self._router_loss, *logits)  # type: ignore[no-untyped-call]
        return carried

    def loss(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """The last stage's: (B, S, V) and (B, S) to this microbatch's part of the batch's mean, nats per token."""
        lm = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        return lm / self._weighing.microbatches

    def _run(self, x: Tensor) -> Tensor:
        given = {"input_ids": x} if self.span.is_first else {"inputs_embeds": x}
        run = self.network if self.span.is_last else self.network.base_model
        y: Tensor = run(**given, use_cache=False)[0]
        return y

    def _router_loss(self, logits: Sequence[Tensor]) -> Tensor:
        """This microbatch's part, weighed, of what the whole batch's router losses come to in all stages."""
        span, weighing, others = self.span, self._weighing, self._weighing.swarm_counts
        balance, z = router_losses(
            logits,
            self.counts_LE,
            scoring=self._scoring(),
            swarm_counts_LE=None if others is None else others[span.moe_first : span.moe_end],
        )
        of_all = len(logits) / span.moe_layers / weighing.microbatches
        return (weighing.balance_coef * balance + weighing.z_coef * z) * of_all


@torch.no_grad()
def check_stages(model: MoEModel, cut: Sequence[Span]) -> None:
    """Raises ValueError where stages one after another do not compute what the whole model does of some tokens.

    Some families do more around their layers than is cut off here: they scale what they embed (Granite), or norm what
    leaves the last layer under another name (Jamba). Every stage would do it again.
    """
    embedding = model.network.get_input_embeddings().weight
    tokens = torch.arange(_CHECKED_TOKENS, device=embedding.device).remainder(len(embedding)).unsqueeze(0)
    whole, x = model(tokens), tokens
    for span in cut:
        x = Stage(model, span)._run(x)
    if not float((x - whole).norm()) <= _CHECKED_ERROR * float(whole.norm()):
        family = model.network.config.model_type
        raise ValueError(f"the layers of {family} do not make stages: computed apart they come to something else")


class _Carry(torch.autograd.Function):
    """Lets y through, and in backward adds the gradient of `loss_of(logits)`, which is asked for only then."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, loss_of: Callable[[Sequence[Tensor]], Tensor], *logits: Tensor) -> Tensor:
        ctx.loss_of = loss_of
        ctx.save_for_backward(*logits)
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        leaves = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        with torch.enable_grad():
            loss = ctx.loss_of(leaves)
        return grad, None, *torch.autograd.grad(loss, leaves)
