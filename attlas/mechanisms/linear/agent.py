"""Agent attention: a few agents, pooled from the queries, gather from the keys and hand out to the queries.

    V_A = softmax(A kᵀ / √D + B₁) v            agents gather
    o   = softmax(q Aᵀ / √D + B₂) V_A + DWC(v)     queries read from the agents

A are the queries averaged over a coarse grid of n cells, so that two softmax attentions with n rows or
columns replace one of N by N: a linear attention whose feature maps are softmaxes. B₁ (H, n, N) and B₂
(H, N, n) are learned position biases: a table of `table` places on each axis, resized linearly to the grid,
plus a vector for each axis, plus one number for each prefix token. The vectors have the length of the grid
that the layer is trained on and are resized linearly for another one. DWC is a depthwise convolution of
`kernel` taps on each axis that gives back the rank that n agents cannot have.

q (B, H, N, D), k and v (B, H, M, D). Prefix tokens attend and are attended to, but enter neither the agents
nor the convolution. In cross-attention keys lie on no grid that we know, so B₁ and DWC are left out. Padding
has no weight as a key, no share in an agent's mean, is 0 to the convolution and gets nothing from it; an
agent with only padding in its cell is seen by nobody. So a sequence of padding alone gives 0. But cells and
biases lie on the grid as it is called, padding included: how far a sequence is padded moves the borders of its
cells, and with them its result. Pad to one grid in training and after it.

With `reduction` r, as in PVT, keys and values lie on a grid r times coarser that the shell around makes (see
`attlas.blocks.spatial_reduction`): B₁ is over that grid, and values are stretched linearly to the queries' before
the convolution. Agent-Swin serves a window as large as the map: that is this layer as it is.

Time O(N n D H), memory O(N n H), linear in N.

Source: Han et al., "Agent Attention: On the Integration of Softmax and Linear Attention", 2023
(arXiv:2312.08874), official code LeapLabTHU/Agent-Attention. One and three axes, and grids that are not
square, are ours.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.core.errors import BadInput, Unsupported, share
from attlas.core.grid import Grid
from attlas.core.mask import Mask
from attlas.core.mechanism import Attend, Call, Cost, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.grid_conv import convolution_flops, convolve_values, value_convolution
from attlas.ops.softmax import attention_weights, softmax_attention

SELF = frozenset({Pattern.NONCAUSAL_SELF})
CROSS = frozenset({Pattern.NONCAUSAL_CROSS})
PROJECTIONS = 4 * (16 * 16 + 16)

SPEC = Spec(
    name="agent",
    title="Agent Attention: On the Integration of Softmax and Linear Attention",
    year=2023,
    paper="arXiv:2312.08874",
    equation="o = softmax(q Aᵀ / √D + B₂) softmax(A kᵀ / √D + B₁) v + DWC(v)",
    complexity="O(N n D) time",
    patterns=SELF | CROSS,
    examples=(
        Example(
            grid=(4, 5),
            params={"agents": 4},
            parameters=PROJECTIONS + 2 * 2 * 4 * (7 * 7 + 4 + 5) + 16 * (9 + 1),
            patterns=SELF,
        ),
        Example(
            grid=(3, 4),
            prefix=2,
            params={"agents": 9, "table": 2},
            parameters=PROJECTIONS + 2 * 2 * 9 * (2 * 2 + 3 + 4 + 2) + 16 * (9 + 1),
            patterns=SELF,
        ),
        Example(
            grid=(9,),
            params={"agents": 3, "kernel": 5},
            parameters=PROJECTIONS + 2 * 2 * 3 * (7 + 9) + 16 * (5 + 1),
            patterns=SELF,
        ),
        Example(
            grid=(2, 3, 2),
            params={"agents": 8, "table": 3},
            parameters=PROJECTIONS + 2 * 2 * 8 * (27 + 2 + 3 + 2) + 16 * (27 + 1),
            patterns=SELF,
        ),
        Example(grid=(4, 3), prefix=1, params={"agents": 4, "table": 0, "kernel": 0}, parameters=PROJECTIONS),
    ),
)


class _Places(nn.Module):
    """A bias (H, n, P + positions) between n agents and the tokens of a grid, learned at one grid."""

    def __init__(self, heads: int, agents: int, table: int, grid: Grid) -> None:
        super().__init__()
        self.prefix = nn.Parameter(torch.empty(heads, agents, grid.prefix)) if grid.prefix else None
        self.table = nn.Parameter(torch.empty(heads, agents, *[table] * grid.rank))
        self.axes = nn.ParameterList(torch.empty(heads, agents, length) for length in grid.shape)
        for parameter in self.parameters():
            nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, grid: Grid) -> Tensor:
        bias = _resize(self.table, grid.shape)
        for axis, (vector, length) in enumerate(zip(self.axes, grid.shape, strict=True)):
            shape = [1] * grid.rank
            shape[axis] = length
            bias = bias + _resize(vector, (length,)).unflatten(-1, shape)
        bias = bias.flatten(2)
        return bias if self.prefix is None else torch.cat([self.prefix, bias], -1)


def _resize(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Linear interpolation of (H, n, ...) to another shape."""
    return F.interpolate(x, shape, mode=("linear", "bilinear", "trilinear")[len(shape) - 1])


