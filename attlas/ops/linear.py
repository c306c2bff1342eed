"""The product behind linear attention: o_n = sum_m (q_n.k_m) v_m, in any order of multiplication.

B batch, H heads, N queries, M keys, D features, E value size, S chunks, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from attlas.core.mask import Mask
from attlas.kernels.cpu import decay as kernel
from attlas.ops import decay
from attlas.ops.dispatch import Backend, Op
from attlas.ops.precision import as_written, wide

CHUNK = 64


def product_flops(queries: int, keys: int, size: int, value: int, causal: bool) -> tuple[int, int]:
    """FLOPs of `feature_product` for one head: what it takes, and what the torch backend multiplies."""
    needed = 2 * (queries + keys) * size * value
    if not causal:
        return needed, needed
    chunk, padded = _chunks(queries)
    before = max(keys - queries, 0)
    return needed, 2 * padded * chunk * (size + value) + 2 * (2 * padded + before) * size * value


def _chunks(queries: int) -> tuple[int, int]:
    """Tokens of a chunk, and of all chunks together."""
    chunk = max(1, min(CHUNK, queries))
    return chunk, -(-queries // chunk) * chunk


def _oracle(
    q_BHND: Tensor,
    k_BHMD: Tensor,
    v_BHME: Tensor,
    state_BHDE: Tensor | None = None,
    *,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """Sum of all values, or of those not after the query, each weighted by the product q.k.

    Computed and accumulated in the dtype of the inputs: widen half precision first.

    Args:
        q_BHND, k_BHMD, v_BHME: feature maps of queries and keys, and values. Queries are the last N of M.
        state_BHDE: sum of k v^T over what came before the first key.
        causal: a query sees no later key.

    Returns:
        (B, H, N, E), and the state behind the last key.
    """
    weights = q_BHND @ k_BHMD.transpose(-1, -2)
    seen = Mask(causal=causal).pairs(q_BHND.shape[2], k_BHMD.shape[2], q_BHND.device)
    o = (weights if seen is None else torch.where(seen, weights, 0)) @ v_BHME
    after = k_BHMD.transpose(-1, -2) @ v_BHME
    return (o, after) if state_BHDE is None else (o + q_BHND @ state_BHDE, after + state_BHDE)


def _torch(
    q_BHND: Tensor,
    k_BHMD: Tensor,
    v_BHME: Tensor,
    state_BHDE: Tensor | None = None,
    *,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    with as_written(q_BHND):  # half precision has no room for a sum over the sequence
        queries, keys = q_BHND.shape[2], k_BHMD.shape[2]
        before = max(keys - queries, 0) if causal else keys
        seen_by_all = k_BHMD[:, :, :before].mT @ v_BHME[:, :, :before]
        state = seen_by_all if state_BHDE is None else state_BHDE + seen_by_all
        if not causal:
            return q_BHND @ state, state
        chunk, padded = _chunks(queries)
        # Keys lie opposite their queries: a negative pad cuts off the first ones, a positive one adds zeros.
        front, back = queries - keys, padded - queries
        k, v = (F.pad(x, (0, 0, front, back)).unflatten(2, (-1, chunk)) for x in (k_BHMD, v_BHME))
        q = F.pad(q_BHND, (0, 0, 0, back)).unflatten(2, (-1, chunk))
        states_BHSDE = torch.cat([state.unsqueeze(2), k.mT @ v], 2).cumsum(2)
        o = (q @ k.mT).tril() @ v + q @ states_BHSDE[:, :, :-1]
        return o.flatten(2, 3)[:, :, :queries], states_BHSDE[:, :, -1]


def _cpu(
    q_BHND: Tensor,
    k_BHMD: Tensor,
    v_BHME: Tensor,
    state_BHDE: Tensor | None = None,
    *,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    return decay.cpu(q_BHND, k_BHMD, v_BHME, _no_decay(q_BHND), state_BHDE)


def _refuses(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None = None, *, causal: bool = False) -> str | None:
    if not causal:
        return "over all keys there is nothing to gain on two matrix products"
    if q.shape[2] != k.shape[2]:
        return f"it takes as many queries as keys, not {q.shape[2]} and {k.shape[2]}"
    return decay.refuses(q, k, v, _no_decay(q))


def _no_decay(q_BHND: Tensor) -> Tensor:
    return q_BHND.new_zeros(q_BHND.shape[1], dtype=torch.float32)


feature_product = Op(
    "feature_product", Backend("cpu", _cpu, _refuses), Backend("torch", _torch), Backend("oracle", _oracle)
)


def with_ones(v_BHME: Tensor, keep_BM: Tensor | None = None) -> Tensor:
    """The values, in float32 at least, with a 1 behind each real one: its sums are the denominators."""
    v = F.pad(wide(v_BHME), (0, 1), value=1.0)
    return v if keep_BM is None else v.where(keep_BM[:, None, :, None], 0)


def _average_oracle(
    q_BHND: Tensor,
    k_BHMD: Tensor,
    v_BHME: Tensor,
    state_BHDE: Tensor | None = None,
    *,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """The average of all values, or of those not after the query, each weighted by the product q.k.

    Computed and accumulated in the dtype of the inputs: widen half precision first.

    Args:
        q_BHND, k_BHMD, v_BHME: positive feature maps of queries and keys, and values. Queries are the last N of M.
        state_BHDE: (B, H, D, E + 1), sum of k v^T over what came before the first key, and in its last column of k.
        causal: a query sees no later key.

    Returns:
        (B, H, N, E), 0 where all weights are 0, and the state behind the last key.
    """
    return _averaged(_oracle, q_BHND, k_BHMD, v_BHME, state_BHDE, causal)


def _average_torch(
    q_BHND: Tensor,
    k_BHMD: Tensor,
    v_BHME: Tensor,
    state_BHDE: Tensor | None = None,
    *,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    return _averaged(_torch, q_BHND, k_BHMD, v_BHME, state_BHDE, causal)


def _averaged(
    product: Callable[..., tuple[Tensor, Tensor]], q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    o, state = product(q, k, F.pad(v, (0, 1), value=1.0), state, causal=causal)
    total = o[..., -1:]
    return o[..., :-1] / total.where(total > 0, 1), state


def _average_cpu(
    q_BHND: Tensor,
    k_BHMD: Tensor,
    v_BHME: Tensor,
    state_BHDE: Tensor | None = None,
    *,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    return kernel.weighted_average(q_BHND, k_BHMD, v_BHME, state_BHDE)


def _average_refuses(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor | None = None, *, causal: bool = False
) -> str | None:
    if q.dtype != torch.float32:
        return f"it computes averages in float32, not {q.dtype}"
    return _refuses(q, k, v, state, causal=causal)


weighted_average = Op(
    "weighted_average",
    Backend("cpu", _average_cpu, _average_refuses),
    Backend("torch", _average_torch),
    Backend("oracle", _average_oracle),
)
