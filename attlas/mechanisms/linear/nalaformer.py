"""NaLaFormer: linear attention that sharpens with the norm of the query, signs kept by splitting features in two.

    φ(q) = [relu(d)^p, relu(−d)^p],  d = q / ‖q‖,  p = λ (τ + tanh ‖q‖)        φ(k) = [relu(k)³, relu(−k)³]
    o_n = Rφ(q_n) · (1/M) Σ_m Rφ(k_m) v_mᵀ / (φ(q_n) · (1/M) Σ_m φ(k_m) + ε) + LePE(v)_n

λ = 3 and τ = 1/2, so that the power p lies between 1.5 and 4.5. Softmax is sharper for longer queries; the
normaliser of a linear attention cancels the norm, and the power gives it back. Features of opposite sign meet in no
half, so a weight is never below 0. R turns neighbouring features by their places on the grid, in the numerator only;
LePE is a depthwise 5 x 5 convolution of the values. Around it the layer norms over all channels and multiplies with
SiLU of a gate, before the projection.

q (B, H, N, D), k (B, H, M, D), v (B, H, M, E), φ (B, H, ., 2 D); D is a multiple of twice the axes of the grid. Prefix
tokens stand at place 0 and have no LePE. A causal layer runs along one axis, without LePE, on sums in place of means:
o_n = Rφ(q_n) · S_n / (φ(q_n) · s_n + ε). In cross-attention keys lie on no grid that we know: nothing is turned and
there is no LePE. Means count real keys only.

Time O((N + M) 2 D E), memory O(N D); the state is 2 D (E + 1) numbers per head, in float32 at least.

Source: Meng et al., "NaLaFormer: Norm-Aware Linear Attention for Transformer Models", 2025 (arXiv:2506.21137), later
titled "Norm x Direction", whose official vision code this is; its 0 / 0 for a query of norm 0 is 0 here. The causal
form and one or three axes are ours. `nalaformer_cos_sin` has the directions' cosine instead of the split.
"""

from torch import Tensor

from attlas.core.registry import register
from attlas.core.spec import ALL_PATTERNS, Example, Pattern, Spec
from attlas.ops.norm_aware import NormAwareAttend

SELF = frozenset({Pattern.NONCAUSAL_SELF})
PROJECTIONS = 5 * (32 * 32 + 32) + 2 * 32

SPEC = Spec(
    name="nalaformer",
    title="NaLaFormer: Norm-Aware Linear Attention for Transformer Models",
    year=2025,
    paper="arXiv:2506.21137",
    equation="o = Rφ(q) Σ Rφ(k) vᵀ / φ(q) Σ φ(k) + LePE(v),  φ(q) = [relu(±q / ‖q‖)]^p(‖q‖)",
    complexity="O(N D²) time, O(D²) state",
    patterns=ALL_PATTERNS,
    streams=True,
    shell={"output_norm": "layer", "gate": "silu"},
    examples=(
        Example(grid=(3, 4), dim=32, parameters=PROJECTIONS + 32 * (25 + 1), patterns=SELF),
        Example(
            grid=(2, 3), prefix=1, dim=32, params={"kernel": 3}, parameters=PROJECTIONS + 32 * (9 + 1), patterns=SELF
        ),
        Example(dim=32, params={"kernel": 0}, parameters=PROJECTIONS),
    ),
)


@register(SPEC)
class NaLaFormer(NormAwareAttend):
    """Norm-aware linear attention with features split by sign; see `NormAwareAttend` for its settings."""

    def halves(self, direction: Tensor) -> tuple[Tensor, Tensor]:
        """Positive features, and negative ones."""
        return (direction > 0).to(direction), (direction < 0).to(direction)

    def agreement(self, query: Tensor, key: Tensor) -> Tensor:
        """1 where signs are equal, 0 elsewhere."""
        return (query * key > 0).to(query)