def _map(x_BHND: Tensor, grid: Grid) -> Tensor:
    """The positions as a picture, (B, H D, S...)."""
    return grid.split(x_BHND)[1].transpose(2, 3).flatten(1, 2).unflatten(-1, grid.shape)


def _tokens(x_BCS: Tensor, heads: int) -> Tensor:
    """A picture as tokens again, (B, H, positions, D)."""
    return x_BCS.flatten(2).unflatten(1, (heads, -1)).transpose(2, 3)


@register(SPEC)
class Agent(Attend):
    """Agent attention.

    Args:
        site: where it is installed; biases and convolution need its grid.
        backend: of the two softmax attentions.
        agents: how many; each axis of the grid has equally many cells, so on two axes a square number.
        table: places of the bias tables on each axis; 0 for no biases at all.
        kernel: taps of the depthwise convolution on each axis, odd; 0 for no convolution.
        reduction: how many times fewer keys than queries there are on each axis.
        scale: of both scores; D ** -0.5 by default.
        weight_dropout: share of the weights dropped in training, in both attentions.
    """

    def __init__(
        self,
        site: Site,
        backend: str = "auto",
        *,
        agents: int = 49,
        table: int = 7,
        kernel: int = 3,
        reduction: int = 1,
        scale: float | None = None,
        weight_dropout: float = 0.0,
    ) -> None:
        super().__init__(site, backend)
        if agents < 1 or table < 0:
            raise BadInput(f"agents is at least 1 and table at least 0, got {agents} and {table}")
        if kernel < 0 or (kernel and kernel % 2 == 0):
            raise BadInput(f"the convolution is centred, so its kernel is odd (or 0 for none), got {kernel}")
        if reduction < 1:
            raise BadInput(f"reduction is at least 1, as many keys as queries, got {reduction}")
        self.agents = agents
        self.reduction = reduction
        self.kernel = kernel
        self.scale = scale
        self.weight_dropout = share("weight_dropout", weight_dropout)
        grid = site.grid
        if grid is not None:
            self._cells(grid)
        elif table or kernel:
            raise BadInput(
                "agent fits its position biases and its convolution to the grid that it is trained on: pass "
                "grid=(height, width) when building it, or table=0 and kernel=0 to go without"
            )
        self.key_places = _Places(site.heads, agents, table, self._key_grid(grid)) if grid and table else None
        self.query_places = _Places(site.heads, agents, table, grid) if grid and table else None
        self.convolution = value_convolution(site, kernel if grid else 0, self.spec.name)

    def _cells(self, grid: Grid) -> Grid:
        """The coarse grid whose cells the agents are."""
        below = int(self.agents ** (1 / grid.rank))
        for side in (below, below + 1):  # the root may come out a little low
            if side**grid.rank == self.agents:
                return Grid((side,) * grid.rank)
        raise BadInput(
            f"agents are the cells of a coarse grid, equally many on each axis of a {grid}; {self.agents} "
            f"is no such number: take {max(below, 1) ** grid.rank} or {(below + 1) ** grid.rank}"
        )

    def _key_grid(self, grid: Grid) -> Grid:
        """How the keys of self-attention lie."""
        if self.reduction == 1:
            return grid
        if grid.prefix:
            raise Unsupported(f"tokens without a position are not reduced with the others: no prefix, got a {grid}")
        if min(grid.shape) < self.reduction:
            raise BadInput(f"a {grid} cannot be reduced by {self.reduction} on each axis")
        return Grid(tuple(length // self.reduction for length in grid.shape))

    def compute(self, q_BHND: Tensor, k_BHMD: Tensor, v_BHMD: Tensor, call: Call) -> Tensor:
        """Pool, gather, read, convolve."""
        self._check_call(q_BHND, k_BHMD, call)
        agents_BHAD, live_BA = self._pool(q_BHND, call)
        gather_bias, read_bias = self._biases(call)
        gathered_BHAD = self._attend(agents_BHAD, k_BHMD, v_BHMD, Mask(keys=call.mask.keys, bias=gather_bias))
        o_BHND = self._attend(q_BHND, agents_BHAD, gathered_BHAD, Mask(keys=live_BA, bias=read_bias))
        if self.convolution is None or call.cross:
            return o_BHND
        return o_BHND + self._local(v_BHMD, call, "auto")

    def _check_call(self, q: Tensor, k: Tensor, call: Call) -> None:
        trained, grid = self.site.grid, call.grid
        if not call.cross and k.shape[2] != self._key_grid(grid).tokens:
            raise BadInput(
                f"agent lays queries and keys on one grid{self._reduced()}, got {q.shape[2]} queries and "
                f"{k.shape[2]} keys; keys of another sequence need cross=True"
            )
        if self.reduction > 1 and (call.mask.keys is not None or call.mask.queries is not None):
            raise Unsupported("agent with a reduction takes no padding: a reduced key is made of several tokens")
        learned = self.key_places is not None or self.convolution is not None
        if learned and trained and (grid.rank, grid.prefix) != (trained.rank, trained.prefix):
            raise BadInput(
                f"this layer was built for a {trained} and called on a {grid}: axes and prefix tokens "
                "must be as many, only lengths may differ"
            )

    def _reduced(self) -> str:
        return "" if self.reduction == 1 else f", the keys' {self.reduction} times coarser on each axis"

    def _pool(self, q_BHND: Tensor, call: Call) -> tuple[Tensor, Tensor | None]:
        """The mean of the real queries of each cell, and which agents (B, n) have any."""
        cells = self._cells(call.grid).shape
        pools = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}
        pool: Callable[..., Tensor] = pools[call.grid.rank]
        q_BCS, keep_BN = _map(q_BHND, call.grid), call.mask.queries
        if keep_BN is None:
            return _tokens(pool(q_BCS, cells), q_BHND.shape[1]), None
        real_B1S = _map(keep_BN[:, None, :, None], call.grid)
        share_B1A = pool(real_B1S.to(q_BCS), cells)
        live_B1A = share_B1A > 0
        mean_BCA = pool(q_BCS.where(real_B1S, 0), cells) / share_B1A.where(live_B1A, 1)
        return _tokens(mean_BCA, q_BHND.shape[1]), live_B1A.flatten(1)

    def _biases(self, call: Call) -> tuple[Tensor | None, Tensor | None]:
        """B₁ (1, H, n, N), which cross-attention has not, and B₂ (1, H, N, n)."""
        if self.key_places is None or self.query_places is None:
            return None, None
        read = self.query_places(call.grid).transpose(1, 2).unsqueeze(0)
        return None if call.cross else self.key_places(self._key_grid(call.grid)).unsqueeze(0), read

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        dropout = self.weight_dropout if self.training else 0.0
        return softmax_attention(q, k, v, mask, scale=self.scale, dropout=dropout, backend=self.backend)

    def _local(self, v_BHMD: Tensor, call: Call, backend: str) -> Tensor:
        """DWC of the values, stretched to the queries' grid."""
        assert self.convolution is not None
        if self.reduction > 1:
            v_BCS = _map(v_BHMD, self._key_grid(call.grid))
            v_BHMD = _tokens(_resize(v_BCS, call.grid.shape), v_BHMD.shape[1])
        return convolve_values(self.convolution, v_BHMD, call.grid, call.mask.keys, backend)

    def oracle(self, q_BHND: Tensor, k_BHMD: Tensor, v_BHMD: Tensor, call: Call) -> Tensor:
        """Cells by their borders, the two attentions as one N x M matrix, the convolution tap by tap."""
        self._check_call(q_BHND, k_BHMD, call)
        grid = call.grid
        all_BN = q_BHND.new_ones(q_BHND.shape[0], grid.tokens, dtype=torch.bool)
        queries_BN = all_BN if call.mask.queries is None else call.mask.queries
        places_SR = grid.places(q_BHND.device)
        length_R, cells = places_SR.new_tensor(grid.shape), self._cells(grid)
        cells_AR, side = cells.places(q_BHND.device), cells.shape[0]
        # A place takes part in each cell that its unit interval overlaps, on every axis.
        begins = (places_SR + 1) * side > (cells_AR * length_R)[:, None]
        ends = places_SR * side < ((cells_AR + 1) * length_R)[:, None]
        member_BAN = F.pad((begins & ends).all(-1), (grid.prefix, 0)) & queries_BN[:, None]
        count_BA1 = member_BAN.sum(-1, keepdim=True)
        agents_BHAD = (member_BAN.to(q_BHND) / count_BA1.clamp(min=1))[:, None] @ q_BHND

        gather_bias, read_bias = self._biases(call)
        gather = Mask(keys=call.mask.keys, bias=gather_bias)
        read = Mask(keys=(count_BA1 > 0)[..., 0], bias=read_bias)
        gather_BHAM = attention_weights(agents_BHAD, k_BHMD, gather, self.scale)
        read_BHNA = attention_weights(q_BHND, agents_BHAD, read, self.scale)
        o_BHND = (read_BHNA @ gather_BHAM) @ v_BHMD
        if self.convolution is None or call.cross:
            return o_BHND
        return o_BHND + self._local(v_BHMD, call, "oracle")

    def count(self, sizes: Sizes) -> Cost:
        """Both attentions, and the taps that fall on the grid; the torch backend also multiplies the rest."""
        heads, size, grid = self.site.heads, self.site.head_dim, sizes.grid
        flops = 4 * sizes.batch * heads * size * self.agents * (sizes.queries + sizes.keys)
        pairs = sizes.batch * heads * sizes.queries * sizes.keys
        if self.convolution is None or sizes.cross:
            return Cost(flops, flops, pairs)
        on_grid, multiplied = convolution_flops(grid, self.kernel)
        channels = sizes.batch * heads * size
        return Cost(flops + channels * on_grid, flops + channels * multiplied, pairs)
