"""Linear attention on random features of queries and keys whose scales were gated.

B batch, H heads, N tokens, D head size, C channels, J levels, R random features.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.core.errors import BadInput, share
from attlas.core.mask import Mask
from attlas.core.mechanism import Attend, Call, Cost, Site, Sizes
from attlas.ops.linear import feature_product, product_flops, with_ones
from attlas.ops.precision import wide
from attlas.ops.softmax import blank_padding

EPSILON = 1e-6
MOST_LEVELS = 32


class ScaleGatedAttend(Attend):
    """What the attends share that gate the wavelet scales of queries and keys.

    Subclasses say how far the convolution that makes the gates reaches (`borders`), and write `filtered` and,
    for the oracle, `filtered_literally`.

    Args:
        site: where it is installed.
        backend: of `feature_product`.
        levels: J, levels of the wavelet transform; there are J + 1 gates.
        features: R, random features.
        share_random: use the queries' random projection for the keys too.
        kernel: taps of the convolution that the gates are made from.
        gate_dropout: inside the network of the gates, in training.
    """

    random_q: Tensor
    random_k: Tensor

    def __init__(
        self,
        site: Site,
        backend: str = "auto",
        *,
        levels: int = 2,
        features: int = 1024,
        share_random: bool = False,
        kernel: int = 33,
        gate_dropout: float = 0.1,
    ) -> None:
        super().__init__(site, backend)
        if not 1 <= levels <= MOST_LEVELS:
            raise BadInput(
                f"levels of the wavelet transform are 1 to {MOST_LEVELS}, beyond which no sequence fills a wavelet, "
                f"got {levels}; log2 of the tokens, rounded up, sees them all"
            )
        if features < 1:
            raise BadInput(f"features counts random features, at least 1, got {features}")
        if kernel < 1 or kernel % 2 == 0:
            raise BadInput(f"kernel is an odd number of taps, got {kernel}")
        self.levels, self.features, self.share_random = levels, features, share_random
        self.gate_dropout = share("gate_dropout", gate_dropout)
        hidden = max(1, site.dim // 4)
        self.local = nn.Conv1d(site.dim, site.dim, kernel, groups=site.dim)
        self.gate_in, self.gate_out = nn.Linear(site.dim, hidden), nn.Linear(hidden, levels + 1)
        self.scale_weights = nn.Parameter(torch.full((levels + 1,), 0.5))
        self.log_bandwidth = nn.Parameter(torch.zeros(()))
        self.norm = nn.LayerNorm(site.head_dim)
        for name in ("random_q",) if share_random else ("random_q", "random_k"):
            self.register_buffer(name, torch.randn(site.head_dim, features) / math.sqrt(site.head_dim))

    @abstractmethod
    def borders(self) -> tuple[int, int]:
        """Hook: tokens before and after a token that its gates are made from."""

    @abstractmethod
    def filtered(self, z_BHND: Tensor, gates_BNJ: Tensor) -> Tensor:
        """Hook: z with its scales gated."""

    @abstractmethod
    def filtered_literally(self, z_BHND: Tensor, gates_BNJ: Tensor) -> Tensor:
        """Hook of the oracle: the same from the definition of the wavelets."""

    def gates(self, x_BNC: Tensor) -> Tensor:
        """One gate for each token and scale (B, N, J + 1), from tokens with zeros around them."""
        return self._gates(F.pad(x_BNC, (0, 0, *self.borders())))

    def _gates(self, x_BMC: Tensor) -> Tensor:
        """Gates of the tokens that have all neighbours that their convolution reads."""
        local = self.local(x_BMC.transpose(1, 2)).transpose(1, 2)
        hidden = F.dropout(self.gate_in(local).relu(), self.gate_dropout, self.training)
        return wide(self.gate_out(hidden)).sigmoid() * wide(self.scale_weights)

    def _random(self) -> tuple[Tensor, Tensor]:
        return self.random_q, self.random_q if self.share_random else self.random_k

    def _floor(self) -> Tensor:
        """What is added to the sum of weights: EPSILON, in units of products of features without their factor.

        phi(z) = relu(z R) / (sqrt(R) bandwidth) is homogeneous: the factor leaves the ratio but for here.
        """
        return EPSILON * self.features * (F.softplus(wide(self.log_bandwidth)) + 0.1) ** 2

    def _tokens(self, q: Tensor, k: Tensor, v: Tensor, tokens: Tensor | None, keep: Tensor | None) -> Tensor:
        name, size = self.spec.name, self.site.head_dim
        if q.shape[2] != k.shape[2]:
            raise BadInput(f"{name} takes as many queries as keys, got {q.shape[2]} and {k.shape[2]}")
        if v.shape[3] != size:
            raise BadInput(f"{name} was built for values of {size} features, which it norms, got {v.shape[3]}")
        if tokens is None:
            raise BadInput(f"{name} makes its gates from the tokens: pass tokens=, (batch, tokens, channels)")
        if tokens.shape != (q.shape[0], q.shape[2], self.site.dim):
            expected = (q.shape[0], q.shape[2], self.site.dim)
            raise BadInput(f"tokens are (batch, tokens, channels), {expected} here, got {tuple(tokens.shape)}")
        return tokens if keep is None else tokens.where(keep.unsqueeze(-1), 0)

    def _activated(self, z_BHND: Tensor, keep: Tensor | None) -> Tensor:
        (z,) = blank_padding(keep, z_BHND)
        return F.gelu(wide(z))

    def _product(
        self,
        q_BHND: Tensor,
        k_BHND: Tensor,
        v_BHND: Tensor,
        keep: Tensor | None,
        sums: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Weighted mean of the values under filtered queries and keys, normalised, and the sums behind the last."""
        causal = self.site.causal
        random_q, random_k = self._random()
        features_q = wide(q_BHND @ wide(random_q)).relu()
        features_k = wide(k_BHND @ wide(random_k)).relu()
        (features_k,) = blank_padding(keep, features_k)
        values = with_ones(v_BHND, keep)
        total, after = feature_product(features_q, features_k, values, sums, causal=causal, backend=self.backend)
        o = total[..., :-1] / (total[..., -1:] + self._floor())
        # Means of values lie close together, so that the norm would blow up what rounding does to them.
        normed = F.layer_norm(o, o.shape[-1:], wide(self.norm.weight), wide(self.norm.bias), self.norm.eps)
        return normed.to(v_BHND.dtype), after

    def compute(self, q_BHND: Tensor, k_BHMD: Tensor, v_BHME: Tensor, call: Call) -> Tensor:
        """Gate, filter, multiply keys with values first."""
        keep = call.mask.keys
        gates = self.gates(self._tokens(q_BHND, k_BHMD, v_BHME, call.tokens, keep))
        q, k = (self.filtered(self._activated(z, keep), gates) for z in (q_BHND, k_BHMD))
        o, _ = self._product(q, k, v_BHME, keep)
        return o if keep is None else o.where(self._seeing(keep), 0)

    def _seeing(self, keep: Tensor) -> Tensor:
        """Which queries see anything, (B, 1, N or 1, 1)."""
        seeing = keep.cumsum(1) > 0 if self.site.causal else keep.any(1, keepdim=True)
        return seeing[:, None, :, None]

    def oracle(self, q_BHND: Tensor, k_BHMD: Tensor, v_BHME: Tensor, call: Call) -> Tensor:
        """Tap by tap, wavelet by wavelet, pair by pair."""
        tokens, keep = q_BHND.shape[2], call.mask.keys
        x = self._tokens(q_BHND, k_BHMD, v_BHME, call.tokens, keep)
        back, _ = self.borders()
        taps, bias = self.local.weight[:, 0], self.local.bias
        assert bias is not None
        local = torch.zeros_like(x) + bias
        for i in range(taps.shape[1]):
            for n in range(max(0, back - i), min(tokens, tokens + back - i)):
                local[:, n] += taps[:, i] * x[:, n + i - back]
        hidden = local @ self.gate_in.weight.T + self.gate_in.bias
        hidden = F.dropout(hidden.clamp(min=0), self.gate_dropout, self.training)
        gates = (hidden @ self.gate_out.weight.T + self.gate_out.bias).sigmoid() * self.scale_weights
        features = []
        for z, random in zip((q_BHND, k_BHMD), self._random(), strict=True):
            (real,) = blank_padding(keep, z)
            features.append((self.filtered_literally(F.gelu(real), gates) @ random).clamp(min=0))
        weights = features[0] @ features[1].mT
        seen = call.mask.pairs(tokens, tokens, weights.device)
        if seen is not None:
            weights = weights * seen
        (values,) = blank_padding(keep, v_BHME)
        o = self.norm(weights @ values / (weights.sum(-1, keepdim=True) + self._floor()))
        return o if seen is None else o * seen.any(-1, keepdim=True)

    def count(self, sizes: Sizes) -> Cost:
        """Gates, random features and their sums; the transform has no matrix product."""
        site, tokens = self.site, sizes.queries
        hidden = self.gate_in.out_features
        per_token = site.dim * (self.local.kernel_size[0] + hidden) + hidden * (self.levels + 1)
        per_token += 2 * site.heads * site.head_dim * self.features
        fixed = 2 * sizes.batch * tokens * per_token
        copies = sizes.batch * site.heads
        needed, made = product_flops(tokens, tokens, self.features, site.head_dim + 1, site.causal)
        pairs = Mask(causal=site.causal).area(tokens, tokens, sizes.batch, site.heads)
        return Cost(fixed + copies * needed, fixed + copies * made, pairs)
