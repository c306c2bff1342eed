"""p-adapter: an adapter behind attention that passes messages over the attention graph by the p-Laplacian.

    h = W_o (P v),   P = softmax(q kᵀ / √D + bias)                     the layer that was there, frozen
    F = split(W_down W_o nodes),   nodes v (self), or q of queries and v of keys (cross)
    A_ij = P_ij ‖√(P_ij + ε) (F_j - F_i) + ε‖^(p-2),   ε = 10⁻⁸
    α_i = 1 / (Σ_j A_ij + 2μ/p),   F'_i = α_i (Σ_j A_ij F_j + (2μ/p) F_i),   μ = μ₀ (2 + tanh θ)
    y = h + W_up (GELU(W_gate h) ⊙ merge(F'))

p and θ are learned scalars. p = 2 is one step of a graph convolution over P; p < 2 gives weight to neighbours
that are alike and takes it from those that are not, which is what the edges between queries and values need. In
cross-attention the keys of the graph are pooled to `pooled_keys`, values and weights by their means (padding
counts as 0), so that a row of P then sums to less than 1.

By default these equations hold as they stand, and a token has no edge to itself: at j = i the difference is 0 and
its power with p < 2 unbounded. `released=True` is the published code instead: it keeps that edge, which ε bounds
at about 10⁶ and which leaves F' almost F in self-attention; and in cross-attention it loses the term with μ in
the sum (not in α).

x (B, N, C), context (B, M, C'); the adapter works in C / r channels, C / (r H) per head. Time O(N M C / r)
beside the layer's own, and as much memory for the differences. It adds 3 C² / r + C + 2 C / r + 2 parameters; the
published model has p = 1.25, μ₀ = 0.1 and 16 keys for questions, p = 1.5, μ₀ = 10 and 24 for entailment, p = 1.75,
μ₀ = 0.1 and 24 for captions. The state of causal self-attention is a key/value cache, and decoding equals the
full pass. (The published code decodes on the graph of queries and keys instead.) `PAdapter.from_layer` puts the
adapter on a layer that is trained.

Source: Wu et al., "p-Laplacian Adaptation for Generative Pre-trained Vision-Language Models", 2023
(arXiv:2312.10613), official code wuhy68/p-Adapter.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.core.errors import BadInput
from attlas.core.mask import Mask
from attlas.core.mechanism import Call, Cost, Mixer, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import EVERY_MASK, Example, Pattern, Spec
from attlas.core.state import KVCache
from attlas.ops.precision import wide
from attlas.ops.softmax import attention_weights

EPSILON = 1e-8

SPEC = Spec(
    name="p_adapter",
    title="p-Laplacian Adaptation for Generative Pre-trained Vision-Language Models",
    year=2023,
    paper="arXiv:2312.10613",
    equation="y = h + W_up (GELU(W_gate h) ⊙ F′),  F′ = α (A F + (2μ/p) F),  A = P ‖√P (Fⱼ − Fᵢ)‖^(p−2)",
    complexity="O(N² D) time, O(N D) state",
    patterns=frozenset({Pattern.NONCAUSAL_SELF, Pattern.CAUSAL_SELF, Pattern.NONCAUSAL_CROSS}),
    masks=EVERY_MASK,
    streams=True,
    examples=(
        Example(params={"reduction": 2}, parameters=4 * (16 * 16 + 16) + 2 * (16 * 8 + 8) + 8 * 16 + 16 + 2),
        Example(
            heads=4,
            grid=(5,),
            params={"reduction": 4, "p": 2.5, "pooled_keys": 3, "released": True},
            parameters=4 * (16 * 16 + 16) + 2 * (16 * 4 + 4) + 4 * 16 + 16 + 2,
        ),
    ),
)


def calibrate(p_NM: Tensor, f_ND: Tensor, f_MD: Tensor, p: Tensor | float, same_NM: Tensor | None = None) -> Tensor:
    """A = P ‖√(P + ε) (F_j - F_i) + ε‖^(p-2), over (..., N, M), of nodes (..., N, D) and (..., M, D).

    `same_NM` says where i = j; the difference there is 0 whatever F is, and so is its gradient.
    """
    difference = f_MD.unsqueeze(-3) - f_ND.unsqueeze(-2)
    if same_NM is not None:
        difference = difference.masked_fill(same_NM.unsqueeze(-1), 0)
    length = ((p_NM + EPSILON).sqrt().unsqueeze(-1) * difference + EPSILON).norm(dim=-1)
    return p_NM * length ** (p - 2)


@register(SPEC)
class PAdapter(Mixer):
    """Softmax attention with a p-Laplacian adapter behind it.

    Args:
        site: where it is installed; heads divide dim, and dim / reduction.
        backend: `auto`, `torch` or `oracle`.
        reduction: r, dim over the channels of the adapter.
        p: where the learned power starts.
        mu: μ₀, the scale of what a node keeps of itself.
        pooled_keys: how many keys the graph of cross-attention has, where there are more.
        released: the published code's form of the equations.
        context_dim: channels of the context; dim by default.
        bias: of W_q, W_k and W_v.
    """

    def __init__(
        self,
        site: Site,
        backend: str = "auto",
        *,
        reduction: int = 8,
        p: float = 1.25,
        mu: float = 0.1,
        pooled_keys: int = 16,
        released: bool = False,
        context_dim: int | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__(site, backend)
        if site.dim % site.heads:
            raise BadInput(f"heads must divide dim: {site.dim} channels do not split into {site.heads} heads")
        if reduction < 1 or site.dim % (reduction * site.heads):
            raise BadInput(
                f"reduction times heads must divide dim: {site.dim} channels, {site.heads} heads, got {reduction}"
            )
        if not (p > 1 and mu > 0):
            raise BadInput(f"p is above 1 and mu above 0, got {p} and {mu}")
        if pooled_keys < 1:
            raise BadInput(f"pooled_keys counts keys and is at least 1, got {pooled_keys}")
        self.narrow = site.dim // reduction
        self.mu, self.pooled_keys, self.released = mu, pooled_keys, released
        self.context_dim = site.dim if context_dim is None else context_dim
        self.q_proj, self.out_proj = nn.Linear(site.dim, site.dim, bias), nn.Linear(site.dim, site.dim)
        self.k_proj, self.v_proj = (nn.Linear(self.context_dim, site.dim, bias) for _ in "kv")
        self.down, self.gate = (nn.Linear(site.dim, self.narrow) for _ in range(2))
        self.up = nn.Linear(self.narrow, site.dim)
        self.p = nn.Parameter(torch.tensor(float(p)))
        self.theta = nn.Parameter(torch.zeros(()))

    @classmethod
    def from_layer(
        cls,
        layer: Mixer,
        *,
        reduction: int = 8,
        p: float = 1.25,
        mu: float = 0.1,
        pooled_keys: int = 16,
        released: bool = False,
    ) -> PAdapter:
        """The adapter around the projections of a softmax layer; they are the layer's own and are frozen.

        Args:
            layer: what `attlas.mixer("softmax", ...)` built, without norms, positions, gate, scale or shared
                heads. Its dropouts are not taken over.
            reduction, p, mu, pooled_keys, released: see the class.
        """
        site = layer.site
        plain = layer.spec.name == "softmax" and site.heads == site.kv_heads
        plain = plain and getattr(layer.attend, "scale", None) is None and getattr(layer, "gate_proj", None) is None
        plain = plain and type(layer.position).__name__ == "Position"
        size = getattr(layer, "query_heads", 0) * site.head_dim
        extra = [getattr(layer, name, None) for name in ("q_norm", "k_norm", "output_norm", "qk_activation")]
        if not (plain and size == site.dim and all(isinstance(module, nn.Identity) for module in extra)):
            raise BadInput(
                "a p-adapter goes around a softmax attlas.Attention with as many key/value heads as query heads of "
                f"size dim / heads and without norms, positions, a gate or another scale, got {layer}"
            )
        host = [cast(nn.Linear, getattr(layer, f"{name}_proj")) for name in ("q", "k", "v", "out")]
        self = cls(
            site,
            layer.backend,
            reduction=reduction,
            p=p,
            mu=mu,
            pooled_keys=pooled_keys,
            released=released,
            context_dim=host[1].in_features,
        ).to(host[0].weight)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (module.requires_grad_(False) for module in host)
        return self.train(layer.training)

    def compute(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Attend, then pass messages between all pairs at once."""
        source = x_BNC if context_BMC is None else context_BMC
        k_BHMD, v_BHMD = self._keys(source, call.mask.keys)
        return self._mix(x_BNC, k_BHMD, v_BHMD, call.mask, call.cross)

    def _keys(self, source: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        if source.shape[2] != self.context_dim:
            raise BadInput(f"context has {source.shape[2]} channels; build with context_dim={source.shape[2]}")
        k, v = self.k_proj(source), self.v_proj(source)
        if keep is not None:
            k, v = (x.where(keep[..., None], 0) for x in (k, v))
        return self._heads(k), self._heads(v)

    def _heads(self, x_BNC: Tensor) -> Tensor:
        return x_BNC.unflatten(-1, (self.site.heads, -1)).transpose(1, 2)

    def _features(self, nodes_BNC: Tensor) -> Tensor:
        return wide(self._heads(self.down(self.out_proj(nodes_BNC))))

    def _mix(self, x: Tensor, k: Tensor, v: Tensor, mask: Mask, cross: bool) -> Tensor:
        q_BNC, v_BMC = self.q_proj(x), v.transpose(1, 2).flatten(2)
        weights = attention_weights(self._heads(q_BNC), k, mask)
        h_BNC = self.out_proj((weights @ v).transpose(1, 2).flatten(2))
        queries, keys = weights.shape[2:]
        weights = wide(weights)
        if cross:
            if keys > self.pooled_keys:
                weights = F.adaptive_avg_pool1d(weights.flatten(0, 1), self.pooled_keys).unflatten(0, weights.shape[:2])
                v_BMC = F.adaptive_avg_pool1d(v_BMC.mT, self.pooled_keys).mT
            nodes_BHMD, mine_BHND = self._features(v_BMC), self._features(q_BNC)
            graph_BHNM = calibrate(weights, mine_BHND, nodes_BHMD, self.p)
        else:
            nodes_BHMD = self._features(v_BMC)
            mine_BHND = nodes_BHMD[:, :, keys - queries :]
            place = torch.arange(keys, device=x.device)
            same_NM = place[keys - queries :, None] == place
            graph_BHNM = calibrate(weights, mine_BHND, nodes_BHMD, self.p, same_NM)
            if not self.released:
                graph_BHNM = graph_BHNM.masked_fill(same_NM, 0)
        kept = 2 * self.mu * (2 + self.theta.tanh()) / self.p
        alpha_BHN1 = 1 / (graph_BHNM.sum(-1, keepdim=True) + kept)
        passed_BHND = graph_BHNM @ nodes_BHMD
        if not (self.released and cross):
            passed_BHND = passed_BHND + kept * mine_BHND
        message_BNC = (alpha_BHN1 * passed_BHND).transpose(1, 2).flatten(2).to(h_BNC.dtype)
        return h_BNC + self.up(F.gelu(self.gate(h_BNC)) * message_BNC)

    def oracle(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Node by node and neighbour by neighbour."""
        source = x_BNC if context_BMC is None else context_BMC
        k, v = self._keys(source, call.mask.keys)
        q_BNC, v_BMC = self.q_proj(x_BNC), v.transpose(1, 2).flatten(2)
        weights = attention_weights(self._heads(q_BNC), k, call.mask)
        h_BNC = self.out_proj((weights @ v).transpose(1, 2).flatten(2))
        queries, keys = weights.shape[2:]
        if call.cross and keys > self.pooled_keys:
            bins = [
                range(i * keys // self.pooled_keys, -(-(i + 1) * keys // self.pooled_keys))
                for i in range(self.pooled_keys)
            ]
            weights = torch.stack([weights[..., list(bin_)].mean(-1) for bin_ in bins], -1)
            v_BMC = torch.stack([v_BMC[:, list(bin_)].mean(1) for bin_ in bins], 1)
        nodes = self._heads(self.down(self.out_proj(v_BMC)))
        mine = self._heads(self.down(self.out_proj(q_BNC))) if call.cross else nodes
        mu = 2 * self.mu + self.mu * self.theta.tanh()
        rows = []
        for n in range(queries):
            total, passed = weights.new_zeros(weights.shape[:2]), torch.zeros_like(mine[:, :, n])
            for m in range(nodes.shape[2]):
                if not call.cross and m == n and not self.released:
                    continue
                edge = weights[:, :, n, m]
                # The difference of a node and itself is spelled as 0, so that no rounding of its gradient is left.
                gap = torch.zeros_like(mine[:, :, n]) if mine is nodes and m == n else nodes[:, :, m] - mine[:, :, n]
                squares = ((edge + EPSILON).sqrt()[..., None] * gap + EPSILON).square().sum(-1)
                edge = edge * squares ** ((self.p - 2) / 2)
                total, passed = total + edge, passed + edge[..., None] * nodes[:, :, m]
            alpha = 1 / (total + 2 * mu / self.p)
            message = alpha[..., None] * passed
            if not (call.cross and self.released):
                message = message + (alpha * 2 * mu / self.p)[..., None] * mine[:, :, n]
            rows.append(message.flatten(1))
        return h_BNC + self.up(F.gelu(self.gate(h_BNC)) * torch.stack(rows, 1))

    def start(self, batch: int, like: Tensor) -> KVCache:
        """No token yet."""
        size = self.site.dim // self.site.heads
        return KVCache.empty(batch, self.site.heads, size, size, like)

    def advance(self, x_BNC: Tensor, state: KVCache, keep: Tensor | None) -> tuple[Tensor, KVCache]:
        """Attend to the cache and the segment itself, and pass messages among them."""
        state = state.append(*self._keys(x_BNC, keep), keep)
        mask = Mask(causal=True, keys=state.keys, queries=keep)
        return self._mix(x_BNC, state.k.rows, state.v.rows, mask, cross=False), state

    def count(self, sizes: Sizes) -> Cost:
        """The layer, the adapter's projections, and messages along the edges."""
        dim, narrow, batch = self.site.dim, self.narrow, sizes.batch
        nodes = min(sizes.keys, self.pooled_keys) if sizes.cross else sizes.keys
        features = nodes + sizes.queries if sizes.cross else nodes
        per_query, per_key = 2 * dim * dim + 2 * dim * narrow, 2 * self.context_dim * dim
        linear = sizes.queries * per_query + sizes.keys * per_key + features * (dim * dim + dim * narrow)
        pairs = Mask(causal=self.site.causal).area(sizes.queries, sizes.keys, batch, self.site.heads)
        edges = batch * self.site.heads * sizes.queries * nodes if sizes.cross else pairs
        size, thin = dim // self.site.heads, narrow // self.site.heads
        flops = 2 * batch * linear + 4 * pairs * size + 2 * edges * thin
        executed = 2 * batch * (linear + sizes.queries * (2 * sizes.keys * dim + nodes * narrow))
        return Cost(flops, executed, pairs)
