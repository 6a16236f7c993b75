"""How a dense feed-forward layer becomes experts, and by what they must be scaled.

A dense layer of width F computes y = sum over its F neurons of act(gate x) (up x) down. Any cut of the neurons into G
shards of width F/G is a sum of G smaller layers, exactly. S of the shards stay what they are, always on: the shared
expert. Each of the other R = G - S becomes C experts, so N = R C, and the router gives all R shards of one copy the
same row: whatever it prefers, the k experts that it takes are k/R whole copies (a virtual group), and every shard comes
k/R times.

Scale. Let a taken expert be weighed by w, and its output scaled by A. The layer is preserved if the weights of each
shard's takers add up to 1/A.

    normalised after top-k    all k weights add up to 1, shares alike for every shard: 1/R each, so A = R
    softmax first             a router that starts tiny makes every weight 1/N, and k/R of them meet in one shard:
                              k/(R N), so A = R N / k, which is E G^2 / k for E copies of G shards

A goes into up and down, sqrt(A) each, since the output is linear in both; gate is within the activation. With both
matrices scaled alike neither has to move further than the other in training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import ConfigError

MAX_EXPERTS = (1 << 20) - 1  # in a layer: the seed of what an expert draws counts them in 20 bits
Gates = Literal["normalised", "softmax-first"]


@dataclass(frozen=True)
class Form:
    """What is made of each feed-forward layer.

    Attributes:
        experts: N, routed, of all shards together.
        granularity: G, shards that a layer is cut into.
        top_k: k, routed experts that a token takes.
        shared: S, shards that every token takes.
        gates: when the router's weights are normalised.

    Raises:
        ConfigError: the numbers do not go with each other.
    """

    experts: int = 8
    granularity: int = 1
    top_k: int = 2
    shared: int = 0
    gates: Gates = "normalised"

    def __post_init__(self) -> None:
        if min(self.experts, self.granularity, self.top_k) < 1 or self.shared < 0:
            raise ConfigError("--experts, --granularity and --top-k are 1 or more", fix="give such numbers")
        if self.experts > MAX_EXPERTS:
            raise ConfigError(f"--experts {self.experts} are too many", fix=f"give {MAX_EXPERTS} at most")
        if self.shared >= self.granularity:
            raise ConfigError(
                f"{self.shared} shared of {self.granularity} shards leave none to route",
                fix="give a larger --granularity, or a smaller --shared",
            )
        routed = self.routed_shards
        if self.experts % routed:
            raise ConfigError(
                f"{self.experts} experts are no multiple of {routed} routed shards",
                fix=f"give {routed * max(1, round(self.experts / routed))} --experts",
            )
        if self.top_k % routed or self.top_k > self.experts:
            raise ConfigError(
                f"a token cannot take whole copies: --top-k {self.top_k} of {self.experts}, {routed} shards to a copy",
                fix=f"give --top-k {routed * max(1, min(self.experts, self.top_k) // routed)}",
            )

    @property
    def routed_shards(self) -> int:
        """R."""
        return self.granularity - self.shared

    @property
    def copies(self) -> int:
        """C, of each routed shard."""
        return self.experts // self.routed_shards

    @property
    def scale(self) -> float:
        """A, of a routed expert's output."""
        if self.gates == "normalised":
            return float(self.routed_shards)
        return self.routed_shards * self.experts / self.top_k

    def shard_of(self, expert: int) -> int:
        """Which shard an expert is of, counted among all G: shared ones come first."""
        return self.shared + expert % self.routed_shards

    def copy_of(self, expert: int) -> int:
        """Which copy it belongs to. Copy 0 is the dense layer itself, whatever is done to the others."""
        return expert // self.routed_shards

    def neurons(self, shard: int, width: int) -> slice:
        """Of a shard, in a dense layer of `width`. Raises ConfigError if the width cannot be cut so."""
        if width % self.granularity:
            raise ConfigError(
                f"a layer {width} wide cannot be cut into {self.granularity} shards", fix="give a divisor of it"
            )
        size = width // self.granularity
        return slice(shard * size, (shard + 1) * size)
