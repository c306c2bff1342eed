"""Visual attention redistribution (VAR): what heads spend on sinks goes to the image, at inference.

    sink_m = max_{d in dims} |RMSNorm(h_m)_d| > τ                   by the layer's input h, no weight
    a = softmax(q kᵀ / √D + bias)
    S_n = Σ_{m in image} a_nm,   R_n = Σ_{m in image, sink} a_nm / Σ_{m in image} (a_nm + 10⁻⁶)

A row (head, query n) is changed where it looks at the image, S ≥ s, and not at its sinks alone, R ≤ ρ:

    a'_nm = p a_nm                                                  for every sink, of the image or not
    a'_nm = a_nm (1 + (1 - p) Σ_{sinks} a_n / Σ_{image, no sink} a_n)   for the rest of the image

and a' = a elsewhere, so that rows still sum to 1. Only queries behind the image are changed, and only in
sequences with a sink in the image. A few dimensions are large in sinks; which, is a matter of the language
model: 1415 and 2533 in LLaMA-2-7B, 2100 and 4743 in LLaMA-2-13B. Without `image` or `dims` this is softmax
attention.

tokens h (B, N, C), q (B, H, N, D), k (B, G, M, D), v (B, G, M, E). Positions count real tokens, so that padding
on the left does not move the image. RMSNorm undoes a norm without a weight; a layer that is given tokens behind
a norm with one sees them weighted. Sinks are judged token by token: the state is a key/value cache and one flag
per token. (The official code judges the prompt and takes no later token for a sink.) The published method leaves
the first two layers and the last as they are: choose layers accordingly. Weights are made in float32 or better,
O(H N M) memory.

Source: Kang et al., "See What You Are Told: Visual Attention Sink in Large Multimodal Models", 2025
(arXiv:2503.03321), official code seilk/VisAttnSink.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attlas.core.errors import BadInput
from attlas.core.mask import Mask
from attlas.core.mechanism import Attend, Call, Cost, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import EVERY_MASK, Example, Pattern, Spec
from attlas.core.state import KVCache, Rows
from attlas.ops.pairs import pair_cost, weighted_values
from attlas.ops.precision import wide
from attlas.ops.softmax import attention_weights, repeat_heads

EPSILON = 1e-6

SPEC = Spec(
    name="attention_sink",
    title="See What You Are Told: Visual Attention Sink in Large Multimodal Models",
    year=2025,
    paper="arXiv:2503.03321",
    equation="a′ = p a at sinks, the rest of the image takes the difference;  a = softmax(q kᵀ / √D + bias)",
    complexity="O(N² D) time, O(N D) state",
    patterns=frozenset({Pattern.CAUSAL_SELF, Pattern.NONCAUSAL_SELF}),
    masks=EVERY_MASK,
    streams=True,
    grouped=True,
    examples=(
        Example(
            params={"image": (1, 3), "dims": (0, 5), "tau": 0.8, "rho": 0.95, "summ": 0.05},
            parameters=4 * (16 * 16 + 16),
        ),
        Example(
            heads=4,
            kv_heads=2,
            grid=(9,),
            params={"image": (2, 4), "dims": (3, 7, 11), "tau": 1.2, "rho": 0.9, "summ": 0.1, "p": 0.3},
            parameters=2 * (16 * 16 + 16) + 2 * (16 * 8 + 8),
        ),
    ),
)


class SinkState(NamedTuple):
    """Keys and values so far, and which tokens are sinks, (B, 1, M)."""

    cache: KVCache
    sinks: Rows


@register(SPEC)
class AttentionSink(Attend):
    """Softmax attention that gives the weight of sinks to the image.

    Args:
        site: where it is installed.
        backend: `auto`, `torch` or `oracle`.
        image: (first position, number of positions) of the image in every sequence; None for no image.
        dims: the channels that are large in sinks.
        tau: τ, above which a channel makes a sink.
        rho: ρ, the largest share of sinks in what a row sees of the image.
        summ: s, the least weight that a row has on the image.
        p: what a sink keeps of its weight; 1 changes nothing.
        scale: of the scores; D ** -0.5 by default.
    """

    def __init__(
        self,
        site: Site,
        backend: str = "auto",
        *,
        image: tuple[int, int] | None = None,
        dims: Sequence[int] = (),
        tau: float = 20.0,
        rho: float = 0.5,
        summ: float = 0.2,
        p: float = 0.6,
        scale: float | None = None,
    ) -> None:
        super().__init__(site, backend)
        if image is not None and (len(image) != 2 or image[0] < 0 or image[1] < 1):
            raise BadInput(f"image is (first position, number of positions), at least (0, 1), got {image}")
        if not all(0 <= dim < site.dim for dim in dims):
            raise BadInput(f"dims are channels from 0 to {site.dim - 1}, got {list(dims)}")
        if not tau >= 0:
            raise BadInput(f"tau is the magnitude above which a channel makes a sink, at least 0, got {tau}")
        for name, value in (("rho", rho), ("summ", summ), ("p", p)):
            if not 0 <= value <= 1:
                raise BadInput(f"{name} is a share from 0 to 1, got {value}")
        self.image, self.dims = image, list(dims)
        self.tau, self.rho, self.summ, self.p = tau, rho, summ, p
        self.scale = scale

    def find_sinks(self, tokens_BNC: Tensor) -> Tensor:
        """Which tokens are sinks, (B, N)."""
        if not self.dims:
            return tokens_BNC.new_zeros(tokens_BNC.shape[:2], dtype=torch.bool)
        h_BNC = F.rms_norm(wide(tokens_BNC), tokens_BNC.shape[-1:], eps=EPSILON)
        return h_BNC[..., self.dims].abs().amax(-1) > self.tau

    def compute(self, q_BHND: Tensor, k_BGMD: Tensor, v_BGME: Tensor, call: Call) -> Tensor:
        """Find the sinks and attend."""
        return self._attend(q_BHND, k_BGMD, v_BGME, call.mask, self._sinks(call.tokens, q_BHND, k_BGMD))

    def _sinks(self, tokens: Tensor | None, q: Tensor, k: Tensor) -> Tensor:
        shape = (q.shape[0], k.shape[2], self.site.dim)
        if tokens is None or tokens.shape != shape:
            raise BadInput(
                f"attention_sink finds sinks in the tokens that keys are made of: pass tokens of shape {shape} "
                f"(a layer of attlas.mixer does), got {None if tokens is None else tuple(tokens.shape)}"
            )
        return self.find_sinks(tokens)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, sinks_BM: Tensor) -> Tensor:
        a = attention_weights(wide(q), wide(k), mask, self.scale)
        if self.image is not None:
            span_BM, after_BN = self._places(mask.keys, sinks_BM, q.shape[2])
            spared_BM = span_BM & ~sinks_BM

            def total(chosen_BM: Tensor) -> Tensor:
                return a.where(chosen_BM[:, None, None], 0).sum(-1, keepdim=True)

            image, visual, rest = total(span_BM), total(span_BM & sinks_BM), total(spared_BM)
            share = visual / (image + EPSILON * span_BM.sum(-1)[:, None, None, None]).clamp(min=EPSILON)
            chosen = (share <= self.rho) & (image >= self.summ) & (rest > 0)
            chosen = chosen & after_BN[:, None, :, None] & (span_BM & sinks_BM).any(-1)[:, None, None, None]
            gain = 1 + (1 - self.p) * total(sinks_BM) / rest.where(chosen, 1)
            factor = gain.where(spared_BM[:, None, None], 1).masked_fill(sinks_BM[:, None, None], self.p)
            a = torch.where(chosen, a * factor, a)
        return weighted_values(a.to(v.dtype), v, mask)

    def _places(self, keys: Tensor | None, sinks_BM: Tensor, queries: int) -> tuple[Tensor, Tensor]:
        """Which keys are the image, (B, M), and which queries stand behind it, (B, N)."""
        assert self.image is not None
        start, stop = self.image[0], sum(self.image)
        real_BM = torch.ones_like(sinks_BM) if keys is None else keys
        place_BM = real_BM.cumsum(-1) - 1
        return real_BM & (place_BM >= start) & (place_BM < stop), place_BM[:, place_BM.shape[1] - queries :] >= stop

    def initial_state(self, batch: int, like: Tensor) -> SinkState:
        """No token yet."""
        size = self.site.head_dim
        cache = KVCache.empty(batch, self.site.kv_heads, size, size, like)
        return SinkState(cache, Rows(like.new_empty(batch, 1, 0, dtype=torch.bool)))

    def advance(
        self, q: Tensor, k: Tensor, v: Tensor, state: SinkState, keep: Tensor | None, tokens: Tensor | None
    ) -> tuple[Tensor, SinkState]:
        """Judge the segment's tokens, then attend to all so far."""
        sinks = state.sinks.append(self._sinks(tokens, q, k)[:, None])
        cache = state.cache.append(k, v, keep)
        mask = Mask(causal=True, keys=cache.keys, queries=keep)
        run = self._rows if self.backend == "oracle" else self._attend
        return run(q, cache.k.rows, cache.v.rows, mask, sinks.rows[:, 0]), SinkState(cache, sinks)

    def oracle(self, q_BHND: Tensor, k_BGMD: Tensor, v_BGME: Tensor, call: Call) -> Tensor:
        """Row by row, sinks and image as lists of positions."""
        return self._rows(q_BHND, k_BGMD, v_BGME, call.mask, self._sinks(call.tokens, q_BHND, k_BGMD))

    def _rows(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, sinks_BM: Tensor) -> Tensor:
        batch, heads, queries, _ = q.shape
        keys = k.shape[2]
        weights = attention_weights(q, k, mask, self.scale).clone()
        start, size = self.image or (0, 0)
        for b in range(batch):
            real = list(range(keys)) if mask.keys is None else mask.keys[b].nonzero().flatten().tolist()
            image = real[start : start + size]
            sinks = [m for m in real if sinks_BM[b, m]]
            visual = [m for m in image if m in sinks]
            others = [m for m in image if m not in sinks]
            behind = [
                n for n in range(queries) if len(real) > start + size and n + keys - queries >= real[start + size]
            ]
            for h in range(heads):
                for n in behind if visual else []:
                    a = weights[b, h, n].clone()
                    share = a[visual].sum() / (a[image] + EPSILON).sum()
                    if share > self.rho or a[image].sum() < self.summ or not a[others].sum() > 0:
                        continue
                    budget = (1 - self.p) * a[sinks].sum()
                    weights[b, h, n, sinks] = self.p * a[sinks]
                    weights[b, h, n, others] = a[others] + budget * a[others] / a[others].sum()
        return weights @ repeat_heads(v, heads)

    def count(self, sizes: Sizes) -> Cost:
        """That of softmax attention."""
        return pair_cost(self.site, sizes)
