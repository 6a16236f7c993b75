"""Building the model: a transformers causal language model whose routed experts are shards.

The order matters. The network is laid out on the meta device, every `experts` module is replaced while it has no
memory, and only then is anything materialised: so no peer ever holds all experts.

The experts of private layers (`ModelSpec.private_layers`) are shards too, in which every expert is held in full, but
their parameters belong to the backbone and nothing outside the forward ever meets these shards. Transformers' own fused
experts would do for them as well, but would decay experts without tokens, cut the backbone into pieces as large as a
layer, and know no capacity.

Shapes: B sequences, S tokens a sequence, V vocabulary, D hidden, F expert width, E experts per layer (= slots), L MoE
layers, private ones included, N rows of one expert.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...kernels.experts import DenseExpert, OwnedExpert
from ...kernels.standin import Menu
from ..run.manifest import ModelSpec, StandInSpec
from ..standins.standin_menu import menu_of
from .balance import router_losses
from .families import MoEBlock, Scoring, moe_blocks, router_logits, scoring, selection_bias, skeleton
from .init import built_expert_shape, split_blocks
from .shard import ExpertShard, Form, OwnedRowsTap, SketchTap
from .start import Seeded, Start

if TYPE_CHECKING:
    from transformers import PreTrainedModel


SumCounts = Callable[[Tensor], Tensor]  # (L, E) int64 -> the same


@dataclass(frozen=True)
class Losses:
    """One forward's losses, scalars with gradients, and its routing."""

    lm: Tensor  # mean next-token cross-entropy, nats per token
    balance: Tensor  # load balance, 1 when even
    z: Tensor  # router z-loss
    total: Tensor  # lm + coefficients * the others
    counts: Tensor  # (L, E) int64, pairs that this batch routed to each expert


