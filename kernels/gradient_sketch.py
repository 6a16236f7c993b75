"""Fixed-size linear sketches of one expert's gradient, added up without ever forming it, rebuilt at low rank.

For a matrix G (M, N), a sum of rows' outer products G = leftᵀ right:

    Y = G Ω = leftᵀ (right Ω)  (M, k)        Z = Ψ G = (Ψ leftᵀ) right  (l, N),  l = 2k
    Q = orth(Y)    X = (Ψ Q)⁺ Z         G ≈ c Q X

(Tropp, Yurtsever, Udell, Cevher, "Practical sketching algorithms for low-rank matrix approximation", 2017, alg. 4.)
For Gaussian Ω, Ψ and c = 1 their theorem 4.3 bounds the mean squared error by (1 + k/(l-k-1)) (1 + p/(k-p-1)) times
that of the best rank-p approximation, for every p < k - 1. A gradient of rank k or less comes back exactly.

c is ours. X is QᵀG plus the noise (Ψ Q)⁺ Ψ G', G' the part of G outside of Q, and for a flat spectrum that noise is
larger than QᵀG: with c = 1 the error is 1.2 to 2 times G itself, worse than no gradient at all. The residual of the
fit says how large G' is, E‖Z - Ψ Q X‖² = (l - k) ‖G'‖², hence the noise, ‖(Ψ Q)⁺‖² ‖G'‖², hence the c of least error,
1 - noise / ‖X‖². Damping each singular value of X by itself was not better on gradients of experts.

Y and Z are linear in G: sketches under the same seed add up to the sketch of the summed gradient, and averages of
sketches, weighted by tokens, are sketches of the mean gradient. Rebuilding is not linear, but homogeneous. Units are
those of the rows that were added: a sum over rows. Whoever wants the mean divides by tokens, before or after.

Size: Y costs k rows of the longer side and Z 2k of the shorter, so G is transposed if it has more columns than rows.
Ω and Ψ are made from a seed, uniform in (-√3, √3) in 2¹⁶ odd steps: Philox bits to integers to one multiplication,
the same bits on every machine. Rejected: Gaussians (their bits depend on the library and its logarithm) and random
signs (equal bits too, but two of their columns coincide often enough in small matrices).

Shapes: N rows of one expert, D hidden, F width, H = 2F.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

LARGEST_VALUE = 1e15  # of anything in a row: products of two, summed over rows, stay within float32
_CORANGE_FACTOR = 2  # l / k


@dataclass(frozen=True)
class _MatrixPlan:
    """One matrix's test matrices and its place in the flat sketch. rows >= columns: wide matrices are transposed."""

    transposed: bool
    omega: Tensor  # (columns, k)
    psi: Tensor  # (l, rows)
    start: int

    @property
    def range_shape(self) -> tuple[int, int]:
        return self.psi.shape[1], self.omega.shape[1]

    @property
    def corange_shape(self) -> tuple[int, int]:
        return self.psi.shape[0], self.omega.shape[0]

    @property
    def end(self) -> int:
        return self.start + math.prod(self.range_shape) + math.prod(self.corange_shape)

    def parts(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Y and Z as views of a flat sketch."""
        cut = self.start + math.prod(self.range_shape)
        return flat[self.start : cut].view(self.range_shape), flat[cut : self.end].view(self.corange_shape)

    def accumulate(self, flat: Tensor, left: Tensor, right: Tensor) -> None:
        """Adds the sketch of leftᵀ right."""
        if self.transposed:
            left, right = right, left
        y, z = self.parts(flat)
        y.addmm_(left.t(), right @ self.omega)
        z.addmm_((left @ self.psi.t()).t(), right)

    def rebuild(self, flat: Tensor) -> Tensor:
        y, z = (part.double() for part in self.parts(flat))
        basis = torch.linalg.qr(y).Q
        seen = self.psi.to(flat.device).double() @ basis
        inverse = torch.linalg.pinv(seen)
        inner = inverse @ z
        outside = (z - seen @ inner).square().sum() / (seen.shape[0] - seen.shape[1])
        energy = inner.square().sum()
        kept = (energy - inverse.square().sum() * outside).clamp(min=0.0)
        matrix: Tensor = basis @ (inner * (kept / energy.clamp(min=torch.finfo(torch.float64).tiny)))
        return (matrix.t() if self.transposed else matrix).float()


def largest_rank(hidden: int, width: int) -> int:
    """At which d gate_up, and with it d down, comes back exactly."""
    return min(2 * width, hidden)


def sketch_numel(hidden: int, width: int, rank: int) -> int:
    """Numbers in one expert's flat sketch: k (long + 2 short) for each matrix, about 3 k (D + F) for both."""
    sizes = ((2 * width, hidden), (hidden, width))
    return sum(min(rank, *shape) * (max(shape) + _CORANGE_FACTOR * min(shape)) for shape in sizes)


class Projections:
    """What composers and owner must agree on: sizes, rank and seed. Shared by all experts of a shape.

    Args:
        hidden: D.
        width: F.
        rank: k of d gate_up (2F, D) and, if F allows, of d down (D, F).
        seed: below 2¹²⁸. A new one for every interval lets the errors of intervals average out.
        device: where rows are added.

    Raises:
        ValueError: sizes below 1, rank not within 1 and min(2F, D), or a seed out of range.
    """

    def __init__(self, hidden: int, width: int, rank: int, seed: int, *, device: torch.device | str = "cpu") -> None:
        if hidden < 1 or width < 1:
            raise ValueError(f"an expert of {width} x {hidden} has no gradient")
        if not 1 <= rank <= largest_rank(hidden, width):
            raise ValueError(f"rank {rank} is not within 1 and {largest_rank(hidden, width)}")
        if not 0 <= seed < 1 << 128:
            raise ValueError(f"seed {seed} is not within 0 and 2**128")
        self.hidden, self.width, self.rank, self.seed = hidden, width, rank, seed
        self.device = torch.device(device)
        self.gate_up = self._plan((2 * width, hidden), 0, 0)
        self.down = self._plan((hidden, width), 2, self.gate_up.end)

    @property
    def numel(self) -> int:
        """Numbers in a flat sketch: k (long + 2 short) for each matrix."""
        return self.down.end

    def rebuild(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient that a sketch stands for, in the sketch's units.

        Returns:
            float32 d gate_up (2F, D) and d down (D, F), of rank k at most, on the device of `flat`.

        Raises:
            ValueError: wrong size, not finite, or so large that the gradient is not.
        """
        if flat.shape != (self.numel,) or not flat.dtype.is_floating_point:
            raise ValueError(f"{tuple(flat.shape)} {flat.dtype} is not a sketch of {self.numel} numbers")
        flat = flat.detach()
        if not bool(flat.isfinite().all()):
            raise ValueError("the gradient sketch is not finite")
        d_gate_up, d_down = self.gate_up.rebuild(flat), self.down.rebuild(flat)
        if not bool(d_gate_up.isfinite().all() & d_down.isfinite().all()):
            raise ValueError("the gradient sketch is too large")
        return d_gate_up, d_down

    def _plan(self, shape: tuple[int, int], stream: int, start: int) -> _MatrixPlan:
        rows, columns = max(shape), min(shape)
        rank = min(self.rank, columns)
        omega = _test_matrix((columns, rank), self.seed, stream)
        psi = _test_matrix((_CORANGE_FACTOR * rank, rows), self.seed, stream + 1)
        return _MatrixPlan(shape[0] < shape[1], omega.to(self.device), psi.to(self.device), start)


class GradientSketcher:
    """Sums the sketches of rows of one expert; memory does not grow with the rows."""

    def __init__(self, projections: Projections) -> None:
        self.projections = projections
        self._flat = torch.zeros(projections.numel, device=projections.device)
        self._refused = torch.zeros((), dtype=torch.int64, device=projections.device)

    @property
    def refused(self) -> int:
        """Rows left out so far because a value was not finite or above LARGEST_VALUE."""
        return int(self._refused)

    def add(self, x_ND: Tensor, dy_ND: Tensor, a_NF: Tensor, dh_NH: Tensor) -> None:
        """Adds rows as `RowTap.backward_rows` shows them: d down += dyᵀ a, d gate_up += dhᵀ x.

        Raises:
            ValueError: shapes are not those of this expert; nothing is added.
        """
        p, n = self.projections, len(x_ND)
        shapes = tuple(tuple(t.shape) for t in (x_ND, dy_ND, a_NF, dh_NH))
        if shapes != ((n, p.hidden), (n, p.hidden), (n, p.width), (n, 2 * p.width)):
            raise ValueError(f"rows of {shapes} are not those of an expert of {p.width} x {p.hidden}")
        rows = [t.detach().float() for t in (x_ND, dy_ND, a_NF, dh_NH)]
        # Masked, not indexed: how many rows are good is never asked, so a GPU does not have to wait.
        bad_N = torch.stack([~(t.abs() <= LARGEST_VALUE).all(1) for t in rows]).any(0)
        x_ND, dy_ND, a_NF, dh_NH = (t.masked_fill(bad_N.unsqueeze(1), 0.0) for t in rows)
        self._refused += bad_N.sum()
        p.gate_up.accumulate(self._flat, dh_NH, x_ND)
        p.down.accumulate(self._flat, dy_ND, a_NF)

    def merge(self, flat: Tensor, refused: int = 0) -> None:
        """Adds what another sketcher under the same projections has summed, on whatever device.

        Raises:
            ValueError: it is not a sketch of this size; nothing is added.
        """
        if flat.shape != self._flat.shape:
            raise ValueError(f"{tuple(flat.shape)} is not a sketch of {self.projections.numel} numbers")
        self._flat += flat.to(self._flat.device)
        self._refused += refused

    def flat(self) -> Tensor:
        """float32 (numel,), a copy: Y then Z of d gate_up, then of d down, each row by row."""
        return self._flat.clone()

    def take(self) -> Tensor:
        """`flat`, starting again from zero."""
        flat = self.flat()
        self._flat.zero_()
        return flat


def _test_matrix(shape: tuple[int, int], seed: int, stream: int) -> Tensor:
    count = math.prod(shape)
    # The high quarter of the counter tells the streams apart: none can run into another.
    raw = np.random.Philox(key=seed, counter=stream << 192).random_raw(-(-count // 4))
    steps = np.asarray(raw).astype("<u8").view("<u2")[:count].astype(np.float32)
    odd = 2.0 * torch.from_numpy(steps) - 65535.0  # integers below 2¹⁷: exact
    return (odd * (math.sqrt(3.0) / 65536.0)).view(shape)
