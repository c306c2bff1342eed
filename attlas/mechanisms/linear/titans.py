"""Titans' neural long-term memory: a small network that learns the sequence while it reads it.

    u_t = -theta_t grad |M_{t-1}(k_t) - v_t|^2      the surprise of a token
    S_t = eta_t S_{t-1} + u_t                       and of those before it
    M_t = (1 - alpha_t) M_{t-1} + S_t               learned, and forgotten
    y_t = M_t(q_t)

x (B, N, C); q, k, v (B, H, N, D) are projections behind a causal convolution of 4 tokens and a SiLU, q and k of length
1; theta, eta and alpha are sigmoids of a projection of the token, for each head, theta divided by the tokens of a
chunk, whose gradients add up. M is a network of `depth` layers without biases, D -> 4 D -> ... -> D with GELUs in
between, one for each head; depth 1 is a D x D matrix, for which eta = alpha = 0 gives the delta rule. Its initial
weights are learned with everything else: the outer gradient goes through the inner ones. Persistent tokens, learned and
the same for every sequence, are read before the first token. Answers are normalised, gated and projected.

Within a chunk gradients are taken at the weights with which the chunk began, which makes it a few matrix products;
chunk = 1 is the recurrence above. A token is answered by the memory that has just learned it, and never by one that
has learned a later token. Padding is not learned, lets nothing be forgotten, and the convolutions skip it; but chunks
are counted in positions, padded ones included.

Time O(N (P + C D)) per head for P = |M| weights and chunks of C tokens; the state is M, S and the weights at the
beginning of the chunk, 3 P numbers per head, and the rows of the last three real tokens before the convolution.

Source: Behrouz, Zhong, Mirrokni, "Titans: Learning to Memorize at Test Time", 2024 (arXiv:2501.00663). There is no
official code. The sizes of the memory and of the convolution, the GELU, the division of theta by the chunk, and what
the rates start from are ours.
"""

from torch import Tensor

from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.neural_memory import LayerState, MemoryMixer, expand

SPEC = Spec(
    name="titans",
    title="Titans: Learning to Memorize at Test Time",
    year=2024,
    paper="arXiv:2501.00663",
    equation="y_t = M_t(q_t),  M_t = (1−α_t) M_{t−1} + S_t,  S_t = η_t S_{t−1} − θ_t ∇‖M_{t−1}(k_t) − v_t‖²",
    complexity="O(N |M|) time, O(|M|) state",
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    grids=(1,),
    prefix=False,
    streams=True,
    examples=(
        # Five projections, convolutions, rates, norm, persistent tokens, and a memory of two layers per head.
        Example(
            params={"chunk": 5, "persistent": 2},
            parameters=5 * 16 * 16 + 4 * 48 + 16 * 6 + 6 + 16 + 2 * 16 + 2 * (8 * 32 + 32 * 8),
        ),
        Example(
            grid=(5,),
            dim=12,
            heads=3,
            params={"depth": 1, "chunk": 1, "kernel": 2, "persistent": 0},
            parameters=5 * 12 * 12 + 2 * 36 + 12 * 9 + 9 + 12 + 3 * 4 * 4,
        ),
        Example(
            grid=(6,),
            dim=8,
            heads=1,
            params={"depth": 3, "expansion": 2, "chunk": 4, "persistent": 0},
            parameters=5 * 8 * 8 + 4 * 24 + 8 * 3 + 3 + 8 + 8 * 16 + 16 * 16 + 16 * 8,
        ),
    ),
    reconstruction=True,
)


@register(SPEC)
class Titans(MemoryMixer):
    """Neural long-term memory; the arguments are those of `MemoryMixer`."""

    def start(self, batch: int, like: Tensor) -> LayerState:
        """The memory that has read the persistent tokens."""
        return expand(self.begin(like)[1], batch)

    def read(self, x_BNC: Tensor, state: LayerState, keep: Tensor | None) -> tuple[Tensor, LayerState]:
        """Read on."""
        return self.memory.read(x_BNC, state, keep, backend=self.backend)

    def literal(self, first_BPC: Tensor, x_BNC: Tensor, keep: Tensor | None) -> Tensor:
        """The answers to the tokens behind the persistent ones."""
        return self.literal_answers(first_BPC, x_BNC, keep)[1]
