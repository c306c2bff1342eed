"""Retention: linear attention whose pairs turn and fade with their distance, each head at a speed of its own.

    o_n = Σ_{m<=n} γ_h^(n − m) Re⟨q_n e^{inθ}, k_m e^{imθ}⟩ / √D v_m,    γ_h = 1 − 2^(−5−h)
    S_n = γ_h S_{n−1} + k̃_n v_nᵀ,    o_n = q̃_n S_n,    q̃ = q turned by nθ, k̃ = k turned by nθ, over √D
    y = W_o (silu(W_g x) * norm(o))

Features 2i and 2i + 1 of a head are one complex number, whose angle is θ_i = 10000^(−i / (D/2 − 1)): turning and
fading together are the complex decay (γ e^{iθ})^(n − m), as in xPos. The norm divides each head of each token by its
root mean square and has no weights. It hides every positive factor of o, and with it the normalisers of the
official code (of rows of the decay and of sums of scores), which are left out: what they do for half precision, sums in
float32 up to the norm do here.
Values and gate are `expand_v` times as wide as the tokens. Padding is no position and does not let the state fade.

x (B, N, C), q, k (B, H, N, D), v (B, H, N, E). Time O(N D E H) beside the projections, memory O(N C); the state is S,
D E numbers per head in float32 at least, and the number of tokens.

Source: Sun et al., "Retentive Network: A Successor to Transformer for Large Language Models", 2023
(arXiv:2307.08621), official code microsoft/torchscale.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.core.errors import BadInput
from attlas.core.mask import Mask
from attlas.core.mechanism import Call, Cost, Mixer, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.decay import decayed_linear_attention, flops
from attlas.ops.precision import as_written, wide
from attlas.ops.recurrent import alone, head_size, normed_heads, roomy

EPS = 1e-6

SPEC = Spec(
    name="retention",
    title="Retentive Network: A Successor to Transformer for Large Language Models",
    year=2023,
    paper="arXiv:2307.08621",
    equation="o_n = q̃_n S_n,  S_n = γ S_{n−1} + k̃_n v_nᵀ,  q̃ and k̃ turned by nθ",
    complexity="O(N D²) time, O(D²) state",
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    streams=True,
    examples=(
        Example(parameters=2 * 16 * 16 + 3 * 16 * 32),
        Example(dim=24, heads=3, grid=(2, 4), prefix=1, params={"expand_v": 1.0}, parameters=5 * 24 * 24),
    ),
)


class RetentionState(NamedTuple):
    """S (B, H, D, E), and how many real tokens are in it (B,)."""

    sums: Tensor
    tokens: Tensor


@register(SPEC)
class Retention(Mixer):
    """Multi-scale retention.

    Args:
        site: where it is installed; dim splits into heads of an even size.
        backend: of `decayed_linear_attention`.
        expand_v: channels of the values and of the gate, as a multiple of dim.
    """

    def __init__(self, site: Site, backend: str = "auto", *, expand_v: float = 2.0) -> None:
        super().__init__(site, backend)
        if site.dim % site.heads:
            raise BadInput(f"heads must divide dim: {site.dim} channels do not split into {site.heads} heads")
        self.size = site.dim // site.heads
        self.value_size = head_size("expand_v", expand_v, site.dim, site.heads)
        if self.size % 2:
            raise BadInput(f"retention turns pairs of features; dim / heads = {self.size} is odd: change heads or dim")
        width = site.heads * self.value_size
        self.q_proj, self.k_proj = (nn.Linear(site.dim, site.dim, bias=False) for _ in range(2))
        self.v_proj, self.gate_proj = (nn.Linear(site.dim, width, bias=False) for _ in range(2))
        self.out_proj = nn.Linear(width, site.dim, bias=False)
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.gate_proj):
            nn.init.xavier_uniform_(layer.weight, gain=2**-2.5)
        nn.init.xavier_uniform_(self.out_proj.weight, gain=2**-1)
        # No buffers: a model in bfloat16 turns and fades at the same rates.
        # Nor on "meta" with a model that is laid out there: they would never be filled.
        head_H = torch.arange(site.heads, dtype=torch.float64, device="cpu")
        self.slopes = -torch.log1p(-(2.0 ** (-5 - head_H)))
        self.angles = 10000.0 ** -torch.linspace(0, 1, self.size // 2, dtype=torch.float64, device="cpu")

    def compute(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """From an empty state."""
        return self._mix(x_BNC, call.mask.keys, self.start(x_BNC.shape[0], x_BNC))[0]

    def _mix(self, x_BNC: Tensor, keep: Tensor | None, state: RetentionState) -> tuple[Tensor, RetentionState]:
        heads, tokens = self.site.heads, x_BNC.shape[1]
        if keep is not None:
            x_BNC = x_BNC.masked_fill(~keep.unsqueeze(-1), 0)
        q, k, v = (
            roomy(proj(x_BNC)).unflatten(-1, (heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        count_BN = torch.arange(1, tokens + 1, device=x_BNC.device).unsqueeze(0) if keep is None else keep.cumsum(1)
        count_BN = state.tokens.unsqueeze(1) + count_BN
        angle_B1ND = count_BN[:, None, :, None] * self.angles.to(x_BNC.device)
        q, k = self._turned(q, angle_B1ND), self._turned(k, angle_B1ND) * self.size**-0.5
        slopes = self.slopes.to(x_BNC.device, wide(q).dtype)
        with as_written(x_BNC):
            o, sums = decayed_linear_attention(q, k, v, slopes, state.sums, keep, backend=self.backend)
        return self._finish(o.transpose(1, 2), x_BNC), RetentionState(sums, count_BN[:, -1])

    @staticmethod
    def _turned(x_BHND: Tensor, angle_B1ND: Tensor) -> Tensor:
        cos, sin = angle_B1ND.cos().to(x_BHND.dtype), angle_B1ND.sin().to(x_BHND.dtype)
        even, odd = x_BHND.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)

    def _finish(self, o_BNHE: Tensor, x_BNC: Tensor) -> Tensor:
        return self.out_proj(F.silu(self.gate_proj(x_BNC)) * normed_heads(o_BNHE, x_BNC, EPS))

    def oracle(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Every pair's weight, in complex numbers."""
        return alone(self._pairs, x_BNC, call.mask.keys)

    def _pairs(self, x_BNC: Tensor) -> Tensor:
        heads, place_N = self.site.heads, torch.arange(x_BNC.shape[1], device=x_BNC.device)
        distance_NM = place_N[:, None] - place_N
        q_BNHF, k_BMHF = (
            torch.view_as_complex(wide(proj(x_BNC)).unflatten(-1, (heads, -1, 2)))
            for proj in (self.q_proj, self.k_proj)
        )
        o = []
        for h in range(heads):
            base_F = torch.polar((1 - 2.0 ** (-5 - h)) * torch.ones_like(self.angles), self.angles)
            fade_NMF = (base_F ** distance_NM.clamp(min=0).unsqueeze(-1)).to(q_BNHF)
            weights = torch.einsum("bnf,bmf,nmf->bnm", q_BNHF[:, :, h], k_BMHF[:, :, h].conj(), fade_NMF).real
            v_BME = wide(self.v_proj(x_BNC)).unflatten(-1, (heads, -1))[:, :, h]
            o.append((weights * (distance_NM >= 0)) / self.size**0.5 @ v_BME)
        return self._finish(torch.stack(o, 2), x_BNC)

    def count(self, sizes: Sizes) -> Cost:
        """The projections, and each token into the state and out of it."""
        dim, heads = self.site.dim, self.site.heads
        projections = 2 * sizes.batch * sizes.queries * dim * (2 * dim + 3 * heads * self.value_size)
        needed, made = flops(sizes.queries, self.size, self.value_size)
        copies = sizes.batch * heads
        pairs = Mask(causal=True).area(sizes.queries, sizes.keys, sizes.batch, heads)
        return Cost(projections + copies * needed, projections + copies * made, pairs)

    def start(self, batch: int, like: Tensor) -> RetentionState:
        """S zero, no token."""
        sums = wide(like.new_zeros(batch, self.site.heads, self.size, self.value_size))
        return RetentionState(sums, like.new_zeros(batch, dtype=torch.int64))

    def advance(self, x_BNC: Tensor, state: RetentionState, keep: Tensor | None) -> tuple[Tensor, RetentionState]:
        """The recurrence, from the state before the segment."""
        return self._mix(x_BNC, keep, state)
