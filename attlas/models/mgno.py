"""MgNO: a network whose layers are learned V-cycles, from functions on a plane to functions on it.

    u = act(MG(u) + B u),    last a 1 x 1 convolution without bias

MG is `attlas.mechanisms.conv.mgno.VCycle`, B a 1 x 1 convolution with bias. Nothing lifts or projects: the first layer
takes the channels of f to those of u. There is one published network for each problem, under its name in `PUBLISHED`.

f (B, sources, H, W), u (B, 1, H, W).

Source: He, Liu and Xu, "MgNO: Efficient Parameterization of Linear Operators via Multigrid", 2023 (arXiv:2310.19809),
official code xlliu2017/MgNO. Inputs and outputs are standardised outside of the network. Not here are the two networks
for the Helmholtz equation, whose grids shrink without padding: one of constant channels with layer norms, which the
official code calls the default of the paper's experiment, and one whose channels grow with the level.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from attlas.core.errors import BadInput
from attlas.mechanisms.conv.mgno import STEPS, VCycle

PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "darcy": {"channels": 24, "layers": 4, "boundary": "dirichlet"},
    "darcy smooth": {"channels": 24, "layers": 5, "boundary": "dirichlet", "shape": (211, 211)},
    "navier stokes": {
        "channels": 32,
        "layers": 5,
        "steps": ((1, 0), (1, 0), (1, 0), (2, 0), (2, 0)),
        "boundary": "periodic",
        "shape": (64, 64),
        "bias": True,
        "normed": True,
        "branch": False,
        "increment": True,
    },
}
"""Arguments of the published networks: `MgNO(**PUBLISHED["darcy"])`. The second is for permeabilities on 421 x 421
points of which every other is taken; the third has layer norms, no B, and predicts what is added to f."""


class MgNO(nn.Module):
    """Layers of V-cycles.

    Args:
        sources: channels of f.
        channels: of u in every layer.
        layers: how many.
        steps: smoothing steps (before, behind) of every level, the finest first.
        boundary: "dirichlet", "periodic" or "reflect".
        residual: restrict f − A u instead of f.
        bias: of A and S.
        shape: the grid that it is trained on; None for sizes that are even down to the last level.
        normed: layer norms in the V-cycles.
        branch: whether there is B.
        increment: the output is added to f, which then has one channel.
    """

    def __init__(
        self,
        sources: int = 1,
        channels: int = 24,
        layers: int = 4,
        *,
        steps: Sequence[tuple[int, int]] = STEPS,
        boundary: str = "dirichlet",
        residual: bool = False,
        bias: bool = False,
        shape: tuple[int, int] | None = None,
        normed: bool = False,
        branch: bool = True,
        increment: bool = False,
    ) -> None:
        super().__init__()
        if layers < 1 or channels < 1 or sources < 1:
            raise BadInput(f"layers, channels and sources are at least 1, got {layers}, {channels} and {sources}")
        if increment and sources != 1:
            raise BadInput(f"an increment is added to f, which needs one channel as the output has, got {sources}")
        self.sources = sources
        self.increment = increment
        widths = [sources] + [channels] * (layers - 1)
        self.cycles = nn.ModuleList(
            VCycle(
                width,
                channels,
                steps=steps,
                boundary=boundary,
                residual=residual,
                bias=bias,
                shape=shape,
                normed=normed,
            )
            for width in widths
        )
        self.branches = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in widths) if branch else None
        self.last = nn.Conv2d(channels, 1, 1, bias=False)

    def forward(self, f_BSHW: Tensor) -> Tensor:
        """The solution (B, 1, H, W)."""
        if f_BSHW.ndim != 4 or f_BSHW.shape[1] != self.sources:
            raise BadInput(f"f is (batch, {self.sources} channels, height, width), got {tuple(f_BSHW.shape)}")
        u = f_BSHW
        for number, cycle in enumerate(self.cycles):
            mixed = cycle(u)
            u = F.gelu(mixed if self.branches is None else mixed + self.branches[number](u))
        u = self.last(u)
        return u + f_BSHW if self.increment else u
