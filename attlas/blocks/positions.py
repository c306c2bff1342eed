"""Positions as objects: each says what it does to tokens, to queries and keys, or to the scores.

B batch, H heads, N queries, M keys, C channels, D head size. Queries are the last N of M positions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.ops.rotary import rotate
from attlas.ops.slopes import alibi_slopes


class Position(nn.Module):
    """A way to tell a mechanism where tokens stand. Subclasses change what they need to."""

    biases = False
    """Whether `bias` gives something, which only mechanisms that take a bias can use."""

    def embed(self, x_BNC: Tensor, start: int) -> Tensor:
        """Tokens before the projections; the first stands at position `start`."""
        return x_BNC

    def rotate(self, x_BHND: Tensor, start: int) -> Tensor:
        """Queries or keys after the projections; the first stands at position `start`."""
        return x_BHND

    def bias(self, grid: Grid) -> Tensor | None:
        """A bias (H, N, N) for the scores of self-attention on a grid, or None."""
        return None


class Rotary(Position):
    """Rotary embedding: feature pairs (i, i + R/2) turn by position / base^(2i / R).

    Args:
        head_dim: D.
        base: of the wavelengths.
        features: R, the first features, which turn; the others stay. All by default.

    Source: Su et al., RoFormer, 2021 (arXiv:2104.09864), halves layout as in Llama.
    """

    def __init__(self, head_dim: int, base: float = 10000.0, features: int | None = None) -> None:
        super().__init__()
        features = head_dim if features is None else features
        if features % 2:
            what = "the head size" if features == head_dim else "features ="
            raise BadInput(f"rotary positions turn pairs of features; {what} {features} is odd")
        if not 0 <= features <= head_dim:
            raise BadInput(f"of a head size of {head_dim} at most as many features turn, got {features}")
        self.head_dim, self.base, self.features = head_dim, base, features

    def rotate(self, x_BHND: Tensor, start: int) -> Tensor:
        """Turn the pairs."""
        return rotate(x_BHND, start, features=self.features, base=self.base)


class PartRotary(Position):
    """Rotary embedding of parts of the head, each as if it were a head of its own.

    Args:
        *sizes: of the parts, even, in order; they make up the head size.
        base: of the wavelengths.
    """

    def __init__(self, *sizes: int, base: float = 10000.0) -> None:
        super().__init__()
        self.sizes = sizes
        self.rotaries = [Rotary(size, base) for size in sizes]

    def rotate(self, x_BHND: Tensor, start: int) -> Tensor:
        """Turn each part."""
        if sum(self.sizes) != x_BHND.shape[-1]:
            raise BadInput(f"parts of {self.sizes} features do not make a head size of {x_BHND.shape[-1]}")
        parts = zip(self.rotaries, x_BHND.split(self.sizes, -1), strict=True)
        return torch.cat([rotary.rotate(part, start) for rotary, part in parts], -1)


class LRPE(Position):
    """Linearised relative positions: x becomes [x cos(θ t), x sin(θ t)], of twice the head size.

    The product of a query at t and a key at j is then Σ_i q_i k_i cos(θ_i (t - j)), and stays one of features that
    linear attention can sum. θ is learned, an angle for each head and feature, at first 10000^(-2i / C) for feature i
    of all C = H D.

    Args:
        heads: H.
        head_dim: D.

    Source: Qin et al., "Linearized Relative Positional Encoding", 2023 (arXiv:2307.09270), as in TransNormerLLM.
    """

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        width = heads * head_dim
        self.theta = nn.Parameter(10000.0 ** (-2 / width * torch.arange(width)).reshape(heads, 1, head_dim))

    def rotate(self, x_BHND: Tensor, start: int) -> Tensor:
        """Double the features."""
        place_N1 = torch.arange(start, start + x_BHND.shape[2], device=x_BHND.device).double().unsqueeze(1)
        angle_HND = self.theta.double() * place_N1
        return torch.cat([x_BHND * angle_HND.cos().to(x_BHND.dtype), x_BHND * angle_HND.sin().to(x_BHND.dtype)], -1)


class ALiBi(Position):
    """A bias of -slope |n - m|, one fixed slope per head (arXiv:2108.12409)."""

    biases = True
    slopes: Tensor

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.register_buffer("slopes", alibi_slopes(heads).to(torch.get_default_device()), persistent=False)

    def bias(self, grid: Grid) -> Tensor:
        """(H, N, N), by the order of the tokens."""
        place = torch.arange(grid.tokens, device=self.slopes.device)
        return -self.slopes[:, None, None] * (place[:, None] - place).abs()


class RelativeBias(Position):
    """A learned bias for each offset on the grid, (H, 2 S1 - 1, ...), as in Swin (arXiv:2103.14030).

    Offsets beyond the trained grid take the bias of the farthest one. Prefix tokens get no bias.
    """

    biases = True

    def __init__(self, heads: int, grid: tuple[int, ...]) -> None:
        super().__init__()
        self.reach = tuple(size - 1 for size in grid)
        self.table = nn.Parameter(torch.empty(heads, *(2 * reach + 1 for reach in self.reach)))
        nn.init.trunc_normal_(self.table, std=0.02)

    def bias(self, grid: Grid) -> Tensor:
        """(H, N, N)."""
        if grid.rank != len(self.reach):
            raise BadInput(f"this relative bias is over {len(self.reach)} axes, got a {grid}")
        places = grid.places(self.table.device)
        flat = places.new_zeros(())
        for offset, reach in zip((places - places[:, None]).unbind(-1), self.reach, strict=True):
            flat = flat * (2 * reach + 1) + offset.clamp(-reach, reach) + reach
        return nn.functional.pad(self.table.flatten(1)[:, flat], (grid.prefix, 0, grid.prefix, 0))


class Learned(Position):
    """One learned vector per position, added to the tokens."""

    def __init__(self, dim: int, length: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(length, dim))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def embed(self, x_BNC: Tensor, start: int) -> Tensor:
        """x plus the vectors from position `start` on."""
        end = start + x_BNC.shape[1]
        if end > len(self.weight):
            raise BadInput(f"positions are learned up to {len(self.weight)}, the sequence reaches {end}")
        return x_BNC + self.weight[start:end]
