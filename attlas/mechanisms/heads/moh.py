"""Mixture-of-head attention: softmax attention in which every token picks its heads.

    o_n,h = g_h(x_n) Σ_m softmax_m(q_n · k_m / √D + bias_nm) v_m

The first h_s heads are shared: every token uses them. Of the other h_r a token uses the K with the highest
p = softmax(W_r x); all other gates are 0.

    g = w₁ h_s softmax(W_s x)                over the shared heads; without the softmax when there is one
    g = w₂ K p_h / (sum of the K kept p)     over the kept ones
    [w₁, w₂] = 2 softmax(W_b x);             both 1 when all heads are shared or none is

so that routers of zeros and K = h_r give gates of 1, plain attention. These are the scales of the official
code; the paper has no factors h_s, K and 2, and does not renormalise. The router sees the tokens that the
queries are made of, in float32 or better: a rounded score could pick another head. In training `auxiliary` is
the balance loss

    balance h_r² mean_h(mean_n p_nh · mean_n kept_nh) / layers

over real tokens: balance K for even use of the heads, balance h_r where all tokens pick the same.

tokens (B, N, C), q (B, H, N, D), k (B, G, M, D), v (B, G, M, E). The mathematics needs kept (token, head) pairs
only, a share (h_s + K) / H of O(N M D H), and keys and values of all heads: `Cost.flops` and `Cost.pairs` count
that. The official code and the backends here compute all heads and multiply by the gates, which is
`Cost.executed`. The state is a key/value cache.

Source: Jin et al., "MoH: Multi-Head Attention as Mixture-of-Head Attention", 2024 (arXiv:2410.11842),
official code SkyworkAI/MoH: MoH-DiT has this attention, MoH-ViT the same gates on a cosine attention. By
default a quarter of the heads is shared and half of all are picked, the plan of the "75 %" models at 12 and 16
heads; the variant "50" is that of the 50 % model at 16.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.core.errors import BadInput, share
from attlas.core.mask import Mask
from attlas.core.mechanism import CachedAttend, Call, Cost, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import ALL_PATTERNS, EVERY_MASK, Example, Pattern, Spec
from attlas.ops.precision import as_written, wide
from attlas.ops.softmax import softmax_attention

PROJECTIONS = 4 * (16 * 16 + 16)

SPEC = Spec(
    name="moh",
    title="MoH: Multi-Head Attention as Mixture-of-Head Attention",
    year=2024,
    paper="arXiv:2410.11842",
    equation="o_h = g_h(x) softmax(q kᵀ / √D + bias) v, most g_h = 0",
    complexity="O(N² D) time on active heads, O(N D) state",
    patterns=ALL_PATTERNS,
    masks=EVERY_MASK,
    streams=True,
    grouped=True,
    variants={"50": {"shared_heads": 1 / 8, "active_heads": 3 / 8}},
    examples=(
        Example(heads=4, parameters=PROJECTIONS + 16 * (3 + 2)),
        Example(
            heads=8,
            kv_heads=4,
            grid=(9,),
            params={"shared_heads": 3, "active_heads": 2},
            parameters=2 * (16 * 16 + 16) + 2 * (16 * 8 + 8) + 16 * (5 + 3 + 2),
        ),
        Example(
            heads=4,
            grid=(2, 3),
            prefix=1,
            params={"shared_heads": 0, "active_heads": 2},
            parameters=PROJECTIONS + 16 * 4,
            patterns=frozenset({Pattern.NONCAUSAL_SELF}),
        ),
        Example(
            heads=4,
            grid=(5,),
            params={"shared_heads": 4},
            parameters=PROJECTIONS + 16 * 4,
            patterns=frozenset({Pattern.NONCAUSAL_CROSS}),
        ),
    ),
)


def _softmax(router: nn.Linear, x: Tensor) -> Tensor:
    """The softmax of a router's scores, in float32 or better, whatever the precision around it."""
    with as_written(x):
        return F.linear(wide(x), wide(router.weight)).softmax(-1)


