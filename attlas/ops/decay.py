"""Causal linear attention with a constant decay: o_t = q_t S_t, S_t = exp(-slope_h) S_{t-1} + k_t v_tᵀ.

B batch, H heads, N tokens, D key size, E value size, n chunks, C tokens in a chunk.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from attlas.kernels.cpu import decay as kernel
from attlas.ops.dispatch import Backend, Op
from attlas.ops.precision import as_written

_BLOCK = 512  # tokens whose intermediate results stay in the cache


def oracle(
    q_BHND: Tensor,
    k_BHND: Tensor,
    v_BHNE: Tensor,
    slopes_H: Tensor,
    state_BHDE: Tensor | None = None,
    keep_BN: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence, token by token.

    Args:
        q_BHND, k_BHND, v_BHNE: queries, keys, values. There is no scale and no normaliser.
        slopes_H: at least 0; a head forgets by exp(-slope) per token.
        state_BHDE: S before the first token, in float32 or better; zeros if None.
        keep_BN: False where there is no token: it neither enters nor decays the state, and gives 0.

    Returns:
        o (B, H, N, E) and S after the last token (B, H, D, E), in float32 or better.
    """
    state = _state(q_BHND, v_BHNE, state_BHDE)
    slopes = slopes_H.to(state.dtype)[:, None, None]
    rows = []
    for t in range(q_BHND.shape[2]):
        q, k, v = (x[:, :, t].to(state.dtype) for x in (q_BHND, k_BHND, v_BHNE))
        after = torch.exp(-slopes) * state + k[..., :, None] * v[..., None, :]
        row = (q[..., None, :] @ after)[..., 0, :]
        if keep_BN is not None:
            keep = keep_BN[:, t, None, None, None]
            after, row = torch.where(keep, after, state), torch.where(keep[..., 0], row, 0)
        state = after
        rows.append(row)
    return torch.stack(rows, 2).to(v_BHNE.dtype), state


def chunked(
    q_BHND: Tensor,
    k_BHND: Tensor,
    v_BHNE: Tensor,
    slopes_H: Tensor,
    state_BHDE: Tensor | None = None,
    keep_BN: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """As `oracle`: quadratic inside chunks, the state between them. Time O(N (C + D) E).

    A processor takes some chunks at a time, so that what lies between two products stays in its cache; a GPU
    takes all of them at once.
    """
    state = _state(q_BHND, v_BHNE, state_BHDE)
    tokens = q_BHND.shape[2]
    block = max(chunk, _BLOCK) if q_BHND.device.type == "cpu" else tokens
    parts = [x.split(block, 2) for x in (q_BHND, k_BHND, v_BHNE)]
    keeps = itertools.repeat(None) if keep_BN is None else keep_BN.split(block, 1)
    rows = []
    with as_written(q_BHND):  # half precision has no room for a state
        for *tokens_of_block, keep in zip(*parts, keeps, strict=False):
            q, k, v = (x.to(state.dtype) for x in tokens_of_block)
            o, state = _block(q, k, v, slopes_H, state, keep, chunk)
            rows.append(o.to(v_BHNE.dtype))
    return torch.cat(rows, 2), state


def _block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes_H: Tensor,
    state: Tensor,
    keep_BN: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    tokens = q.shape[2]
    chunk = min(chunk, tokens)
    if keep_BN is None:
        live = torch.ones(1, tokens, dtype=torch.bool, device=q.device)
    else:
        live = keep_BN
        q, k, v = (x.masked_fill(~keep_BN[:, None, :, None], 0) for x in (q, k, v))
    padding = -tokens % chunk
    q, k, v = (F.pad(x, (0, 0, 0, padding)).unflatten(2, (-1, chunk)) for x in (q, k, v))
    count_BnC = F.pad(live, (0, padding)).unflatten(1, (-1, chunk)).cumsum(2)
    total_Bn = count_BnC[:, :, -1]

    def decay(tokens_B: Tensor) -> Tensor:
        """(B, ...) numbers of tokens, never negative, to (B, H, ...)."""
        slopes = slopes_H.to(state.dtype).reshape(-1, *[1] * (tokens_B.ndim - 1))
        return torch.exp(-slopes * tokens_B[:, None])

    # Without gaps every chunk has the same triangle; the padding of the last one lies behind all that is seen.
    place = count_BnC if keep_BN is not None else count_BnC[:, :1]
    triangle = decay((place[..., :, None] - place[..., None, :]).clamp(min=0)).tril()
    within = (q @ k.transpose(-1, -2) * triangle) @ v
    gained = (k * decay(total_Bn[..., None] - count_BnC)[..., None]).transpose(-1, -2) @ v
    forgotten = decay(total_Bn)[..., None, None]

    before = []
    for gain, forget in zip(gained.unbind(2), forgotten.unbind(2), strict=True):
        before.append(state)
        state = torch.addcmul(gain, forget, state)
    o = within + (q * decay(count_BnC)[..., None]) @ torch.stack(before, 2)
    return o.flatten(2, 3)[:, :, :tokens], state


def cpu(
    q_BHND: Tensor,
    k_BHND: Tensor,
    v_BHNE: Tensor,
    slopes_H: Tensor,
    state_BHDE: Tensor | None = None,
    keep_BN: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `oracle`, by the C++ kernel, which refuses what `refuses` names. Kept tokens are moved together for it."""
    if keep_BN is None:
        return kernel.decayed_linear_attention(q_BHND, k_BHND, v_BHNE, slopes_H, state_BHDE)
    order_BN = keep_BN.int().argsort(dim=1, descending=True, stable=True)
    q, k, v = (_take(x, order_BN) for x in (q_BHND, k_BHND, v_BHNE))
    o, state = kernel.decayed_linear_attention(q, k, v, slopes_H, state_BHDE, keep_BN.sum(1))
    return _take(o, order_BN.argsort(dim=1)), state


def _take(x_BHND: Tensor, order_BN: Tensor) -> Tensor:
    """The tokens of every sequence in another order."""
    batch, heads, tokens, size = x_BHND.shape
    row_BN = order_BN + tokens * torch.arange(batch, device=x_BHND.device)[:, None]
    rows = x_BHND.transpose(1, 2).reshape(batch * tokens, heads * size)
    return rows.index_select(0, row_BN.flatten()).view(batch, tokens, heads, size).transpose(1, 2)


def _state(q: Tensor, v: Tensor, state: Tensor | None) -> Tensor:
    dtype = torch.promote_types(q.dtype, torch.float32)
    if state is None:
        return q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3], dtype=dtype)
    return state.to(dtype)


def flops(tokens: int, size: int, value: int, chunk: int = 64) -> tuple[int, int]:
    """FLOPs of one head: what the recurrence takes, and what `chunked` multiplies on a processor."""
    needed = made = 0
    for start in range(0, tokens, max(chunk, _BLOCK)):
        block = min(tokens - start, max(chunk, _BLOCK))
        rows = min(chunk, block)
        padded = -(-block // rows) * rows
        needed += 4 * block * size * value
        made += 2 * padded * rows * (size + value) + 4 * padded * size * value
    return needed, made


def refuses(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, *args: object) -> str | None:
    """Why `cpu` cannot take these, or None."""
    if torch.compiler.is_exporting():
        return "an exported program must run where this kernel is not"
    return kernel.refuses(q, k, v, slopes)


decayed_linear_attention = Op(
    "decayed_linear_attention", Backend("cpu", cpu, refuses), Backend("torch", chunked), Backend("oracle", oracle)
)
