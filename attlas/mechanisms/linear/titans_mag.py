"""Titans, memory as a gate: a window of attention and a neural memory read the sequence side by side.

    y = SlidingWindowAttention([P | x])
    o = W_o (silu(norm y) * silu(norm M([P | x])))

x (B, N, C); P are persistent tokens, learned and the same for every sequence: every query of the attention sees them,
and the memory M reads them first (`attlas show titans` has its equations). The window holds the last `window` tokens,
itself included; window and chunks are counted in positions, padded ones included. The norms are root mean squares with
weights. Positions are left to the tokens: the convolutions of the memory and the window itself are all that tells near
from far.

Time O(N (W C + |M|)); the state is that of the memory and keys and values of the last W - 1 tokens.

Source: Behrouz, Zhong, Mirrokni, "Titans: Learning to Memorize at Test Time", 2024 (arXiv:2501.00663). There is no
official code: the SiLU of the gate and the projections around it are ours.
"""

from typing import NamedTuple

from torch import Tensor

from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.neural_memory import GatedProduct, LayerState, expand, project
from attlas.ops.persistent_window import WindowedMemory, WindowState

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
class TitansGate(WindowedMemory):
    """Sliding-window attention gated by a neural memory; the arguments are those of `WindowedMemory`."""

    def add(self) -> None:
        """The gate."""
        self.gate = GatedProduct(self.site.dim)

    def start(self, batch: int, like: Tensor) -> GateState:
        """The memory that has read the persistent tokens, and an empty window."""
        return GateState(expand(self.begin(like)[1], batch), self.attention.start(batch, like))

    def read(self, x_BNC: Tensor, state: GateState, keep: Tensor | None) -> tuple[Tensor, GateState]:
        """Both read on."""
        y, window = self.attention.read(x_BNC, self.front(x_BNC), state.window, keep, backend=self.backend)
        m, memory = self.memory.read(x_BNC, state.memory, keep, backend=self.backend)
        return self.out_proj(self.gate(y, m)), GateState(memory, window)

    def literal(self, first_BPC: Tensor, x_BNC: Tensor, keep: Tensor | None) -> Tensor:
        """Both, and their product."""
        y_BNC = self.attention.literal(first_BPC, x_BNC, keep)
        return project(self.out_proj, self.gate.literal(y_BNC, self.literal_answers(first_BPC, x_BNC, keep)[1]))
