"""NaLaFormer by cosines: linear attention that sharpens with the norm of the query, directions compared as angles.

    φ(q) = |d|^p ⊙ [cos(π d / 4), sin(π d / 4)],  d = q / ‖q‖,  p = λ (τ + tanh ‖q‖)
    φ(k) = |k|³ ⊙ [cos(π d / 4), sin(π d / 4)],  d = k / ‖k‖
    o_n = Rφ(q_n) · (1/M) Σ_m Rφ(k_m) v_mᵀ / (φ(q_n) · (1/M) Σ_m φ(k_m) + ε) + LePE(v)_n

So a pair weighs Σ_i |d(q)_i|^p |k_i|³ cos(π (d(q)_i − d(k)_i) / 4): no norm is lost to the map, since cos² + sin² = 1,
and directions count the less the more they differ. All that is around the map, R, LePE, gate, norm, the causal form
and cross-attention, is as in `nalaformer`.

q (B, H, N, D), k (B, H, M, D), v (B, H, M, E), φ (B, H, ., 2 D). Time O((N + M) 2 D E), memory O(N D); the state is
2 D (E + 1) numbers per head, in float32 at least.

Source: Meng et al., "NaLaFormer: Norm-Aware Linear Attention for Transformer Models", 2025 (arXiv:2506.21137). A
reconstruction: the official code splits by sign instead. That angles are π / 4 times the direction is ours: the
largest factor with which no weight is below 0; opposite unit directions then weigh exactly 0.
"""

import math

import torch
from torch import Tensor

from attlas.core.registry import register
from attlas.core.spec import ALL_PATTERNS, Example, Pattern, Spec
from attlas.ops.norm_aware import NormAwareAttend

SELF = frozenset({Pattern.NONCAUSAL_SELF})
ANGLE = math.pi / 4

SPEC = Spec(
    name="nalaformer_cos_sin",
    title="NaLaFormer: Norm-Aware Linear Attention for Transformer Models",
    year=2025,
    paper="arXiv:2506.21137",
    equation="o = Rφ(q) Σ Rφ(k) vᵀ / φ(q) Σ φ(k) + LePE(v),  φ(q) = |d|^p(‖q‖) [cos πd/4, sin πd/4]",
    complexity="O(N D²) time, O(D²) state",
    patterns=ALL_PATTERNS,
    streams=True,
    shell={"output_norm": "layer", "gate": "silu"},
    reconstruction=True,
    examples=(
        Example(params={"kernel": 0}, parameters=5 * (16 * 16 + 16) + 2 * 16),
        Example(
            grid=(2, 2, 3),
            prefix=1,
            dim=24,
            params={"kernel": 3},
            parameters=5 * (24 * 24 + 24) + 2 * 24 + 24 * (27 + 1),
            patterns=SELF,
        ),
    ),
)


@register(SPEC)
class NaLaFormerCosSin(NormAwareAttend):
    """Norm-aware linear attention on angles; see `NormAwareAttend` for its settings."""

    def halves(self, direction: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the angles."""
        return (ANGLE * direction).cos(), (ANGLE * direction).sin()

    def agreement(self, query: Tensor, key: Tensor) -> Tensor:
        """The cosine of the angle between them."""
        return torch.cos(ANGLE * (query - key))
