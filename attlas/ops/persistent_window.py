"""Attention to the last tokens and to persistent ones, alone and beside or behind a neural memory.

B batch, H heads, N queries, M keys, P persistent tokens, D head size, W tokens of the window, n blocks of C queries.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.core.errors import BadInput
from attlas.core.mask import Mask
from attlas.core.mechanism import Cost, Site, Sizes
from attlas.ops.dispatch import Backend, Op
from attlas.ops.neural_memory import MemoryMixer, project
from attlas.ops.softmax import attention_weights, softmax_attention


def _oracle(
    q_BHND: Tensor,
    k_BHMD: Tensor,
    v_BHMD: Tensor,
    first_k_BHPD: Tensor,
    first_v_BHPD: Tensor,
    keep_BM: Tensor,
    window: int,
) -> Tensor:
    """Softmax attention of each query to the persistent tokens and to the last `window` tokens, itself included.

    Args:
        q_BHND: queries, the last N of the M positions.
        k_BHMD, v_BHMD: keys and values.
        first_k_BHPD, first_v_BHPD: those of the persistent tokens, which everything sees.
        keep_BM: False where a token is padding.
        window: W.

    Returns:
        (B, H, N, D).
    """
    first, keys = first_k_BHPD.shape[2], k_BHMD.shape[2]
    rows = []
    for n in range(q_BHND.shape[2]):
        last = keys - q_BHND.shape[2] + n
        near = slice(max(last - window + 1, 0), last + 1)
        k, v = (torch.cat([p, x[:, :, near]], 2) for p, x in ((first_k_BHPD, k_BHMD), (first_v_BHPD, v_BHMD)))
        seen = Mask.padding(F.pad(keep_BM[:, near], (first, 0), value=True))
        rows.append(attention_weights(q_BHND[:, :, n : n + 1], k, seen) @ v)
    return torch.cat(rows, 2)


def _torch(
    q_BHND: Tensor,
    k_BHMD: Tensor,
    v_BHMD: Tensor,
    first_k_BHPD: Tensor,
    first_v_BHPD: Tensor,
    keep_BM: Tensor,
    window: int,
) -> Tensor:
    batch, queries = q_BHND.shape[0], q_BHND.shape[2]
    first = first_k_BHPD.shape[2]
    size, blocks = _blocks(queries, window)
    span, back = size + window - 1, blocks * size - queries
    front = queries + window - 1 - k_BHMD.shape[2]  # a negative pad cuts off the keys that nobody sees

    def blocked(x_BHMD: Tensor, first_BHPD: Tensor) -> Tensor:
        near = F.pad(x_BHMD, (0, 0, front, back)).unfold(2, span, size).permute(0, 2, 1, 4, 3)
        return torch.cat([first_BHPD.unsqueeze(1).expand(batch, blocks, -1, -1, -1), near], 3).flatten(0, 1)

    keep = F.pad(keep_BM, (front, back), value=False).unfold(1, span, size).flatten(0, 1)
    row, column = torch.arange(size, device=keep.device).unsqueeze(1), torch.arange(span, device=keep.device)
    band = (row <= column) & (column < row + window)
    mask = Mask.pairs_(F.pad(band, (first, 0), value=True)) & Mask.padding(F.pad(keep, (first, 0), value=True))
    q = F.pad(q_BHND, (0, 0, 0, back)).unflatten(2, (blocks, size)).transpose(1, 2).flatten(0, 1)
    o = softmax_attention(q, blocked(k_BHMD, first_k_BHPD), blocked(v_BHMD, first_v_BHPD), mask)
    return o.unflatten(0, (batch, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :queries]


def _blocks(queries: int, window: int) -> tuple[int, int]:
    """Queries of a block, and how many blocks."""
    size = min(window, queries)
    return size, -(-queries // size)


window_attention = Op("window_attention", Backend("torch", _torch), Backend("oracle", _oracle))


class WindowState(NamedTuple):
    """Keys and values of the last W - 1 tokens (B, H, W - 1, D) and which of them are real (B, W - 1)."""

    k: Tensor
    v: Tensor
    keep: Tensor


class WindowAttention(nn.Module):
    """Attention heads over a sliding window and persistent tokens, before their output projection.

    Args:
        site: where it is installed; heads divide dim.
        window: tokens that a token sees, itself included.
    """

    def __init__(self, site: Site, window: int) -> None:
        super().__init__()
        if window < 1:
            raise BadInput(f"the window holds at least the token itself, got {window}")
        self.heads, self.window = site.heads, window
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(site.dim, site.dim, bias=False) for _ in range(3))

    def start(self, batch: int, like: Tensor) -> WindowState:
        """Nothing real yet."""
        before, dim = self.window - 1, self.q_proj.in_features
        rows = like.new_zeros(batch, self.heads, before, dim // self.heads)
        return WindowState(rows, rows, like.new_zeros(batch, before, dtype=torch.bool))

    def read(
        self,
        x_BNC: Tensor,
        persistent_1PC: Tensor,
        state: WindowState,
        keep: Tensor | None = None,
        *,
        backend: str = "auto",
    ) -> tuple[Tensor, WindowState]:
        """What the tokens see (B, N, dim), and the state behind the last one."""
        real = x_BNC.new_ones(x_BNC.shape[:2], dtype=torch.bool) if keep is None else keep
        x_BNC = x_BNC.where(real.unsqueeze(-1), 0)
        q, k, v = (self._heads(proj, x_BNC) for proj in (self.q_proj, self.k_proj, self.v_proj))
        firsts = (
            self._heads(proj, persistent_1PC).expand(len(x_BNC), -1, -1, -1) for proj in (self.k_proj, self.v_proj)
        )
        k, v = torch.cat([state.k.to(k), k], 2), torch.cat([state.v.to(v), v], 2)
        real = torch.cat([state.keep, real], 1)
        o = window_attention(q, k, v, *firsts, real, self.window, backend=backend)
        past = x_BNC.shape[1]
        # Copies of the last rows, so that nothing keeps the whole segment alive.
        last = WindowState(k[:, :, past:].clone(), v[:, :, past:].clone(), real[:, past:].clone())
        return o.transpose(1, 2).flatten(2), last

    def literal(self, first_BPC: Tensor, x_BNC: Tensor, keep: Tensor | None) -> Tensor:
        """`read` from the beginning, written out."""
        q, k, v, first_k, first_v = (
            torch.stack(project(proj, t).chunk(self.heads, -1), 1)
            for proj, t in (
                (self.q_proj, x_BNC),
                (self.k_proj, x_BNC),
                (self.v_proj, x_BNC),
                (self.k_proj, first_BPC),
                (self.v_proj, first_BPC),
            )
        )
        real = x_BNC.new_ones(x_BNC.shape[:2], dtype=torch.bool) if keep is None else keep
        o_BHND = window_attention(q, k, v, first_k, first_v, real, self.window, backend="oracle")
        return torch.cat(o_BHND.unbind(1), -1)

    def _heads(self, proj: nn.Linear, x_BNC: Tensor) -> Tensor:
        return proj(x_BNC).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def count(self, tokens: int, batch: int, persistent: int) -> Cost:
        """Of a whole sequence, the persistent tokens projected once."""
        dim, window = self.q_proj.in_features, self.window
        size, blocks = _blocks(tokens, window)
        near = sum(min(n + 1, window) for n in range(tokens))
        around = 2 * dim * dim * (3 * batch * tokens + 2 * persistent)
        pairs = batch * (near + tokens * persistent)
        made = batch * blocks * size * (size + window - 1 + persistent)
        return Cost(around + 4 * dim * pairs, around + 4 * dim * made, self.heads * pairs)


class WindowedMemory(MemoryMixer):
    """What the mixers with a neural memory and a window of attention share.

    Args:
        site: where it is installed; heads divide dim.
        backend: of `neural_memory` and `window_attention`.
        window: tokens that a token attends to, itself included.
        depth, expansion, chunk, kernel, persistent, max_step: see `MemoryMixer`.
    """

    def __init__(
        self,
        site: Site,
        backend: str = "auto",
        *,
        window: int = 128,
        depth: int = 2,
        expansion: int = 4,
        chunk: int = 64,
        kernel: int = 4,
        persistent: int = 4,
        max_step: float = 1.0,
    ) -> None:
        super().__init__(
            site,
            backend,
            depth=depth,
            expansion=expansion,
            chunk=chunk,
            kernel=kernel,
            persistent=persistent,
            max_step=max_step,
        )
        self.attention = WindowAttention(site, window)
        self.out_proj = nn.Linear(site.dim, site.dim, bias=False)
        self.add()

    def add(self) -> None:
        """Hook: what else is learned."""

    def count(self, sizes: Sizes) -> Cost:
        """The memory, the window, the output."""
        first = 0 if self.persistent is None else self.persistent.shape[1]
        out = 2 * sizes.batch * sizes.queries * self.site.dim**2
        return super().count(sizes) + self.attention.count(sizes.queries, sizes.batch, first) + Cost(out, out)
