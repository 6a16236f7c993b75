"""Row sketches: what an owner must know of other peers' tokens to train its expert on them.

A row is (x, dy): an input that was routed to the expert, and the gradient of that token's *own* loss, in nats, at the
expert's own output, gate included. With E(x) = down (act(gate x) ⊙ up x) an expert's gradient over any set of tokens is

    Σ_rows  w · dyᵀ dE/dweights   /   number of tokens         (tokens, not rows: those routed elsewhere have zero)

`sketch_gradient.py` gives the sum; whoever steps divides. Rows are quantised as they come (`rows.py`) and sampled last
(`sampling.py`): x and dy as the owner will see them, w = 1 / p.

Correction. dy was taken at the output S(x) of the expert's stand-in. To first order the gradient at E(x) is
dy + H (E(x) - S(x)), H the Hessian of the token's loss in the expert's output. H is unknown; its empirical Fisher
estimate is the mean of dy dyᵀ, of which all is kept ("full"), the diagonal, or the diagonal's mean ("isotropic"):

    dy_E = dy + kappa · mean(dy²) · (E(x) - S(x))

(In units of a mean loss over N tokens dy' = dy / N, so kappa · N · mean(dy'²) there.) `docs/sketches.md` derives it.

Sampling by ||x|| ||dy|| alone would never take a row without dy, and the correction of that row would be lost: a tenth
of the mean size is added to each (defensive mixing, Hesterberg 1995). It also keeps every weight within 11 times what
even sampling would give.

Shapes: N rows, D hidden, F width of the expert.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .codecs import tensor_bytes
from .rows import (
    CODECS,
    LARGEST,
    RowCodec,
    Rows,
    encode_rows,
    nbytes_of_rows,
    parts_of,
    read_rows,
    row_size_of,
    rows_of,
)
from .sampling import inclusion_probabilities, systematic

Curvature = Literal["isotropic", "diagonal", "full"]

FOLLOWS_FIDELITY = -1.0  # in place of a kappa
# It falls from KAPPA_ROUGH at a fidelity of ROUGH to 0 at NEAR_EXACT.
KAPPA_ROUGH = 80.0
ROUGH = 0.75
NEAR_EXACT = 0.92

_EVEN_SHARE = 0.1  # of the mean size, added to each row's before sampling
# Weights sum to `pairs` on average; no sampling that this module does gets near this many times that.
_MAX_WEIGHT_SUM = 64
_HEADER = struct.Struct("<BBBxIQd")  # version, codec, weighted, rows, pairs, effective
_VERSION = 1


@dataclass(frozen=True)
class RowSketch:
    """Rows of one expert, and what they stand for.

    Attributes:
        x, dy: N rows of D each, on the CPU.
        weights_N: float32, 1 / p of each row; None if each stands for itself.
        effective: the share of all rows that these are worth (`sampling.py`): 1 for all rows or where there were none,
            0 only where there were some and none was taken. What the sender says; the owner weighs the sketch by it.
        pairs: how many routed rows these stand for.
        codec: of x and dy.
    """

    x: Rows
    dy: Rows
    weights_N: Tensor | None
    effective: float
    pairs: int
    codec: RowCodec

    @property
    def num_rows(self) -> int:
        return len(parts_of(self.x)[0])

    @property
    def hidden(self) -> int:
        """D."""
        return row_size_of(self.x)

    @property
    def nbytes(self) -> int:
        """Length of `to_bytes`."""
        return _HEADER.size + self.num_rows * row_bytes(self.hidden, self.codec, weighted=self.weights_N is not None)

    def to_bytes(self) -> bytes:
        """A header of 24 bytes, then x, dy and the weights, if there are any."""
        weighted = self.weights_N is not None
        codec = CODECS.index(self.codec)
        header = _HEADER.pack(_VERSION, codec, weighted, self.num_rows, self.pairs, self.effective)
        weights = b"" if self.weights_N is None else tensor_bytes(self.weights_N)
        return header + self.x.to_bytes() + self.dy.to_bytes() + weights

    @classmethod
    def from_bytes(cls, data: bytes | memoryview, *, hidden: int, max_rows: int) -> RowSketch:
        """Reads what `to_bytes` wrote.

        Raises:
            ValueError: not a sketch of rows of `hidden`; more than `max_rows`; anything in it that is not finite or out
                of bounds; or counts and weights that no sampling gives.
        """
        view = memoryview(data)
        if len(view) < _HEADER.size:
            raise ValueError(f"{len(view)} bytes are too few for a row sketch")
        version, code, weighted, num_rows, pairs, effective = _HEADER.unpack_from(view)
        if view[3] or version != _VERSION or code >= len(CODECS) or weighted > (num_rows > 0):
            raise ValueError("not a row sketch of a known version and codec")
        codec = CODECS[code]
        if num_rows > max_rows:
            raise ValueError(f"a sketch of {num_rows} rows, more than {max_rows}")
        size = nbytes_of_rows(num_rows, hidden, codec)
        body = view[_HEADER.size :]
        if len(body) != 2 * size + 4 * num_rows * weighted:
            raise ValueError(f"{len(body)} bytes are not {num_rows} {codec} rows of {hidden}")
        x = read_rows(body[:size], num_rows, hidden, codec)
        dy = read_rows(body[size : 2 * size], num_rows, hidden, codec)
        weights = None
        if weighted:
            weights = torch.frombuffer(bytearray(body[2 * size :]), dtype=torch.float32)
        sketch = cls(x, dy, weights, effective, pairs, codec)
        sketch._check()
        return sketch

    def _check(self) -> None:
        if not 0.0 <= self.effective <= 1.0:  # also true for NaN
            raise ValueError("a sketch's effective share is not within 0 and 1")
        if self.num_rows and not self.effective:
            raise ValueError("a sketch has rows, but says that they are worth nothing")
        if self.weights_N is not None:
            weights = self.weights_N.double()
            if not bool((weights.isfinite() & (weights >= 1)).all()):
                raise ValueError("a weight is not finite or below 1")
            if self.pairs < self.num_rows or float(weights.sum()) > _MAX_WEIGHT_SUM * self.pairs:
                raise ValueError(f"weights that sum to {float(weights.sum()):.3g} cannot be those of {self.pairs} rows")
        elif self.num_rows and (self.pairs != self.num_rows or self.effective != 1.0):
            raise ValueError(f"{self.num_rows} rows without weights do not stand for {self.pairs}")
        elif not self.num_rows and self.effective != float(not self.pairs):
            raise ValueError(f"no rows, of {self.pairs}, cannot be worth {self.effective}")


class RowBuffer:
    """Rows of one expert since the last `take`, quantised, at most `max_rows`: beyond that they thin themselves out.

    Thinning again and again comes close to sampling once from everything: a row's size is multiplied by the weight
    that it has, so all rows that were not certain are alike in the next round (as in VarOpt, Cohen et al. 2011).

    Args:
        hidden: D.
        codec: of the rows.
        max_rows: kept, on the CPU.
        generator: of thinning; torch's default one if None.
    """

    def __init__(
        self, hidden: int, codec: RowCodec = "int8", *, max_rows: int = 65536, generator: torch.Generator | None = None
    ) -> None:
        if hidden < 1 or max_rows < 1:
            raise ValueError(f"a buffer of {max_rows} rows of {hidden}")
        if codec not in CODECS:
            raise ValueError(f"row codec {codec!r} is not one of {', '.join(CODECS)}")
        self.hidden, self.codec, self.max_rows = hidden, codec, max_rows
        self.refused = 0  # rows left out, ever: not finite, or too large for the codec
        self._generator = generator
        parts = parts_of(encode_rows(torch.empty(0, hidden), torch.empty(0), codec))
        ones = torch.empty(0, dtype=torch.float64)
        # Parts of x, parts of dy, weight, size: everything that moves when a row moves.
        self._none = (*parts, *parts, ones, ones)
        self._clear()

    def _clear(self) -> None:
        self._columns = list(self._none)
        self._pairs = 0
        self._sizes = self._squares = 0.0  # Σ s and Σ s² over all rows since the last take

    def __len__(self) -> int:
        return len(self._columns[-1])

    def add(self, x_ND: Tensor, dy_ND: Tensor) -> None:
        """Keeps rows that are finite and within the codec's range; counts the others in `refused`.

        Raises:
            ValueError: shapes are not (N, D) both.
        """
        if x_ND.dim() != 2 or x_ND.shape != dy_ND.shape or x_ND.shape[1] != self.hidden:
            raise ValueError(f"x {tuple(x_ND.shape)} and dy {tuple(dy_ND.shape)} are not rows of {self.hidden}")
        add_rows([self], [len(x_ND)], x_ND, dy_ND)

    def merge(self, other: RowBuffer) -> None:
        """Takes in all that another buffer holds and has seen. ValueError if its rows are of another kind."""
        if (other.hidden, other.codec) != (self.hidden, self.codec):
            raise ValueError(f"{other.codec} rows of {other.hidden} among {self.codec} rows of {self.hidden}")
        self.refused += other.refused
        self._count(other._pairs, other._sizes, other._squares)
        if len(other):
            self._hold(list(other._columns))

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_generator": None}  # which no process can give to another

    def _keep(self, new: list[Tensor]) -> None:
        """Takes in encoded rows."""
        sizes = new[-1]
        self._count(len(sizes), float(sizes.sum()), float(sizes.square().sum()))
        self._hold(new)

    def _count(self, pairs: int, sizes: float, squares: float) -> None:
        self._pairs += pairs
        self._sizes += sizes
        self._squares += squares

    def _hold(self, new: list[Tensor]) -> None:
        sizes = new[-1]
        room = self.max_rows - len(self)
        if room == self.max_rows:
            self._columns = [column[:room] for column in new]
        elif room:
            pairs = zip(self._columns, new, strict=True)
            self._columns = [torch.cat((held, column[:room])) for held, column in pairs]
        if len(sizes) > room:
            self._replace([column[room:] for column in new])

    def _replace(self, new: list[Tensor]) -> None:
        """Sample from a full buffer and `new` together; new rows that stay take the places of old ones that do not."""
        weights, sizes = (torch.cat(pair) for pair in zip(self._columns[-2:], new[-2:], strict=True))
        index, kept_weights, _ = self._draw(weights, sizes, self.max_rows, self._generator)
        weights[index] = kept_weights
        old = index[index < self.max_rows]
        stay = index[len(old) :]
        free = torch.ones(self.max_rows, dtype=torch.bool)
        free[old] = False
        self._columns[-2] = weights[: self.max_rows]
        new[-2] = weights[self.max_rows :]
        for held, column in zip(self._columns, new, strict=True):
            held[free] = column[stay - self.max_rows]

    def _draw(
        self, weights: Tensor, sizes: Tensor, num: int, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, float]:
        """Indices of `num` rows, their weights now, and Σ w² s² to be expected."""
        p = inclusion_probabilities(weights * (sizes + _EVEN_SHARE * self._sizes / self._pairs), num)
        index = systematic(p, num, generator)
        return index, weights[index] / p[index], float(((weights * sizes).square() / p).sum())

    @torch.no_grad()
    def take(self, max_rows: int | None, generator: torch.Generator | None = None) -> RowSketch:
        """All rows held, or a sample of `max_rows` of them; the buffer is empty then."""
        if max_rows is not None and max_rows < 0:
            raise ValueError(f"cannot take {max_rows} rows")
        weights, sizes = self._columns[-2:]
        parts = self._columns[:-2]
        num = len(self) if max_rows is None else min(max_rows, len(self))
        spread = 0.0
        if 0 < num < len(self):
            index, weights, spread = self._draw(weights, sizes, num, generator)
            parts = [part[index] for part in parts]
        elif not num:
            parts = [part[:0] for part in parts]
        elif num < self._pairs:
            spread = float((weights * sizes).square().sum())
        pairs, squares = self._pairs, self._squares
        self._clear()
        worth = squares / spread if spread else num / max(1, pairs)  # rows without any size: by their number
        effective = 1.0 if num == pairs else min(1.0, worth) if num else 0.0
        half = len(parts) // 2
        return RowSketch(
            rows_of(parts[:half], self.codec, self.hidden),
            rows_of(parts[half:], self.codec, self.hidden),
            weights.float() if 0 < num < pairs else None,
            effective,
            pairs,
            self.codec,
        )


@torch.no_grad()
def add_rows(buffers: Sequence[RowBuffer], counts: Sequence[int], x_PD: Tensor, dy_PD: Tensor) -> None:
    """What `RowBuffer.add` does, for the rows of many experts in a few operations: encoded together, moved together.

    Args:
        buffers: of one width and codec.
        counts: how many of the P rows are of each, in their order.
        x_PD, dy_PD: on any device.
    """
    codec, ends = buffers[0].codec, list(itertools.accumulate(counts))
    both = [rows_PD.detach().float() for rows_PD in (x_PD, dy_PD)]
    largest = [rows_PD.abs().amax(1) for rows_PD in both]
    usable = (largest[0] <= LARGEST[codec]) & (largest[1] <= LARGEST[codec])  # also false for NaN
    if not bool(usable.all()):
        both, largest = [rows_PD[usable] for rows_PD in both], [values_P[usable] for values_P in largest]
        kept = [int(part.sum()) for part in torch.split(usable.cpu(), list(counts))]
        for buffer, before, now in zip(buffers, counts, kept, strict=True):
            buffer.refused += before - now
        ends = list(itertools.accumulate(kept))
    norms = [torch.linalg.vector_norm(rows_PD, dim=1).double() for rows_PD in both]
    sizes = (norms[0] * norms[1]).cpu()
    encoded = [encode_rows(rows_PD, values_P, codec) for rows_PD, values_P in zip(both, largest, strict=True)]
    columns = [*(part.cpu() for rows in encoded for part in parts_of(rows)), torch.ones_like(sizes), sizes]
    for buffer, start, end in zip(buffers, [0, *ends], ends, strict=False):
        if end > start:
            buffer._keep([column[start:end].clone() for column in columns])


def row_bytes(hidden: int, codec: RowCodec, *, weighted: bool = True) -> int:
    """Bytes of one row (x, dy), with the weight that sampled ones have."""
    return 2 * nbytes_of_rows(1, hidden, codec) + 4 * weighted


def bytes_per_token(hidden: int, codec: RowCodec, *, top_k: int, num_moe_layers: int, owned_share: float) -> float:
    """Bytes of all rows of one token, unsampled, for experts that its composer does not own (even routing)."""
    return top_k * num_moe_layers * (1.0 - owned_share) * row_bytes(hidden, codec, weighted=False)


def kappa_for(fidelity: float) -> float:
    """How much of the estimated curvature to correct with: much for rough stand-ins, nothing for near-exact ones.

    0 also where the fidelity is not known (NaN).
    """
    if math.isnan(fidelity):
        return 0.0
    return KAPPA_ROUGH * min(1.0, max(0.0, (NEAR_EXACT - fidelity) / (NEAR_EXACT - ROUGH)))
