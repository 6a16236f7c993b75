"""The expert shard: what stands where a layer's `experts` were, full experts for owned slots, stand-ins for the rest.

Shapes: T tokens, K experts per token, E experts (= slots), D hidden, F expert width, N rows of one expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...kernels.experts import DenseExpert, ExpertWeights, OwnedExpert
from ...kernels.grouped import fast_dtype
from ...kernels.routed import apply_experts, drop_over_capacity
from ...kernels.standin import StandIn

# Called as tap(layer, slot, x_ND, gate_N) with the rows routed to an owned expert, detached.
OwnedRowsTap = Callable[[int, int, Tensor, Tensor], None]

# Called as tap(layer, slot, x_ND, dy_ND, a_NF, dh_NH) in backward with the rows of an expert that is not owned; see
# `kernels.routed.RowTap.backward_rows`.
SketchTap = Callable[[int, int, Tensor, Tensor, Tensor, Tensor], None]


# Makes an owned expert of its weights gate_up (2F, D) and down (D, F).
Form = Callable[[Tensor, Tensor], OwnedExpert]


def parameter_names(slot: int) -> tuple[str, str]:
    """What the gate_up and down of an expert that is trained in full are called in its shard."""
    return f"gate_up_{slot}", f"down_{slot}"


class ExpertShard(nn.Module):
    """One MoE layer's experts as one composer has them. Every slot must be filled before the first forward.

    Ownership changes between steps only, on the thread that trains.
    """

    def __init__(
        self,
        *,
        layer: int,
        num_experts: int,
        hidden: int,
        width: int,
        act: str,
        capacity_factor: float,
        expert: Form = DenseExpert,
    ) -> None:
        """
        Args:
            layer: position among the MoE layers that have slots, from 0, as taps are told it.
            act: transformers' name of the gate's activation.
            capacity_factor: pairs an expert takes, over the even share T * K / E; pairs beyond are dropped, those with
                the lowest gate first. 0 never drops.
            expert: what becomes of the weights of one that is owned.
        """
        super().__init__()
        self.layer = layer
        self.num_experts = num_experts
        self.hidden = hidden
        self.width = width
        self.tap: OwnedRowsTap | None = None
        self.sketch_tap: SketchTap | None = None
        self.counts = torch.zeros(num_experts, dtype=torch.int64)  # (E) pairs routed in the last forward, before drops
        self._act = act
        self._capacity_factor = capacity_factor
        self._expert = expert
        self._owned: dict[int, OwnedExpert] = {}
        self._device = torch.device("cpu")
        self._standins: dict[int, StandIn] = {}  # as they were given: what travels is on the CPU
        self._running: dict[int, StandIn] = {}  # the same on the device

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """What transformers' `experts` compute: x (T, D), index (T, K), weights (T, K) -> y (T, D)."""
        self.counts = torch.bincount(top_k_index.reshape(-1), minlength=self.num_experts)[: self.num_experts]
        if self._capacity_factor > 0:
            capacity = math.ceil(self._capacity_factor * top_k_index.numel() / self.num_experts)
            top_k_index = drop_over_capacity(top_k_index, top_k_weights, self.num_experts, capacity)
        tap = _Rows(self.layer, self._owned, self.tap, self.sketch_tap) if self.tap or self.sketch_tap else None
        return apply_experts(
            hidden_states,
            top_k_index,
            top_k_weights,
            self._weights(),
            tap=tap,
            act=self._act,
            dtype=fast_dtype(self._device),
        )

    def _weights(self) -> list[ExpertWeights]:
        """All experts by slot. An owned one without tokens goes in detached: its gradient stays None, not zero, so that
        the optimizer neither decays it nor moves it by old momentum."""
        weights: list[ExpertWeights] = []
        for slot, count in enumerate(self.counts.tolist()):
            expert = self._owned.get(slot)
            if expert is None:
                weights.append(self._running[slot])
            elif count:
                weights.append(expert)
            else:
                weights.append(expert.with_trained([tensor.detach() for tensor in expert.trained]))
        return weights

    @property
    def owned(self) -> list[int]:
        """Slots held in full, ascending."""
        return sorted(self._owned)

    def expert(self, slot: int) -> OwnedExpert:
        """The owned expert; what it trains are this module's parameters. Raises ValueError if it is not owned."""
        if slot not in self._owned:
            raise ValueError(f"slot {slot} is not owned")
        return self._owned[slot]

    def standin(self, slot: int) -> StandIn:
        """What runs in place of an expert, as it was given. Raises ValueError if the slot is owned."""
        if slot not in self._standins:
            raise ValueError(f"slot {slot} has no stand-in here")
        return self._standins[slot]

    def set_standin(self, slot: int, standin: StandIn) -> None:
        """Run `standin` for a slot that is not owned. Raises ValueError if it is owned or does not exist."""
        self._check(slot)
        if slot in self._owned:
            raise ValueError(f"slot {slot} is owned: release it to run a stand-in")
        self._run(slot, standin)

    def adopt(self, slot: int, gate_up: Tensor, down: Tensor) -> OwnedExpert:
        """Hold a slot in full from now on. Copies the weights gate_up (2F, D) and down (D, F).

        Raises ValueError if the slot is owned already or the shapes are wrong; nothing has changed then.
        """
        self._check(slot)
        if gate_up.shape != (2 * self.width, self.hidden) or down.shape != (self.hidden, self.width):
            raise ValueError(f"expert of shapes {tuple(gate_up.shape)}, {tuple(down.shape)} does not fit slot {slot}")
        return self.hold(slot, self._expert(gate_up, down))

    def hold(self, slot: int, expert: OwnedExpert) -> OwnedExpert:
        """The same with an expert, of which what is trained is copied into new parameters.

        Raises ValueError if the slot is owned already; nothing has changed then.
        """
        self._check(slot)
        if slot in self._owned:
            raise ValueError(f"slot {slot} is owned already")
        parameters = [_parameter(tensor, self._device) for tensor in expert.trained]
        for name, parameter in zip(expert.names, parameters, strict=True):
            self.register_parameter(f"{name}_{slot}", parameter)
        expert = self._owned[slot] = expert.to(self._device).with_trained(parameters)
        self._standins.pop(slot, None)
        self._running.pop(slot, None)
        return expert

    def release(self, slot: int, standin: StandIn) -> None:
        """Give up a slot: `standin` runs in its place. Raises ValueError if it is not owned."""
        for name in self.expert(slot).names:
            delattr(self, f"{name}_{slot}")
        del self._owned[slot]
        self._run(slot, standin)

    def place(self, device: torch.device) -> None:
        """Compute on `device` from now on. What is trained is moved by whoever moves the network."""
        self._device = device
        self._owned = {slot: expert.to(device) for slot, expert in self._owned.items()}
        for slot, standin in self._standins.items():
            self._run(slot, standin)

    def _run(self, slot: int, standin: StandIn) -> None:
        self._standins[slot] = standin
        self._running[slot] = standin if self._device.type == "cpu" else standin.to(self._device)

    def _check(self, slot: int) -> None:
        if not 0 <= slot < self.num_experts:
            raise ValueError(f"no slot {slot}: this layer has {self.num_experts}")


class _Rows:
    """Inputs of owned experts, to fit their stand-ins to; gradients at experts of others, to tell them."""

    def __init__(
        self, layer: int, owned: dict[int, OwnedExpert], tap: OwnedRowsTap | None, sketch_tap: SketchTap | None
    ) -> None:
        self._layer = layer
        self._owned = owned
        self._tap = tap
        self._sketch_tap = sketch_tap

    def forward_rows(self, expert: int, x_ND: Tensor, gate_N: Tensor) -> None:
        if self._tap is not None and expert in self._owned:
            self._tap(self._layer, expert, x_ND, gate_N)

    def backward_rows(self, expert: int, x_ND: Tensor, dy_ND: Tensor, a_NF: Tensor, dh_NH: Tensor) -> None:
        if self._sketch_tap is not None and expert not in self._owned:
            self._sketch_tap(self._layer, expert, x_ND, dy_ND, a_NF, dh_NH)


def _parameter(weights: Tensor, device: torch.device) -> nn.Parameter:
    kept = weights.detach().to(device, torch.float32, copy=True, memory_format=torch.contiguous_format)
    return nn.Parameter(kept)
