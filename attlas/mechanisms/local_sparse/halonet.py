"""Halo attention (HaloNet): blocks of queries, each with a window that reaches a halo beyond the block.

    o_n = Σ_m softmax_m(q_n · k_m / √D + Σ_a q_n · r_a[m - n]) v_m     over the m in the block of n or its halo

q (B, H, N, D), k (B, G, N, D), v (B, G, N, E). The grid is cut into blocks of b places on every axis a; all queries
of a block share one window of b + 2 h places, h beyond the block on either side. So keys are fetched once for a
block and not for every query, and neighbours in one block see the same keys at different offsets. r_a (2 (b + 2 h)
- 1, D), one table per axis, shared over heads and blocks, meets the query before its scaling. Entry b + 3 h - 1
is offset 0 of key - query, and the first 2 h belong to no pair: so timm counts, keys from where the window begins and
queries from where the block does.

The window ends at the border of the map and the last blocks may be smaller. Published code pads the map with zeros
there, whose keys take part with the score of their place: so does `border="zeros"`. Zeros change nothing but the sum of
the weights, by Π_a Σ exp over all places of the window less the same over those on the map, so they cost one key more.
A strided layer, which scales a map down, is this layer with every second row and column of its output kept; timm's
counts the queries that it keeps one by one, so its tables mean other offsets. With h = 0 it is window attention, with
b the whole axis global attention.

Blocks run through the kernel of window attention: the score of a place on one axis is one of b + 2 h numbers per
query, so queries carry those numbers and keys their place modulo b + 2 h as a one-hot vector, both as features.

In the shell around, the projections have no bias; its output projection is the 1 x 1 convolution that follows in
HaloNet's bottleneck. Prefix tokens see every token and every token sees them, without place; the paper has none.

Time O(N (b + 2 h)^axes D H), no state.

Source: Vaswani et al., "Scaling Local Self-Attention for Parameter Efficient Visual Backbones", 2021
(arXiv:2103.12731). There is no official code; the details are those of timm's halo attention.

In shape suffixes: B batch, H query heads, G key/value heads, N queries, M keys, P positions, D head size, E value
size, W places of a window, T entries of a table.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.core.axis import Block
from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.core.mask import Mask
from attlas.core.mechanism import Attend, Call, Cost, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.neighborhood import neighborhood_attention
from attlas.ops.precision import wide
from attlas.ops.softmax import blank_padding, softmax_attention
from attlas.ops.windows import block_cost, per_axis

SPEC = Spec(
    name="halonet",
    title="Scaling Local Self-Attention for Parameter Efficient Visual Backbones",
    year=2021,
    paper="arXiv:2103.12731",
    equation="o = softmax over the block and its halo of (q kᵀ / √D + q r) v",
    complexity="O(N (b + 2h) D) time",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    grouped=True,
    shell={"bias": False, "out_bias": False},
    reconstruction=True,
    examples=(
        Example(grid=(6, 4), params={"block": 2, "halo": 1}, parameters=4 * 16 * 16 + 2 * 7 * 8),
        Example(
            grid=(5, 4),
            prefix=1,
            heads=4,
            kv_heads=2,
            params={"block": (3, 2), "halo": (2, 0)},
            parameters=2 * 16 * 16 + 2 * 16 * 8 + (13 + 3) * 4,
        ),
        Example(grid=(11,), params={"block": 3, "halo": 2}, parameters=4 * 16 * 16 + 13 * 8),
        Example(
            grid=(5, 4),
            prefix=1,
            params={"block": (3, 2), "halo": (2, 1), "border": "zeros"},
            parameters=4 * 16 * 16 + (13 + 7) * 8,
        ),
    ),
)

UNSEEN = -1e4
"""A score whose weight is 0, within the range of float16."""


@register(SPEC)
class HaloNet(Attend):
    """Attention of blocks to windows that reach beyond them.

    Args:
        site: where it is installed; its grid says how many axes there are, two where it has none.
        backend: of `neighborhood_attention`.
        block: b, places of a block on every axis, or one number per axis; a shorter axis is one block.
        halo: h, places that are seen to either side of the block, or one number per axis.
        border: "end" where there are no keys beyond it, "zeros" where there are keys and values of zero.
        scale: of q · k; D ** -0.5 by default.
    """

    def __init__(
        self,
        site: Site,
        backend: str = "auto",
        *,
        block: int | Sequence[int] = 8,
        halo: int | Sequence[int] = 3,
        border: str = "end",
        scale: float | None = None,
    ) -> None:
        super().__init__(site, backend)
        rank = 2 if site.grid is None else site.grid.rank
        self.block, self.halo = per_axis("block", block, rank), per_axis("halo", halo, rank)
        if min(self.block) < 1 or min(self.halo) < 0:
            raise BadInput(
                f"a block holds a place at least and a halo is not negative, got block {block} and halo {halo}"
            )
        if border not in ("end", "zeros"):
            raise BadInput(f"border is 'end' or 'zeros', got {border!r}")
        self.zeros = border == "zeros"
        self.scale = site.head_dim**-0.5 if scale is None else scale
        self.relative = nn.ParameterList(
            torch.empty(2 * (block + 2 * halo) - 1, site.head_dim)
            for block, halo in zip(self.block, self.halo, strict=True)
        )
        for table in self.relative:
            nn.init.normal_(table, std=site.head_dim**-0.5)

    def _axes(self, grid: Grid) -> tuple[Block, ...]:
        """The rule of each axis."""
        if grid.rank != len(self.block):
            raise BadInput(
                f"the relative embeddings were built for {len(self.block)} axes, the call has a {grid}; build the "
                f"layer with a grid of {grid.rank} axes"
            )
        settings = zip(grid.shape, self.block, self.halo, strict=True)
        return tuple(Block(length, min(length, block), halo=halo) for length, block, halo in settings)

    def _widths(self) -> list[int]:
        """The places of a window on each axis."""
        return [block + 2 * halo for block, halo in zip(self.block, self.halo, strict=True)]

    def compute(self, q_BHND: Tensor, k_BGMD: Tensor, v_BGME: Tensor, call: Call) -> Tensor:
        """Widen queries and keys by what their places say, run the op."""
        grid = call.grid
        axes = self._axes(grid)
        q_BHPD = grid.split(q_BHND)[1]
        queries, keys = [q_BHND * self.scale], [k_BGMD]
        beyond_BHP, on_map_BHP = q_BHPD.new_tensor(UNSEEN), q_BHPD.new_zeros(())
        settings = zip(
            grid.places(q_BHND.device).unbind(1), self.block, self._widths(), self.relative, axes, strict=True
        )
        for place_P, block, width, table_TD, axis in settings:
            halo = (width - block) // 2
            begin_P1 = (place_P // block * block - halo).unsqueeze(1)
            key_PW = begin_P1 + (torch.arange(width, device=place_P.device) - begin_P1) % width  # key_PW % width = w
            entry_PW = key_PW - place_P.unsqueeze(1) + halo + width - 1
            all_BHPT = q_BHPD @ table_TD.mT.to(q_BHPD.dtype)
            own_BHPW = all_BHPT.gather(-1, entry_PW.expand(*q_BHPD.shape[:2], -1, -1))
            queries.append(F.pad(own_BHPW.to(q_BHND.dtype), (0, 0, grid.prefix, 0)))
            hot_PW = F.one_hot(place_P % width, width).to(k_BGMD)
            keys.append(F.pad(hot_PW, (0, 0, grid.prefix, 0)).expand(*k_BGMD.shape[:2], -1, -1))
            if self.zeros:
                own_BHPW, there_PW = wide(own_BHPW), (key_PW >= 0) & (key_PW < axis.length)
                off_BHP = own_BHPW.masked_fill(there_PW, UNSEEN).logsumexp(-1)
                beyond_BHP = torch.logaddexp(beyond_BHP + own_BHPW.logsumexp(-1), on_map_BHP + off_BHP)
                on_map_BHP = on_map_BHP + own_BHPW.masked_fill(~there_PW, UNSEEN).logsumexp(-1)
        q, k, v, keep, prefix = torch.cat(queries, -1), torch.cat(keys, -1), v_BGME, call.mask.keys, grid.prefix
        if self.zeros:
            # All of them are one key in front, of value 0, whose score a further feature carries.
            score_BHP = beyond_BHP.clamp(min=UNSEEN).to(q.dtype)
            q = torch.cat([q, F.pad(score_BHP, (prefix, 0), value=UNSEEN).unsqueeze(-1)], -1)
            k = F.pad(k, (0, 1))
            mark_1F = F.pad(k.new_ones(1, 1), (k.shape[3] - 1, 0))
            k = torch.cat([mark_1F.expand(*k.shape[:2], -1, -1), k], 2)
            q, v, prefix = F.pad(q, (0, 0, 1, 0)), F.pad(v, (0, 0, 1, 0)), prefix + 1
            keep = None if keep is None else F.pad(keep, (1, 0), value=True)
        o = neighborhood_attention(q, k, v, axes, prefix=prefix, keep=keep, scale=1.0, backend=self.backend)
        return o[:, :, prefix - grid.prefix :]

    def oracle(self, q_BHND: Tensor, k_BGMD: Tensor, v_BGME: Tensor, call: Call) -> Tensor:
        """Dense attention to the map and what lies around it, under the mask of block and halo, pair by pair."""
        grid = call.grid
        self._axes(grid)
        k_BGMD, v_BGME = blank_padding(call.mask.keys, k_BGMD, v_BGME)
        q_BHPD = grid.split(q_BHND)[1]
        frames = [
            (halo, block + halo) if self.zeros else (0, 0) for block, halo in zip(self.block, self.halo, strict=True)
        ]
        around = Grid(tuple(length + sum(frame) for length, frame in zip(grid.shape, frames, strict=True)))
        sides = [side for frame in reversed(frames) for side in frame]
        k_BGMD, v_BGME = (
            torch.cat(
                [x[:, :, : grid.prefix], F.pad(grid.unflatten(x[:, :, grid.prefix :]), (0, 0, *sides)).flatten(2, -2)],
                2,
            )
            for x in (k_BGMD, v_BGME)
        )
        keep = call.mask.keys
        if keep is not None:
            map_BS = keep[:, grid.prefix :].unflatten(1, grid.shape)
            keep = torch.cat([keep[:, : grid.prefix], F.pad(map_BS, sides, value=True).flatten(1)], 1)
        near_PM = torch.ones(grid.positions, around.positions, dtype=torch.bool, device=q_BHND.device)
        bias_BHPM = q_BHPD.new_zeros(*q_BHPD.shape[:3], around.positions)
        queries, keys = grid.places(q_BHND.device).unbind(1), around.places(q_BHND.device).unbind(1)
        settings = zip(queries, keys, frames, self.block, self.halo, self.relative, strict=True)
        for place, key, (before, _), block, halo, table in settings:
            first, offset = (place // block * block).unsqueeze(1), key - before - place.unsqueeze(1)
            near_PM = near_PM & (key - before >= first - halo) & (key - before < first + block + halo)
            entry_PM = (offset + block + 3 * halo - 1).clamp(0, len(table) - 1)
            bias_BHPM = bias_BHPM + torch.einsum("bhnd,nmd->bhnm", q_BHPD, table[entry_PM])
        corner = (grid.prefix, 0, grid.prefix, 0)
        seen = F.pad(near_PM, corner, value=True)
        seen[: grid.prefix, grid.prefix :] = F.pad(
            torch.ones(grid.shape, dtype=torch.bool, device=seen.device), sides
        ).flatten()
        mask = Mask.pairs_(seen) & Mask.biased(F.pad(bias_BHPM, corner))
        return softmax_attention(q_BHND, k_BGMD, v_BGME, mask.with_(keys=keep), scale=self.scale, backend="oracle")

    def count(self, sizes: Sizes) -> Cost:
        """Two products per visible pair, and one per query and place of an axis that takes part.

        The torch backend multiplies all entries of the tables, and the one-hot places of the keys; zeros beyond the
        border are one key and one feature more.
        """
        axes, widths, size = self._axes(sizes.grid), self._widths(), self.site.head_dim
        positions, per_product = sizes.grid.positions, 2 * sizes.batch * self.site.heads * size
        needed = block_cost(self.site, sizes, axes)
        run = replace(sizes, grid=Grid(sizes.grid.shape, sizes.grid.prefix + self.zeros))
        executed = block_cost(self.site, run, axes, score=size + sum(widths) + self.zeros).executed
        scores = [
            positions * width if self.zeros else axis.pairs() * positions // axis.length
            for axis, width in zip(axes, widths, strict=True)
        ]
        made = positions * sum(2 * width - 1 for width in widths)
        return Cost(needed.flops + per_product * sum(scores), executed + per_product * made, needed.pairs)
