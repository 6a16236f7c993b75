"""What keeps the router healthy, over the whole swarm's routing rather than one composer's.

Load balance (Switch Transformer, https://arxiv.org/abs/2101.03961, eq. 4, for top-k as a share of all pairs):

    balance = mean over layers of E * Σ_e f_e P_e,   1 when all is even, E when one expert takes everything

with f_e the share of routed pairs that went to expert e (a count: no gradient) and P_e the mean router probability of e
over local tokens. Counting f over the swarm lets one composer's batch be uneven as long as the swarm is even.
P is softmax(logits), or for sigmoid routers sigma(logits) / Σ sigma(logits), as DeepSeek-V3 does.

Router z-loss (ST-MoE, https://arxiv.org/abs/2202.08906, eq. 5): mean over tokens and layers of logsumexp(logits)^2.

Balance without a loss (https://arxiv.org/abs/2408.15664, algorithm 1): where a router selects experts by score + bias,

    b_e += rate * sign(mean load - load of e)

after each step, which pulls no gradient away from the language model.

Shapes: T tokens, E experts per layer, L MoE layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .families import Scoring


def router_losses(
    logits: Sequence[Tensor], counts_LE: Tensor, *, scoring: Scoring, swarm_counts_LE: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The balance loss and the z-loss, scalars with gradients to the logits.

    Args:
        logits: of every MoE layer, L tensors (T, E).
        counts_LE: pairs that this batch routed to each expert.
        scoring: how the router turns logits into probabilities.
        swarm_counts_LE: recent pairs of the other composers, not counting this batch; any non-negative numbers. They
            should stand for about as many steps as the caller wants to average over.

    Raises:
        ValueError: swarm_counts_LE has another shape, or is negative or not finite (it comes from peers).
    """
    shares = _all_counts(counts_LE, swarm_counts_LE)
    shares = shares / shares.sum(dim=1, keepdim=True).clamp_min(1.0)
    stacked_LTE = torch.stack(list(logits)).float()
    log_total_LT = stacked_LTE.logsumexp(dim=-1)
    if scoring == "softmax":
        probabilities_LTE = (stacked_LTE - log_total_LT.unsqueeze(-1)).exp()
    else:
        scores_LTE = stacked_LTE.sigmoid()
        probabilities_LTE = scores_LTE / scores_LTE.sum(dim=-1, keepdim=True)
    num_layers, _, num_experts = stacked_LTE.shape
    balance = (probabilities_LTE.mean(dim=1) * shares).sum() * (num_experts / num_layers)
    return balance, log_total_LT.square().mean()


@torch.no_grad()
def balance_biases(
    biases: Sequence[Tensor], counts_LE: Tensor, rate: float, *, swarm_counts_LE: Tensor | None = None
) -> None:
    """Move selection biases, L tensors (E), by `rate` towards even load, in place. Arguments as in `router_losses`."""
    loads_LE = _all_counts(counts_LE, swarm_counts_LE)
    for bias_E, missing_E in zip(biases, loads_LE.mean(dim=1, keepdim=True) - loads_LE, strict=True):
        bias_E.add_(missing_E.sign().to(bias_E), alpha=rate)


def _all_counts(counts_LE: Tensor, swarm_counts_LE: Tensor | None) -> Tensor:
    """float32, this batch's and the others'; may raise as `router_losses` says."""
    counts = counts_LE.to(torch.float32)
    if swarm_counts_LE is None:
        return counts
    if swarm_counts_LE.shape != counts_LE.shape:
        raise ValueError(f"swarm counts are {tuple(swarm_counts_LE.shape)}, not {tuple(counts_LE.shape)}")
    if not bool((torch.isfinite(swarm_counts_LE) & (swarm_counts_LE >= 0)).all()):
        raise ValueError("swarm counts are negative or not finite")
    return counts + swarm_counts_LE.to(counts)