@register(SPEC)
class MoH(CachedAttend):
    """Mixture-of-head attention.

    Args:
        site: where it is installed; the balance loss is divided by its number of layers.
        backend: of the softmax attention.
        shared_heads: h_s, heads that every token uses; a quarter of all by default.
        active_heads: K, how many of the other heads a token uses; half of all by default.
        balance: coefficient of the balance loss.
        weight_dropout: share of the attention weights dropped in training.
    """

    def __init__(
        self,
        site: Site,
        backend: str = "auto",
        *,
        shared_heads: int | None = None,
        active_heads: int | None = None,
        balance: float = 0.01,
        weight_dropout: float = 0.0,
    ) -> None:
        super().__init__(site, backend)
        shared = site.heads // 4 if shared_heads is None else shared_heads
        if not 0 <= shared <= site.heads:
            raise BadInput(f"shared_heads is 0 to {site.heads}, the heads there are, got {shared}")
        routed = site.heads - shared
        active = min(max(1, site.heads // 2), routed) if active_heads is None else active_heads
        if not min(1, routed) <= active <= routed:
            raise BadInput(f"active_heads is {min(1, routed)} to {routed}, the heads that are not shared, got {active}")
        if balance < 0:
            raise BadInput(f"balance is a coefficient and cannot be negative, got {balance}")
        self.shared, self.routed, self.active = shared, routed, active
        self.balance = balance
        self.weight_dropout = share("weight_dropout", weight_dropout)
        self.pick = nn.Linear(site.dim, routed, bias=False) if routed else None
        self.weigh = nn.Linear(site.dim, shared, bias=False) if shared > 1 else None
        self.split = nn.Linear(site.dim, 2, bias=False) if shared and routed else None

    def compute(self, q_BHND: Tensor, k_BGMD: Tensor, v_BGME: Tensor, call: Call) -> Tensor:
        """All heads, times their gates."""
        gates_BNH = self.gates(self._check_tokens(call.tokens, q_BHND), call.mask.queries)
        dropout = self.weight_dropout if self.training else 0.0
        o_BHNE = softmax_attention(q_BHND, k_BGMD, v_BGME, call.mask, dropout=dropout, backend=self.backend)
        return o_BHNE * gates_BNH.transpose(1, 2).unsqueeze(-1).to(o_BHNE.dtype)

    def _check_tokens(self, tokens: Tensor | None, q: Tensor) -> Tensor:
        shape = (q.shape[0], q.shape[2], self.site.dim)
        if tokens is None or tokens.shape != shape:
            raise BadInput(
                f"moh picks heads by the tokens that queries are made of: pass tokens of shape {shape} "
                f"(a layer of attlas.mixer does), got {None if tokens is None else tuple(tokens.shape)}"
            )
        return tokens

    def gates(self, tokens_BNC: Tensor, keep_BN: Tensor | None = None) -> Tensor:
        """The gates (B, N, H), shared heads first. In training this sets the balance loss.

        Args:
            tokens_BNC: what the queries are made of.
            keep_BN: which tokens are real and count in the balance loss; None for all.
        """
        shared_BNS = wide(tokens_BNC.new_ones(*tokens_BNC.shape[:2], self.shared))
        if self.weigh is not None:
            shared_BNS = self.shared * _softmax(self.weigh, tokens_BNC)
        if self.pick is None:
            return shared_BNS
        p_BNR, kept_BNR = self._pick(self.pick, tokens_BNC, keep_BN)
        routed_BNR = p_BNR * kept_BNR
        routed_BNR = self.active * routed_BNR / routed_BNR.sum(-1, keepdim=True)
        if self.split is None:
            return routed_BNR
        w_BN2 = 2 * _softmax(self.split, tokens_BNC)
        return torch.cat([w_BN2[..., :1] * shared_BNS, w_BN2[..., 1:] * routed_BNR], -1)

    def _pick(self, router: nn.Linear, tokens_BNC: Tensor, keep_BN: Tensor | None) -> tuple[Tensor, Tensor]:
        """p and the 0/1 choice over the routed heads; sets the balance loss in training."""
        p_BNR = _softmax(router, tokens_BNC)
        kept_BNR = torch.zeros_like(p_BNR).scatter(-1, p_BNR.topk(self.active).indices, 1)
        if self.training:
            real_BN = torch.ones_like(p_BNR[..., 0]) if keep_BN is None else keep_BN.to(p_BNR)
            mean_BN1 = (real_BN / real_BN.sum().clamp(min=1)).unsqueeze(-1)
            share_R, use_R = (mean_BN1 * p_BNR).sum((0, 1)), (mean_BN1 * kept_BNR).sum((0, 1))
            coefficient = self.balance / self.site.layers * self.routed**2
            self.auxiliary = coefficient * (share_R * use_R).mean()
        return p_BNR, kept_BNR

    def oracle(self, q_BHND: Tensor, k_BGMD: Tensor, v_BGME: Tensor, call: Call) -> Tensor:
        """Token by token over the heads that it keeps, and over nothing else."""
        x_BNC, mask = self._check_tokens(call.tokens, q_BHND), call.mask
        batch, heads, queries, size = q_BHND.shape
        groups, keys = k_BGMD.shape[1:3]
        shape = (batch, heads, queries, keys)
        pairs = mask.pairs(queries, keys, q_BHND.device)
        seen = q_BHND.new_ones(shape, dtype=torch.bool) if pairs is None else pairs.expand(shape)
        bias = q_BHND.new_zeros(shape) if mask.bias is None else mask.bias.expand(shape)
        o_BHNE = v_BGME.new_zeros(*shape[:3], v_BGME.shape[3])
        for b in range(batch):
            for n in range(queries):
                for h, gate in self._kept(x_BNC[b, n]):
                    g, m = h // (heads // groups), seen[b, h, n]
                    scores = k_BGMD[b, g, m] @ q_BHND[b, h, n] * size**-0.5 + bias[b, h, n, m]
                    weights = F.dropout(scores.softmax(0), self.weight_dropout, self.training)
                    o_BHNE[b, h, n] = gate * (weights @ v_BGME[b, g, m])
        if self.training and self.pick is not None:
            self._pick(self.pick, x_BNC, mask.queries)  # sets the balance loss
        return o_BHNE

    def _kept(self, x_C: Tensor) -> list[tuple[int, Tensor]]:
        """The heads of one token with their gates."""
        w_shared, w_routed = 2 * _softmax(self.split, x_C) if self.split else x_C.new_ones(2)
        p_S = _softmax(self.weigh, x_C) if self.weigh else x_C.new_ones(1)
        kept = [(h, w_shared * self.shared * p_S[h]) for h in range(self.shared)]
        if self.pick is not None:
            p_R = _softmax(self.pick, x_C)
            chosen = p_R.argsort(descending=True)[: self.active].tolist()
            total = sum(p_R[r] for r in chosen)
            kept += [(self.shared + r, w_routed * self.active * p_R[r] / total) for r in chosen]
        return kept

    def count(self, sizes: Sizes) -> Cost:
        """Two products for each visible pair of a kept (token, head), and the routers."""
        batch, heads, size = sizes.batch, self.site.heads, self.site.head_dim
        mask = Mask(causal=self.site.causal and not sizes.cross)
        pairs = mask.area(sizes.queries, sizes.keys, batch, self.shared + self.active)
        routing = 2 * batch * sizes.queries * sum(router.numel() for router in self.parameters())
        everything = batch * heads * sizes.queries * sizes.keys
        return Cost(4 * pairs * size + routing, 4 * everything * size + routing, pairs)
