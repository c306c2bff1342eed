"""The delta rule: the state stores the difference between a value and what it already recalls for the key.

    S' = exp(g_t) S_{t-1}        w_t = beta_t (v_t - k_t S')        S_t = S' + k_t^T w_t        o_t = q_t S_t

B batch, H heads, N tokens, D key size, E value size, n chunks, C tokens of a chunk. The decay is per token and head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attlas.kernels.cpu import gated as kernel
from attlas.ops.dispatch import Backend, Op
from attlas.ops.gated import AT_ONCE, BLOCK, CHUNK, NOTHING, first_state, in_chunks, real_tokens, refuses


def _oracle(
    q_BHND: Tensor,
    k_BHND: Tensor,
    v_BHNE: Tensor,
    beta_BHN: Tensor,
    log_decay_BHN: Tensor | None = None,
    state_BHDE: Tensor | None = None,
    keep_BN: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence, token by token.

    Args:
        q_BHND, k_BHND, v_BHNE: queries, keys, values. There is no scale. Keys of norm 1 and beta in 0 .. 2 keep the
            state bounded.
        beta_BHN: how much of the difference is stored.
        log_decay_BHN: at most 0, minus infinity allowed; None for no decay.
        state_BHDE: S before the first token, in float32 or better; zeros if None.
        keep_BN: False where there is no token: it leaves the state as it is, and gives 0.

    Returns:
        o (B, H, N, E) and S after the last token (B, H, D, E), in float32 or better.
    """
    state = first_state(q_BHND, k_BHND, v_BHNE, _decay(beta_BHN, log_decay_BHN), state_BHDE, beta_BHN)
    rows = []
    for t in range(q_BHND.shape[2]):
        q, k, v = (x[:, :, t, None].to(state.dtype) for x in (q_BHND, k_BHND, v_BHNE))
        beta = beta_BHN[:, :, t, None, None].to(state.dtype)
        decayed = state
        if log_decay_BHN is not None:
            decayed = log_decay_BHN[:, :, t, None, None].to(state.dtype).exp() * state
        after = decayed + k.transpose(-1, -2) @ (beta * (v - k @ decayed))
        row = (q @ after).squeeze(2)
        if keep_BN is not None:
            keep = keep_BN[:, t, None, None, None]
            after, row = after.where(keep, state), row.where(keep[..., 0], 0)
        state = after
        rows.append(row)
    return torch.stack(rows, 2).to(v_BHNE.dtype), state


def _torch(
    q_BHND: Tensor,
    k_BHND: Tensor,
    v_BHNE: Tensor,
    beta_BHN: Tensor,
    log_decay_BHN: Tensor | None = None,
    state_BHDE: Tensor | None = None,
    keep_BN: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    state = first_state(q_BHND, k_BHND, v_BHNE, _decay(beta_BHN, log_decay_BHN), state_BHDE, beta_BHN)
    tokens = real_tokens(keep_BN, q_BHND, k_BHND, v_BHNE, beta_BHN, _decay(beta_BHN, log_decay_BHN))
    at_once = AT_ONCE if q_BHND.device.type == "cpu" else q_BHND.shape[2]
    rows = []
    for q, k, v, beta, g in zip(*(x.to(state.dtype).split(at_once, 2) for x in tokens), strict=True):
        o, state = _chunks(q, k, v, beta, g, state)
        rows.append(o.to(v_BHNE.dtype))
    return torch.cat(rows, 2), state


def _chunks(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """What a chunk stores solves a triangular system; its right side is linear in the state before the chunk."""
    tokens = q.shape[2]
    chunk = CHUNK if tokens > BLOCK else BLOCK
    q, k, v, beta, g = (in_chunks(x, chunk) for x in (q, k, v, beta, g.clamp(min=NOTHING)))
    total_BHnC1 = g.cumsum(3).unsqueeze(-1)
    end_BHn11 = total_BHnC1[..., -1:, :]
    beta_BHnC1 = beta.unsqueeze(-1)
    place = torch.arange(chunk, device=q.device)
    difference = total_BHnC1 - total_BHnC1.transpose(-1, -2)
    fade_BHnCC = difference.masked_fill(place > place[:, None], -torch.inf).exp()
    system = beta_BHnC1 * (k @ k.transpose(-1, -2)) * fade_BHnCC  # strictly below the diagonal; 1 on it
    sides = torch.cat([beta_BHnC1 * v, beta_BHnC1 * total_BHnC1.exp() * k], -1)
    solved = torch.linalg.solve_triangular(system, sides, upper=False, unitriangular=True)
    own_BHnCE, recalling_BHnCD = solved.split([v.shape[-1], k.shape[-1]], -1)
    scores = q @ k.transpose(-1, -2) * fade_BHnCC
    queries, keys = q * total_BHnC1.exp(), (k * (end_BHn11 - total_BHnC1).exp()).transpose(-1, -2)
    rows = []
    for i in range(q.shape[2]):
        stored = own_BHnCE[:, :, i] - recalling_BHnCD[:, :, i] @ state
        rows.append(scores[:, :, i] @ stored + queries[:, :, i] @ state)
        state = end_BHn11[:, :, i].exp() * state + keys[:, :, i] @ stored
    return torch.cat(rows, 2)[:, :, :tokens], state


def flops(tokens: int, size: int, value: int) -> tuple[int, int]:
    """FLOPs of one head: what the recurrence takes, and what the torch backend multiplies on a processor."""
    made = 0
    for start in range(0, tokens, AT_ONCE):
        part = min(tokens - start, AT_ONCE)
        chunk = CHUNK if part > BLOCK else BLOCK
        padded = -(-part // chunk) * chunk
        made += 2 * padded * (chunk * (2 * size + value) + 3 * size * value)
    return 6 * tokens * size * value, made


def _cpu(
    q_BHND: Tensor,
    k_BHND: Tensor,
    v_BHNE: Tensor,
    beta_BHN: Tensor,
    log_decay_BHN: Tensor | None = None,
    state_BHDE: Tensor | None = None,
    keep_BN: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    q, k, v, beta, g = real_tokens(keep_BN, q_BHND, k_BHND, v_BHNE, beta_BHN, _decay(beta_BHN, log_decay_BHN))
    return kernel.gated_delta_rule(q, k, v, beta, g, state_BHDE)


def _decay(beta_BHN: Tensor, log_decay_BHN: Tensor | None) -> Tensor:
    return torch.zeros_like(beta_BHN) if log_decay_BHN is None else log_decay_BHN


def _refuses(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    state: Tensor | None = None,
    keep: Tensor | None = None,
) -> str | None:
    return refuses(q, k, v, beta, log_decay, state)


gated_delta_rule = Op(
    "gated_delta_rule", Backend("cpu", _cpu, _refuses), Backend("torch", _torch), Backend("oracle", _oracle)
)
