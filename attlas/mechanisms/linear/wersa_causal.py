"""WERSA without a look ahead: gates on causal wavelet scales, random features, running sums. Our variant.

    f_t = sigmoid(W₂ relu(W₁ Σ_{i<33} c_i x_{t-i}))             one gate for each token and scale
    a_0 = gelu(q),    a_i[t] = (a_{i-1}[t] + a_{i-1}[t - 2^(i-1)]) / 2,    d_i = a_{i-1} - a_i
    q̃ = Σ_i w_i f_i d_i + w_{J+1} f_{J+1} a_J,    k̃ likewise
    o_t = norm(φ(q̃_t) · Σ_{s≤t} φ(k̃_s) v_sᵀ / (φ(q̃_t) · Σ_{s≤t} φ(k̃_s) + 1e-6))
    φ(z) = relu(z R / b) / √r,    b = softplus(log b) + 0.1

q, k, v (B, H, N, D), x (B, N, C) the tokens that they were made of, J levels, r random features, R (D, r) drawn once
from N(0, 1 / D), norm a LayerNorm over D. What `wersa` takes from both sides is taken from the past: the convolution
ends at its token, and the Haar transform is undecimated, a_i the mean of the last 2^i tokens. Its scales sum to z, so
that gates of 1 change nothing. Before the first token, and in padding, there are zeros.

Time O(N (33 C + J D + r D)); the state is r (D + 1) sums per head, the last 2^J - 1 queries and keys, and 32 tokens.

Source of the parts: Dentamaro, "Scaling Attention to Very Long Sequences in Linear Time with Wavelet-Enhanced Random
Spectral Attention (WERSA)", 2025, whose own equations look ahead. A reconstruction.
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.haar import causal_scales
from attlas.ops.precision import wide
from attlas.ops.scale_gates import ScaleGatedAttend

PROJECTIONS = 4 * (16 * 16 + 16)
GATES = 16 * 4 + 4

SPEC = Spec(
    name="wersa_causal",
    title=(
        "Scaling Attention to Very Long Sequences in Linear Time with Wavelet-Enhanced Random Spectral Attention "
        "(WERSA)"
    ),
    year=2025,
    paper="arXiv:2507.08637",
    equation="o_t = norm(φ(q̃_t) S_t / φ(q̃_t) z_t),  S_t = S_{t−1} + φ(k̃_t) v_tᵀ,  z_t = z_{t−1} + φ(k̃_t)",
    complexity="O(N r D) time, O(r D) state",
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    streams=True,
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


class WersaState(NamedTuple):
    """What later tokens read of those so far; zeros where there were none.

    Attributes:
        x: the last tokens that the convolution reaches, (B, kernel - 1, C).
        q, k: the last 2^J - 1 queries and keys, activated, (B, H, 2^J - 1, D).
        sums: of φ(k̃) vᵀ without the factor of φ, and in the last column of φ(k̃), (B, H, r, D + 1).
        seen: whether there was a real token, (B, 1) bool.
    """

    x: Tensor
    q: Tensor
    k: Tensor
    sums: Tensor
    seen: Tensor


@register(SPEC)
class WersaCausal(ScaleGatedAttend):
    """Wavelet-enhanced random spectral attention from the past alone."""

    def borders(self) -> tuple[int, int]:
        """The convolution ends at its token."""
        return self.local.kernel_size[0] - 1, 0

    def filtered(self, z_BHND: Tensor, gates_BNJ: Tensor) -> Tensor:
        """Gate the undecimated scales; z may have older tokens in front, which have no gates and are not returned."""
        tokens = gates_BNJ.shape[1]
        scales = torch.stack(causal_scales(z_BHND, self.levels), -1)[:, :, z_BHND.shape[2] - tokens :]
        return (scales * gates_BNJ[:, None, :, None, :]).sum(-1)

    def filtered_literally(self, z_BHND: Tensor, gates_BNJ: Tensor) -> Tensor:
        """Token by token, means of the last 2^i."""
        rows = []
        for t in range(z_BHND.shape[2]):
            means = [z_BHND[:, :, max(0, t + 1 - 2**i) : t + 1].sum(2) / 2**i for i in range(self.levels + 1)]
            parts = [*(finer - coarser for finer, coarser in itertools.pairwise(means)), means[-1]]
            rows.append(sum(gates_BNJ[:, t, i, None, None] * part for i, part in enumerate(parts)))
        return torch.stack(rows, 2)

    def initial_state(self, batch: int, like: Tensor) -> WersaState:
        """No token yet."""
        site, reach = self.site, 2**self.levels - 1
        past = wide(like.new_zeros(batch, site.heads, reach, site.head_dim))
        sums = wide(like.new_zeros(batch, site.heads, self.features, site.head_dim + 1))
        x = like.new_zeros(batch, self.borders()[0], site.dim)
        return WersaState(x, past, past, sums, x.new_zeros(batch, 1, dtype=torch.bool))

    def advance(
        self, q: Tensor, k: Tensor, v: Tensor, state: WersaState, keep: Tensor | None, tokens: Tensor | None
    ) -> tuple[Tensor, WersaState]:
        """Filter behind the last tokens of before, and go on with the sums."""
        segment = q.shape[2]
        x = torch.cat([state.x, self._tokens(q, k, v, tokens, keep)], 1)
        gates = self._gates(x)
        q, k = (torch.cat([past, self._activated(z, keep)], 2) for past, z in ((state.q, q), (state.k, k)))
        o, sums = self._product(self.filtered(q, gates), self.filtered(k, gates), v, keep, state.sums)
        real = state.seen.new_ones(q.shape[0], segment) if keep is None else keep
        seen = state.seen | (real.cumsum(1) > 0)
        past = WersaState(x[:, segment:], q[:, :, segment:], k[:, :, segment:], sums, seen[:, -1:])
        return o.where(seen[:, None, :, None], 0), past