class MoEModel(nn.Module):
    """A causal language model of which one composer holds the backbone, some experts, and stand-ins for the rest.

    Training and evaluation run the same forward: dropout and router jitter are off, there is no KV cache.
    """

    def __init__(
        self,
        spec: ModelSpec,
        network: PreTrainedModel,
        blocks: Sequence[MoEBlock],
        shards: Sequence[ExpertShard],
        start: Start,
        menu: Menu,
    ) -> None:
        """Use `build_model`. `network` is materialised and has `shards` where `blocks` had their experts, by depth."""
        super().__init__()
        self.spec = spec
        self._start, self.menu = start, menu
        self.network = network
        # The network registers the shards already; plain tuples keep them from being registered twice.
        self.all_shards: tuple[ExpertShard, ...] = tuple(shards)
        self.shards = tuple(shard for shard in shards if shard.layer >= 0)  # those of layers that have slots
        self.num_slots = blocks[0].num_experts
        self.expert_shapes = ((2 * blocks[0].width, blocks[0].hidden), (blocks[0].hidden, blocks[0].width))
        biases = [selection_bias(block) for block in blocks]
        self.selection_biases = [bias for bias in biases if bias is not None]  # of all MoE layers, or of none
        self._router_logits: list[Tensor] = []  # of the forward that is running, by MoE layer
        for block in blocks:
            block.router.register_forward_hook(self._keep_logits)
        self._scoring: Scoring | None = None  # found out in the first `routed`
        self._routing: tuple[Tensor, Tensor] | None = None  # until then: index and weights of the first MoE layer
        self._watch = self.all_shards[0].register_forward_pre_hook(self._keep_routing)
        self.eval()

    def place(self, device: torch.device) -> None:
        """Compute on `device` from now on. Optimizers are to be made afterwards."""
        self.network.to(device)
        for shard in self.all_shards:
            shard.place(device)

    @functools.cached_property
    def backbone(self) -> dict[str, nn.Parameter]:
        """Every parameter but those of slots, by its name in the transformers model; tied weights once."""
        experts = {id(parameter) for shard in self.shards for parameter in shard.parameters()}
        return {name: p for name, p in self.network.named_parameters() if id(p) not in experts}

    def train(self, mode: bool = True) -> MoEModel:
        """Has no effect on the forward (see the class)."""
        super().train(mode)
        self.network.eval()
        return self

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, S) int64 -> logits (B, S, V) float32."""
        try:
            logits: Tensor = self.network(input_ids=tokens, use_cache=False).logits
        finally:
            self._router_logits.clear()
        return logits

    def loss(
        self,
        tokens: Tensor,
        *,
        swarm_counts: Tensor | None = None,
        balance_coef: float = 0.01,
        z_coef: float = 0.001,
        sum_counts: SumCounts | None = None,
    ) -> Losses:
        """Losses of one batch.

        Args:
            tokens: (B, S) int64, S >= 2; every token but the first of a sequence is a target.
            swarm_counts: (L, E) recent routed pairs of the other composers, see `balance.router_losses`.
            balance_coef, z_coef: weights in `total` only.
            sum_counts: adds the counts of others who compute the same step; the result's are all of theirs.
        """
        logits_BSV, router_logits = self.routed(lambda: self.network(input_ids=tokens, use_cache=False).logits)
        lm = nn.functional.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        counts_LE = torch.stack([shard.counts for shard in self.all_shards])
        if sum_counts is not None:
            counts_LE = sum_counts(counts_LE)
        balance, z = router_losses(router_logits, counts_LE, scoring=self.scoring, swarm_counts_LE=swarm_counts)
        return Losses(lm, balance, z, lm + balance_coef * balance + z_coef * z, counts_LE)

    def experts_of(self, slot: int) -> list[OwnedExpert]:
        """The owned experts of a slot, one per layer that has slots. Raises ValueError if the slot is not owned."""
        return [shard.expert(slot) for shard in self.shards]

    def initial_expert(self, layer: int, slot: int) -> tuple[Tensor, Tensor]:
        """Initial weights gate_up (2F, D) and down (D, F) of any slot's expert."""
        return self._start.expert(layer, slot)

    def set_tap(self, tap: OwnedRowsTap | None) -> None:
        """From the next forward on, call tap(layer, slot, x_ND, gate_N) with the rows routed to owned experts."""
        for shard in self.shards:
            shard.tap = tap

    def set_sketch_tap(self, tap: SketchTap | None) -> None:
        """From the next forward on, call the tap in backward with the rows of experts that are not owned."""
        for shard in self.shards:
            shard.sketch_tap = tap

    def routed(self, forward: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
        """What `forward` returns, which runs this network or a part of it, and router logits (T, E) by MoE layer."""
        self._router_logits.clear()
        try:
            result = forward()
            if self._scoring is None:
                assert self._routing is not None
                self._scoring = scoring(self._router_logits[0], *self._routing)
                self._routing = None
                self._watch.remove()
            return result, list(self._router_logits)
        finally:
            self._router_logits.clear()

    @property
    def scoring(self) -> Scoring:
        """How the routers turn logits into probabilities. After the first `routed` or `loss`."""
        assert self._scoring is not None
        return self._scoring

    def _keep_logits(self, _router: nn.Module, _inputs: object, output: object) -> None:
        self._router_logits.append(router_logits(output))

    def _keep_routing(self, _shard: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._routing = inputs[1], inputs[2].detach()


def build_model(
    spec: ModelSpec,
    *,
    owned: Collection[int],
    standin: StandInSpec,
    expert: Form = DenseExpert,
    start: Start | None = None,
) -> MoEModel:
    """The model of a run as one composer holds it, with its initial weights.

    Args:
        owned: slots held in full, in every MoE layer that has slots; may be empty or all.
        standin: what runs in place of the others.
        expert: what becomes of the weights of an owned one. Private ones are trained in full, like all of the backbone.
        start: where the initial weights come from; by default from the seed in `spec`.

    Raises:
        ValueError: the config cannot be built, its family is not supported, its experts are not as `spec` states, no
            layer would have slots, or a slot does not exist.
    """
    shape = built_expert_shape(spec)
    if spec.experts not in (None, shape):
        raise ValueError(f"the manifest states {spec.experts}, but its config makes {shape}")
    strangers = [slot for slot in owned if not 0 <= slot < shape.num_experts]
    if strangers:
        raise ValueError(f"no slots {strangers}: the model has {shape.num_experts}")
    network = skeleton(spec.config)
    blocks = moe_blocks(network)
    private, _ = split_blocks(blocks, spec.private_layers)
    shards = [put_shard(block, depth - len(private), spec, expert) for depth, block in enumerate(blocks)]
    start = start or Seeded(spec)
    start.fill(network)
    menu = menu_of(standin, shape.hidden, shape.width, start.bases)
    held = frozenset(owned)
    for depth, shard in enumerate(shards[: len(private)]):
        for number in range(shape.num_experts):
            shard.adopt(number, *start.private(depth, number))
    for slot in range(shape.num_experts):  # not layer by layer: a start may have to read all of a slot for one expert
        for shard in shards[len(private) :]:
            if slot in held:
                shard.adopt(slot, *start.expert(shard.layer, slot))
            else:
                shard.set_standin(slot, start.standin(shard.layer, slot, menu))
    return MoEModel(spec, network, blocks, shards, start, menu)


def put_shard(block: MoEBlock, layer: int, spec: ModelSpec, expert: Form = DenseExpert) -> ExpertShard:
    """Replace the experts of a block that is on the meta device by a shard, whose slots are still empty.

    `layer` counts those that have slots; it is below 0 for private ones, which nobody asks by number.
    """
    shard = ExpertShard(
        layer=layer,
        num_experts=block.num_experts,
        hidden=block.hidden,
        width=block.width,
        act=block.act,
        capacity_factor=spec.capacity_factor,
        expert=expert if layer >= 0 else DenseExpert,
    )
    block.block.experts = shard
    return shard
