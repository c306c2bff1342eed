"""The gated convolution of MambaOut: what a Mamba block does without its state-space model.

    [g, i, c] = W_1 x + b_1
    y = W_2 (GELU(g) ⊙ [i, DWConv(c)]) + b_2

g has F = ⌊8/3 C⌋ channels, i and c together as many; only the last `conv_ratio` C of them, c, are convolved over the
grid, the rest passes as it is. The layer is its own channel mixer: the block around it has one norm, one residual path
and no MLP. With `conv_ratio=0` nothing is convolved and it is a gated MLP, in which no token sees another.

x, y (B, N, C), g (B, N, F). Beyond the border and where there is padding c is 0. Prefix tokens have no surroundings:
they give 0 and enter nothing. A causal layer, our extension (gated convolutions were causal before they were used on
pictures), runs along one axis without prefix tokens and convolves the last `kernel` places; its state is the c of
kernel - 1 of them.

Time O(N C (C + kernel^axes)), linear in N.

Source: Yu and Wang, "MambaOut: Do We Really Need Mamba for Vision?", 2024 (arXiv:2405.07992), official code
yuweihao/MambaOut.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.core.mechanism import Call, Cost, Mixer, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.grid_conv import convolution_flops, depthwise, grid_convolution, positions

PLANE = frozenset({Pattern.NONCAUSAL_SELF})
CAUSAL = frozenset({Pattern.CAUSAL_SELF})
PROJECTIONS = (16 + 1) * 2 * 42 + (42 + 1) * 16

SPEC = Spec(
    name="mambaout",
    title="MambaOut: Do We Really Need Mamba for Vision?",
    year=2024,
    paper="arXiv:2405.07992",
    equation="y = W₂ (GELU(g) ⊙ [i, DWConv(c)]), [g, i, c] = W₁ x",
    complexity="O(N C (C + k²)) time, O(k C) state",
    patterns=PLANE | CAUSAL,
    streams=True,
    examples=(
        Example(grid=(4, 5), prefix=1, parameters=PROJECTIONS + 16 * (49 + 1), patterns=PLANE),
        Example(grid=(2, 3, 4), params={"kernel": 3}, parameters=PROJECTIONS + 16 * (27 + 1), patterns=PLANE),
        Example(
            grid=(7,),
            params={"kernel": 3, "conv_ratio": 0.5, "expansion": 2.0},
            parameters=(16 + 1) * 2 * 32 + (32 + 1) * 16 + 8 * (3 + 1),
        ),
    ),
)


@register(SPEC)
class MambaOut(Mixer):
    """The gated convolution.

    Args:
        site: where it is installed; the convolution needs the axes of its grid, and a causal layer has one.
        backend: of `grid_convolution`.
        kernel: taps on each axis, odd.
        expansion: F / C.
        conv_ratio: convolved channels as a share of C.
    """

    def __init__(
        self,
        site: Site,
        backend: str = "auto",
        *,
        kernel: int = 7,
        expansion: float = 8 / 3,
        conv_ratio: float = 1.0,
    ) -> None:
        super().__init__(site, backend)
        hidden, self.convolved = int(expansion * site.dim), int(conv_ratio * site.dim)
        if not 0 <= self.convolved <= hidden or hidden < 1:
            raise BadInput(
                f"of {hidden} hidden channels {self.convolved} cannot be convolved: take conv_ratio from 0 to "
                f"expansion, got {conv_ratio} and {expansion}"
            )
        if site.grid is None and not site.causal:
            raise BadInput(
                "mambaout convolves over the axes of the grid that it is trained on: pass grid=(height, width) when "
                "building it"
            )
        self.hidden, self.kernel, self.axes = hidden, kernel, 1 if site.grid is None else site.grid.rank
        if site.grid is not None:
            self._check_grid(site.grid)
        self.fc1 = nn.Linear(site.dim, 2 * hidden)
        self.conv = depthwise(self.convolved, kernel, self.axes) if self.convolved else None
        self.fc2 = nn.Linear(hidden, site.dim)

    def _check_grid(self, grid: Grid) -> None:
        if self.site.causal and (grid.rank > 1 or grid.prefix):
            raise BadInput(
                f"a causal gated convolution runs along one axis without prefix tokens, got a {grid}: build it with "
                "causal=False, or pass the tokens as one line"
            )
        if grid.rank != self.axes:
            raise BadInput(f"this layer was built for {self.axes} axes, got a {grid}; only lengths may differ")

    def compute(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Project, convolve a part, gate, project."""
        self._check_grid(call.grid)
        if self.site.causal:
            return self._causal(x_BNC, self.start(len(x_BNC), x_BNC), call.mask.keys)[0]
        x_BPC, real_BP1 = positions(x_BNC, call.grid, call.mask.keys)
        g, i, c = self._split(x_BPC)
        if self.conv is not None:
            keep = None if call.mask.keys is None else real_BP1[..., 0]
            grid = Grid(call.grid.shape)
            c = grid_convolution(c, self.conv.weight, self.conv.bias, grid, keep, backend=self.backend)
        return F.pad(self._gate(g, i, c), (0, 0, call.grid.prefix, 0))

    def _split(self, x_BPC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gate, channels that pass and channels to be convolved."""
        sizes = (self.hidden, self.hidden - self.convolved, self.convolved)
        g, i, c = self.fc1(x_BPC).split(sizes, -1)
        return g, i, c

    def _gate(self, g: Tensor, i: Tensor, c: Tensor) -> Tensor:
        return self.fc2(F.gelu(g) * torch.cat([i, c], -1))

    def oracle(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """The convolution as a matrix of positions by positions."""
        self._check_grid(call.grid)
        x_BPC, real_BP1 = positions(x_BNC, call.grid, call.mask.keys)
        hidden = self.fc1(x_BPC)
        g, passing = hidden[..., : self.hidden], hidden[..., self.hidden :]
        if self.conv is not None:
            first, weight, kernel = self.hidden - self.convolved, self.conv.weight[:, 0], self.kernel
            places_PR = call.grid.places(x_BPC.device)
            before = kernel - 1 if self.site.causal else kernel // 2
            tap_NMR = places_PR[None] - places_PR[:, None] + before
            inside_NM = ((tap_NMR >= 0) & (tap_NMR < kernel)).all(-1)
            matrix_CNM = weight[:, *tap_NMR.clamp(0, kernel - 1).unbind(-1)] * inside_NM  # type: ignore[index]
            c = torch.einsum("cnm,bmc->bnc", matrix_CNM, passing[..., first:] * real_BP1)
            passing = torch.cat([passing[..., :first], c.add(self.conv.bias)], -1)  # type: ignore[arg-type]
        gelu = g * 0.5 * (1 + torch.erf(g / 2**0.5))
        return F.pad(self.fc2(gelu * passing), (0, 0, call.grid.prefix, 0))

    def count(self, sizes: Sizes) -> Cost:
        """Projections, and the taps on the grid; the torch backend also multiplies the others."""
        grid = sizes.grid
        self._check_grid(grid)
        projections = 2 * grid.positions * 3 * self.hidden * self.site.dim
        on_grid, multiplied = convolution_flops(grid, self.kernel)
        if self.site.causal:
            on_grid = 2 * sum(min(n + 1, self.kernel) for n in range(grid.positions))
        flops, executed = (projections + self.convolved * taps for taps in (on_grid, multiplied))
        return Cost(sizes.batch * flops, sizes.batch * executed)

    def start(self, batch: int, like: Tensor) -> Tensor:
        """Nothing before the first token (B, kernel - 1, convolved channels)."""
        return like.new_zeros(batch, self.kernel - 1, self.convolved)

    def advance(self, x_BNC: Tensor, state: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        """Convolve the segment behind what came before."""
        return self._causal(x_BNC, state, keep)

    def _causal(self, x_BNC: Tensor, tail: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        x_BNC, real_BN1 = positions(x_BNC, Grid((x_BNC.shape[1],)), keep)
        g, i, c = self._split(x_BNC)
        if self.conv is None:
            return self._gate(g, i, c), tail
        c = torch.cat([tail, c.where(real_BN1, 0)], 1)
        tail = c[:, x_BNC.shape[1] :].clone()  # a view would keep the whole segment
        c = F.conv1d(c.mT, self.conv.weight, self.conv.bias, groups=self.convolved).mT
        return self._gate(g, i, c), tail
