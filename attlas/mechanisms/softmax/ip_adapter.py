"""IP-Adapter: decoupled cross-attention, one softmax over text tokens and one over image tokens.

    y = W_o (softmax(q kᵀ / √D) v + λ softmax(q k'ᵀ / √D) v')
    q = W_q x,  k = W_k t,  v = W_v t,   k' = W'_k i,  v' = W'_v i

Text t and image i ask one query, but never compete for its weight: λ = 0 is the text-to-image model that was
there, whose projections are frozen, and λ moves the picture in a straight line. Only W'_k, W'_v and what makes
the image tokens are trained. The context is [t; i], the last `image_tokens` of it the image's, and
what a mask hides is hidden in its own branch: where the text is all padding the image still speaks.

x (B, N, C), context (B, T + I, C'), H heads of size D = C / H. Time O(N (T + I) C) beside the projections; the
adapter adds 2 C C' parameters to a layer.

`ImagePrompt` makes I tokens of one embedding e, LayerNorm(W e) cut into I; where no image is given the tokens
are those of e = 0, not 0. `IPAdapter.from_layer` puts the adapter on a layer that is trained.

Source: Ye et al., "IP-Adapter: Text Compatible Image Prompt Adapter for Text-to-Image Diffusion Models", 2023
(arXiv:2308.06721), official code tencent-ailab/IP-Adapter. Stable Diffusion 1.5 has 16 such layers, C = 320
(5), 640 (5) and 1280 (6), C' = 768: 22,319,616 parameters with the maker of 4 tokens from 1024 features.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from attlas.core.errors import BadInput
from attlas.core.mask import Mask
from attlas.core.mechanism import Call, Cost, Mixer, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import EVERY_MASK, Example, Pattern, Spec
from attlas.ops.pairs import dense_mask
from attlas.ops.softmax import softmax_attention

SPEC = Spec(
    name="ip_adapter",
    title="IP-Adapter: Text Compatible Image Prompt Adapter for Text-to-Image Diffusion Models",
    year=2023,
    paper="arXiv:2308.06721",
    equation="y = Wₒ (softmax(q kᵀ / √D) v + λ softmax(q k′ᵀ / √D) v′),  k, v of text, k′, v′ of an image",
    complexity="O(N M D) time",
    patterns=frozenset({Pattern.NONCAUSAL_CROSS}),
    masks=EVERY_MASK,
    examples=(
        Example(parameters=6 * 16 * 16 + 16),
        Example(
            heads=4,
            grid=(2, 3),
            params={"image_tokens": 3, "scale": 0.6, "bias": True},
            parameters=4 * (16 * 16 + 16) + 2 * 16 * 16,
        ),
    ),
)


@register(SPEC)
class IPAdapter(Mixer):
    """Decoupled cross-attention to text and image.

    Args:
        site: where it is installed; heads divide dim.
        backend: of `softmax_attention`.
        image_tokens: how many tokens at the end of the context are the image's.
        scale: λ of the image; 1 in training, free afterwards: set `layer.scale`.
        context_dim: channels of the context; dim by default.
        bias: of W_q, W_k and W_v. W_o has one, W'_k and W'_v have none.
    """

    def __init__(
        self,
        site: Site,
        backend: str = "auto",
        *,
        image_tokens: int = 4,
        scale: float = 1.0,
        context_dim: int | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__(site, backend)
        if site.dim % site.heads:
            raise BadInput(f"heads must divide dim: {site.dim} channels do not split into {site.heads} heads")
        if image_tokens < 1:
            raise BadInput(f"image_tokens counts the image's tokens and is at least 1, got {image_tokens}")
        self.image_tokens, self.scale = image_tokens, scale
        self.context_dim = site.dim if context_dim is None else context_dim
        self.q_proj = nn.Linear(site.dim, site.dim, bias)
        self.k_proj, self.v_proj = (nn.Linear(self.context_dim, site.dim, bias) for _ in "kv")
        self.k_image, self.v_image = (nn.Linear(self.context_dim, site.dim, bias=False) for _ in "kv")
        self.out_proj = nn.Linear(site.dim, site.dim)

    @classmethod
    def from_layer(cls, layer: Mixer, image_tokens: int = 4, scale: float = 1.0) -> IPAdapter:
        """The adapter around the projections of a softmax cross-attention layer.

        The projections are the layer's own and are frozen; W'_k and W'_v start as copies of W_k and W_v.

        Args:
            layer: what `attlas.mixer("softmax", ...)` built, without norms, positions, gate, scale or shared
                heads. Its dropouts are not taken over.
            image_tokens, scale: see the class.
        """
        site = layer.site
        plain = layer.spec.name == "softmax" and not site.causal and site.heads == site.kv_heads
        plain = plain and getattr(layer.attend, "scale", None) is None and type(layer.position).__name__ == "Position"
        size = getattr(layer, "query_heads", 0) * site.head_dim
        extra = [getattr(layer, name, None) for name in ("q_norm", "k_norm", "output_norm", "qk_activation")]
        if not (plain and size == site.dim and all(isinstance(module, nn.Identity) for module in extra)):
            raise BadInput(
                "an IP-Adapter goes around a softmax attlas.Attention that is not causal, with as many key/value "
                f"heads as query heads of size dim / heads and without norms, positions or another scale, got {layer}"
            )
        q, k, v, out = (cast(nn.Linear, getattr(layer, f"{name}_proj")) for name in ("q", "k", "v", "out"))
        if out.bias is None or getattr(layer, "gate_proj", None) is not None:
            raise BadInput("an IP-Adapter goes around a layer with a bias of the output and without a gate")
        with torch.device("meta"):  # nothing of it stays
            self = cls(site, layer.backend, image_tokens=image_tokens, scale=scale, context_dim=k.in_features)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            module.requires_grad_(False) for module in (q, k, v, out)
        )
        self.k_image.weight = nn.Parameter(k.weight.detach().clone())
        self.v_image.weight = nn.Parameter(v.weight.detach().clone())
        return self.train(layer.training)

    def compute(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """One query, two softmaxes."""
        text_BTC, image_BIC = self._split(context_BMC, call.mask.keys)
        q_BHND = self._heads(self.q_proj(x_BNC))
        sources = ((text_BTC, self.k_proj, self.v_proj), (image_BIC, self.k_image, self.v_image))
        masks = _parts(call.mask, x_BNC.shape[1], (text_BTC.shape[1], self.image_tokens), x_BNC.device)
        text, image = (
            softmax_attention(q_BHND, self._heads(k(part)), self._heads(v(part)), mask, backend=self.backend)
            for (part, k, v), mask in zip(sources, masks, strict=True)
        )
        return self.out_proj((text + self.scale * image).transpose(1, 2).flatten(2))

    def _split(self, context: Tensor | None, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        assert context is not None  # it serves no other pattern
        if context.shape[2] != self.context_dim:
            raise BadInput(f"context has {context.shape[2]} channels; build with context_dim={context.shape[2]}")
        if context.shape[1] <= self.image_tokens:
            raise BadInput(
                f"the context is text followed by {self.image_tokens} image tokens, got {context.shape[1]} tokens "
                "in all; without text pass the tokens of an empty prompt"
            )
        context = context if keep is None else context.where(keep[..., None], 0)
        text = context.shape[1] - self.image_tokens
        return context[:, :text], context[:, text:]

    def _heads(self, x_BNC: Tensor) -> Tensor:
        return x_BNC.unflatten(-1, (self.site.heads, -1)).transpose(1, 2)

    def oracle(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Head by head, the weights written out."""
        context = torch.cat(self._split(context_BMC, call.mask.keys), 1)
        queries, keys, size = x_BNC.shape[1], context.shape[1], self.site.dim // self.site.heads
        text = torch.arange(keys, device=x_BNC.device) < keys - self.image_tokens
        seen, bias = dense_mask(call.mask, (x_BNC.shape[0], self.site.heads, queries, keys), x_BNC)
        q = self.q_proj(x_BNC)
        k = torch.where(text[:, None], self.k_proj(context), self.k_image(context))
        v = torch.where(text[:, None], self.v_proj(context), self.v_image(context))
        outputs = []
        for h in range(self.site.heads):
            head = slice(h * size, (h + 1) * size)
            scores = (torch.einsum("bnd,bmd->bnm", q[..., head], k[..., head]) / size**0.5 + bias[:, h]).exp()
            weights = torch.zeros_like(scores)
            for part, scale in ((text, 1.0), (~text, self.scale)):
                shares = scores.where(seen[:, h] & part, 0)
                total = shares.sum(-1, keepdim=True)
                weights = weights + scale * shares / total.where(total > 0, 1)
            outputs.append(torch.einsum("bnm,bmd->bnd", weights, v[..., head]))
        return self.out_proj(torch.cat(outputs, -1))

    def count(self, sizes: Sizes) -> Cost:
        """The projections, each token of the context by one pair of them, and two products per pair."""
        dim, batch = self.site.dim, sizes.batch
        projections = sizes.queries * 2 * dim * dim + sizes.keys * 2 * self.context_dim * dim
        flops = 2 * batch * projections + 4 * batch * sizes.queries * sizes.keys * dim
        return Cost(flops, flops, batch * self.site.heads * sizes.queries * sizes.keys)


