"""VMoBA: every query attends to its own block of a video and to the blocks that are most like it.

    g_nb = q_n · k̄_b                                                   k̄_b the mean key of block b, in float32 or better
    s_nb = (g_nb - min g) / (max g - min g)                            over a scope
    kept = the own blocks, and the largest others of the scope until Σ s over what is kept ≥ threshold Σ s
    o_n  = Σ_m softmax_m(q_n · k_m / √D) v_m,    m over the keys of the blocks kept for n

Blocks are boxes of the grid, and which boxes changes from layer to layer: runs of frames, then tiles of the picture
through all frames, then cubes, then runs of frames again (1-2-3-D partition). Where sizes do not divide, the last
blocks of an axis are smaller, and the mean is over what they hold. Keys are averaged as they come, positions turned
into them included.

The scope says which similarities compete: "head", all queries and blocks of a head (the paper's global selection,
in which a head with peaked similarities keeps fewer blocks than a flat one); "query", the blocks of one query of one
head; "block", all queries of all heads for one block; "all", everything in one sequence. A threshold keeps at least one
other block in each scope, and everything at 1 or where all similarities are equal. With `top` K instead of a threshold
a scope keeps K blocks per query and head, own ones first: K for each query, or K times as many as the scope has
queries. Selection carries no gradient, and of equal similarities the first is better.

q (B, H, N, D), k, v (B, G, N, D), T blocks. Time O(N T D H) for the gate and O(N n D H) for the pairs, n keys kept
on average; the similarities of a scope are sorted.

Padding enters no mean and no scope. A block of padding alone is not kept.

Source: Wu et al., "VMoBA: Mixture-of-Block Attention for Video Diffusion Models", 2025 (arXiv:2506.23858), official
code KwaiVGI/VMoBA. The published code attends to everything where no other block is kept at all; here queries then
see their own blocks. Where all others of a scope are least similar, the one that it keeps may be none of them; here it
is one. It takes similarities g that span up to 1e-6 for equal, so that small queries keep more; here equal is what
spans that share of the largest |g|, and how large queries and keys are decides nothing. Its scopes "head", "block" and
"all" run over all sequences that are packed together; here each sequence is by itself. Its tiles and cubes have to
divide the grid. By default blocks make 7, 40 and 60 on its example of 21 x 20 x 32 tokens; how the 60 cubes are shaped
is our reading.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.core.mechanism import Attend, Call, Cost, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.block_sparse import block_sparse_attention
from attlas.ops.pairs import weighted_values
from attlas.ops.precision import as_written, wide
from attlas.ops.softmax import blank_padding, repeat_heads
from attlas.ops.tile_order import TileOrder
from attlas.ops.topk import descending, largest

SMALL = 1e-6  # spreads up to this share of the largest similarity are rounding
KEPT_AXES = {"all": 1, "head": 2, "block": 2, "query": 3}
BLOCKS: dict[int, tuple[tuple[int | None, ...], ...]] = {
    1: ((16,),),
    2: ((4, 4),),
    3: ((3, None, None), (None, 4, 4), (7, 4, 8)),
}
PROJECTIONS = 4 * (16 * 16 + 16)

SPEC = Spec(
    name="vmoba",
    title="VMoBA: Mixture-of-Block Attention for Video Diffusion Models",
    year=2025,
    paper="arXiv:2506.23858",
    equation="o = softmax(q kᵀ / √D over the own block and those with the largest q k̄ᵀ) v",
    complexity="O(N T D + N n D) time, n keys kept",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    prefix=False,
    grouped=True,
    # At these sizes no similarity is near the edge of a selection, so that half precision selects the same blocks.
    examples=(
        Example(grid=(4, 2, 3), params={"blocks": ((2, 1, 3),), "top": 2}, parameters=PROJECTIONS),
        Example(grid=(3, 4), params={"blocks": ((2, 2),), "threshold": 0.3}, parameters=PROJECTIONS),
        Example(
            grid=(9,),
            heads=4,
            kv_heads=2,
            params={"blocks": ((3,),), "top": 2, "scope": "query"},
            parameters=2 * (16 * 16 + 16) + 2 * (16 * 8 + 8),
        ),
        Example(grid=(2, 3, 2), params={"blocks": ((1, None, 2),), "scope": "all"}, parameters=PROJECTIONS),
        Example(grid=(2, 2, 3), params={"blocks": ((None, 1, 2),), "scope": "block"}, parameters=PROJECTIONS),
    ),
)


@register(SPEC)
class VMoBA(Attend):
    """Mixture-of-block attention on a grid.

    Args:
        site: where it is installed; its layer picks the blocks.
        backend: of `block_sparse_attention`.
        blocks: shapes of a block, used in turn from layer to layer: places on each axis of the grid, None for the
            whole axis. By default those of `BLOCKS`, cut to the grid: of a video the published ones.
        scope: "head", "query", "block" or "all": which similarities compete.
        threshold: share of the similarity of a scope that is kept, 0 to 1.
        top: K, blocks per query and head, the own one included, instead of a threshold; not with scope "block".
    """

    def __init__(
        self,
        site: Site,
        backend: str = "auto",
        *,
        blocks: Sequence[Sequence[int | None]] | None = None,
        scope: str = "head",
        threshold: float = 0.25,
        top: int | None = None,
    ) -> None:
        super().__init__(site, backend)
        if scope not in KEPT_AXES:
            raise BadInput(f"scope is one of {', '.join(map(repr, KEPT_AXES))}, got {scope!r}")
        if not 0 <= threshold <= 1:
            raise BadInput(f"threshold is a share, 0 to 1, got {threshold}")
        if top is not None and not (isinstance(top, int) and top >= 1):
            raise BadInput(f"top counts blocks, the own one included: a whole number of at least 1, got {top!r}")
        if top is not None and scope == "block":
            raise BadInput("top counts the blocks of a query, which scope 'block' does not: give a threshold")
        if blocks is not None and not (isinstance(blocks, Sequence) and blocks and all(map(_is_shape, blocks))):
            raise BadInput(
                "blocks is a sequence of shapes, at least one, and a shape has a whole number of at least 1, or None "
                f"for all, per axis, as ((2, 2),): got {blocks!r}"
            )
        self.blocks = blocks
        self.scope, self.threshold, self.top = scope, threshold, top
        if site.grid is not None:
            self._order(site.grid)

    def _order(self, grid: Grid) -> TileOrder:
        """The blocks as tiles of the grid."""
        block = self._block(grid)
        if len(block) != grid.rank:
            raise BadInput(
                f"blocks of {block} are for {len(block)} axes, the grid has {grid.rank}: pass blocks with a number, or "
                "None for all, per axis"
            )
        tile = self._sides(grid)
        if any(side > length for side, length in zip(tile, grid.shape, strict=True)):
            raise BadInput(
                f"blocks of {block} reach over the {grid}: pass blocks of at most {grid.shape}, or with None for a "
                "whole axis"
            )
        return TileOrder(grid.shape, tile)

    def _block(self, grid: Grid) -> tuple[int | None, ...]:
        """The shape that is this layer's turn."""
        if self.blocks is not None:
            return tuple(self.blocks[self.site.layer % len(self.blocks)])
        shapes = BLOCKS[grid.rank]
        shape = shapes[self.site.layer % len(shapes)]
        return tuple(
            None if side is None else min(side, length) for side, length in zip(shape, grid.shape, strict=True)
        )

    def _sides(self, grid: Grid) -> tuple[int, ...]:
        """Places of a block on each axis."""
        sides = zip(self._block(grid), grid.shape, strict=True)
        return tuple(length if side is None else side for side, length in sides)

    def compute(self, q_BHND: Tensor, k_BGND: Tensor, v_BGND: Tensor, call: Call) -> Tensor:
        """Order keys by blocks, select, attend."""
        order, keep_BN = self._order(call.grid), call.mask.keys
        q, k, v = blank_padding(keep_BN, q_BHND, k_BGND, v_BGND)
        real_BTP, keep_BM = order.held(keep_BN, q)
        k_BGTPD = order.cut(k)
        own_NT = order.owner(q.device).unsqueeze(1) == torch.arange(order.tiles, device=q.device)
        valid_B1NT = real_BTP.any(-1)[:, None, None].expand(-1, -1, q.shape[2], -1)
        if keep_BN is not None:
            valid_B1NT = valid_B1NT & keep_BN[:, None, :, None]
        o: Tensor = block_sparse_attention(
            q,
            k_BGTPD.flatten(2, 3),
            order.cut(v).flatten(2, 3),
            self._select(self._gate(q, k_BGTPD, real_BTP), own_NT, valid_B1NT),
            rows=1,
            columns=order.places,
            keep=keep_BM,
            backend=self.backend,
        )
        return o

    @torch.no_grad()
    def _gate(self, q_BHND: Tensor, k_BGTPD: Tensor, real_BTP: Tensor) -> Tensor:
        """Queries times mean keys (B, H, N, T); keys off the grid and at padding are 0."""
        size_B1T1 = real_BTP.sum(-1)[:, None, :, None].clamp(min=1)
        with as_written(q_BHND):
            mean_BGTD = wide(k_BGTPD).sum(3) / size_B1T1
            return wide(q_BHND) @ repeat_heads(mean_BGTD, q_BHND.shape[1]).mT

    @torch.no_grad()
    def _select(self, gate_BHNT: Tensor, own: Tensor, valid: Tensor) -> Tensor:
        """Which blocks each query attends to, (B, H, N, T)."""
        own, valid = own.expand_as(gate_BHNT), valid.expand_as(gate_BHNT)
        if self.top is None and self.threshold == 1:
            return valid
        gate_XS, own_XS, valid_XS = (self._scopes(x) for x in (gate_BHNT, own & valid, valid))
        if self.top is None:
            chosen_XS = own_XS | self._largest_share(gate_XS, own_XS, valid_XS)
        else:
            queries_X1 = own_XS.sum(-1, keepdim=True)  # each has one own block
            best_XS = gate_XS.masked_fill(own_XS, torch.inf).masked_fill(~valid_XS, -torch.inf)
            chosen_XS = largest(best_XS, self.top * queries_X1) & valid_XS
        if self.scope != "block":
            return chosen_XS.view(gate_BHNT.shape)
        batch, heads, queries, tiles = gate_BHNT.shape
        return chosen_XS.view(batch, tiles, heads, queries).permute(0, 2, 3, 1)

    def _scopes(self, x_BHNT: Tensor) -> Tensor:
        """What competes, side by side on the last axis."""
        x = x_BHNT.permute(0, 3, 1, 2) if self.scope == "block" else x_BHNT
        return x.flatten(KEPT_AXES[self.scope])

    def _largest_share(self, gate_XS: Tensor, own_XS: Tensor, valid_XS: Tensor) -> Tensor:
        """The largest others, one at least and no more than the threshold asks for."""
        other_XS = valid_XS & ~own_XS
        low = gate_XS.masked_fill(~valid_XS, torch.inf).amin(-1, keepdim=True)
        high = gate_XS.masked_fill(~valid_XS, -torch.inf).amax(-1, keepdim=True)
        spread = high - low
        differ = spread > SMALL * torch.maximum(low.abs(), high.abs())
        similar_XS = ((gate_XS - low) / spread.where(differ, torch.inf)).where(valid_XS, 0)
        total = similar_XS.sum(-1, keepdim=True).clamp(min=1)  # the largest alone is 1, unless all are 0
        missing = (self.threshold - similar_XS.where(own_XS, 0).sum(-1, keepdim=True) / total).clamp(min=0)
        best, index_XS = descending(similar_XS.masked_fill(~other_XS, -1))
        share_XS = best.clamp(min=0).cumsum(-1) / total
        short_XS = F.pad(share_XS[..., :-1], (1, 0), value=-1) < missing
        return torch.zeros_like(valid_XS).scatter(-1, index_XS, short_XS) & other_XS

    def oracle(self, q_BHND: Tensor, k_BGND: Tensor, v_BGND: Tensor, call: Call) -> Tensor:
        """Pair by pair and scope by scope, then one matrix of weights."""
        self._order(call.grid)  # checks that the blocks fit
        batch, heads, tokens, size = q_BHND.shape
        keep_BN = call.mask.keys
        q, k, v = blank_padding(keep_BN, q_BHND, k_BGND, v_BGND)
        k_BHND = repeat_heads(k, heads)
        places_NR = call.grid.places(q.device)
        block_N = (places_NR // places_NR.new_tensor(self._sides(call.grid))).unique(dim=0, return_inverse=True)[1]
        seen_BHNN = q.new_zeros(batch, heads, tokens, tokens, dtype=torch.bool)
        for b in range(batch):
            real = [n for n in range(tokens) if keep_BN is None or keep_BN[b, n]]
            members = {t: [n for n in real if block_N[n] == t] for t in block_N[real].tolist()}
            means_HTD = {t: wide(k_BHND[b].detach())[:, ns].mean(1) for t, ns in members.items()}
            gate = {
                (h, n, t): float(wide(q[b, h, n].detach()) @ means_HTD[t][h])
                for h in range(heads)
                for n in real
                for t in sorted(members)
            }
            scopes: dict[object, list[tuple[int, int, int]]] = {}
            for h, n, t in gate:
                scopes.setdefault({"head": h, "query": (h, n), "block": t, "all": 0}[self.scope], []).append((h, n, t))
            for triples in scopes.values():
                own = [(h, n, t) for h, n, t in triples if block_N[n] == t]
                others = sorted(set(triples) - set(own), key=lambda triple: (-gate[triple], triple))
                for h, n, t in own + others[: self._how_many(gate, triples, own, others)]:
                    seen_BHNN[b, h, n, members[t]] = True
        scores = torch.einsum("bhnd,bhmd->bhnm", q, k_BHND) * size**-0.5
        seeing = seen_BHNN.any(-1, keepdim=True)
        weights = scores.masked_fill(~seen_BHNN, -torch.inf).masked_fill(~seeing, 0).softmax(-1) * seeing
        return weighted_values(weights, v, call.mask)

    def _how_many(
        self,
        gate: dict[tuple[int, int, int], float],
        triples: list[tuple[int, int, int]],
        own: list[tuple[int, int, int]],
        others: list[tuple[int, int, int]],
    ) -> int:
        """How many of the others, best first, a scope keeps."""
        if self.top is not None:
            return (self.top - 1) * len(own)
        low, high = (extreme(gate[triple] for triple in triples) for extreme in (min, max))
        spread = high - low if high - low > SMALL * max(abs(low), abs(high)) else float("inf")
        total = sum((gate[triple] - low) / spread for triple in triples) or 1.0
        share = sum((gate[triple] - low) / spread for triple in own) / total
        missing, kept, share = max(0.0, self.threshold - share), 0, 0.0
        while kept < len(others) and (kept == 0 or share < missing or self.threshold == 1):
            share += (gate[others[kept]] - low) / spread / total
            kept += 1
        return kept

    def count(self, sizes: Sizes) -> Cost:
        """The gate, and two products per pair; the torch backend multiplies all pairs.

        With a threshold what tokens say decides how many pairs there are: the useful ones are those of equal
        similarities. Where blocks differ in size it decides, too, and they are those of blocks of average size.
        """
        order, positions = self._order(sizes.grid), sizes.grid.positions
        rows = sizes.batch * self.site.heads * positions
        everything = self.threshold == 1 if self.top is None else self.top >= order.tiles
        if everything:
            share = 1.0
        elif self.top is None:
            share = max(self.threshold, 1 / order.tiles)
        else:
            share = self.top / order.tiles
        pairs = round(rows * positions * share)
        exact = everything or (self.top is not None and order.even)
        gate, product = 2 * rows * order.tiles * self.site.head_dim, 4 * self.site.head_dim
        executed = rows * order.tiles * order.places
        return Cost(gate + product * pairs, gate + product * executed, pairs if exact else 0)


def _is_shape(value: object) -> bool:
    """Whether it says how many places a block has on each axis."""
    return isinstance(value, Sequence) and all(side is None or (isinstance(side, int) and side >= 1) for side in value)
