"""DeltaNet: linear attention whose state replaces what it recalls for a key instead of adding to it.

    S_t = S_{t−1} + β_t k_tᵀ (v_t − k_t S_{t−1}) = (1 − β_t k_tᵀ k_t) S_{t−1} + β_t k_tᵀ v_t
    o_t = q_t S_t / √D,    y_t = W_o norm(o_t)

q, k and v are silu(conv(W x)), the convolution over `convolution` tokens of each channel alone; q and k are divided by
their length. β_t = σ(W_β x_t), one per head: with β = 1 what was stored for k_t is forgotten and v_t takes its place.
Each step is one of gradient descent on ½ |k_t S − v_t|² at a rate of β. Between tokens of a chunk what is stored solves
a triangular system, so that time does not go token by token. The norm divides each head by its root mean square and has
one weight per feature, shared by the heads. Padding is skipped, by the convolution too.

x (B, N, C), q, k (B, H, N, D), v (B, H, N, E). Time O(N D E H) beside the projections, memory O(N C); the state is S,
D E numbers per head in float32 at least, and the last `convolution` − 1 rows.

Sources: Yang et al., "Parallelizing Linear Transformers with the Delta Rule over Sequence Length", 2024
(arXiv:2406.06484), official code fla-org/flash-linear-attention; β up to 2 after Grazzi et al., "Unlocking
State-Tracking in Linear RNNs Through Negative Eigenvalues", 2024 (arXiv:2411.12537).
"""

from torch import Tensor

from attlas.core.mechanism import Site
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.delta_mixer import DeltaMixer

SPEC = Spec(
    name="delta",
    title="Parallelizing Linear Transformers with the Delta Rule over Sequence Length",
    year=2024,
    paper="arXiv:2406.06484",
    equation="o_t = q_t S_t / √D,  S_t = (1 − β_t k_tᵀ k_t) S_{t−1} + β_t k_tᵀ v_t",
    complexity="O(N D²) time, O(D²) state",
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    streams=True,
    examples=(
        Example(parameters=4 * 16 * 16 + 4 * 3 * 16 + 16 * 2 + 8),
        Example(
            dim=24,
            heads=3,
            grid=(2, 4),
            prefix=1,
            params={"expand_k": 0.5, "expand_v": 1.5, "convolution": 2, "largest_beta": 2.0},
            parameters=24 * (12 + 12 + 36) + 2 * (12 + 12 + 36) + 24 * 3 + 12 + 36 * 24,
        ),
    ),
)


@register(SPEC)
class Delta(DeltaMixer):
    """The delta rule, nothing fades.

    Args:
        site: where it is installed.
        backend: of `gated_delta_rule`.
        expand_k: channels of queries and keys, as a multiple of dim.
        expand_v: channels of values, as a multiple of dim.
        convolution: tokens that the short convolutions see; 1 for the token alone.
        largest_beta: β lies between 0 and this; above 1 the state may change its sign along a key.
    """

    def __init__(
        self,
        site: Site,
        backend: str = "auto",
        *,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        convolution: int = 4,
        largest_beta: float = 1.0,
    ) -> None:
        super().__init__(site, backend, expand_k, expand_v, convolution, largest_beta)

    def log_decay(self, x_BNC: Tensor) -> None:
        """Nothing fades."""
        return None

    def finish(self, o_BNV: Tensor, x_BNC: Tensor) -> Tensor:
        """The output as it is: there is no gate."""
        return o_BNV
