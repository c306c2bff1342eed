"""iLLaMA's soft mask: the weights of softmax attention, of which a share is taken from those on later tokens.

    o_n = Σ_m (ρ + (1 - ρ) [m <= n]) softmax_m(q_n · k_m / √D) v_m

In training ρ falls from 1, attention over all tokens, to 0, where no value flows back from later tokens. The mask
multiplies behind the softmax and rows are not normalised again: weights of an early token sum to less than 1, and its
sum over the keys still has the later ones in it, so that even at ρ = 0 the layer is not causal in the strict sense; the
last token sees all and is as in softmax attention. The strict form is the mechanism `softmax` with causal=True.

q, k, v (B, H, N, D). Time O(N² D), memory O(N²).

Source: Wang et al., "Adapting LLaMA Decoder to Vision Transformer", 2024 (arXiv:2404.06773), official code
techmonsterwang/iLLaMA. Rotary positions, learned places and the class token behind the patches belong to the network.
"""

import torch
from torch import Tensor

from attlas.core.errors import BadInput
from attlas.core.mask import Mask
from attlas.core.mechanism import Attend, Call, Cost, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.softmax import attention_weights, blank_padding

SPEC = Spec(
    name="illama",
    title="Adapting LLaMA Decoder to Vision Transformer",
    year=2024,
    paper="arXiv:2404.06773",
    equation="o = ((ρ + (1 − ρ) [m ≤ n]) ⊙ softmax(q kᵀ / √D)) v",
    complexity="O(N² D) time",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    examples=(
        Example(parameters=4 * (16 * 16 + 16)),
        Example(grid=(2, 3), prefix=1, heads=4, params={"softness": 0.25}, parameters=4 * (16 * 16 + 16)),
    ),
)


@register(SPEC)
class ILlama(Attend):
    """Softmax attention behind a soft causal mask.

    Args:
        site: where it is installed.
        backend: `auto`, `torch` or `oracle`.
        softness: ρ, from 1 for none of the mask to 0 for all of it; set the attribute to change it in training.
    """

    def __init__(self, site: Site, backend: str = "auto", *, softness: float = 0.0) -> None:
        super().__init__(site, backend)
        if not 0 <= softness <= 1:
            raise BadInput(f"softness is a share in [0, 1], got {softness}")
        self.softness = softness

    def compute(self, q_BHND: Tensor, k_BHMD: Tensor, v_BHME: Tensor, call: Call) -> Tensor:
        """Weights, mask, values."""
        k_BHMD, v_BHME = blank_padding(call.mask.keys, k_BHMD, v_BHME)
        weights_BHNM = attention_weights(q_BHND, k_BHMD, Mask(keys=call.mask.keys))
        if self.softness < 1:
            weights_BHNM = self.softness * weights_BHNM + (1 - self.softness) * weights_BHNM.tril()
        return weights_BHNM @ v_BHME

    def oracle(self, q_BHND: Tensor, k_BHMD: Tensor, v_BHME: Tensor, call: Call) -> Tensor:
        """Query by query."""
        tokens = q_BHND.shape[2]
        keep = q_BHND.new_ones(len(q_BHND), tokens, dtype=torch.bool) if call.mask.keys is None else call.mask.keys
        real_BHM = keep.unsqueeze(1).to(q_BHND)
        k_BHMD, v_BHME = (torch.where(keep[:, None, :, None], x, 0) for x in (k_BHMD, v_BHME))
        rows = []
        for n in range(tokens):
            raised = (torch.einsum("bhd,bhmd->bhm", q_BHND[:, :, n], k_BHMD) / q_BHND.shape[3] ** 0.5).exp() * real_BHM
            weights = raised / raised.sum(-1, keepdim=True).clamp(min=torch.finfo(raised.dtype).tiny)
            mask = torch.tensor([1.0 if m <= n else self.softness for m in range(tokens)]).to(weights)
            rows.append(torch.einsum("bhm,bhme->bhe", weights * mask, v_BHME))
        return torch.stack(rows, 2)

    def count(self, sizes: Sizes) -> Cost:
        """Scores of every pair, values of those that the mask lets through; torch multiplies all."""
        heads, size = sizes.batch * self.site.heads, self.site.head_dim
        every = heads * sizes.queries * sizes.keys
        pairs = every if self.softness else heads * sizes.queries * (sizes.queries + 1) // 2
        return Cost(2 * size * (every + pairs), 4 * size * every, pairs)
