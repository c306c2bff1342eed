"""One softmax over single keys and over regions of keys, each of which stands for its members.

    p(j | i) = p(j | i)                 for j that query i sees directly,
               p(Ω | i) p(j | Ω)        for j in a region Ω,    p(j | Ω) = softmax_{j in Ω}(scale Q_Ω . k_j)

with one softmax over all direct logits scale q_i . k_j and all region logits scale q_i . K_Ω. Q_Ω and K_Ω pool the
queries and keys of the region, so that its value E_Ω = Σ_j p(j | Ω) v_j does not depend on i: a region is a key with
a value like any other.

B batch, H heads, N tokens, T rows of U tokens, M slots that a query sees, D head size, E value size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isqrt
from typing import NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.core.mechanism import Site
from attlas.core.state import KVCache, Rows
from attlas.ops.precision import as_written, wide

POOLS = ("max", "mean", "sum")


class Slots(NamedTuple):
    """What queries (B, H, T, U, D) see beside one another: keys and values, and which query sees which.

    Slots lie in the query's own row, (B, H, T or 1, M, D); or where `across` in its column, (B, H, M, U, D).
    `seen` broadcasts to (B, H, T, U, M).
    """

    keys: Tensor
    values: Tensor
    seen: Tensor
    across: bool = False


class Regions(NamedTuple):
    """K (..., D), E (..., E) and which regions have a real member (...)."""

    keys: Tensor
    values: Tensor
    live: Tensor


class Open(Protocol):
    """A state with a segment that is not full yet."""

    @property
    def q(self) -> Rows:
        """Its queries, (B, H, n, D)."""


State = TypeVar("State", bound=Open)


def segment_length(site: Site, segment: int | None) -> int:
    """`segment`, or the root of the length that the layer is trained on, rounded up."""
    if segment is not None:
        if not isinstance(segment, int) or segment < 1:
            raise BadInput(f"segment counts the tokens of a segment, a whole number of at least 1, got {segment}")
        return segment
    length = site.length if site.grid is None else site.grid.tokens
    if length is None:
        raise BadInput("segments are as long as the root of the sequence: pass length=, or segment= itself")
    return isqrt(max(length, 1) - 1) + 1


def row_length(site: Site, segment: int | None) -> int:
    """Likewise where tokens lie in rows: a grid of two axes has its own."""
    if site.grid is None or site.grid.rank == 1:
        return segment_length(site, segment)
    if site.grid.rank > 2:
        raise BadInput(f"rows are those of a grid of two axes, or cut from one axis, got the {site.grid}")
    if segment is not None:
        raise BadInput(f"rows are those of the {site.grid}: leave segment={segment} out")
    return site.grid.shape[1]


def row_width(grid: Grid, segment: int) -> int:
    """Places of a row on `grid`."""
    return grid.shape[1] if grid.rank == 2 else min(segment, grid.tokens)


def by_segments(
    tokens: int, segment: int, state: State, fill: Callable[[slice, State], tuple[Tensor, State]]
) -> tuple[Tensor, State]:
    """Outputs of new tokens, (B, H, tokens, E), by `fill` of those that the open segment has room for."""
    parts, start = [], 0
    while start < tokens:
        stop = min(start + segment - state.q.rows.shape[2], tokens)
        part, state = fill(slice(start, stop), state)
        parts.append(part)
        start = stop
    return torch.cat(parts, 2), state


def no_queries_missing(queries: int, keys: int) -> None:
    """A region's distribution comes from its own queries."""
    if queries != keys:
        raise BadInput(
            f"a region is summarised by the queries of its tokens, so every token is a query: got {queries} queries "
            f"for {keys} keys; to go on from earlier tokens, stream"
        )


def real_tokens(keep_BN: Tensor | None, like_BHND: Tensor) -> Tensor:
    """`keep`, or all True."""
    if keep_BN is not None:
        return keep_BN
    return like_BHND.new_ones(like_BHND.shape[0], like_BHND.shape[2], dtype=torch.bool)


