"""Block-sparse attention: softmax over the blocks of keys that were chosen for each run of queries.

    o_n = sum_m softmax_m(scale q_n . k_m) v_m     over the m in the blocks chosen for the run of n

The choice may be made once or from what the tokens say, for all heads or for each, run by run or query by query.

B batch, H query heads, G key/value heads, N queries, M keys, D head size, E value size, R runs of queries, C blocks
of keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attlas.core.errors import BadInput
from attlas.core.mask import Mask
from attlas.kernels.cpu import tiles
from attlas.ops.dispatch import Backend, Op
from attlas.ops.softmax import softmax_attention

ROWS = 1024
"""Queries whose pairs with all keys the torch backend holds at a time."""

SINGLE = 4
"""Pairs that are chosen together; of fewer the kernel makes nothing."""


def _check(q: Tensor, k: Tensor, chosen: Tensor, rows: int, columns: int) -> None:
    batch, heads, queries, keys = *q.shape[:3], k.shape[2]
    if min(rows, columns) < 1:
        raise BadInput(f"runs and blocks hold a token at least, got rows {rows} and columns {columns}")
    shape = (batch, heads, -(-queries // rows), -(-keys // columns))
    fits = chosen.ndim == 4 and all(
        a in (b, c) for a, b, c in zip(chosen.shape, shape, (1, 1, *shape[2:]), strict=True)
    )
    if chosen.dtype != torch.bool or not fits:
        raise BadInput(
            f"chosen is bool ({batch} or 1, {heads} or 1, {shape[2]} runs of {rows} queries, {shape[3]} blocks of "
            f"{columns} keys), got {chosen.dtype} {tuple(chosen.shape)}"
        )


def _oracle(
    q_BHND: Tensor,
    k_BGMD: Tensor,
    v_BGME: Tensor,
    chosen: Tensor,
    *,
    rows: int,
    columns: int,
    causal: bool = False,
    keep: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention over chosen blocks of keys; a query that sees nothing gives 0.

    Args:
        q_BHND, k_BGMD, v_BGME: queries, keys, values; H is a multiple of G.
        chosen: (B or 1, H or 1, R, C) bool, whether a run of queries sees a block of keys. No gradient reaches it.
        rows: queries of a run; the last one may hold fewer.
        columns: keys of a block; the last one may hold fewer.
        causal: besides, query n sees keys up to n + M - N.
        keep: (B, M) bool, False where a key is padding.
        scale: of the scores, D ** -0.5 by default.

    Returns:
        (B, H, N, E).
    """
    _check(q_BHND, k_BGMD, chosen, rows, columns)
    query = torch.arange(q_BHND.shape[2], device=q_BHND.device)
    key = torch.arange(k_BGMD.shape[2], device=q_BHND.device)
    seen = chosen[:, :, query.unsqueeze(1) // rows, key // columns]
    mask = Mask.pairs_(seen).with_(causal=causal, keys=keep)
    return softmax_attention(q_BHND, k_BGMD, v_BGME, mask, scale=scale, backend="oracle")


def _torch(
    q_BHND: Tensor,
    k_BGMD: Tensor,
    v_BGME: Tensor,
    chosen: Tensor,
    *,
    rows: int,
    columns: int,
    causal: bool = False,
    keep: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    _check(q_BHND, k_BGMD, chosen, rows, columns)
    queries, keys = q_BHND.shape[2], k_BGMD.shape[2]
    block = torch.arange(keys, device=q_BHND.device) // columns
    outputs = []
    for start in range(0, queries, ROWS):
        stop = min(start + ROWS, queries)
        run = torch.arange(start, stop, device=q_BHND.device) // rows
        last = stop + keys - queries if causal else keys
        if last < 1:  # more queries than keys: the first ones see nothing
            outputs.append(v_BGME.new_zeros(*q_BHND.shape[:2], stop - start, v_BGME.shape[3]))
            continue
        q, k, v = q_BHND[:, :, start:stop], k_BGMD[:, :, :last], v_BGME[:, :, :last]
        mask = Mask.pairs_(chosen[:, :, run][..., block[:last]])
        mask = mask.with_(causal=causal, keys=None if keep is None else keep[:, :last])
        outputs.append(softmax_attention(q, k, v, mask, scale=scale, backend="torch"))
    if not outputs:
        return v_BGME.new_zeros(*q_BHND.shape[:3], v_BGME.shape[3])
    return torch.cat(outputs, 2)


def _cpu(
    q_BHND: Tensor,
    k_BGMD: Tensor,
    v_BGME: Tensor,
    chosen: Tensor,
    *,
    rows: int,
    columns: int,
    causal: bool = False,
    keep: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    _check(q_BHND, k_BGMD, chosen, rows, columns)
    scale = q_BHND.shape[3] ** -0.5 if scale is None else scale
    return tiles.block_sparse_attention(
        q_BHND, k_BGMD, v_BGME, chosen, keep, rows=rows, columns=columns, causal=causal, scale=scale
    )[0]


def _cpu_yields(
    q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, *, rows: int, columns: int, **options: object
) -> str | None:
    if rows * columns < SINGLE:
        return "pairs chosen one by one leave nothing to share: all pairs are multiplied faster"
    return None


block_sparse_attention = Op(
    "block_sparse_attention",
    Backend("cpu", _cpu, lambda q, k, v, *args, **kwargs: tiles.refuses(q, k, v), _cpu_yields),
    Backend("torch", _torch),
    Backend("oracle", _oracle),
)
