"""Long-short distance attention: neighbours in one layer, tokens far apart in the next.

    o_n = Σ_{m in the group of n} softmax_m(q_n · k_m / √D + DPB(p_n - p_m)) v_m

The grid is cut into groups of G x G tokens, which attend to one another. Short distance: a group is a window. Long
distance: the grid is cut into squares of G I places on a side, and a group is every I-th token of a square on each
axis; p are places in the group, so that neighbours of a long-distance group differ by 1, too. With G I the length of
the axes (the paper's I = 8, 4, 2, 1 at 224 pixels, and the default here) a short layer and a long one connect every
token to every other.

DPB, the dynamic position bias, is a small MLP from an offset (rows, columns) to one number per head: Linear, then three
times LayerNorm, ReLU, Linear, with C / 16 channels between. It has no table, so one layer serves groups of any size.

q, k, v (B, H, N, D) on a grid of two axes. Where sizes do not divide, groups at the lower and right border have fewer
tokens: what is off the grid is no key. A group that is no smaller than the shorter axis is a window of that axis's
length, in either kind of layer, as in the official code. Prefix tokens, which the paper has not, see all tokens and all
see them, in the same softmax and without bias.

Time O(N G² C).

Source: Wang et al., "CrossFormer: A Versatile Vision Transformer Hinging on Cross-scale Attention", 2021
(arXiv:2108.00154), official code cheerss/CrossFormer. There the interval of long distance is one number for both axes;
the default here fits each axis.
"""

import math
from collections import Counter

import torch
from torch import Tensor, nn

from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.core.mechanism import Attend, Call, Cost, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.neighborhood import Block, neighborhood_attention
from attlas.ops.pairs import weighted_values
from attlas.ops.softmax import blank_padding

PROJECTIONS = 4 * (128 * 128 + 128)
DPB = (2 * 8 + 8) + 3 * 2 * 8 + 2 * (8 * 8 + 8)
"""Of 8 channels, without the last Linear."""

SPEC = Spec(
    name="crossformer",
    title="CrossFormer: A Versatile Vision Transformer Hinging on Cross-scale Attention",
    year=2021,
    paper="arXiv:2108.00154",
    equation="o = softmax over a window, or over every I-th token, of (q kᵀ / √D + MLP(offset)) v",
    complexity="O(N G² D) time",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    grids=(2,),
    grouped=True,
    examples=(
        Example(grid=(5, 4), prefix=1, dim=128, params={"group": 2}, parameters=PROJECTIONS + DPB + 9 * 2),
        Example(
            grid=(4, 6),
            dim=128,
            heads=4,
            kv_heads=2,
            params={"group": 2, "distance": "long"},
            parameters=2 * (128 * 128 + 128) + 2 * (128 * 64 + 64) + DPB + 9 * 4,
        ),
        Example(
            grid=(5, 7),
            prefix=1,
            dim=128,
            params={"group": 2, "interval": 2, "distance": "long"},
            parameters=PROJECTIONS + DPB + 9 * 2,
        ),
        Example(grid=(3, 4), dim=128, params={"distance": "long"}, parameters=PROJECTIONS + DPB + 9 * 2),
    ),
)


