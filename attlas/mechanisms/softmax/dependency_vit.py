"""Reversed attention: tokens do not gather, they send; every child gives its message to its parents.

    o_j = Σ_i A_ij P_i M_i v_i,    A = softmax over j of q_i · k_j / √D + bias_ji

A_ij says to which parents j child i sends, so it is the senders' rows that sum to one, and what a receiver gets
grows with the number of its children. P (N, H), a softmax over heads of a linear map of the token, says through
which head child i sends; M in [0, 1], a sigmoid of another, how much it sends at all. Σ_h A_ij P_i M_i is the
strength of the dependency of i on j (`edges`); over j it sums to M_i. Down the depth messages only get fainter:
M of a layer is multiplied by M of the layer before, which is `incoming` (B, N) or None; `message` gives it on:

    for layer in layers:
        layer.attend.incoming = message
        y, message = layer(x), layer.attend.message(x)
        x = x + y

A mask says from whom a token may receive. No causal form: the sum over a child's parents would know the future.
q, k, v (B, H, N, D), tokens (B, N, C). Time O(N² D H), as softmax attention.

Source: Ding et al., "Visual Dependency Transformers: Dependency Tree Emerges from Reversed Attention", 2023
(arXiv:2304.03282). The official repository, dingmyu/DependencyViT, holds no code: how P and M are made of the
token, and that M is multiplied along the depth, are a reconstruction.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.core.errors import BadInput, share
from attlas.core.grid import Grid
from attlas.core.mask import Mask
from attlas.core.mechanism import Attend, Call, Cost, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import EVERY_MASK, Example, Pattern, Spec
from attlas.ops.pairs import dense_mask
from attlas.ops.precision import as_written, wide
from attlas.ops.softmax import attention_weights, blank_padding

PROJECTIONS = 4 * (16 * 16 + 16)

SPEC = Spec(
    name="dependency_vit",
    title="Visual Dependency Transformers: Dependency Tree Emerges from Reversed Attention",
    year=2023,
    paper="arXiv:2304.03282",
    equation="o = Aᵀ (P ⊙ M ⊙ v), A = softmax(q kᵀ / √D)",
    complexity="O(N² D) time",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    masks=EVERY_MASK,
    reconstruction=True,
    examples=(
        Example(grid=(3, 2), prefix=1, parameters=PROJECTIONS + (16 + 1) * (2 + 1)),
        Example(grid=(5,), heads=4, parameters=PROJECTIONS + (16 + 1) * (4 + 1)),
    ),
)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """In float32 or better, whatever the precision around it."""
    with as_written(x):
        return F.linear(wide(x), wide(layer.weight), wide(layer.bias))


@register(SPEC)
class DependencyViT(Attend):
    """Reversed attention.

    Args:
        site: where it is installed.
        backend: `auto`, `torch` or `oracle`.
        weight_dropout: share of the weights dropped in training.
    """

    incoming: Tensor | None
    """What the layer before left of each token's message, (B, N), or None for all."""

    def __init__(self, site: Site, backend: str = "auto", *, weight_dropout: float = 0.0) -> None:
        super().__init__(site, backend)
        self.select = nn.Linear(site.dim, site.heads)
        self.control = nn.Linear(site.dim, 1)
        self.incoming = None
        self.weight_dropout = share("weight_dropout", weight_dropout)

    def message(self, tokens_BNC: Tensor) -> Tensor:
        """M, (B, N): how much each token sends in this layer."""
        own_BN = _linear(self.control, tokens_BNC).sigmoid().squeeze(-1)
        if self.incoming is None:
            return own_BN
        if self.incoming.shape != own_BN.shape:
            raise BadInput(
                f"incoming is (batch, tokens) = {tuple(own_BN.shape)}, got {tuple(self.incoming.shape)}: set the "
                "message of the layer before for this batch, or None"
            )
        return self.incoming * own_BN

    def sent(self, tokens_BNC: Tensor, keep_BN: Tensor | None = None) -> Tensor:
        """P M, (B, H, N): what of each token goes through which head; nothing of padding."""
        sent_BNH = _linear(self.select, tokens_BNC).softmax(-1) * self.message(tokens_BNC).unsqueeze(-1)
        sent_BHN = sent_BNH.transpose(1, 2)
        return sent_BHN if keep_BN is None else sent_BHN.masked_fill(~keep_BN.unsqueeze(1), 0)

    def _check_call(self, q: Tensor, k: Tensor, tokens: Tensor | None) -> Tensor:
        if q.shape[2] != k.shape[2]:
            raise BadInput(f"senders and receivers are the same tokens, got {q.shape[2]} queries, {k.shape[2]} keys")
        shape = (q.shape[0], q.shape[2], self.site.dim)
        if tokens is None or tokens.shape != shape:
            raise BadInput(
                f"dependency_vit reads from the tokens what they send: pass tokens of shape {shape} (a layer of "
                f"attlas.mixer does), got {None if tokens is None else tuple(tokens.shape)}"
            )
        return tokens

    def _directed(self, q: Tensor, k: Tensor, mask: Mask) -> Tensor:
        """A, (B, H, N children, N parents)."""
        seen = mask.pairs(q.shape[2], k.shape[2], q.device)
        # Turned, padding closes the rows of senders; that nobody sends to padding has to be said again.
        turned = Mask(keys=mask.keys) & (Mask() if seen is None else Mask.pairs_(seen.mT))
        return attention_weights(q, k, turned.with_(bias=None if mask.bias is None else mask.bias.mT))

    def compute(self, q_BHND: Tensor, k_BHND: Tensor, v_BHNE: Tensor, call: Call) -> Tensor:
        """Scale what is sent, then send."""
        tokens_BNC = self._check_call(q_BHND, k_BHND, call.tokens)
        sent_BHN1 = self.sent(tokens_BNC, call.mask.queries).unsqueeze(-1)
        v_BHNE = (v_BHNE * sent_BHN1.to(v_BHNE.dtype)).masked_fill(sent_BHN1 == 0, 0)  # 0 times NaN is no 0
        q_BHND, k_BHND = blank_padding(call.mask.keys, q_BHND, k_BHND)
        weights_BHNN = F.dropout(self._directed(q_BHND, k_BHND, call.mask), self.weight_dropout, self.training)
        return weights_BHNN.to(v_BHNE.dtype).mT @ v_BHNE

    def edges(
        self,
        q_BHND: Tensor,
        k_BHND: Tensor,
        *,
        tokens: Tensor,
        mask: Mask | Tensor | None = None,
        grid: Grid | Sequence[int] | None = None,
    ) -> Tensor:
        """How strongly each child depends on each parent, over all heads: (B, N parents, N children)."""
        self._check_call(q_BHND, k_BHND, tokens)
        mask, _ = self._check(q_BHND.shape[0], q_BHND.shape[2], k_BHND.shape[2], False, mask, grid)
        weights_BHNN = self._directed(q_BHND, k_BHND, mask)
        return (wide(weights_BHNN) * self.sent(tokens, mask.queries).unsqueeze(-1)).sum(1).mT

    def oracle(self, q_BHND: Tensor, k_BHND: Tensor, v_BHNE: Tensor, call: Call) -> Tensor:
        """Child by child, parent by parent."""
        x_BNC = self._check_call(q_BHND, k_BHND, call.tokens)
        mask = call.mask
        batch, heads, tokens, size = q_BHND.shape
        seen, bias = dense_mask(mask, (batch, heads, tokens, tokens), q_BHND)
        rows = [[[v_BHNE[b, h, j] * 0 for j in range(tokens)] for h in range(heads)] for b in range(batch)]
        for b in range(batch):
            for i in range(tokens):
                if mask.queries is not None and not mask.queries[b, i]:
                    continue
                p_H = (self.select.weight @ x_BNC[b, i] + self.select.bias).softmax(0)
                m = (self.control.weight[0] @ x_BNC[b, i] + self.control.bias[0]).sigmoid()
                m = m if self.incoming is None else m * self.incoming[b, i]
                for h in range(heads):
                    real = seen[b, h, :, i] if mask.keys is None else seen[b, h, :, i] & mask.keys[b]
                    parents = real.nonzero()[:, 0]
                    scores = k_BHND[b, h, parents] @ q_BHND[b, h, i] / math.sqrt(size) + bias[b, h, parents, i]
                    for j, a in zip(parents.tolist(), scores.softmax(0), strict=True):
                        rows[b][h][j] = rows[b][h][j] + a * p_H[h] * m * v_BHNE[b, h, i]
        return torch.stack([torch.stack([torch.stack(row) for row in head]) for head in rows])

    def count(self, sizes: Sizes) -> Cost:
        """Two products for each pair, and two small projections of the tokens."""
        batch, heads, size = sizes.batch, self.site.heads, self.site.head_dim
        pairs = batch * heads * sizes.queries**2
        flops = 4 * pairs * size + 2 * batch * sizes.queries * self.site.dim * (heads + 1)
        return Cost(flops, flops, pairs)
