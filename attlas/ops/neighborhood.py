"""Neighborhood attention: softmax over a window of the grid around each position.

    o_n = sum_m softmax_m(scale q_n . k_m + bias_(m - n)) v_m     over the m in the window of n

A window is a product of intervals, one per axis of the grid; `Axis` is the rule of one of them.

B batch, H query heads, G key/value heads, R = H / G, N queries, M keys, P prefix tokens, D head size,
E value size, W and V keys of a window, S positions of one axis, X = P + W.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from attlas.core.errors import BadInput
from attlas.core.mask import Mask
from attlas.ops.dispatch import Backend, Op
from attlas.ops.softmax import softmax_attention


class Windows(NamedTuple):
    """The window of each query, all (N, W).

    `key` is where each key stands and `seen` whether the query sees it; `entry` is how far it
    stands behind the first place that any window reaches, `window - 1` places before the query.
    """

    key: Tensor
    seen: Tensor
    entry: Tensor


@dataclass(frozen=True)
class Axis:
    """Which positions of one axis see which.

    A dilation cuts the axis into groups, the positions of equal remainder; everything below happens
    inside one group. A stride cuts the group into runs of queries that share the window of their leader.
    Not causal: the leader is the run's middle (of an even run the right one), the window reaches
    `window // 2` places to the left of it and the rest to the right, and where it would cross a border it
    is shifted inwards, so that it always holds `window` places. Causal: the leader is the run's last
    query, the window is the `window` places that end there, and a query sees those up to itself.

    Attributes:
        length: positions of the axis.
        window: places of the window.
        dilation: distance between neighbouring places of the window.
        stride: queries that share a window; 1 is sliding, `window` is blocked.
        causal: whether a position sees no later one.

    Raises:
        BadInput: a window that does not fit into the axis or a stride that does not fit into the window.
    """

    length: int
    window: int
    dilation: int = 1
    stride: int = 1
    causal: bool = False

    def __post_init__(self) -> None:
        if min(self.window, self.dilation, self.stride) < 1:
            raise BadInput(
                f"window, dilation and stride are at least 1, got {self.window}, {self.dilation} and {self.stride}"
            )
        if self.stride > self.window:
            raise BadInput(
                f"stride {self.stride} is more than window {self.window}: some keys would be in no window; "
                f"take a stride of at most {self.window}"
            )
        if self.window * self.dilation > self.length:
            raise BadInput(
                f"window {self.window} with dilation {self.dilation} spans {self.window * self.dilation} "
                f"positions, the axis has {self.length}; take a window of at most "
                f"{self.length // self.dilation} or a dilation of at most {self.length // self.window}"
            )

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        """The rule, on broadcasting positions of queries and of keys."""
        place, leader, size = self._group(query)
        other = key // self.dilation
        together = query % self.dilation == key % self.dilation
        if self.causal:
            return together & (other <= place) & (leader - other < self.window)
        left = self.window // 2
        right = self.window - 1 - left
        centre = leader.clamp(min=left).minimum(size - 1 - right)
        return together & (other >= centre - left) & (other <= centre + right)

    def windows(self, queries: int, device: torch.device | str = "cpu") -> Windows:
        """The windows of the last `queries` positions."""
        query = torch.arange(self.length - queries, self.length, device=device)
        place, leader, size = self._group(query)
        if self.causal:
            first = leader - (self.window - 1)
        else:
            first = (leader - self.window // 2).clamp(min=0).minimum(size - self.window)
        key = first.unsqueeze(1) + torch.arange(self.window, device=device)
        ahead = key - place.unsqueeze(1)
        seen = (key >= 0) & (ahead <= 0) if self.causal else torch.ones_like(key, dtype=torch.bool)
        position = key.clamp(min=0) * self.dilation + (query % self.dilation).unsqueeze(1)
        return Windows(position, seen, ahead + self.window - 1)

    def pairs(self) -> int:
        """How many (query, key) pairs see one another."""
        if not self.causal:
            return self.length * self.window
        place, leader, _ = self._group(torch.arange(self.length))
        return int((place - (leader - self.window + 1).clamp(min=0) + 1).sum())

    def _group(self, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Inside the query's dilation group: its place, its leader's place, how many places there are."""
        place = query // self.dilation
        size = (self.length - 1 - query % self.dilation) // self.dilation + 1
        lead = self.stride - 1 if self.causal else self.stride // 2
        return place, (place // self.stride * self.stride + lead).minimum(size - 1), size


def _check(q: Tensor, k: Tensor, axes: Sequence[Axis], prefix: int) -> None:
    queries, keys, tokens = q.shape[2], k.shape[2], prefix + prod([axis.length for axis in axes])
    if keys != tokens:
        raise BadInput(f"the grid and {prefix} prefix tokens make {tokens} keys, got {keys}")
    if queries != keys and (queries > keys or len(axes) > 1 or prefix):
        raise BadInput(
            f"{queries} queries for {keys} keys: fewer queries are the last positions of a plain sequence, "
            "one axis without prefix tokens"
        )


def _oracle(
    q_BHND: Tensor,
    k_BGMD: Tensor,
    v_BGME: Tensor,
    axes: Sequence[Axis],
    *,
    prefix: int = 0,
    keep: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Neighborhood attention on a grid; a query that sees nothing gives 0.

    Args:
        q_BHND, k_BGMD, v_BGME: queries, keys, values in raster order, prefix tokens in front; H is a
            multiple of G. On one axis without prefix tokens, queries may be the last N of M positions.
        axes: the rule of each axis of the grid.
        prefix: tokens without a position. They see every token and every token sees them, in one softmax;
            where all axes are causal they see the prefix up to themselves.
        keep: (B, M) bool, False where a key is padding.
        bias: (H, 2 window - 1, ...) added to the scores by the offset key - query in places of the
            dilation group, on every axis; entry `window - 1` is offset 0. Prefix tokens have none.
        scale: of the scores, D ** -0.5 by default.

    Returns:
        (B, H, N, E).
    """
    _check(q_BHND, k_BGMD, axes, prefix)
    keys = k_BGMD.shape[2]
    token = torch.arange(keys, device=q_BHND.device)
    place = torch.unravel_index((token - prefix).clamp(min=0), tuple(axis.length for axis in axes))
    near = torch.ones(keys, keys, dtype=torch.bool, device=q_BHND.device)
    entry: list[Tensor] = []
    for axis, x in zip(axes, place, strict=True):
        query, key = x.unsqueeze(1), x.unsqueeze(0)
        near &= axis.sees(query, key)
        entry.append((key // axis.dilation - query // axis.dilation + axis.window - 1).clamp(0, 2 * axis.window - 2))
    is_prefix = token < prefix
    either = is_prefix.unsqueeze(1) | is_prefix
    in_reach = token <= token.unsqueeze(1) if _all_causal(axes) else torch.ones_like(near)
    seen = torch.where(either, in_reach, near)[keys - q_BHND.shape[2] :]
    mask = Mask.pairs_(seen).with_(keys=keep)
    if bias is not None:
        spread = torch.stack([table[tuple(entry)] for table in bias]).masked_fill(either, 0)
        mask = mask & Mask.biased(spread[:, keys - q_BHND.shape[2] :])
    return softmax_attention(q_BHND, k_BGMD, v_BGME, mask, scale=scale, backend="oracle")


def _torch(
    q_BHND: Tensor,
    k_BGMD: Tensor,
    v_BGME: Tensor,
    axes: Sequence[Axis],
    *,
    prefix: int = 0,
    keep: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    _check(q_BHND, k_BGMD, axes, prefix)
    groups, queries, causal = k_BGMD.shape[1], q_BHND.shape[2] - prefix, _all_causal(axes)
    scale = q_BHND.shape[3] ** -0.5 if scale is None else scale
    windows = _windows(axes, queries, q_BHND.device)
    shape = windows.key.shape
    k_BGNWD, v_BGNWE = (
        x[:, :, prefix:].index_select(2, windows.key.flatten()).unflatten(2, shape) for x in (k_BGMD, v_BGME)
    )
    q_BGNRD = q_BHND[:, :, prefix:].unflatten(1, (groups, -1)).transpose(2, 3) * scale
    scores_BGNRX = q_BGNRD @ k_BGNWD.mT
    if bias is not None:
        bias_HNW = bias.flatten(1).index_select(1, windows.entry.flatten()).unflatten(1, shape)
        scores_BGNRX = scores_BGNRX + bias_HNW.unflatten(0, (groups, -1)).transpose(1, 2)
    if prefix:
        to_prefix = q_BGNRD.flatten(2, 3) @ k_BGMD[:, :, :prefix].mT
        scores_BGNRX = torch.cat([to_prefix.unflatten(2, (queries, -1)), scores_BGNRX], -1)
    if keep is None and not any(axis.causal for axis in axes):
        weights_BGNRX = scores_BGNRX.softmax(-1)
    else:
        seen = _seen(windows, prefix, keep)
        lowest = torch.finfo(scores_BGNRX.dtype).min
        # Zeroed after the softmax, so that a query that sees nothing gives 0.
        weights_BGNRX = scores_BGNRX.masked_fill(~seen, lowest).softmax(-1) * seen
    o_BGNRE = weights_BGNRX[..., prefix:] @ v_BGNWE
    if not prefix:
        return o_BGNRE.transpose(2, 3).flatten(1, 2)
    from_prefix = weights_BGNRX[..., :prefix].flatten(2, 3) @ v_BGME[:, :, :prefix]
    o_BHNE = (o_BGNRE + from_prefix.unflatten(2, (queries, -1))).transpose(2, 3).flatten(1, 2)
    reach = prefix if causal else k_BGMD.shape[2]
    mask = Mask(causal=causal, keys=None if keep is None else keep[:, :reach])
    q, k, v = q_BHND[:, :, :prefix], k_BGMD[:, :, :reach], v_BGME[:, :, :reach]
    return torch.cat([softmax_attention(q, k, v, mask, scale=scale, backend="torch"), o_BHNE], 2)


def _all_causal(axes: Sequence[Axis]) -> bool:
    return all(axis.causal for axis in axes)


def _windows(axes: Sequence[Axis], queries: int, device: torch.device) -> Windows:
    """The windows of the last `queries` positions of the grid, the first axis slowest."""
    whole = axes[0].windows(queries if len(axes) == 1 else axes[0].length, device)
    for axis in axes[1:]:
        own = axis.windows(axis.length, device)
        whole = Windows(
            _product(whole.key * axis.length, own.key, torch.add),
            _product(whole.seen, own.seen, torch.logical_and),
            _product(whole.entry * (2 * axis.window - 1), own.entry, torch.add),
        )
    return whole


def _product(first_NW: Tensor, second_SV: Tensor, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """A table over the product of two sets of positions and of two windows: (N S, W V)."""
    joined = combine(first_NW[:, None, :, None], second_SV[None, :, None, :])
    return joined.flatten(2).flatten(0, 1)


def _seen(windows: Windows, prefix: int, keep: Tensor | None) -> Tensor:
    """What each query sees of the prefix and its window, (B or 1, 1, N, 1, P + W)."""
    seen, queries = windows.seen.unsqueeze(0), len(windows.seen)
    real = seen.new_ones(1, prefix)
    if keep is not None:
        seen, real = seen & keep[:, prefix:][:, windows.key], keep[:, :prefix]
    return torch.cat([real.unsqueeze(1).expand(-1, queries, -1), seen], -1)[:, None, :, None]


neighborhood_attention = Op("neighborhood_attention", Backend("torch", _torch), Backend("oracle", _oracle))
