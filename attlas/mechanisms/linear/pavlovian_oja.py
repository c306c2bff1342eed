"""Conditioning that fades: the Hebbian sum of outcomes times stimuli, with a decay of Oja's kind.

    M_t = M_{t-1} + rate (v_t k_t^T - decay M_{t-1}),    o_t = M_t q_t

A key is the conditional stimulus of a trial, its value the outcome, a query the test stimulus. An association fades
with every later trial, whatever that trial shows, by 1 - rate decay; under equal trials M settles at v k^T / decay. In
Oja's own rule the decay is the squared output; here it is a constant, so that the memory stays linear in the outcomes.
decay = 0 is Hebb's rule.

q, k (B, H, N, D), v (B, H, N, E). There is no scale and no normaliser; the shell divides the output by its root mean
square over all channels. A padded token neither enters M nor lets it fade.

Time O(N D E), memory O(N D); the state is M / rate, D E numbers per head, in float32 at least.

Source: "Understanding Transformers through the Lens of Pavlovian Conditioning", 2025 (arXiv:2508.08289), which has no
official code: the constant decay, the default values and the normalisation in the shell are a reconstruction.
"""

import math

import torch
from torch import Tensor

from attlas.core.errors import BadInput
from attlas.core.mechanism import Call, Site
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.decay import decayed_linear_attention, flops
from attlas.ops.precision import as_written
from attlas.ops.recurrent import RecurrentAttend

SPEC = Spec(
    name="pavlovian_oja",
    title="Understanding Transformers through the Lens of Pavlovian Conditioning",
    year=2025,
    paper="arXiv:2508.08289",
    equation="o_t = M_t q_t,  M_t = M_{t−1} + η (v_t k_tᵀ − λ M_{t−1})",
    complexity="O(N D²) time, O(D²) state",
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    streams=True,
    shell={"output_norm": "simple_rms"},
    reconstruction=True,
    examples=(
        Example(parameters=4 * (16 * 16 + 16)),
        Example(heads=4, grid=(2, 4), prefix=1, params={"rate": 0.5, "decay": 0.4}, parameters=4 * (16 * 16 + 16)),
    ),
)


@register(SPEC)
class PavlovianOja(RecurrentAttend):
    """An associative memory that adds and fades.

    Args:
        site: where it is installed.
        backend: of `decayed_linear_attention`.
        rate: share of a trial that is learned; above 0.
        decay: what each trial takes from what was known, before the rate; rate decay is below 1.
    """

    def __init__(self, site: Site, backend: str = "auto", *, rate: float = 1.0, decay: float = 0.02) -> None:
        super().__init__(site, backend)
        if not 0 < rate < math.inf:
            raise BadInput(f"rate is the share of a trial that is learned, above 0, got {rate}")
        if not 0 <= rate * decay < 1:
            raise BadInput(f"rate times decay is forgotten in each trial, a share in [0, 1), got {rate} x {decay}")
        self.rate, self.decay = rate, decay
        # No buffer, and not on "meta" with a model that is: it forgets at the same rate in bfloat16.
        self.slopes = torch.full((site.heads,), -math.log1p(-rate * decay), dtype=torch.float64, device="cpu")

    def recur(
        self, q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, keep: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Run the op."""
        slopes = self.slopes.to(q.device, torch.promote_types(q.dtype, torch.float32))
        with as_written(q):
            o, sums = decayed_linear_attention(q, k, v, slopes, state, keep, backend=self.backend)
        return o * self.rate, sums

    def oracle(self, q_BHND: Tensor, k_BHMD: Tensor, v_BHME: Tensor, call: Call) -> Tensor:
        """The rule as it is written, trial by trial."""
        ahead = k_BHMD.shape[2] - q_BHND.shape[2]
        memory_BHED = v_BHME.new_zeros(*v_BHME.shape[:2], v_BHME.shape[3], k_BHMD.shape[3])
        rows = []
        for t in range(k_BHMD.shape[2]):
            learned = v_BHME[:, :, t, :, None] * k_BHMD[:, :, t, None, :]
            after = memory_BHED + self.rate * (learned - self.decay * memory_BHED)
            if call.mask.keys is not None:
                after = torch.where(call.mask.keys[:, t, None, None, None], after, memory_BHED)
            memory_BHED = after
            if t >= ahead:
                rows.append((memory_BHED @ q_BHND[:, :, t - ahead, :, None]).squeeze(-1))
        return torch.stack(rows, 2)

    def head_flops(self, tokens: int, size: int) -> tuple[int, int]:
        """Those of the op."""
        return flops(tokens, size, size)
