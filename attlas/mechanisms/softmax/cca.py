"""Compressed convolutional attention: softmax attention that is narrow from its first projection to its last.

    [q; k] = conv₂(conv₁([W_q x; W_k x])) + [m_q; m_k],     q = √D q/‖q‖,    k = τ √D k/‖k‖
    v_t    = [W_v x_t ; W_w x_{t−1}]
    o_n    = Σ_{m≤n} softmax_{m≤n}(q_n · k_m / √D) v_m,     y = W_o o

The model's nominal heads, dim / D of them, shrink to H = heads / C₁ query heads and G = heads / C₂ key/value heads
of the same size D, and nothing widens them again before W_o: attention, its cache and all four projections are
C₁ or C₂ times smaller. C₁ = C₂ is CCA, C₁ < C₂ shares each key/value head among H / G query heads (CCGQA). Three
things make up for the width. (1) Two causal convolutions over time, the first within a channel, the second within
a head; two zeros stand before the first of them and none before the second. (2) The means m of what enters them:
m_q = (q + k)/2 with k's head repeated for the query heads that share it, m_k the mean of m_q over those. (3) Values
half from the token, half from the one before it; the halves are halves of all G D channels, so that with an
even G the first heads are current and the last are delayed. q and k lie on a sphere, k scaled by one learned
τ per head, and then the first half of their features turns with the position. τ starts at 0: the first output is the
running mean of v, and the first step teaches τ alone.

x (B, N, C), q (B, H, N, D), k, v (B, G, N, D), u = [W_q x; W_k x] (B, N, (H + G) D). A padded token is a zero
wherever another position would reach it. A bias is added to the scores; pair masks are refused, because they could
not stop the convolutions.

Time O(N² D H); the state is 2 G D numbers per token, and the last two u and the last W_w x.

Source: Figliolia et al., "Compressed Convolutional Attention: Efficient Attention in a Compressed Latent Space",
2025 (arXiv:2510.04476); checked against ZayaAttention of huggingface/transformers, whose ZAYA1 is dim 2048, 16
nominal heads and the defaults here.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.core.errors import BadInput
from attlas.core.mask import Mask
from attlas.core.mechanism import Call, Cost, Mixer, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec, Takes
from attlas.core.state import KVCache
from attlas.ops.precision import wide
from attlas.ops.rotary import rotate
from attlas.ops.softmax import attention_weights, repeat_heads, softmax_attention

SPEC = Spec(
    name="cca",
    title="Compressed Convolutional Attention: Efficient Attention in a Compressed Latent Space",
    year=2025,
    paper="arXiv:2510.04476",
    equation="o = softmax(q kᵀ / √D) v in a latent space,  [q; k] = conv(W x) + mean,  v = [W_v x_t; W_w x_{t−1}]",
    complexity="O(N² D) time, O(N D) state",
    patterns=frozenset({Pattern.CAUSAL_SELF}),
    grids=(1,),
    prefix=False,
    masks=frozenset({Takes.PADDING, Takes.BIAS}),
    streams=True,
    examples=(
        Example(dim=32, heads=8, parameters=32 * (16 + 2 * 4) + 16 * 32 + 20 * 3 + 20 * (4 * 2 + 1) + 1),
        Example(
            heads=4,
            grid=(9,),
            params={"query_compression": 1, "kv_compression": 2, "kernels": (3, 2)},
            parameters=16 * (16 + 2 * 8) + 16 * 16 + 24 * 4 + 24 * (4 * 2 + 1) + 2,
        ),
        Example(
            heads=4,
            params={"query_compression": 2, "kv_compression": 2, "rotary": 1.0},
            parameters=16 * (8 + 2 * 8) + 8 * 16 + 16 * 3 + 16 * (4 * 2 + 1) + 2,
        ),
    ),
)


class CCAState(NamedTuple):
    """Latent keys and values, the last u (B, 2, (H + G) D), the last W_w x (B, 1, G D / 2), tokens so far."""

    cache: KVCache
    u: Tensor
    delayed: Tensor
    position: int


@register(SPEC)
class CCA(Mixer):
    """Compressed convolutional attention.

    Args:
        site: where it is installed; its heads are the nominal ones, of size dim / heads.
        backend: of `softmax_attention`.
        query_compression: C₁, how many times fewer query heads than nominal ones; 2 where these are even.
        kv_compression: C₂, how many times fewer key/value heads; 8, or the most that divides the nominal ones.
        kernels: positions that the two convolutions reach over, the token itself included.
        rotary: share of the features of a head that turns with the position.
        base: of the rotary angles.
    """

    def __init__(
        self,
        site: Site,
        backend: str = "auto",
        *,
        query_compression: int | None = None,
        kv_compression: int | None = None,
        kernels: tuple[int, int] = (2, 2),
        rotary: float = 0.5,
        base: float = 5e6,
    ) -> None:
        super().__init__(site, backend)
        if site.dim % site.heads:
            raise BadInput(f"heads must divide dim: {site.dim} channels do not split into {site.heads} heads")
        query_compression = math.gcd(site.heads, 2) if query_compression is None else query_compression
        kv_compression = math.gcd(site.heads, 8) if kv_compression is None else kv_compression
        for name, factor in (("query_compression", query_compression), ("kv_compression", kv_compression)):
            if factor < 1 or site.heads % factor:
                raise BadInput(f"{name} divides the {site.heads} nominal heads, got {factor}")
        if kv_compression % query_compression:
            raise BadInput(
                f"kv_compression is a multiple of query_compression, so that query heads share key/value heads "
                f"evenly; got {kv_compression} and {query_compression}"
            )
        if len(kernels) != 2 or min(kernels) < 1:
            raise BadInput(f"kernels are the sizes of two convolutions, each at least 1, got {kernels}")
        self.heads, self.kv_heads = site.heads // query_compression, site.heads // kv_compression
        self.size = site.dim // site.heads
        self.turning = int(rotary * self.size)
        if not 0 <= rotary <= 1 or self.turning % 2:
            raise BadInput(
                f"rotary is the share of the {self.size} features of a head that turn, in pairs: {rotary} makes "
                f"{rotary * self.size:g}; take an even number in 0 to {self.size}"
            )
        values = self.kv_heads * self.size
        if values % 2:
            raise BadInput(f"half of the value channels is delayed: {values} of them do not halve; use larger heads")
        self.reach = sum(kernels) - 2
        self.base = base
        queries, convolved = self.heads * self.size, (self.heads + self.kv_heads) * self.size
        self.q_proj = nn.Linear(site.dim, queries, bias=False)
        self.k_proj = nn.Linear(site.dim, values, bias=False)
        self.v_proj = nn.Linear(site.dim, values // 2, bias=False)
        self.delayed_proj = nn.Linear(site.dim, values // 2, bias=False)
        self.channel_conv = nn.Conv1d(convolved, convolved, kernels[0], groups=convolved)
        self.head_conv = nn.Conv1d(convolved, convolved, kernels[1], groups=self.heads + self.kv_heads)
        self.temperature = nn.Parameter(torch.zeros(self.kv_heads))
        self.out_proj = nn.Linear(queries, site.dim, bias=False)

    def compute(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Latents behind a history of zeros, and attention over them."""
        u, delayed = self._nothing(x_BNC.shape[0], x_BNC)
        q, k, v, *_ = self._latents(x_BNC, call.mask.keys, u, delayed, 0)
        return self._attend(q, k, v, call.mask)

    def _nothing(self, batch: int, like: Tensor) -> tuple[Tensor, Tensor]:
        values = self.kv_heads * self.size
        return like.new_zeros(batch, self.reach, self.heads * self.size + values), like.new_zeros(batch, 1, values // 2)

    def _latents(
        self, x_BNC: Tensor, keep_BN: Tensor | None, u: Tensor, delayed: Tensor, start: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """q, k and v of a segment at position `start`, behind the last u and W_w x; then the new last ones."""
        if keep_BN is not None:
            x_BNC = x_BNC.where(keep_BN.unsqueeze(-1), 0)
        q, k, shift = self.q_proj(x_BNC), self.k_proj(x_BNC), self.delayed_proj(x_BNC)
        u = torch.cat([u.to(q.dtype), torch.cat([q, k], -1)], 1)
        shift = torch.cat([delayed.to(shift.dtype), shift], 1)

        heads = (self.kv_heads, self.heads // self.kv_heads, self.size)
        mean_q_BNGSD = (q.unflatten(-1, heads) + k.unflatten(-1, (self.kv_heads, 1, self.size))) / 2
        mean = torch.cat([mean_q_BNGSD.flatten(2), mean_q_BNGSD.mean(3).flatten(2)], -1)
        mixed = self.head_conv(self.channel_conv(u.transpose(1, 2))).transpose(1, 2) + mean
        sphere = self.size**0.5 * F.normalize(
            wide(mixed.unflatten(-1, (-1, self.size))), dim=-1, eps=torch.finfo(torch.float32).eps
        )
        q_BNHD, k_BNGD = sphere.split([self.heads, self.kv_heads], 2)
        k_BNGD = k_BNGD * self.temperature[:, None]

        v_BNE = torch.cat([self.v_proj(x_BNC), shift[:, :-1]], -1)
        v_BGND = v_BNE.unflatten(-1, (self.kv_heads, self.size)).transpose(1, 2)
        q, k = (
            rotate(t.transpose(1, 2), start, features=self.turning, base=self.base).to(v_BGND.dtype)
            for t in (q_BNHD, k_BNGD)
        )
        return q, k, v_BGND, u[:, u.shape[1] - self.reach :], shift[:, -1:]

    def _attend(self, q_BHND: Tensor, k_BGMD: Tensor, v_BGMD: Tensor, mask: Mask) -> Tensor:
        o_BHND = softmax_attention(q_BHND, k_BGMD, v_BGMD, mask, backend=self.backend)
        return self.out_proj(o_BHND.transpose(1, 2).flatten(2))

    def oracle(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Head by head: taps of the convolutions written out, positions turned as complex numbers."""
        if call.mask.keys is not None:
            x_BNC = x_BNC.where(call.mask.keys.unsqueeze(-1), 0)
        batch, tokens = x_BNC.shape[:2]
        heads, kv_heads, size = self.heads, self.kv_heads, self.size
        shared = heads // kv_heads
        q = (x_BNC @ self.q_proj.weight.T).view(batch, tokens, heads, size)
        k = (x_BNC @ self.k_proj.weight.T).view(batch, tokens, kv_heads, size)
        means = [(q[:, :, h] + k[:, :, h // shared]) / 2 for h in range(heads)]
        means += [torch.stack(means[g * shared : (g + 1) * shared]).mean(0) for g in range(kv_heads)]

        zeros = x_BNC.new_zeros(batch, self.reach, size)
        first, last = self.channel_conv, self.head_conv
        assert first.bias is not None
        assert last.bias is not None
        length, latents = tokens + last.kernel_size[0] - 1, []
        for h, mean in enumerate(means):
            own = slice(h * size, (h + 1) * size)
            u = torch.cat([zeros, q[:, :, h] if h < heads else k[:, :, h - heads]], 1)
            taps = [first.weight[own, 0, i] * u[:, i : i + length] for i in range(first.kernel_size[0])]
            within = sum(taps) + first.bias[own]
            mixed = [within[:, i : i + tokens] @ last.weight[own, :, i].T for i in range(last.kernel_size[0])]
            y = sum(mixed) + last.bias[own] + mean
            latents.append(size**0.5 * y / y.norm(dim=-1, keepdim=True))

        latents_BHND, pairs = torch.stack(latents, 1), self.turning // 2
        place = torch.arange(tokens, device=x_BNC.device, dtype=x_BNC.dtype)
        speed = self.base ** (-torch.arange(pairs, device=x_BNC.device, dtype=x_BNC.dtype) / max(pairs, 1))
        angle = place[:, None] * speed
        turn = torch.polar(torch.ones_like(angle), angle)
        turned = torch.complex(latents_BHND[..., :pairs], latents_BHND[..., pairs : 2 * pairs]) * turn
        latents_BHND = torch.cat([turned.real, turned.imag, latents_BHND[..., 2 * pairs :]], -1)
        keys = latents_BHND[:, heads:] * self.temperature[:, None, None]

        before = torch.cat([x_BNC.new_zeros(batch, 1, x_BNC.shape[2]), x_BNC[:, :-1]], 1)
        v = torch.cat([x_BNC @ self.v_proj.weight.T, before @ self.delayed_proj.weight.T], -1)
        v = repeat_heads(v.view(batch, tokens, kv_heads, size).transpose(1, 2), heads)
        o = attention_weights(latents_BHND[:, :heads], keys, call.mask) @ v
        return o.transpose(1, 2).flatten(2) @ self.out_proj.weight.T

    def count(self, sizes: Sizes) -> Cost:
        """Projections, both convolutions, two products per visible pair."""
        batch, tokens, size = sizes.batch, sizes.queries, self.size
        per_token = self.site.dim * 2 * (self.heads + self.kv_heads) * size
        convolved = (self.heads + self.kv_heads) * size
        first, last = self.channel_conv.kernel_size[0], self.head_conv.kernel_size[0]
        taps = (tokens + last - 1) * first * convolved + tokens * last * size * convolved
        linear = 2 * batch * (tokens * per_token + taps)
        pairs = Mask(causal=True).area(tokens, tokens, batch, self.heads)
        return Cost(linear + 4 * pairs * size, linear + 4 * batch * self.heads * tokens**2 * size, pairs)

    def start(self, batch: int, like: Tensor) -> CCAState:
        """An empty cache behind zeros."""
        cache = KVCache.empty(batch, self.kv_heads, self.size, self.size, like)
        return CCAState(cache, *self._nothing(batch, like), 0)

    def advance(self, x_BNC: Tensor, state: CCAState, keep: Tensor | None) -> tuple[Tensor, CCAState]:
        """Latents of the segment behind the state's last ones; attention to the cache and the segment."""
        q, k, v, u, delayed = self._latents(x_BNC, keep, state.u, state.delayed, state.position)
        cache = state.cache.append(k, v, keep)
        y = self._attend(q, cache.k.rows, cache.v.rows, Mask(causal=True, keys=cache.keys, queries=keep))
        # Copies of the last rows, so that nothing keeps the whole segment alive.
        return y, CCAState(cache, u.clone(), delayed.clone(), state.position + x_BNC.shape[1])
