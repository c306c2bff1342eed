"""Softmax attention by tiles (FlashAttention-2): exact, with memory that grows with N + M and not with N M.

    o_n = sum_m exp(s_nm - lse_n) v_m,   lse_n = log sum_m exp(s_nm),   s_nm = scale q_n.k_m + bias_nm

Forward: a tile of queries walks over the tiles of keys and carries the largest score, the sum of the powers and the
weighted sum of the values; it divides once, at the end. Kept for the backward pass are q, k, v, o and lse alone; the
weights are made again, tile by tile, as p = exp(s - lse). With D_n = do_n.o_n - dlse_n:

    dv_m = sum_n p_nm do_n              ds_nm = p_nm (do_n.v_m - D_n)
    dq_n = scale sum_m ds_nm k_m        dk_m = scale sum_n ds_nm q_n

Both passes walk over queries outside and keys inside, so that a row of a mask is made once per tile of queries. The
sums are in a fixed order: the result is the same every time.

Forward 2 N M (D + E) FLOPs per head, backward 2 N M (3 D + 2 E), half of both where causal.

Source: Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", 2023
(arXiv:2307.08691).

B batch, H query heads, G key/value heads, R = H / G, N queries, M keys, D head size, E value size; n and m queries
and keys of one tile, X = R n: the query heads that share keys are rows of one product.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attlas.core.errors import BadInput
from attlas.core.mask import Mask
from attlas.ops.dispatch import Backend, Op
from attlas.ops.precision import as_written, wide
from attlas.ops.scan import NEVER, RunningSoftmax
from attlas.ops.scan import merge as merge_runs

TILE = (128, 128)
"""Queries and keys of a tile."""


def tiles(
    queries: int, keys: int, tile: tuple[int, int] = TILE, causal: bool = False
) -> list[tuple[slice, list[slice]]]:
    """Each tile of queries with the tiles of keys that it walks over; those wholly above the diagonal are left out.

    >>> tiles(4, 4, (2, 2), causal=True)
    [(slice(0, 2, None), [slice(0, 2, None)]), (slice(2, 4, None), [slice(0, 2, None), slice(2, 4, None)])]
    """
    height, width = tile
    plan = []
    for start in range(0, queries, height):
        stop = min(start + height, queries)
        reach = max(keys - queries + stop, 0) if causal else keys
        plan.append((slice(start, stop), [slice(m, min(m + width, reach)) for m in range(0, reach, width)]))
    return plan


def visits(queries: int, keys: int, tile: tuple[int, int] = TILE, causal: bool = False) -> int:
    """How many tiles are computed per head.

    >>> visits(1024, 1024), visits(1024, 1024, causal=True)
    (64, 36)
    """
    return sum(len(columns) for _, columns in tiles(queries, keys, tile, causal))


def partial_softmax(scores_XM: Tensor, v_ME: Tensor) -> RunningSoftmax:
    """What some keys contribute to the rows of X, not divided yet; a score of -inf has no weight."""
    m_X1 = scores_XM.amax(-1, keepdim=True).clamp(min=NEVER)
    powers_XM = (scores_XM - m_X1).exp()
    return RunningSoftmax(m_X1, powers_XM.sum(-1, keepdim=True), powers_XM @ v_ME)


def merge(o1_BHNE: Tensor, lse1_BHN: Tensor, o2_BHNE: Tensor, lse2_BHN: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys as attention over both.

    Associative and commutative; `o = 0, lse = -inf`, the result of no keys, changes nothing.
    """
    lse1, lse2 = lse1_BHN.unsqueeze(-1), lse2_BHN.unsqueeze(-1)
    # The result does not depend on m, which is a constant for gradients.
    m = torch.maximum(lse1, lse2).detach()
    m = m.where(m > -torch.inf, 0)
    u1, u2 = (lse1 - m).exp(), (lse2 - m).exp()
    seeing = u1 + u2 > 0
    u = (u1 + u2).where(seeing, 1)
    o = (u1 * o1_BHNE + u2 * o2_BHNE) / u
    return o.to(o1_BHNE.dtype), (m + u.log()).where(seeing, -torch.inf).squeeze(-1)