@register(SPEC)
class CrossFormer(Attend):
    """Long-short distance attention.

    Args:
        site: where it is installed; short distance in the layers 0, 2, ... and long in 1, 3, ...
        backend: of `neighborhood_attention`.
        group: G, tokens of a group on each axis.
        interval: I, from token to token of a long-distance group on each axis; by default such that one group spans
            the axis.
        distance: "short" or "long", whatever the layer.
        scale: of the scores; D ** -0.5 by default.
    """

    def __init__(
        self,
        site: Site,
        backend: str = "auto",
        *,
        group: int = 7,
        interval: int | None = None,
        distance: str | None = None,
        scale: float | None = None,
    ) -> None:
        super().__init__(site, backend)
        if group < 1 or (interval is not None and interval < 1):
            raise BadInput(f"group and interval are at least 1, got {group} and {interval}")
        if distance not in (None, "short", "long"):
            raise BadInput(f"distance is 'short', 'long' or None for the layer's turn, got {distance!r}")
        hidden = site.dim // 16
        if hidden < 1:
            raise BadInput(f"the position bias has dim / 16 channels: take a dim of at least 16, got {site.dim}")
        self.group, self.interval, self.scale = group, interval, scale
        self.distance = distance or ("short", "long")[site.layer % 2]
        layers: list[nn.Module] = [nn.Linear(2, hidden)]
        for out in (hidden, hidden, site.heads):
            layers += [nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, out)]
        self.position_bias = nn.Sequential(*layers)

    def groups(self, grid: Grid) -> tuple[int, tuple[int, ...]]:
        """Tokens of a group on each axis, and the interval between them on every axis."""
        shortest = min(grid.shape)
        if shortest <= self.group:
            return shortest, (1,) * grid.rank
        if self.distance == "short":
            return self.group, (1,) * grid.rank
        fit = tuple(-(-length // self.group) for length in grid.shape)
        return self.group, fit if self.interval is None else (self.interval,) * grid.rank

    def compute(self, q_BHND: Tensor, k_BGMD: Tensor, v_BGME: Tensor, call: Call) -> Tensor:
        """Windows as they are; long-distance groups become windows by another order of the tokens."""
        grid, keep_BM = call.grid, call.mask.keys
        group, intervals = self.groups(grid)
        windows = tuple(_window(*each, group) for each in zip(grid.shape, intervals, strict=True))
        bias_HOO = self._table(windows).to(q_BHND.dtype)
        if max(intervals) == 1:
            return self._windows(q_BHND, k_BGMD, v_BGME, grid, windows, bias_HOO, keep_BM)
        padded, token_T, on_grid_T, place_N = _order(grid, group, intervals, q_BHND.device)
        if padded.tokens > grid.tokens or keep_BM is not None:
            real_BM = on_grid_T.expand(len(q_BHND), -1)
            keep_BM = real_BM if keep_BM is None else real_BM & keep_BM[:, token_T]
        q, k, v = (x.index_select(2, token_T) for x in (q_BHND, k_BGMD, v_BGME))
        return self._windows(q, k, v, padded, windows, bias_HOO, keep_BM).index_select(2, place_N)

    def _windows(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: Grid,
        windows: tuple[int, ...],
        bias: Tensor,
        keep: Tensor | None,
    ) -> Tensor:
        k, v = blank_padding(keep, k, v)
        axes = [Block(length, window) for length, window in zip(grid.shape, windows, strict=True)]
        return neighborhood_attention(
            q, k, v, axes, prefix=grid.prefix, keep=keep, bias=bias, scale=self.scale, backend=self.backend
        )

    def _table(self, windows: tuple[int, ...]) -> Tensor:
        """The bias (H, 2 w - 1, 2 w' - 1) by the offset key - query, whose negative DPB takes."""
        device = next(self.position_bias.parameters()).device
        offsets = [torch.arange(window - 1, -window, -1, device=device) for window in windows]
        return self._bias(torch.cartesian_prod(*offsets)).unflatten(1, [len(each) for each in offsets])

    def _bias(self, offset_X2: Tensor) -> Tensor:
        """DPB of offsets query - key, (H, X)."""
        return self.position_bias(offset_X2.to(next(self.position_bias.parameters()))).T

    def oracle(self, q_BHND: Tensor, k_BGMD: Tensor, v_BGME: Tensor, call: Call) -> Tensor:
        """All pairs, with the MLP at the offset of each, and the rule who is in whose group."""
        grid, heads = call.grid, q_BHND.shape[1]
        group, intervals = self.groups(grid)
        place_N2 = grid.places(q_BHND.device)
        interval_2 = place_N2.new_tensor(intervals)
        square_N2, start_N2 = place_N2 // (group * interval_2), place_N2 % interval_2
        inside_N2 = place_N2 // interval_2 % group
        together_NN = (square_N2[:, None] == square_N2).all(-1) & (start_N2[:, None] == start_N2).all(-1)
        offset_NN2 = inside_N2[:, None] - inside_N2
        bias_HNN = self._bias(offset_NN2.flatten(0, 1)).unflatten(1, offset_NN2.shape[:2])
        front = (grid.prefix, 0, grid.prefix, 0)
        seen_BNN = nn.functional.pad(together_NN, front, value=True)[None]
        if call.mask.keys is not None:
            seen_BNN = seen_BNN & call.mask.keys[:, None]
        k_BHMD = k_BGMD.repeat_interleave(heads // k_BGMD.shape[1], 1)
        scores = torch.einsum("bhnd,bhmd->bhnm", q_BHND, k_BHMD)
        scores = scores * (q_BHND.shape[3] ** -0.5 if self.scale is None else self.scale)
        scores = scores + nn.functional.pad(bias_HNN, front)
        unseen = ~seen_BNN[:, None]
        scores = scores.masked_fill(unseen, -1e30)
        weights = (scores - scores.detach().amax(-1, keepdim=True)).exp().masked_fill(unseen, 0)
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
        return weighted_values(weights, v_BGME, call.mask)

    def count(self, sizes: Sizes) -> Cost:
        """The MLP once for each offset, and two products per pair; the torch backend fills all groups up."""
        grid, heads, size = sizes.grid, self.site.heads, self.site.head_dim
        group, intervals = self.groups(grid)
        pairs = places = inside = offsets = 1
        for length, interval in zip(grid.shape, intervals, strict=True):
            window = _window(length, interval, group)
            side = group * interval
            members = [(n // side, n % interval) for n in range(length)]
            pairs *= sum(count**2 for count in Counter(members).values())
            places *= length if max(intervals) == 1 else _ordered(length, interval, group)
            inside, offsets = inside * window, offsets * (2 * window - 1)
        pairs += grid.prefix * (grid.prefix + 2 * grid.positions)
        executed = places * (grid.prefix + inside) + grid.prefix * (grid.prefix + places)
        hidden = self.site.dim // 16
        mlp = 2 * offsets * (2 * hidden + 2 * hidden**2 + hidden * heads)
        products = 4 * sizes.batch * heads * size
        return Cost(products * pairs + mlp, products * executed + mlp, sizes.batch * heads * pairs)


def _window(length: int, interval: int, group: int) -> int:
    """The most tokens that a group has on an axis."""
    return min(group, -(-length // interval))


def _ordered(length: int, interval: int, group: int) -> int:
    """Places of an axis when each of its groups is a window: in a square that is cut off some groups are empty."""
    squares, rest = divmod(length, group * interval)
    return (squares * interval + min(rest, interval)) * _window(length, interval, group)


def _order(
    grid: Grid, group: int, intervals: tuple[int, ...], device: torch.device
) -> tuple[Grid, Tensor, Tensor, Tensor]:
    """The order in which each long-distance group is a window, on a grid that holds whole ones.

    Returns:
        That grid; the token at each of its places, prefix included, and whether there is one; the place of each token.
    """
    lengths, sources, targets = [], [], []
    for length, interval in zip(grid.shape, intervals, strict=True):
        side, window = group * interval, _window(length, interval, group)
        lengths.append(_ordered(length, interval, group))
        place = torch.arange(lengths[-1], device=device)
        token = torch.arange(length, device=device)
        number = token // side * interval + token % interval  # of the token's group
        sources.append(place // window // interval * side + place % window * interval + place // window % interval)
        targets.append(number * window + token // interval % group)
    padded, prefix = Grid(tuple(lengths), grid.prefix), torch.arange(grid.prefix, device=device)
    row, column = (x.flatten() for x in torch.meshgrid(*sources, indexing="ij"))
    on_grid = (row < grid.shape[0]) & (column < grid.shape[1])
    token_T = (row * grid.shape[1] + column).clamp(max=math.prod(grid.shape) - 1)
    place_N = (targets[0][:, None] * lengths[1] + targets[1]).flatten()
    return (
        padded,
        torch.cat([prefix, token_T + grid.prefix]),
        torch.cat([torch.ones_like(prefix, dtype=torch.bool), on_grid]),
        torch.cat([prefix, place_N + grid.prefix]),
    )
