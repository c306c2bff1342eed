"""Softmax attention inside groups of neighbouring positions, causal, with the first tokens seen by all.

    query i sees key j   if j <= i and (j < s or floor((j + shift) / g) = floor((i + shift) / g))

B batch, H heads, N queries, M keys at hand, S sinks, D head size, E value size, T groups that hold queries, g places of
a group.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attlas.core.errors import BadInput
from attlas.core.mask import Mask
from attlas.ops.softmax import blank_padding, softmax_attention


class Keys(NamedTuple):
    """Keys (B, H, M, D), values (B, H, M, E), and which are real (B, M)."""

    k: Tensor
    v: Tensor
    keep: Tensor

    def part(self, start: int, stop: int) -> Keys:
        """Those from `start` to before `stop`."""
        return Keys(self.k[:, :, start:stop], self.v[:, :, start:stop], self.keep[:, start:stop])

    def then(self, other: Keys) -> Keys:
        """These and others behind them."""
        return Keys(*(torch.cat(pair, -2 if pair[0].ndim == 4 else -1) for pair in zip(self, other, strict=True)))


def group_size(length: int, ratio: float) -> int:
    """g = ratio · length, rounded down, at least 1."""
    if not 0 < ratio <= 1:
        raise BadInput(f"group_ratio is the share of the sequence that one group holds, in (0, 1], got {ratio}")
    return max(1, int(length * ratio))


def every_token_asks(q_BHND: Tensor, k_BGMD: Tensor) -> None:
    """Refuse keys without queries of their own."""
    if q_BHND.shape[2] != k_BGMD.shape[2]:
        raise BadInput(f"every token is a query, got {q_BHND.shape[2]} queries for {k_BGMD.shape[2]} keys")


def causal_groups(
    q_BHND: Tensor, keys: Keys, sinks: Keys, *, group: int, shift: int = 0, start: int = 0, backend: str = "auto"
) -> Tensor:
    """Attend, in time that is linear in N (g + S); a query that sees nothing gives 0.

    Args:
        q_BHND: the last N of the positions of `keys`.
        keys: M positions from `start` on, at least those of the groups that queries stand in.
        sinks: the first S positions.
        group: g.
        shift: how many places of the first group lie before position 0, less than g.
        start: position of the first key.
        backend: of `softmax_attention`.

    Returns:
        (B, H, N, E).
    """
    batch, queries, count = q_BHND.shape[0], q_BHND.shape[2], sinks.k.shape[2]
    stop = start + keys.k.shape[2]
    first, groups, begin = _layout(stop - queries, stop, group, shift)
    keys = keys.part(max(begin - start, 0), stop - start)
    held = max(begin, start)
    before, behind, rows = 0, 0, queries
    if groups > 1:  # one group alone, as in decoding, needs no places that are not there
        before, behind, rows = first - begin, begin + groups * group - stop, group
        q_BHND = F.pad(q_BHND, (0, 0, before, behind))
        lead, held = held - begin, begin
        k, v = (F.pad(x, (0, 0, lead, behind)) for x in (keys.k, keys.v))
        keys = Keys(k, v, F.pad(keys.keep, (lead, behind), value=False))
    columns = keys.k.shape[2] // groups
    key_TM = torch.arange(held, held + groups * columns, device=q_BHND.device).unflatten(0, (groups, columns))
    query_TN1 = torch.arange(first - before, stop + behind, device=q_BHND.device).view(groups, rows, 1)
    near_TNM = (key_TM.unsqueeze(1) <= query_TN1) & (key_TM >= count).unsqueeze(1)
    near_BTNM = near_TNM & keys.keep.unflatten(1, (groups, columns)).unsqueeze(2)
    far_BTNS = (torch.arange(count, device=q_BHND.device) <= query_TN1) & sinks.keep[:, None, None]
    seen_BTNM = torch.cat([far_BTNS, near_BTNM], -1)
    folded = (x.unflatten(2, (groups, -1)).transpose(1, 2) for x in (q_BHND, *blank_padding(keys.keep, *keys[:2])))
    q_BTHND, k_BTHMD, v_BTHME = folded
    sink_k, sink_v = (
        x.unsqueeze(1).expand(-1, groups, -1, -1, -1) for x in blank_padding(sinks.keep, sinks.k, sinks.v)
    )
    o_BTHNE = softmax_attention(
        q_BTHND.flatten(0, 1),
        torch.cat([sink_k, k_BTHMD], 3).flatten(0, 1),
        torch.cat([sink_v, v_BTHME], 3).flatten(0, 1),
        Mask.pairs_(seen_BTNM.flatten(0, 1).unsqueeze(1)),
        backend=backend,
    ).unflatten(0, (batch, groups))
    return o_BTHNE.transpose(1, 2).flatten(2, 3)[:, :, before : before + queries]


def causal_groups_cost(queries: int, keys: int, group: int, shift: int, sinks: int) -> tuple[int, int]:
    """Visible pairs of one head, and the pairs that are multiplied; queries are the last of the positions."""
    first, groups, begin = _layout(keys - queries, keys, group, shift)
    query = torch.arange(first, keys)
    border = ((query + shift) // group * group - shift).clamp(min=0)
    seen = int((query - border + 1 + border.clamp(max=sinks)).sum())
    rows, columns = (queries, keys - max(begin, 0)) if groups == 1 else (group, group)
    return seen, groups * rows * (columns + min(sinks, keys))


def _layout(first: int, stop: int, group: int, shift: int) -> tuple[int, int, int]:
    """Of queries from `first` to before `stop`: the first, how many groups hold them, where these begin."""
    opening = (first + shift) // group
    return first, (stop - 1 + shift) // group - opening + 1, opening * group - shift
