"""What mixers share that write into a matrix by the delta rule: projections, short convolutions, norms, the state.

B batch, N tokens, C channels, H heads, D key size, E value size, L lags of the convolution.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.core.errors import BadInput
from attlas.core.mask import Mask
from attlas.core.mechanism import Call, Cost, Mixer, Site, Sizes
from attlas.ops.delta import flops, gated_delta_rule
from attlas.ops.precision import as_written, wide
from attlas.ops.recurrent import alone, head_size, projection_flops, short_convolution

LENGTH_EPS = 1e-6
NORM_EPS = 1e-5


class DeltaState(NamedTuple):
    """S (B, H, D, E), and what of the last L - 1 real tokens goes into the convolution, (B, L - 1, W) of q, k and v."""

    sums: Tensor
    tail: Tensor


class DeltaMixer(Mixer):
    """Queries, keys and values from a projection, a convolution and a SiLU; the delta rule; a norm; a projection.

        y_t = W_o finish(norm(o_t), x_t),    o_t = q_t S_t / √D
        S_t = α_t S_{t−1} + β_t k_tᵀ (v_t − k_t α_t S_{t−1})

    Queries and keys have length 1. Subclasses write `log_decay` and `finish`.

    Args:
        site: where it is installed.
        backend: of `gated_delta_rule`.
        expand_k: channels of queries and keys, as a multiple of dim.
        expand_v: channels of values, as a multiple of dim.
        convolution: tokens that the short convolutions see, 1 or more.
        largest_beta: β lies between 0 and this; above 1 the state may change its sign along a key.
    """

    def __init__(
        self,
        site: Site,
        backend: str,
        expand_k: float,
        expand_v: float,
        convolution: int,
        largest_beta: float,
    ) -> None:
        super().__init__(site, backend)
        if convolution < 1:
            raise BadInput(f"convolution counts the tokens it sees, itself included: at least 1, got {convolution}")
        if not 0 < largest_beta <= 2:
            raise BadInput(f"largest_beta is in (0, 2], beyond it the state grows without bound; got {largest_beta}")
        self.key_size = head_size("expand_k", expand_k, site.dim, site.heads)
        self.value_size = head_size("expand_v", expand_v, site.dim, site.heads)
        self.largest_beta = largest_beta
        keys, values = site.heads * self.key_size, site.heads * self.value_size
        self.widths = [keys, keys, values]
        self.qkv_proj = nn.Linear(site.dim, sum(self.widths), bias=False)
        self.taps = nn.Parameter(torch.empty(convolution, sum(self.widths)).uniform_(-1, 1) * convolution**-0.5)
        self.beta_proj = nn.Linear(site.dim, site.heads, bias=False)
        self.norm = nn.RMSNorm(self.value_size, eps=NORM_EPS)
        self.out_proj = nn.Linear(values, site.dim, bias=False)

    @abstractmethod
    def log_decay(self, x_BNC: Tensor) -> Tensor | None:
        """Hook: log α of each head (B, N, H), in float32 or better; None where nothing fades."""

    @abstractmethod
    def finish(self, o_BNV: Tensor, x_BNC: Tensor) -> Tensor:
        """Hook: what becomes of the normed output before its projection."""

    def compute(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """From an empty state."""
        return self.advance(x_BNC, self.start(x_BNC.shape[0], x_BNC), call.mask.keys)[0]

    def advance(self, x_BNC: Tensor, state: DeltaState, keep: Tensor | None) -> tuple[Tensor, DeltaState]:
        """Convolve and write behind the state."""
        if keep is not None:
            x_BNC = x_BNC.masked_fill(~keep.unsqueeze(-1), 0)
        qkv_BNW, tail = short_convolution(self.qkv_proj(x_BNC), self.taps, state.tail, keep)
        q, k, v = (
            x.unflatten(-1, (self.site.heads, -1)).transpose(1, 2) for x in F.silu(qkv_BNW).split(self.widths, -1)
        )
        q, k = _unit(q) * self.key_size**-0.5, _unit(k)
        beta, g = wide(self.beta_proj(x_BNC)).sigmoid().transpose(1, 2) * self.largest_beta, self.log_decay(x_BNC)
        beta = beta.minimum(2 / wide(k).square().sum(-1).clamp(min=1))  # a rounded key may be longer than 1
        gates = (beta, None if g is None else g.transpose(1, 2))
        with as_written(x_BNC):
            o, sums = gated_delta_rule(q, k, v, *gates, state.sums, keep, backend=self.backend)
        return self._merge(o.transpose(1, 2), x_BNC), DeltaState(sums, tail)

    def _merge(self, o_BNHE: Tensor, x_BNC: Tensor) -> Tensor:
        return self.out_proj(self.finish(self.norm(o_BNHE).flatten(2), x_BNC))

    def oracle(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Tap by tap and token by token, the state multiplied by the matrix α (1 − β k kᵀ)."""
        return alone(self._token_by_token, x_BNC, call.mask.keys)

    def _token_by_token(self, x_BNC: Tensor) -> Tensor:
        rows_BNW, heads = self.qkv_proj(x_BNC), self.site.heads
        g = self.log_decay(x_BNC)
        alpha_BNH = torch.ones_like(wide(x_BNC[..., :heads])) if g is None else g.exp()
        eye = torch.eye(self.key_size, dtype=alpha_BNH.dtype, device=x_BNC.device)
        state_BHDE, o = alpha_BNH.new_zeros(x_BNC.shape[0], heads, self.key_size, self.value_size), []
        for t in range(x_BNC.shape[1]):
            taps = (self.taps[i] * rows_BNW[:, t - i] for i in range(min(t + 1, len(self.taps))))
            qkv_BW = wide(F.silu(sum(taps, torch.zeros_like(rows_BNW[:, t]))))
            q, k, v = (x.unflatten(-1, (heads, -1)) for x in qkv_BW.split(self.widths, -1))
            q, k = (x / (x.pow(2).sum(-1, keepdim=True) + LENGTH_EPS).sqrt() for x in (q, k))
            beta_BH11 = self.largest_beta * wide(self.beta_proj(x_BNC[:, t])).sigmoid()[..., None, None]
            turn = alpha_BNH[:, t, :, None, None] * (eye - beta_BH11 * k.unsqueeze(-1) * k.unsqueeze(-2))
            state_BHDE = turn @ state_BHDE + beta_BH11 * k.unsqueeze(-1) * v.unsqueeze(-2)
            o.append(torch.einsum("bhd,bhde->bhe", q, state_BHDE) / self.key_size**0.5)
        return self._merge(torch.stack(o, 1).to(x_BNC.dtype), x_BNC)

    def count(self, sizes: Sizes) -> Cost:
        """Projections, taps, and each token read, written and recalled; the torch backend also multiplies zeros."""
        tokens, lags = sizes.queries, len(self.taps)
        projections = projection_flops(self, sizes.batch * tokens)
        seen = sum(min(t + 1, lags) for t in range(min(tokens, lags))) + max(tokens - lags, 0) * lags
        per_tap = 2 * sizes.batch * sum(self.widths)
        needed, made = flops(tokens, self.key_size, self.value_size)
        copies = sizes.batch * self.site.heads
        pairs = Mask(causal=True).area(tokens, sizes.keys, sizes.batch, self.site.heads)
        return Cost(
            projections + per_tap * seen + copies * needed, projections + per_tap * tokens * lags + copies * made, pairs
        )

    def start(self, batch: int, like: Tensor) -> DeltaState:
        """S zero, no token."""
        sums = wide(like.new_zeros(batch, self.site.heads, self.key_size, self.value_size))
        return DeltaState(sums, like.new_zeros(batch, len(self.taps) - 1, sum(self.widths)))


def _unit(x: Tensor) -> Tensor:
    """Each head of each token at length 1; 0 where it is 0."""
    return (wide(x) * (wide(x).pow(2).sum(-1, keepdim=True) + LENGTH_EPS).rsqrt()).to(x.dtype)
