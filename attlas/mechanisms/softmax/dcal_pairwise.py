"""Pair-wise cross-attention (PWCA): in training every image also sees the keys of another one, a distractor.

    o₁ = softmax([q₁ k₁ᵀ, q₁ k₂ᵀ] / √D) [v₁; v₂]    in training,    o₁ = softmax(q₁ k₁ᵀ / √D) v₁    else

Image 2 stands a random number of places, the same for all, further on in the batch, so never itself; labels stay
those of image 1. It has no parameters: the layer is a softmax layer with weights of its own or, as published, the
softmax layer itself, run a second time in each training step. `distract` switches the distractor off for the
plain one of these two runs. Masks and biases of image 2's keys are those that image 2 has for its own. With image
2 = image 1 all weights are halved and all keys doubled: the output is that of softmax attention.

q (B, H, N, D), k and v (B, G, M, D). Time O(N M D H), twice that in training.

Source: Zhu et al., "Dual Cross-Attention Learning for Fine-Grained Visual Categorization and Object
Re-Identification", 2022 (arXiv:2205.02151). No official code; how pairs are drawn is a reconstruction.
"""

import torch
from torch import Tensor

from attlas.core.errors import BadInput, share
from attlas.core.mask import Mask
from attlas.core.mechanism import Attend, Call, Cost, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import EVERY_MASK, Example, Pattern, Spec
from attlas.ops.softmax import softmax_attention

SPEC = Spec(
    name="dcal_pairwise",
    title="Dual Cross-Attention Learning for Fine-Grained Visual Categorization and Object Re-Identification",
    year=2022,
    paper="arXiv:2205.02151",
    equation="o₁ = softmax([q₁ k₁ᵀ, q₁ k₂ᵀ] / √D) [v₁; v₂] in training",
    complexity="O(N² D) time",
    patterns=frozenset({Pattern.NONCAUSAL_SELF, Pattern.NONCAUSAL_CROSS}),
    masks=EVERY_MASK,
    grouped=True,
    reconstruction=True,
    examples=(
        Example(parameters=4 * (16 * 16 + 16)),
        Example(grid=(2, 3), prefix=1, heads=4, kv_heads=2, parameters=2 * (16 * 16 + 16) + 2 * (16 * 8 + 8)),
    ),
)


def _pair(k_BGMD: Tensor, v_BGME: Tensor, mask: Mask, partner_B: Tensor, queries: int) -> tuple[Tensor, Tensor, Mask]:
    """Keys, values and mask with those of each one's partner behind them."""
    batch, keys = k_BGMD.shape[0], k_BGMD.shape[2]

    def join(x: Tensor, dim: int) -> Tensor:
        x = x.expand(batch, *x.shape[1:])
        return torch.cat([x, x[partner_B]], dim)

    seen = mask.pairs(queries, keys, k_BGMD.device)
    joint = Mask() if seen is None else Mask.pairs_(join(seen, 3))
    return join(k_BGMD, 2), join(v_BGME, 2), joint.with_(bias=None if mask.bias is None else join(mask.bias, 3))


@register(SPEC)
class Pairwise(Attend):
    """Pair-wise cross-attention.

    Args:
        site: where it is installed.
        backend: of the softmax attention.
        weight_dropout: share of the attention weights dropped in training.
    """

    distract: bool
    """Whether a forward in training has distractors."""

    def __init__(self, site: Site, backend: str = "auto", *, weight_dropout: float = 0.0) -> None:
        super().__init__(site, backend)
        self.weight_dropout = share("weight_dropout", weight_dropout)
        self.distract = True

    def compute(self, q_BHND: Tensor, k_BGMD: Tensor, v_BGME: Tensor, call: Call) -> Tensor:
        """Softmax attention, in training over the keys of a pair."""
        batch, mask = q_BHND.shape[0], call.mask
        if self.training and self.distract:
            if batch < 2:
                raise BadInput(
                    "a distractor is another image of the batch, got a batch of one: drop the last batch, set "
                    "distract = False or call eval()"
                )
            places = torch.arange(batch, device=q_BHND.device)
            shift = torch.randint(1, batch, (), device=q_BHND.device)
            k_BGMD, v_BGME, mask = _pair(k_BGMD, v_BGME, mask, (places + shift) % batch, q_BHND.shape[2])
        dropout = self.weight_dropout if self.training else 0.0
        return softmax_attention(q_BHND, k_BGMD, v_BGME, mask, dropout=dropout, backend=self.backend)

    oracle = compute  # the op's own oracle backend

    def count(self, sizes: Sizes) -> Cost:
        """Two products per pair, over twice as many keys in training."""
        batch, heads, size = sizes.batch, self.site.heads, self.site.head_dim
        keys = sizes.keys * (1 + (self.training and self.distract))
        pairs = batch * heads * sizes.queries * keys
        return Cost(4 * pairs * size, 4 * pairs * size, pairs)
