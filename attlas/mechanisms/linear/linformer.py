"""Linformer: keys and values are projected along the sequence to a fixed number of slots.

    o = softmax(q (E k)ᵀ / √D) F v

E and F (K, L) are learned and shared by all heads; `shared=True` makes F = E (key-value sharing), and layers that are
given one another's `projections` share them too (layerwise sharing). L is the length that the layer is built for: a
shorter sequence takes the first columns, a longer one is refused. Everything is in every slot, so that no output can
be causal.

q, k, v (B, H, N, D), N <= L. Padding is 0 to E and F. Prefix tokens and grids are taken in the order of the tokens.

Time O(N K D), memory O(N K), linear in N; 2 K L parameters, or K L.

Source: Wang et al., "Linformer: Self-Attention with Linear Complexity", 2020 (arXiv:2006.04768), official code in
facebookresearch/fairseq, examples/linformer, which puts E before the key projection: the same but for that
projection's bias, which does not pass through E there.
"""

import torch
from torch import Tensor, nn

from attlas.core.errors import BadInput, share
from attlas.core.mechanism import Attend, Call, Cost, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.softmax import blank_padding, softmax_attention

SPEC = Spec(
    name="linformer",
    title="Linformer: Self-Attention with Linear Complexity",
    year=2020,
    paper="arXiv:2006.04768",
    equation="o = softmax(q (E k)ᵀ / √D) F v",
    complexity="O(N K D) time",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    examples=(
        Example(params={"slots": 3}, parameters=4 * (16 * 16 + 16) + 2 * 3 * 7),
        Example(
            heads=4,
            grid=(2, 4),
            prefix=1,
            params={"slots": 4, "shared": True},
            parameters=4 * (16 * 16 + 16) + 4 * 9,
        ),
        Example(grid=(5,), parameters=4 * (16 * 16 + 16) + 2 * 256 * 5),
    ),
)


class Projections(nn.Module):
    """E and F, for one layer or several.

    Args:
        length: L, tokens of the longest sequence.
        slots: K.
        shared: F is E.
    """

    def __init__(self, length: int, slots: int, shared: bool = False) -> None:
        super().__init__()
        if slots < 1:
            raise BadInput(f"slots must be at least 1, got {slots}")
        self.keys = nn.Parameter(torch.empty(slots, length))
        self.values = self.keys if shared else nn.Parameter(torch.empty(slots, length))
        for weight in self.parameters():
            nn.init.xavier_uniform_(weight, gain=2**-0.5)


@register(SPEC)
class Linformer(Attend):
    """Attention to learned mixtures of all positions.

    Args:
        site: where it is installed; its length is L.
        backend: of the softmax attention.
        slots: K, mixtures that queries attend to.
        shared: values are mixed as keys are.
        projections: another layer's, to share them; `slots` and `shared` are then theirs.
        weight_dropout: share of the weights dropped in training.
    """

    def __init__(
        self,
        site: Site,
        backend: str = "auto",
        *,
        slots: int = 256,
        shared: bool = False,
        projections: Projections | None = None,
        weight_dropout: float = 0.0,
    ) -> None:
        super().__init__(site, backend)
        if projections is None:
            length = site.length if site.length is not None or site.grid is None else site.grid.tokens
            if length is None:
                raise BadInput(
                    "linformer learns a weight for every position: pass length, the longest sequence, when building it"
                )
            projections = Projections(length, slots, shared)
        self.projections = projections
        self.weight_dropout = share("weight_dropout", weight_dropout)

    def compute(self, q_BHND: Tensor, k_BHND: Tensor, v_BHNE: Tensor, call: Call) -> Tensor:
        """Mix, then attend to the mixtures."""
        k, v = blank_padding(call.mask.keys, k_BHND, v_BHNE)
        e_KN, f_KN = self._columns(k.shape[2])
        k_BHKD, v_BHKE = (e_KN @ k).to(k.dtype), (f_KN @ v).to(v.dtype)
        dropout = self.weight_dropout if self.training else 0.0
        return softmax_attention(q_BHND, k_BHKD, v_BHKE, dropout=dropout, backend=self.backend)

    def _columns(self, tokens: int) -> tuple[Tensor, Tensor]:
        keys, values = self.projections.keys, self.projections.values
        if tokens > keys.shape[1]:
            raise BadInput(
                f"this layer was built for sequences of up to {keys.shape[1]} tokens, got {tokens}: build it with "
                f"length={tokens}"
            )
        return keys[:, :tokens], values[:, :tokens]

    def oracle(self, q_BHND: Tensor, k_BHND: Tensor, v_BHNE: Tensor, call: Call) -> Tensor:
        """Slot by slot, query by query."""
        e_KN, f_KN = self._columns(k_BHND.shape[2])
        real = k_BHND.new_ones(k_BHND.shape[0], 1, k_BHND.shape[2], 1, dtype=torch.bool)
        if call.mask.keys is not None:
            real = call.mask.keys[:, None, :, None]
        slot_keys = [(torch.where(real, k_BHND, 0) * e_N[:, None]).sum(2) for e_N in e_KN]
        slot_values = [(torch.where(real, v_BHNE, 0) * f_N[:, None]).sum(2) for f_N in f_KN]
        rows = []
        for q_BHD in q_BHND.unbind(2):
            scores = torch.stack([(q_BHD * key).sum(-1) for key in slot_keys], -1) * q_BHD.shape[-1] ** -0.5
            odds = (scores - scores.amax(-1, keepdim=True)).exp()
            weights = odds / odds.sum(-1, keepdim=True)
            rows.append(sum(weights[..., i, None] * value for i, value in enumerate(slot_values)))
        return torch.stack(rows, 2)

    def count(self, sizes: Sizes) -> Cost:
        """Two mixtures and two products with them."""
        copies, slots = sizes.batch * self.site.heads, self.projections.keys.shape[0]
        flops = 4 * copies * slots * self.site.head_dim * (sizes.queries + sizes.keys)
        return Cost(flops, flops, copies * sizes.queries * sizes.keys)
