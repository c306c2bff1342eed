"""The matrix that an attention layer multiplies its values with, asked of the mechanism itself.

    o = W(q, k) v

However a mechanism computes its output, one that is linear in the values and treats their features alike has one such
matrix per head; its column m is the output for values that are 1 at key m and 0 elsewhere.

B batch, H query heads, G key/value heads, N queries, M keys, D features, E value size, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attlas.core.errors import Unsupported
from attlas.core.grid import Grid
from attlas.core.mechanism import Attend, Mixer
from attlas.ops.softmax import repeat_heads

TOLERANCE = 1e-8
"""Largest relative RMS difference between W v and the output, in float64."""


class Heard(NamedTuple):
    """What an attend was called with: q (B, H, N, D), k (B, G, M, D), v (B, G, M, E), and the keyword arguments."""

    attend: Attend
    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any]

    def output(self, v_BGME: Tensor) -> Tensor:
        """The attend's output (B, H, N, E) for other values."""
        return self.attend(self.q, self.k, v_BGME, **self.options)


@torch.no_grad()
def listen(layer: Mixer, x_BNC: Tensor, *, grid: Grid | Sequence[int] | None = None) -> Heard:
    """The queries, keys and values that a layer makes of its input, as its attend gets them.

    Raises:
        Unsupported: the mechanism is no attend.
    """
    attend: Any = getattr(layer, "attend", None)
    if not isinstance(attend, Attend):
        raise Unsupported(
            f"{layer.spec.name} mixes tokens by itself; an implied matrix is asked of mechanisms that are a function "
            "of queries, keys and values"
        )
    heard: list[Heard] = []

    def catch(attend: Attend, args: tuple[Tensor, ...], options: dict[str, Any]) -> None:
        q, k, v = args
        heard.append(Heard(attend, q, k, v, options))

    handle = attend.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        layer(x_BNC, grid=grid)
    finally:
        handle.remove()
    return heard[0]


@torch.no_grad()
def implied_matrix(heard: Heard) -> Tensor:
    """W (B, H, N, M): the outputs for one-hot values, held against the output for the values that there are.

    Use float64: the comparison is strict.

    Raises:
        Unsupported: the output is not linear in the values, or its features have different matrices.
    """
    v = heard.v
    keys, size = v.shape[2:]
    columns = []
    for start in range(0, keys, size):
        one_hot_ME = torch.eye(keys, dtype=v.dtype, device=v.device)[:, start : start + size]
        width = one_hot_ME.shape[1]
        values = v.new_zeros(keys, size)
        values[:, :width] = one_hot_ME
        columns.append(heard.output(values.expand_as(v))[..., :width])
    weights_BHNM = torch.cat(columns, -1)
    expected = weights_BHNM @ repeat_heads(v, weights_BHNM.shape[1])
    got = heard.output(v)
    error = (got - expected).square().mean().sqrt() / got.square().mean().sqrt().clamp(min=1e-30)
    if not error <= TOLERANCE:
        raise Unsupported(
            f"{heard.attend.spec.name} has no implied matrix: its output differs from that of its one-hot values by "
            f"{float(error):.1e} of its size, so it is not linear in the values or its features differ"
        )
    return weights_BHNM
