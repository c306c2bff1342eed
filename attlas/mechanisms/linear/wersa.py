"""WERSA: linear attention on random features of queries and keys, after gates on their wavelet scales.

    f = sigmoid(W₂ relu(W₁ conv(x)))                        one gate for each token and scale
    q̃ = Haar⁻¹(w_i f_i Haar_i(gelu(q))),    k̃ likewise
    o_n = norm(φ(q̃_n) · Σ_m φ(k̃_m) v_mᵀ / (φ(q̃_n) · Σ_m φ(k̃_m) + 1e-6))
    φ(z) = relu(z R / b) / √r,    b = softplus(log b) + 0.1

q, k, v (B, H, N, D), x (B, N, C) the tokens that they were made of, conv depthwise with 33 taps, the orthonormal
Haar transform of J levels along the tokens with J details and one approximation i, r random features with R (D, r)
drawn once from N(0, 1 / D), norm a LayerNorm over D. Queries and keys have projections R of their own as published;
then φ(q̃) · φ(k̃) estimates no kernel. With `share_random=True` it estimates the arc-cosine kernel of order 1.
φ is homogeneous, so b leaves the ratio but for the 1e-6.

A coefficient takes the gate of the first token under its wavelet; the tokens end in zeros up to a multiple of 2^J.
Padding holds zeros, so a sequence padded on the right gives what it gives alone.

There is no causal use: a wavelet of scale 2^i mixes 2^i tokens, later ones among them, and the convolution looks 16
tokens ahead. The causal branch that circulates accumulates over features instead of tokens, which is neither causal nor
linear attention. `wersa_causal` is a variant without a look ahead.

Time O(N (33 C + J D + r D)), memory O(N r).

Source: Dentamaro, "Scaling Attention to Very Long Sequences in Linear Time with Wavelet-Enhanced Random Spectral
Attention (WERSA)", 2025. The official repository was seen without its code; the equations follow a public port, a
reconstruction. Its gates are stretched over the padded length; the two agree where N is a power of two.
"""

from typing import Any

import torch
from torch import Tensor

from attlas.core.errors import Unsupported
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.haar import dwt, idwt
from attlas.ops.scale_gates import ScaleGatedAttend

PROJECTIONS = 4 * (16 * 16 + 16)
GATES = 16 * 4 + 4

SPEC = Spec(
    name="wersa",
    title=(
        "Scaling Attention to Very Long Sequences in Linear Time with Wavelet-Enhanced Random Spectral Attention "
        "(WERSA)"
    ),
    year=2025,
    paper="arXiv:2507.08637",
    equation="o = norm(φ(q̃) (φ(k̃)ᵀ v) / φ(q̃) (φ(k̃)ᵀ 1)),  z̃ = Haar⁻¹(f(x) Haar(z))",
    complexity="O(N r D) time",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    reconstruction=True,
    examples=(
        Example(
            parameters=PROJECTIONS + 16 * 33 + 16 + GATES + 4 * 3 + 3 + 3 + 1 + 2 * 8,
        ),
        Example(
            heads=4,
            grid=(2, 4),
            prefix=1,
            params={"features": 256, "levels": 3, "kernel": 5, "share_random": True},
            parameters=PROJECTIONS + 16 * 5 + 16 + GATES + 4 * 4 + 4 + 4 + 1 + 2 * 4,
        ),
    ),
)


@register(SPEC)
class Wersa(ScaleGatedAttend):
    """Wavelet-enhanced random spectral attention."""

    def _unsupported(self, what: str, **filters: Any) -> Unsupported:
        error = super()._unsupported(what, **filters)
        if what != "causal use":
            return error
        return Unsupported(f"{error}. wersa's wavelets and its convolution look ahead; wersa_causal's do not")

    def borders(self) -> tuple[int, int]:
        """The convolution is centred."""
        reach = self.local.kernel_size[0] // 2
        return reach, reach

    def filtered(self, z_BHND: Tensor, gates_BNJ: Tensor) -> Tensor:
        """Gate the coefficients of the decimated transform."""
        coefficients = dwt(z_BHND, self.levels)
        gated = []
        for index, c in enumerate(coefficients):
            step = 2 ** min(index + 1, self.levels)
            gated.append(gates_BNJ[:, None, ::step, index, None] * c)
        return idwt(gated, z_BHND.shape[2])

    def filtered_literally(self, z_BHND: Tensor, gates_BNJ: Tensor) -> Tensor:
        """Sum of the wavelets, each as much as it is in z."""
        tokens = z_BHND.shape[2]
        places = torch.arange(tokens, device=z_BHND.device)
        total = torch.zeros_like(z_BHND)
        for index in range(self.levels + 1):
            level = min(index + 1, self.levels)
            size = 2**level
            for start in range(0, tokens, size):
                inside = (places >= start) & (places < start + size)
                sign = torch.where(places < start + size // 2, 1, -1) if index < self.levels else 1
                wavelet = (inside * sign).to(z_BHND) * size**-0.5
                share = torch.einsum("n,bhnd->bhd", wavelet, z_BHND) * gates_BNJ[:, start, index, None, None]
                total = total + torch.einsum("n,bhd->bhnd", wavelet, share)
        return total
