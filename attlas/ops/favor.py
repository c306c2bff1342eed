"""Causal sums whose weights are powers, each relative to the largest exponent so far.

    o_n = Σ_{m≤n} exp(b_m − B_n) (q_n · k_m) v_m,    B_n = max_{m≤n} b_m

No exponent is above 0 and none looks ahead: later b, k and v, however large, change nothing before them as long as
they are finite.

B batch, H heads, N queries, M keys, R features, E value size, S chunks, C tokens of a chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attlas.ops.dispatch import Backend, Op
from attlas.ops.linear import CHUNK
from attlas.ops.precision import wide
from attlas.ops.scan import NEVER


class PowerSums(NamedTuple):
    """Σ exp(b_m − B) k_m v_mᵀ over the keys so far (B, H, R, E), and their largest exponent B (B, H)."""

    sums: Tensor
    largest: Tensor

    @classmethod
    def empty(cls, batch: int, heads: int, size: int, value: int, like: Tensor) -> PowerSums:
        """No key yet, in float32 at least."""
        sums = wide(like.new_zeros(batch, heads, size, value))
        return cls(sums, sums[:, :, 0, 0] + NEVER)


def _oracle(
    q_BHNR: Tensor, k_BHMR: Tensor, v_BHME: Tensor, b_BHM: Tensor, state: PowerSums | None = None
) -> tuple[Tensor, PowerSums]:
    """Sum of the values not after the query, weighted by q.k and by a power relative to the largest.

    Computed in the dtype of the inputs: widen half precision first.

    Args:
        q_BHNR, k_BHMR, v_BHME: queries, keys and values. Queries are the last N of M.
        b_BHM: exponents of the keys; `attlas.ops.scan.NEVER` with a key of 0 for no key.
        state: what came before the first key.

    Returns:
        (B, H, N, E), and the state behind the last key.
    """
    now = _start(q_BHNR, v_BHME) if state is None else state
    rows, before = [], k_BHMR.shape[2] - q_BHNR.shape[2]
    for m in range(min(before, 0), k_BHMR.shape[2]):
        if m >= 0:
            largest = torch.maximum(now.largest, b_BHM[:, :, m])
            old, new = ((b - largest).exp()[..., None, None] for b in (now.largest, b_BHM[:, :, m]))
            outer = k_BHMR[:, :, m, :, None] * v_BHME[:, :, m, None, :]
            now = PowerSums(old * now.sums + new * outer, largest)
        if m >= before:
            rows.append((q_BHNR[:, :, m - before, None, :] @ now.sums).squeeze(2))
    return torch.stack(rows, 2), now


def _start(q_BHNR: Tensor, v_BHME: Tensor) -> PowerSums:
    batch, heads, _, size = q_BHNR.shape
    return PowerSums.empty(batch, heads, size, v_BHME.shape[3], v_BHME)


def _torch(
    q_BHNR: Tensor, k_BHMR: Tensor, v_BHME: Tensor, b_BHM: Tensor, state: PowerSums | None = None
) -> tuple[Tensor, PowerSums]:
    state = _start(q_BHNR, v_BHME) if state is None else state
    queries, before = q_BHNR.shape[2], k_BHMR.shape[2] - q_BHNR.shape[2]
    if before > 0:
        state = _gather(k_BHMR[:, :, :before], v_BHME[:, :, :before], b_BHM[:, :, :before], state)
    chunk = max(1, min(CHUNK, queries))
    back = -queries % chunk
    q_BHSCR = F.pad(q_BHNR, (0, 0, 0, back)).unflatten(2, (-1, chunk))
    k, v, b = _chunked(k_BHMR, v_BHME, b_BHM, chunk, back, -before)
    largest_BHSC = torch.maximum(b.flatten(2).cummax(2).values, state.largest.unsqueeze(-1)).view_as(b)

    later = torch.ones(chunk, chunk, dtype=torch.bool, device=b.device).triu(1)
    powers = (b.unsqueeze(3) - largest_BHSC.unsqueeze(4)).masked_fill(later, -torch.inf).exp()
    o = (q_BHSCR @ k.mT * powers).to(v.dtype) @ v

    states = [state]
    for k_BHCR, v_BHCE, b_BHC in zip(k.unbind(2), v.unbind(2), b.unbind(2), strict=True):
        states.append(_gather(k_BHCR, v_BHCE, b_BHC, states[-1]))
    sums_BHSRE = torch.stack([s.sums for s in states[:-1]], 2)
    fading_BHSC = (torch.stack([s.largest for s in states[:-1]], 2).unsqueeze(-1) - largest_BHSC).exp()
    o = o + (q_BHSCR @ sums_BHSRE) * fading_BHSC.unsqueeze(-1)
    return o.flatten(2, 3)[:, :, :queries].to(q_BHNR.dtype), states[-1]


def _chunked(k: Tensor, v: Tensor, b: Tensor, chunk: int, back: int, front: int) -> tuple[Tensor, Tensor, Tensor]:
    """Chunks of the keys; a negative pad cuts off the first ones, a positive one adds what is none."""
    k, v = (F.pad(x, (0, 0, front, back)).unflatten(2, (-1, chunk)) for x in (k, v))
    return k, v, F.pad(b, (front, back), value=NEVER).unflatten(2, (-1, chunk))


def _gather(k_BHCR: Tensor, v_BHCE: Tensor, b_BHC: Tensor, state: PowerSums) -> PowerSums:
    """The state with some keys more."""
    largest = torch.maximum(state.largest, b_BHC.amax(2))
    k = k_BHCR * (b_BHC - largest.unsqueeze(-1)).exp().unsqueeze(-1)
    sums = (state.largest - largest).exp()[..., None, None] * state.sums + k.mT @ v_BHCE
    return PowerSums(sums.to(state.sums.dtype), largest)


running_powers = Op("running_powers", Backend("torch", _torch), Backend("oracle", _oracle))
