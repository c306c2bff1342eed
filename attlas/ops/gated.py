"""Linear attention whose state forgets by gates that depend on the data.

    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T        o_t = q_t S_t        g_t <= 0

B batch, H heads, N tokens, D key size, E value size, n chunks, C tokens of a chunk, s blocks of a chunk, c tokens of a
block. A gate is per token, head and key channel, (B, H, N, D), or per token and head, (B, H, N, 1). For a decay that is
the same for all tokens there is `attlas.ops.decay`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from attlas.kernels.cpu import gated as kernel
from attlas.ops.dispatch import Backend, Op
from attlas.ops.precision import wide

CHUNK, BLOCK = 64, 16
AT_ONCE = 512
"""Tokens whose intermediate results stay in a processor's cache."""
NOTHING = -50.0
"""Logarithm of a decay that leaves nothing. The torch backend adds up logarithms over a chunk, so that one this low
costs the others around it three of their seven digits in float32; lower ones would cost more."""


def _oracle(
    q_BHND: Tensor,
    k_BHND: Tensor,
    v_BHNE: Tensor,
    log_decay_BHND: Tensor,
    state_BHDE: Tensor | None = None,
    keep_BN: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence, token by token.

    Args:
        q_BHND, k_BHND, v_BHNE: queries, keys, values. There is no scale and no normaliser.
        log_decay_BHND: at most 0, minus infinity allowed; its last axis may be 1.
        state_BHDE: S before the first token, in float32 or better; zeros if None.
        keep_BN: False where there is no token: it neither enters nor decays the state, and gives 0.

    Returns:
        o (B, H, N, E) and S after the last token (B, H, D, E), in float32 or better.
    """
    tokens = range(q_BHND.shape[2])
    return _recurrence(q_BHND, k_BHND, v_BHNE, log_decay_BHND, state_BHDE, keep_BN, tokens)


def _recurrence(
    q_BHND: Tensor,
    k_BHND: Tensor,
    v_BHNE: Tensor,
    log_decay_BHND: Tensor,
    state_BHDE: Tensor | None,
    keep_BN: Tensor | None,
    order: Sequence[int],
) -> tuple[Tensor, Tensor]:
    state = first_state(q_BHND, k_BHND, v_BHNE, log_decay_BHND, state_BHDE)
    rows = {}
    for t in order:
        q, k, v, g = (x[:, :, t].to(state.dtype) for x in (q_BHND, k_BHND, v_BHNE, log_decay_BHND))
        after = g.exp().unsqueeze(-1) * state + k.unsqueeze(-1) * v.unsqueeze(-2)
        row = (q.unsqueeze(-2) @ after).squeeze(-2)
        if keep_BN is not None:
            keep = keep_BN[:, t, None, None, None]
            after, row = after.where(keep, state), row.where(keep[..., 0], 0)
        state = after
        rows[t] = row
    return torch.stack([rows[t] for t in sorted(order)], 2).to(v_BHNE.dtype), state


def _torch(
    q_BHND: Tensor,
    k_BHND: Tensor,
    v_BHNE: Tensor,
    log_decay_BHND: Tensor,
    state_BHDE: Tensor | None = None,
    keep_BN: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    state = first_state(q_BHND, k_BHND, v_BHNE, log_decay_BHND, state_BHDE)
    q, k, v, g = real_tokens(keep_BN, q_BHND, k_BHND, v_BHNE, log_decay_BHND)
    at_once = AT_ONCE if q.device.type == "cpu" else q.shape[2]
    rows = []
    parts = (x.to(state.dtype).split(at_once, 2) for x in (q, k, v, g))
    for q_part, k_part, v_part, g_part in zip(*parts, strict=True):
        o, state = _chunks(q_part, k_part, v_part, g_part, state)
        rows.append(o.to(v.dtype))
    return torch.cat(rows, 2), state


def _chunks(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    tokens = q.shape[2]
    q, k, v, g = (in_chunks(x, CHUNK if tokens > BLOCK else BLOCK) for x in (q, k, v, g.clamp(min=NOTHING)))
    total_BHnCD = g.cumsum(3)
    end_BHn1D = total_BHnCD[..., -1:, :]
    within = _scores(q, k, total_BHnCD) @ v
    gained = (k * (end_BHn1D - total_BHnCD).exp()).transpose(-1, -2) @ v
    forgotten = end_BHn1D.exp().transpose(-1, -2)
    before = []
    for gain, forget in zip(gained.unbind(2), forgotten.unbind(2), strict=True):
        before.append(state)
        state = gain + forget * state
    o = within + (q * total_BHnCD.exp()) @ torch.stack(before, 2)
    return o.flatten(2, 3)[:, :, :tokens], state


def _scores(q: Tensor, k: Tensor, total_BHnCD: Tensor) -> Tensor:
    """sum_d q_rd k_cd exp(G_rd - G_cd) for c <= r, without ever raising e to a positive power.

    A block's rows take the keys of earlier blocks relative to where the block begins, which lies between the two;
    inside a block every pair has its own difference.
    """
    chunk = q.shape[3]
    q_BHnscD, k_BHnscD, total_BHnscD = (x.unflatten(3, (-1, BLOCK)) for x in (q, k, total_BHnCD))
    start_BHns1D = F.pad(total_BHnscD[..., -1:, :], (0, 0, 0, 0, 1, 0))[..., :-1, :, :]
    queries = q_BHnscD * (total_BHnscD - start_BHns1D).exp()
    place = torch.arange(chunk, device=q.device)
    later_sC1 = place.unsqueeze(-1) >= place[::BLOCK].view(-1, 1, 1)
    fade_BHnsCD = (start_BHns1D - total_BHnCD.unsqueeze(3)).masked_fill(later_sC1, -torch.inf).exp()
    earlier = (queries @ (k.unsqueeze(3) * fade_BHnsCD).transpose(-1, -2)).flatten(3, 4)

    later_cc1 = (place[:BLOCK] > place[:BLOCK, None]).unsqueeze(-1)
    difference = total_BHnscD.unsqueeze(-2) - total_BHnscD.unsqueeze(-3)
    fade_BHnsccD = difference.masked_fill(later_cc1, -torch.inf).exp()
    pairs = (q_BHnscD.unsqueeze(-2) * fade_BHnsccD * k_BHnscD.unsqueeze(-3)).sum(-1)
    inside = torch.stack([F.pad(x, (i * BLOCK, chunk - (i + 1) * BLOCK)) for i, x in enumerate(pairs.unbind(3))], 3)
    return earlier + inside.flatten(3, 4)


def first_state(
    q_BHND: Tensor, k_BHND: Tensor, v_BHNE: Tensor, gates: Tensor, state: Tensor | None, beta: Tensor | None = None
) -> Tensor:
    """S before the first token, in float32 at least, of inputs whose shapes are checked."""
    kernel.check(q_BHND, k_BHND, v_BHNE, gates, state, beta)
    if state is None:
        return wide(k_BHND.new_zeros(*k_BHND.shape[:2], k_BHND.shape[3], v_BHNE.shape[3]))
    return wide(state)


def real_tokens(keep_BN: Tensor | None, *tokens: Tensor) -> tuple[Tensor, ...]:
    """Tokens (B, H, N, ...) with zeros where there is none: nothing enters, nothing decays, 0 is read."""
    if keep_BN is None:
        return tokens
    return tuple(
        x.masked_fill(~keep_BN[:, None, :].reshape(len(keep_BN), 1, -1, *[1] * (x.ndim - 3)), 0) for x in tokens
    )


def in_chunks(x: Tensor, chunk: int) -> Tensor:
    """Axis 2 as (n, C), with zeros behind the last token."""
    return F.pad(x, (*[0, 0] * (x.ndim - 3), 0, -x.shape[2] % chunk)).unflatten(2, (-1, chunk))


def flops(tokens: int, size: int, value: int) -> tuple[int, int]:
    """FLOPs of one head: what the recurrence takes, and what the torch backend multiplies on a processor."""
    made = 0
    for start in range(0, tokens, AT_ONCE):
        part = min(tokens - start, AT_ONCE)
        chunk = CHUNK if part > BLOCK else BLOCK
        padded = -(-part // chunk) * chunk
        made += 2 * padded * (chunk * (size + value) + 2 * size * value)
    return 4 * tokens * size * value, made


def _cpu(
    q_BHND: Tensor,
    k_BHND: Tensor,
    v_BHNE: Tensor,
    log_decay_BHND: Tensor,
    state_BHDE: Tensor | None = None,
    keep_BN: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    q, k, v, g = real_tokens(keep_BN, q_BHND, k_BHND, v_BHNE, log_decay_BHND)
    return kernel.gated_linear_attention(q, k, v, g, state_BHDE)


def refuses(q: Tensor, k: Tensor, v: Tensor, *others: Tensor | None) -> str | None:
    """Why the kernel cannot take these, or None."""
    if torch.compiler.is_exporting():
        return "an exported program must run where this kernel is not"
    return kernel.refuses(q, k, v, *others)


def _refuses(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None = None, keep: Tensor | None = None
) -> str | None:
    return refuses(q, k, v, log_decay, state)


gated_linear_attention = Op(
    "gated_linear_attention", Backend("cpu", _cpu, _refuses), Backend("torch", _torch), Backend("oracle", _oracle)
)


def _oracle_both_ways(
    q_BHND: Tensor,
    k_BHND: Tensor,
    v_BHNE: Tensor,
    log_decay_BHND: Tensor,
    log_decay_back_BHND: Tensor,
    keep_BN: Tensor | None = None,
) -> Tensor:
    """The sum of the recurrence from the first token on and of that from the last token back; each has its own gates.

    Args:
        q_BHND, k_BHND, v_BHNE: queries, keys, values, which both directions share.
        log_decay_BHND, log_decay_back_BHND: at most 0; the last axis may be 1.
        keep_BN: False where there is no token.

    Returns:
        (B, H, N, E). A token sees itself in both directions.
    """
    inputs, tokens = (q_BHND, k_BHND, v_BHNE), range(q_BHND.shape[2])
    ahead, _ = _recurrence(*inputs, log_decay_BHND, None, keep_BN, tokens)
    back, _ = _recurrence(*inputs, log_decay_back_BHND, None, keep_BN, tokens[::-1])
    return ahead + back


def _torch_both_ways(
    q_BHND: Tensor,
    k_BHND: Tensor,
    v_BHNE: Tensor,
    log_decay_BHND: Tensor,
    log_decay_back_BHND: Tensor,
    keep_BN: Tensor | None = None,
) -> Tensor:
    ahead, _ = _torch(q_BHND, k_BHND, v_BHNE, log_decay_BHND, None, keep_BN)
    q, k, v, g = (x.flip(2) for x in (q_BHND, k_BHND, v_BHNE, log_decay_back_BHND))
    back, _ = _torch(q, k, v, g, None, None if keep_BN is None else keep_BN.flip(1))
    return ahead + back.flip(2)


def _cpu_both_ways(
    q_BHND: Tensor,
    k_BHND: Tensor,
    v_BHNE: Tensor,
    log_decay_BHND: Tensor,
    log_decay_back_BHND: Tensor,
    keep_BN: Tensor | None = None,
) -> Tensor:
    tokens = real_tokens(keep_BN, q_BHND, k_BHND, v_BHNE, log_decay_BHND, log_decay_back_BHND)
    return kernel.bidirectional_gated_attention(*tokens)


def _refuses_both_ways(
    q: Tensor, k: Tensor, v: Tensor, forward: Tensor, back: Tensor, keep: Tensor | None = None
) -> str | None:
    return refuses(q, k, v, forward, back)


bidirectional_gated_attention = Op(
    "bidirectional_gated_attention",
    Backend("cpu", _cpu_both_ways, _refuses_both_ways),
    Backend("torch", _torch_both_ways),
    Backend("oracle", _oracle_both_ways),
)
