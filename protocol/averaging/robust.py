"""Averages that a few liars cannot move far: clipped norms, then CenteredClip (Karimireddy et al. 2021, "Learning from
History for Byzantine Robust Optimization").

    x_i   <- x_i · min(1, median norm / ||x_i||)                      nobody speaks louder than the median
    v_0    = coordinate-wise median of the x_i
    v_k+1  = v_k + Σ w_i (x_i - v_k) · min(1, tau_k / ||x_i - v_k||)     tau_k = median of these distances

Each step lets a member pull the centre by its share of tau at most, wherever it stands. Unlike the paper, tau follows
the members' own spread, so there is nothing to tune as pseudo-gradients shrink; and the centre starts at the median,
not at the last round's average, so that nothing has to be remembered and newcomers compute the same.

Medians are lower ones: a member's own number, of the smaller half. With two members nobody can tell who lies; what is
left is that neither outweighs the other in norm.

A reducer applies this to the parts that it averages, not to whole vectors: an attacker gains nothing from that, since
each part has a centre and a spread of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

STEPS = 3


def robust_mean(parts: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """Weighted mean of what most members agree on.

    Args:
        parts: one per member, float32, of one shape, finite.
        shares: of each member, positive.

    Returns:
        A new tensor of the same shape. Of equal parts it is that part; of one member its own.

    Raises:
        ValueError: no parts, another number of shares, or a share that is not positive.
    """
    if not parts or len(parts) != len(shares) or not all(share > 0 for share in shares):
        raise ValueError(f"{len(parts)} parts with the shares {list(shares)}")
    x_ME = torch.stack([part.reshape(-1) for part in parts])
    weights_M1 = torch.tensor(shares, dtype=torch.float64)[:, None]
    weights_M1 = (weights_M1 / weights_M1.sum()).float()
    # Norms in float64: values near float32's end must not overflow when they are squared.
    x_ME = x_ME * _limited(torch.linalg.vector_norm(x_ME, dim=1, dtype=torch.float64))
    centre_E = _middle(x_ME)
    for _ in range(STEPS):
        away_ME = x_ME - centre_E
        away_ME *= _limited(torch.linalg.vector_norm(away_ME, dim=1, dtype=torch.float64))
        centre_E = centre_E + (weights_M1 * away_ME).sum(0)
    return centre_E.view_as(parts[0])


def _limited(norms_M: Tensor) -> Tensor:
    """(M, 1): what scales every norm down to the lower median, if it is above."""
    limit = norms_M.sort().values[(len(norms_M) - 1) // 2]
    return torch.where(norms_M > limit, limit / norms_M, 1.0).float()[:, None]


def _middle(x_ME: Tensor) -> Tensor:
    """Coordinate-wise median; of an even number, the mean of the middle two."""
    ordered = x_ME.sort(0).values
    return (ordered[(len(x_ME) - 1) // 2] + ordered[len(x_ME) // 2]) / 2
