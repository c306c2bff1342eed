"""Titans, memory as a layer: a neural memory reads the sequence, and a window of attention reads what it says.

    y = M([P | x]),    o = W_o SlidingWindowAttention(y)

x (B, N, C); P are persistent tokens, learned and the same for every sequence. The memory M reads them first (`attlas
show titans` has its equations), and what it answers to them is seen by every query of the attention. The window holds
the last `window` tokens, itself included; window and chunks are counted in positions, padded ones included.

Time O(N (W C + |M|)); the state is that of the memory, keys and values of the last W - 1 tokens, and the answers to P.

Source: Behrouz, Zhong, Mirrokni, "Titans: Learning to Memorize at Test Time", 2024 (arXiv:2501.00663). There is no
official code: that the answers to the persistent tokens stay visible is our reading of it.
"""

from typing import NamedTuple

from torch import Tensor

from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.neural_memory import LayerState, expand, project
from attlas.ops.persistent_window import WindowedMemory, WindowState

SPEC = Spec(
    name="titans_mal",
    title="Titans: Learning to Memorize at Test Time",
    year=2024,
    paper="arXiv:2501.00663",
    equation="o = SlidingWindowAttention(M([P | x]))",
    complexity="O(N (W D + |M|)) time, O(W D + |M|) state",
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    grids=(1,),
    prefix=False,
    streams=True,
    examples=(
        # The memory layer, three projections of the attention and one of the output, persistent tokens.
        Example(
            params={"window": 3, "chunk": 5, "persistent": 0},
            parameters=(5 * 16 * 16 + 4 * 48 + 16 * 6 + 6 + 16 + 2 * (8 * 32 + 32 * 8)) + 4 * 16 * 16,
        ),
        Example(
            grid=(5,),
            dim=8,
            params={"depth": 1, "window": 8, "chunk": 4, "persistent": 2},
            parameters=(5 * 8 * 8 + 4 * 24 + 8 * 6 + 6 + 8 + 2 * 4 * 4) + 4 * 8 * 8 + 2 * 8,
        ),
    ),
    reconstruction=True,
)


class LayersState(NamedTuple):
    """The memory's state, the window's, and the memory's answers to the persistent tokens (1, P, C)."""

    memory: LayerState
    window: WindowState
    first: Tensor


@register(SPEC)
class TitansLayer(WindowedMemory):
    """Sliding-window attention on the answers of a neural memory; the arguments are those of `WindowedMemory`."""

    def start(self, batch: int, like: Tensor) -> LayersState:
        """The memory that has read the persistent tokens, what it answered, and an empty window."""
        first, memory = self.begin(like)
        return LayersState(expand(memory, batch), self.attention.start(batch, like), first)

    def read(self, x_BNC: Tensor, state: LayersState, keep: Tensor | None) -> tuple[Tensor, LayersState]:
        """The memory reads on, the window behind it."""
        y, memory = self.memory.read(x_BNC, state.memory, keep, backend=self.backend)
        o, window = self.attention.read(y, state.first, state.window, keep, backend=self.backend)
        return self.out_proj(o), LayersState(memory, window, state.first)

    def literal(self, first_BPC: Tensor, x_BNC: Tensor, keep: Tensor | None) -> Tensor:
        """The memory's answers, then the window on them."""
        return project(self.out_proj, self.attention.literal(*self.literal_answers(first_BPC, x_BNC, keep), keep))