def _parts(mask: Mask, queries: int, sizes: tuple[int, int], device: torch.device) -> tuple[Mask, Mask]:
    """A mask over text and image as one for each."""
    seen, bias = mask.pairs(queries, sum(sizes), device), mask.bias
    parts = []
    for start, stop in ((0, sizes[0]), (sizes[0], sum(sizes))):
        part = Mask() if seen is None else Mask.pairs_(seen[..., start:stop])
        parts.append(part if bias is None else part & Mask.biased(bias[..., start:stop]))
    return parts[0], parts[1]


class ImagePrompt(nn.Module):
    """Image tokens from one embedding of an image: (B, E) -> (B, I, C').

    Args:
        embedding: E, of the image encoder's projected output (1024 in OpenCLIP ViT-H/14).
        context_dim: C', channels of the text tokens.
        tokens: I.
    """

    def __init__(self, embedding: int = 1024, context_dim: int = 768, tokens: int = 4) -> None:
        super().__init__()
        self.shape = (tokens, context_dim)
        self.proj = nn.Linear(embedding, tokens * context_dim)
        self.norm = nn.LayerNorm(context_dim)

    def forward(self, embedding_BE: Tensor) -> Tensor:
        """The tokens of an image."""
        return self.norm(self.proj(embedding_BE).unflatten(-1, self.shape))

    def unconditional(self, batch: int) -> Tensor:
        """The tokens where no image is given, for guidance."""
        return self(self.proj.weight.new_zeros(batch, self.proj.in_features))
