"""Titans, memory as a gate: a window of attention and a neural memory read the sequence side by side.

    y = SlidingWindowAttention([P | x])
    o = W_o (silu(norm y) * silu(norm M([P | x])))

x (B, N, C); P are persistent tokens, learned and the same for every sequence: every query of the attention sees them,
and the memory M reads them first (`attlas show titans` has its equations). The window holds the last `window` tokens,
itself included. The norms are root mean squares with weights. Positions are left to the tokens: the convolutions of
the memory and the window itself are all that tells near from far.

Time O(N (W C + |M|)); the state is that of the memory and keys and values of the last W - 1 tokens.

Source: Behrouz, Zhong, Mirrokni, "Titans: Learning to Memorize at Test Time", 2024 (arXiv:2501.00663). There is no
official code: the SiLU of the gate and the projections around it are ours.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from attlas.core.errors import BadInput
from attlas.core.mechanism import Call, Cost, Mixer, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.neural_memory import LayerState, NeuralMemory, expand
from attlas.ops.persistent_window import GatedProduct, WindowAttention, WindowState

SPEC = Spec(
    name="titans_mag",
    title="Titans: Learning to Memorize at Test Time",
    year=2024,
    paper="arXiv:2501.00663",
    equation="o = SlidingWindowAttention([P | x]) ⊗ M([P | x])",
    complexity="O(N (W D + |M|)) time, O(W D + |M|) state",
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    grids=(1,),
    prefix=False,
    streams=True,
    examples=(
        # The memory layer, three projections of the attention and one of the output, two norms, persistent tokens.
        Example(
            params={"window": 3, "chunk": 5, "persistent": 0},
            parameters=(5 * 16 * 16 + 4 * 48 + 16 * 6 + 6 + 16 + 2 * (8 * 32 + 32 * 8)) + 4 * 16 * 16 + 2 * 16,
        ),
        Example(
            grid=(5,),
            dim=8,
            params={"depth": 1, "window": 8, "chunk": 4, "persistent": 2},
            parameters=(5 * 8 * 8 + 4 * 24 + 8 * 6 + 6 + 8 + 2 * 4 * 4) + 4 * 8 * 8 + 2 * 8 + 2 * 8,
        ),
    ),
    reconstruction=True,
)


class GateState(NamedTuple):
    """The memory's state and the window's."""

    memory: LayerState
    window: WindowState


@register(SPEC)
class TitansGate(Mixer):
    """Sliding-window attention gated by a neural memory.

    Args:
        site: where it is installed; heads divide dim.
        backend: of `neural_memory` and `window_attention`.
        window: tokens that a token attends to, itself included.
        depth: layers of the memory; one is a matrix.
        expansion: width of the memory's hidden layers, in head sizes.
        chunk: tokens whose gradients are taken at the same weights.
        kernel: tokens that the memory's convolutions see.
        persistent: learned tokens in front.
        max_step: theta stays below it.
    """

    def __init__(
        self,
        site: Site,
        backend: str = "auto",
        *,
        window: int = 128,
        depth: int = 2,
        expansion: int = 4,
        chunk: int = 64,
        kernel: int = 4,
        persistent: int = 4,
        max_step: float = 1.0,
    ) -> None:
        super().__init__(site, backend)
        if persistent < 0:
            raise BadInput(f"persistent counts learned tokens, got {persistent}")
        self.memory = NeuralMemory(
            site, depth=depth, expansion=expansion, chunk=chunk, kernel=kernel, max_step=max_step
        )
        self.attention = WindowAttention(site, window)
        self.gate = GatedProduct(site.dim)
        self.out_proj = nn.Linear(site.dim, site.dim, bias=False)
        self.persistent = nn.Parameter(torch.randn(1, persistent, site.dim)) if persistent else None

    def compute(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Read all tokens."""
        return self.advance(x_BNC, self.start(x_BNC.shape[0], x_BNC), call.mask.keys)[0]

    oracle = compute  # the ops' own oracle backends

    def count(self, sizes: Sizes) -> Cost:
        """The memory, which reads the persistent tokens once, the window, the output."""
        first = 0 if self.persistent is None else self.persistent.shape[1]
        one = self.memory.count(sizes.queries, first % self.memory.chunk)
        out = 2 * sizes.queries * self.site.dim**2
        every = Cost(sizes.batch * (one.flops + out), sizes.batch * (one.executed + out))
        return every + self.memory.count(first) + self.attention.count(sizes.queries, sizes.batch, first)

    def start(self, batch: int, like: Tensor) -> GateState:
        """The memory that has read the persistent tokens, and an empty window."""
        memory = self.memory.start(1, like)
        if self.persistent is not None:
            memory = self.memory.read(self.persistent.to(like), memory, backend=self.backend)[1]
        return GateState(expand(memory, batch), self.attention.start(batch, like))

    def advance(self, x_BNC: Tensor, state: GateState, keep: Tensor | None) -> tuple[Tensor, GateState]:
        """Both read on."""
        first = x_BNC.new_zeros(1, 0, self.site.dim) if self.persistent is None else self.persistent.to(x_BNC)
        y, window = self.attention.read(x_BNC, first, state.window, keep, backend=self.backend)
        m, memory = self.memory.read(x_BNC, state.memory, keep, backend=self.backend)
        return self.out_proj(self.gate(y, m)), GateState(memory, window)
