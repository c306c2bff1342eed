"""Gated DeltaNet: the delta rule on a state that fades, as fast as the token says.

    S_t = α_t (1 − β_t k_tᵀ k_t) S_{t−1} + β_t k_tᵀ v_t,    o_t = q_t S_t / √D,    y_t = W_o (norm(o_t) * silu(W_g x_t))
    α_t = exp(−exp(A) softplus(w · x_t + b)),    β_t = σ(W_β x_t)

α clears the whole state, β replaces what is stored for one key: a head can do either, at each token. q, k and v are
silu(conv(W x)), the convolution over `convolution` tokens of each channel alone; q and k are divided by their length.
A and b are one number per head, at first such that exp(A) is uniform in 0 .. 16 and softplus(b) log-uniform in
0.001 .. 0.1. The norm divides each head by its root mean square and has one weight per feature, shared by the heads.
Padding is skipped, by the convolution too. With its defaults a layer has about 6 C² parameters, of which three quarters
belong to values, gate and output.

x (B, N, C), q, k (B, H, N, D), v (B, H, N, E). Time O(N D E H) beside the projections, memory O(N C); the state is S,
D E numbers per head in float32 at least, and the last `convolution` − 1 rows.

Sources: Yang et al., "Gated Delta Networks: Improving Mamba2 with Delta Rule", 2024 (arXiv:2412.06464), official code
fla-org/flash-linear-attention, where values are sized as multiples of the keys; β up to 2 after Grazzi et al.,
"Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues", 2024 (arXiv:2411.12537).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.core.mechanism import Site
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.delta_mixer import DeltaMixer
from attlas.ops.precision import wide

SPEC = Spec(
    name="gated_delta",
    title="Gated Delta Networks: Improving Mamba2 with Delta Rule",
    year=2024,
    paper="arXiv:2412.06464",
    equation="o_t = q_t S_t / √D,  S_t = α_t (1 − β_t k_tᵀ k_t) S_{t−1} + β_t k_tᵀ v_t",
    complexity="O(N D²) time, O(D²) state",
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    streams=True,
    examples=(
        Example(parameters=16 * (12 + 12 + 24) + 4 * (12 + 12 + 24) + 2 * 16 * 2 + 2 * 2 + 12 + 2 * 16 * 24),
        Example(
            dim=24,
            heads=3,
            grid=(2, 4),
            prefix=1,
            params={"expand_k": 0.5, "expand_v": 1.0, "convolution": 1, "largest_beta": 2.0},
            parameters=24 * (12 + 12 + 24) + (12 + 12 + 24) + 2 * 24 * 3 + 2 * 3 + 8 + 2 * 24 * 24,
        ),
    ),
)


@register(SPEC)
class GatedDelta(DeltaMixer):
    """The delta rule with a decay and an output gate.

    Args:
        site: where it is installed.
        backend: of `gated_delta_rule`.
        expand_k: channels of queries and keys, as a multiple of dim.
        expand_v: channels of values and gate, as a multiple of dim.
        convolution: tokens that the short convolutions see; 1 for the token alone.
        largest_beta: β lies between 0 and this; above 1 the state may change its sign along a key.
    """

    def __init__(
        self,
        site: Site,
        backend: str = "auto",
        *,
        expand_k: float = 0.75,
        expand_v: float = 1.5,
        convolution: int = 4,
        largest_beta: float = 1.0,
    ) -> None:
        super().__init__(site, backend, expand_k, expand_v, convolution, largest_beta)
        self.decay_proj = nn.Linear(site.dim, site.heads, bias=False)
        self.gate_proj = nn.Linear(site.dim, site.heads * self.value_size, bias=False)
        self.log_rate = nn.Parameter(torch.empty(site.heads).uniform_(1e-4, 16).log())
        step_H = torch.empty(site.heads).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.step_bias = nn.Parameter(step_H.expm1().log())  # softplus gives the step back

    def log_decay(self, x_BNC: Tensor) -> Tensor:
        """−exp(A) softplus(w · x + b)."""
        # log σ(−x) is −softplus(x), whose gradient torch.compile lays out differently than it runs.
        minus_step_BNH = F.logsigmoid(-(wide(self.decay_proj(x_BNC)) + wide(self.step_bias)))
        return wide(self.log_rate).exp() * minus_step_BNH

    def finish(self, o_BNV: Tensor, x_BNC: Tensor) -> Tensor:
        """The output gate."""
        return o_BNV * F.silu(self.gate_proj(x_BNC))
