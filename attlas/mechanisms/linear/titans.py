"""Titans' neural long-term memory: a small network that learns the sequence while it reads it.

    u_t = -theta_t grad |M_{t-1}(k_t) - v_t|^2      the surprise of a token
    S_t = eta_t S_{t-1} + u_t                       and of those before it
    M_t = (1 - alpha_t) M_{t-1} + S_t               learned, and forgotten
    y_t = M_t(q_t)

x (B, N, C); q, k, v (B, H, N, D) are projections behind a causal convolution of 4 tokens and a SiLU, q and k of length
1; theta, eta and alpha are sigmoids of a projection of the token, for each head. M is a network of `depth` layers
without biases, D -> 4 D -> ... -> D with GELUs in between, one for each head; depth 1 is a D x D matrix, for which eta
= alpha = 0 gives the delta rule. Its initial weights are learned with everything else: the outer gradient goes through
the inner ones. Persistent tokens, learned and the same for every sequence, are read before the first token. Answers
are normalised, gated and projected.

Within a chunk gradients are taken at the weights with which the chunk began, which makes it a few matrix products;
chunk = 1 is the recurrence above. Chunks are counted in positions. A token is answered by the memory that has just
learned it, and never by one that has learned a later token. Padding is not learned and lets nothing be forgotten.

Time O(N (P + C D)) per head for P = |M| weights and chunks of C tokens; the state is M, S and the weights at the
beginning of the chunk, 3 P numbers per head, and the last three rows before the convolution.

Source: Behrouz, Zhong, Mirrokni, "Titans: Learning to Memorize at Test Time", 2024 (arXiv:2501.00663). There is no
official code. The sizes of the memory and of the convolution, the GELU, and what the rates start from are ours.
"""

import torch
from torch import Tensor, nn

from attlas.core.errors import BadInput
from attlas.core.mechanism import Call, Cost, Mixer, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.neural_memory import LayerState, NeuralMemory, expand

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
class Titans(Mixer):
    """Neural long-term memory.

    Args:
        site: where it is installed; heads divide dim.
        backend: of `neural_memory`.
        depth: layers of the memory; one is a matrix.
        expansion: width of the memory's hidden layers, in head sizes.
        chunk: tokens whose gradients are taken at the same weights.
        kernel: tokens that the convolutions of q, k and v see.
        persistent: learned tokens that are read first.
        max_step: theta stays below it.
    """

    def __init__(
        self,
        site: Site,
        backend: str = "auto",
        *,
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
        self.persistent = nn.Parameter(torch.randn(1, persistent, site.dim)) if persistent else None

    def compute(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Read all tokens behind the persistent ones."""
        return self.advance(x_BNC, self.start(x_BNC.shape[0], x_BNC), call.mask.keys)[0]

    oracle = compute  # the ops' own oracle backends

    def count(self, sizes: Sizes) -> Cost:
        """The persistent tokens once, and each sequence."""
        first = 0 if self.persistent is None else self.persistent.shape[1]
        one = self.memory.count(sizes.queries, first % self.memory.chunk)
        every = Cost(sizes.batch * one.flops, sizes.batch * one.executed)
        return every + self.memory.count(first)

    def start(self, batch: int, like: Tensor) -> LayerState:
        """The memory that has read the persistent tokens."""
        if self.persistent is None:
            return self.memory.start(batch, like)
        return expand(
            self.memory.read(self.persistent.to(like), self.memory.start(1, like), backend=self.backend)[1], batch
        )

    def advance(self, x_BNC: Tensor, state: LayerState, keep: Tensor | None) -> tuple[Tensor, LayerState]:
        """Read on."""
        return self.memory.read(x_BNC, state, keep, backend=self.backend)
