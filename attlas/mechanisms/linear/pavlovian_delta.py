"""Rescorla-Wagner conditioning: a trial teaches what its stimuli, all together, did not foretell.

    M_t = M_{t-1} + rate_h / max(1, |k_t|^2) (v_t - M_{t-1} k_t) k_t^T,    o_t = M_t q_t

A key is the compound of stimuli of a trial, its value the outcome, a query the test stimulus. Learning saturates; an
outcome of 0 extinguishes what was learned; a stimulus beside one that already foretells the outcome learns nothing
(blocking); as many associations as the keys have independent directions, at most D, are recalled exactly after enough
trials. The rate of each head is learned, the sigmoid of one number, or fixed. Beyond length 1 a stimulus learns no
faster: no key, however long, makes a step overshoot, so that M stays bounded at every rate up to 1.

q, k (B, H, N, D), v (B, H, N, E). There is no scale. A padded token leaves M as it is. With a fixed rate nothing is
learned outside M.

Time O(N D E), memory O(N D); the state is M, D E numbers per head, in float32 at least.

Source: "Understanding Transformers through the Lens of Pavlovian Conditioning", 2025 (arXiv:2508.08289), which has no
official code; the rule is Rescorla and Wagner's of 1972, the delta rule. The bound on long keys and the learned rate
are a reconstruction.
"""

import torch
from torch import Tensor, nn

from attlas.core.errors import BadInput
from attlas.core.mechanism import Call, Site
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.delta import flops, gated_delta_rule
from attlas.ops.precision import wide
from attlas.ops.recurrent import RecurrentAttend, keys_ahead

SPEC = Spec(
    name="pavlovian_delta",
    title="Understanding Transformers through the Lens of Pavlovian Conditioning",
    year=2025,
    paper="arXiv:2508.08289",
    equation="o_t = M_t q_t,  M_t = M_{t−1} + η (v_t − M_{t−1} k_t) k_tᵀ / max(1, |k_t|²)",
    complexity="O(N D²) time, O(D²) state",
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    streams=True,
    reconstruction=True,
    examples=(
        Example(parameters=4 * (16 * 16 + 16) + 2),
        Example(heads=4, grid=(2, 4), prefix=1, params={"rate": 0.7}, parameters=4 * (16 * 16 + 16)),
    ),
)


@register(SPEC)
class PavlovianDelta(RecurrentAttend):
    """An associative memory that corrects itself.

    Args:
        site: where it is installed.
        backend: of `gated_delta_rule`.
        rate: share of the difference that a trial corrects, in (0, 1]; None learns one per head, from a half on.
    """

    def __init__(self, site: Site, backend: str = "auto", *, rate: float | None = None) -> None:
        super().__init__(site, backend)
        if rate is not None and not 0 < rate <= 1:
            raise BadInput(f"rate is a share of the difference, in (0, 1], or None to learn it, got {rate}")
        self.rate = rate
        self.rate_logit = nn.Parameter(torch.zeros(site.heads)) if rate is None else None

    def recur(
        self, q: Tensor, k: Tensor, v: Tensor, state: Tensor | None, keep: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Run the op."""
        length_BHN1 = wide(k).square().sum(-1, keepdim=True).clamp(min=1)
        beta_BHN = (self._rates(length_BHN1) / length_BHN1).squeeze(-1)
        return gated_delta_rule(q, k, v, beta_BHN, None, state, keep, backend=self.backend)

    def _rates(self, like: Tensor) -> Tensor | float:
        """(H, 1, 1) in the dtype of `like`, or one number for all heads."""
        if self.rate is not None:
            return self.rate
        assert self.rate_logit is not None
        return self.rate_logit.to(like.dtype).sigmoid()[:, None, None]

    def oracle(self, q_BHND: Tensor, k_BHMD: Tensor, v_BHME: Tensor, call: Call) -> Tensor:
        """The rule as it is written, trial by trial."""
        ahead = keys_ahead(q_BHND.shape[2], k_BHMD.shape[2])
        memory_BHED = v_BHME.new_zeros(*v_BHME.shape[:2], v_BHME.shape[3], k_BHMD.shape[3])
        rows = []
        for t in range(k_BHMD.shape[2]):
            k_BHD1, v_BHE1 = k_BHMD[:, :, t, :, None], v_BHME[:, :, t, :, None]
            step = self._rates(k_BHD1) / k_BHD1.square().sum(2, keepdim=True).clamp(min=1)
            after = memory_BHED + step * (v_BHE1 - memory_BHED @ k_BHD1) @ k_BHD1.mT
            if call.mask.keys is not None:
                after = torch.where(call.mask.keys[:, t, None, None, None], after, memory_BHED)
            memory_BHED = after
            if t >= ahead:
                rows.append((memory_BHED @ q_BHND[:, :, t - ahead, :, None]).squeeze(-1))
        return torch.stack(rows, 2)

    def head_flops(self, tokens: int, size: int) -> tuple[int, int]:
        """Those of the op."""
        return flops(tokens, size, size)