class _Tensors(NamedTuple):
    """What one call works on, and its tiles, in float32 at least."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    mask: Mask
    scale: float

    def tiles(self, tile: tuple[int, int]) -> list[tuple[slice, list[slice]]]:
        return tiles(self.q.shape[2], self.k.shape[2], tile, self.mask.causal)

    def queries(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        """Scaled queries (B, G, X, D), and what the mask's rule lets them see of all keys (B or 1, H or 1, n, M)."""
        q_BGXD = self.stack(self.q[:, :, rows]) * self.scale
        if self.mask.rule is None:
            return q_BGXD, None
        key = torch.arange(self.k.shape[2], device=self.k.device)
        seen = self.mask.rule(self._positions(rows), key.unsqueeze(0))
        return q_BGXD, seen[(None,) * (4 - seen.ndim)]

    def keys(self, column: slice) -> tuple[Tensor, Tensor]:
        """Keys and values, with 0 for what padding holds: a weight of 0 does not silence a NaN."""
        k_BGmD, v_BGmE = wide(self.k[:, :, column]), wide(self.v[:, :, column])
        if self.mask.keys is None:
            return k_BGmD, v_BGmE
        real = self.mask.keys[:, None, column, None].to(self.k.device)
        return k_BGmD.where(real, 0), v_BGmE.where(real, 0)

    def scores(self, q_BGXD: Tensor, k_BGmD: Tensor, seen: Tensor | None, rows: slice, column: slice) -> Tensor:
        """(B, G, X, m), -inf where a key is not seen."""
        groups, device = self.k.shape[1], self.k.device
        scores = (q_BGXD @ k_BGmD.mT).unflatten(2, (-1, rows.stop - rows.start))
        if self.bias is not None:
            scores = scores + _grouped(self.bias[:, :, rows, column], groups)
        if seen is not None:
            scores = scores.masked_fill(~_grouped(seen[..., column], groups), -torch.inf)
        if self.mask.keys is not None:
            scores = scores.masked_fill(~self.mask.keys[:, None, None, None, column].to(device), -torch.inf)
        if self.mask.causal and column.stop - 1 > rows.start + self.k.shape[2] - self.q.shape[2]:
            key = torch.arange(column.start, column.stop, device=device)
            scores = scores.masked_fill(key > self._positions(rows), -torch.inf)
        return scores.flatten(2, 3)

    def stack(self, x_BHnD: Tensor) -> Tensor:
        """(B, G, X, D)."""
        return wide(x_BHnD).unflatten(1, (self.k.shape[1], -1)).flatten(2, 3)

    def spread(self, x_BGXD: Tensor) -> Tensor:
        """(B, H, n, D) again."""
        return x_BGXD.unflatten(2, (self.q.shape[1] // self.k.shape[1], -1)).flatten(1, 2)

    def _positions(self, rows: slice) -> Tensor:
        offset = self.k.shape[2] - self.q.shape[2]
        return torch.arange(rows.start + offset, rows.stop + offset, device=self.k.device).unsqueeze(1)


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        mask: Mask,
        scale: float,
        tile: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:
        x = _Tensors(q, k, v, bias, mask, scale)
        o = q.new_zeros(*q.shape[:3], v.shape[3])
        lse = wide(o[..., 0]) - torch.inf
        with as_written(q):
            for rows, columns in x.tiles(tile):
                q_BGXD, seen = x.queries(rows)
                run = _nothing(q_BGXD, v.shape[3])
                for column in columns:
                    k_BGmD, v_BGmE = x.keys(column)
                    run = merge_runs(run, partial_softmax(x.scores(q_BGXD, k_BGmD, seen, rows, column), v_BGmE))
                o[:, :, rows] = x.spread(run.average).to(o.dtype)
                lse[:, :, rows] = x.spread(run.m + run.u.log()).squeeze(-1)
        ctx.save_for_backward(q, k, v, o, lse, bias)
        ctx.mask, ctx.scale, ctx.tile = mask, scale, tile
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, lse, bias = ctx.saved_tensors
        x = _Tensors(q, k, v, bias, ctx.mask, ctx.scale)
        dq, dk, dv = torch.zeros_like(q), wide(torch.zeros_like(k)), wide(torch.zeros_like(v))
        dbias = wide(torch.zeros_like(bias)) if ctx.needs_input_grad[3] else None
        # The row of a query that sees nothing has scores of -inf alone: against 0 its weights are 0 as well.
        lse = lse.where(lse > -torch.inf, 0).unsqueeze(-1)
        with as_written(q):
            delta = (wide(do) * wide(o)).sum(-1, keepdim=True) - dlse.unsqueeze(-1)
            for rows, columns in x.tiles(ctx.tile):
                q_BGXD, seen = x.queries(rows)
                do_BGXE, lse_BGX1, delta_BGX1 = (x.stack(y[:, :, rows]) for y in (do, lse, delta))
                dq_BGXD = torch.zeros_like(q_BGXD)
                for column in columns:
                    k_BGmD, v_BGmE = x.keys(column)
                    p_BGXm = (x.scores(q_BGXD, k_BGmD, seen, rows, column) - lse_BGX1).exp()
                    ds_BGXm = p_BGXm * (do_BGXE @ v_BGmE.mT - delta_BGX1)
                    dq_BGXD += ds_BGXm @ k_BGmD
                    # X runs over the query heads of the group: the products sum over them.
                    dk[:, :, column] += ds_BGXm.mT @ q_BGXD
                    dv[:, :, column] += p_BGXm.mT @ do_BGXE
                    if dbias is not None:
                        own = dbias[:, :, rows, column]
                        own += x.spread(ds_BGXm).sum_to_size(own.shape)
                dq[:, :, rows] = x.spread(dq_BGXD * ctx.scale).to(q.dtype)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None if dbias is None else dbias.to(bias.dtype), None, None, None


def _nothing(q_BGXD: Tensor, value: int) -> RunningSoftmax:
    zero = q_BGXD.new_zeros(*q_BGXD.shape[:3], value)
    return RunningSoftmax(zero[..., :1] + NEVER, zero[..., :1], zero)


def _grouped(x_bhnm: Tensor, groups: int) -> Tensor:
    """Heads as (G, R), or (1, 1) where all are alike."""
    return x_bhnm.unsqueeze(2) if x_bhnm.shape[1] == 1 else x_bhnm.unflatten(1, (groups, -1))


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Mask, tile: tuple[int, int]) -> None:
    if min(tile) < 1:
        raise BadInput(f"a tile holds at least one query and one key, got {tile}")
    if q.shape[1] % k.shape[1] or k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise BadInput(
            "queries (B, H, N, D), keys (B, G, M, D) and values (B, G, M, E) with H a multiple of G, "
            f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if mask.bias is not None and mask.bias.shape[2:] != (q.shape[2], k.shape[2]):
        raise BadInput(
            f"a bias has one number per pair, (B or 1, H or 1, {q.shape[2]}, {k.shape[2]}), "
            f"got {tuple(mask.bias.shape)}; expand it"
        )
    if mask.keys is not None and mask.keys.shape[1] != k.shape[2]:
        raise BadInput(f"the padding mask covers {mask.keys.shape[1]} keys, the call has {k.shape[2]}")


def _oracle(
    q_BHND: Tensor,
    k_BGMD: Tensor,
    v_BGME: Tensor,
    mask: Mask | None = None,
    *,
    scale: float | None = None,
    tile: tuple[int, int] = TILE,
) -> tuple[Tensor, Tensor]:
    """Exact softmax attention and the logarithm of its denominators.

    Args:
        q_BHND, k_BGMD, v_BGME: queries, keys, values; H is a multiple of G.
        mask: what may be seen, and the bias.
        scale: of the scores, D ** -0.5 by default.
        tile: queries and keys that are computed at once; the result does not depend on it.

    Returns:
        o (B, H, N, E), and lse (B, H, N) in float32 at least; a query that sees nothing gives 0 and -inf.
        Results over disjoint sets of keys become one by `merge`.

    Raises:
        BadInput: shapes that do not fit together.
    """
    mask = mask or Mask()
    _check(q_BHND, k_BGMD, v_BGME, mask, tile)
    scale = q_BHND.shape[3] ** -0.5 if scale is None else scale
    q, k, v = (wide(x) for x in (q_BHND, k_BGMD, v_BGME))
    q_BGRND = q.unflatten(1, (k.shape[1], -1))
    scores = torch.einsum("bgrnd,bgmd->bgrnm", q_BGRND, k).flatten(1, 2) * scale
    if mask.bias is not None:
        scores = scores + mask.bias
    seen = mask.pairs(q.shape[2], k.shape[2], q.device)
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    seeing = (scores > -torch.inf).any(-1, keepdim=True)
    scores = scores.where(seeing, 0)
    weights = (scores.softmax(-1) * seeing).unflatten(1, (k.shape[1], -1))
    o = torch.einsum("bgrnm,bgme->bgrne", weights, v).flatten(1, 2)
    return o.to(q_BHND.dtype), scores.logsumexp(-1).where(seeing.squeeze(-1), -torch.inf)


def _torch(
    q_BHND: Tensor,
    k_BGMD: Tensor,
    v_BGME: Tensor,
    mask: Mask | None = None,
    *,
    scale: float | None = None,
    tile: tuple[int, int] = TILE,
) -> tuple[Tensor, Tensor]:
    mask = mask or Mask()
    _check(q_BHND, k_BGMD, v_BGME, mask, tile)
    scale = q_BHND.shape[3] ** -0.5 if scale is None else scale
    return _Tiled.apply(q_BHND, k_BGMD, v_BGME, mask.bias, mask.with_(bias=None), scale, tile)


def run(
    q_BHND: Tensor,
    k_BGMD: Tensor,
    v_BGME: Tensor,
    mask: Mask | None = None,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """The output alone: a backend of `softmax_attention`, for arguments that `refuses` does not refuse."""
    return _torch(q_BHND, k_BGMD, v_BGME, mask, scale=scale)[0]


def refuses(
    q_BHND: Tensor,
    k_BGMD: Tensor,
    v_BGME: Tensor,
    mask: Mask | None = None,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
) -> str | None:
    """Why `run` cannot serve these arguments, or None."""
    return "drops no weights: it makes them again in the backward pass" if dropout else None


flash_attention = Op("flash_attention", Backend("torch", _torch), Backend("oracle", _oracle))