def cached(cache: KVCache) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values of a cache, and which of them are real, (B, 1, M)."""
    keys = cache.k.rows
    return keys, cache.v.rows, real_tokens(cache.keys, keys).unsqueeze(1)


def cut(x: Tensor, size: int, dim: int = 2) -> Tensor:
    """Axis `dim` in runs of `size`, (..., runs, size, ...); the last is filled up with 0 or False."""
    missing = -x.shape[dim] % size
    if missing:
        x = F.pad(x, (0, 0) * (x.ndim - 1 - dim) + (0, missing))
    return x.unflatten(dim, (-1, size))


def pool(x_SD: Tensor, real_S: Tensor, kind: str) -> Tensor:
    """The real ones of the last but one axis, (..., S, D) -> (..., D); 0 where there is none."""
    x_SD = wide(x_SD)
    real_S1 = real_S.unsqueeze(-1)
    if kind == "max":
        highest = x_SD.masked_fill(~real_S1, torch.finfo(x_SD.dtype).min).amax(-2)
        return highest.masked_fill(~real_S1.any(-2), 0)
    total = x_SD.masked_fill(~real_S1, 0).sum(-2)
    return total if kind == "sum" else total / real_S1.sum(-2).clamp(min=1)


def masked_softmax(scores: Tensor, seen: Tensor) -> Tensor:
    """Weights over the last axis; the row of a query that sees nothing is 0."""
    return scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(~seen, 0)


def summarise(q_SD: Tensor, k_SD: Tensor, v_SE: Tensor, real_S: Tensor, scale: float) -> Regions:
    """The regions whose members lie along the last but one axis, pooled by maximum."""
    return valued(pool(q_SD, real_S, "max"), pool(k_SD, real_S, "max"), k_SD, v_SE, real_S, scale)


def valued(query_D: Tensor, key_D: Tensor, k_SD: Tensor, v_SE: Tensor, real_S: Tensor, scale: float) -> Regions:
    """The regions of these members with the summaries Q and K."""
    with as_written(k_SD):
        scores = (wide(query_D) * scale).unsqueeze(-2) @ wide(k_SD).mT
        value_E = (masked_softmax(scores, real_S.unsqueeze(-2)) @ wide(v_SE)).squeeze(-2)
    return Regions(key_D, value_E, real_S.any(-1))


def regions_before(q_SD: Tensor, k_SD: Tensor, v_SE: Tensor, real_S: Tensor, scale: float) -> Regions:
    """For each place of the last but one axis the region of all places before it, (..., S, D); pooled by maximum.

    Of members that are largest together the gradient goes to the nearest, where `pool` shares it among them: both are
    subgradients.
    """
    places = torch.arange(k_SD.shape[-2], device=k_SD.device)
    so_far = (places <= places.unsqueeze(1)) & real_S.unsqueeze(-2)
    live_S = real_S.cumsum(-1) > 0
    query_SD, key_SD = (_running_max(x, real_S).masked_fill(~live_S.unsqueeze(-1), 0) for x in (q_SD, k_SD))
    with as_written(k_SD):
        value_SE = masked_softmax((query_SD * scale) @ wide(k_SD).mT, so_far) @ wide(v_SE)
    return Regions(_shift(key_SD), _shift(value_SE), _shift(live_S.unsqueeze(-1)).squeeze(-1))


def regions_behind(q_SD: Tensor, k_SD: Tensor, v_SE: Tensor, real_S: Tensor, scale: float) -> Regions:
    """Likewise the region of all places behind it."""
    q, k, v = (x.flip(-2) for x in (q_SD, k_SD, v_SE))
    found = regions_before(q, k, v, real_S.flip(-1), scale)
    return Regions(found.keys.flip(-2), found.values.flip(-2), found.live.flip(-1))


def _running_max(x_SD: Tensor, real_S: Tensor) -> Tensor:
    x_SD = wide(x_SD)
    return x_SD.masked_fill(~real_S.unsqueeze(-1), torch.finfo(x_SD.dtype).min).cummax(-2).values


def _shift(x_SD: Tensor) -> Tensor:
    """Each place gets what stood before it, the first 0."""
    return F.pad(x_SD, (0, 0, 1, 0))[..., :-1, :]


def joint_attention(q_BHTUD: Tensor, slots: Sequence[Slots], scale: float) -> Tensor:
    """One softmax over all slots; (B, H, T, U, E), 0 for a query that sees none."""
    with as_written(q_BHTUD):
        slots = [each._replace(keys=wide(each.keys), values=wide(each.values)) for each in slots]
        return _joint(wide(q_BHTUD) * scale, slots).to(q_BHTUD.dtype)


def _joint(q: Tensor, slots: Sequence[Slots]) -> Tensor:
    scores = []
    for each in slots:
        if each.across:
            scores.append((q.transpose(2, 3) @ each.keys.transpose(2, 3).mT).transpose(2, 3))
        else:
            scores.append(q @ each.keys.mT)
    seen = [each.seen.expand(score.shape) for each, score in zip(slots, scores, strict=True)]
    weights = masked_softmax(torch.cat(scores, -1), torch.cat(seen, -1))
    o_BHTUE: Tensor | int = 0
    for each, weight in zip(slots, weights.split([score.shape[-1] for score in scores], -1), strict=True):
        if each.across:
            o_BHTUE = o_BHTUE + (weight.transpose(2, 3) @ each.values.transpose(2, 3)).transpose(2, 3)
        else:
            o_BHTUE = o_BHTUE + weight @ each.values
    assert isinstance(o_BHTUE, Tensor)
    return o_BHTUE


def combined_weights(
    q_BHND: Tensor,
    k_BHND: Tensor,
    keep_BN: Tensor | None,
    sees: Callable[[int], tuple[Sequence[int], Sequence[Sequence[int]]]],
    scale: float,
    kind: str = "max",
    summary: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda q, k: (q, k),
) -> Tensor:
    """The matrix p (B, H, N, N), query by query and region by region: what the factorisation means.

    Args:
        q_BHND, k_BHND: queries and keys.
        keep_BN: which tokens are real.
        sees: the positions that a query sees directly, and the positions of each of its regions.
        scale: of all scores.
        kind: how a region is pooled.
        summary: what of the region's queries and keys is pooled.
    """
    batch, heads, tokens, _ = q_BHND.shape
    real = real_tokens(keep_BN, q_BHND).tolist()
    rows = []
    for b in range(batch):
        for n in range(tokens):
            direct, regions = sees(n)
            logits, spreads = [], []
            for m in (m for m in direct if real[b][m]):
                logits.append((q_BHND[b, :, n] * k_BHND[b, :, m]).sum(-1) * scale)
                spreads.append(F.one_hot(torch.tensor(m, device=q_BHND.device), tokens).to(q_BHND).expand(heads, -1))
            for members in filter(None, ([m for m in region if real[b][m]] for region in regions)):
                q_HSD, k_HSD = q_BHND[b, :, members], k_BHND[b, :, members]
                query_HD, key_HD = (_pool_all(x, kind) for x in summary(q_HSD, k_HSD))
                logits.append((q_BHND[b, :, n] * key_HD).sum(-1) * scale)
                inner_HS = ((query_HD.unsqueeze(1) * k_HSD).sum(-1) * scale).softmax(-1)
                spread_HN = q_BHND.new_zeros(heads, tokens)
                spreads.append(spread_HN.index_copy(1, torch.tensor(members, device=q_BHND.device), inner_HS))
            if not logits:
                rows.append(q_BHND.new_zeros(heads, tokens))
                continue
            outer_HM = torch.stack(logits, 1).softmax(1)
            rows.append(torch.einsum("hm,hmn->hn", outer_HM, torch.stack(spreads, 1)))
    return torch.stack(rows).unflatten(0, (batch, tokens)).transpose(1, 2)


def _pool_all(x_HSD: Tensor, kind: str) -> Tensor:
    return {"max": x_HSD.amax(1), "mean": x_HSD.mean(1), "sum": x_HSD.sum(1)}[kind]
