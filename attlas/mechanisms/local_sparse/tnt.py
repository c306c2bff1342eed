"""Transformer in Transformer: a small transformer mixes the words inside every sentence, a large one the sentences.

    w ← w + MSA(LN(w));  w ← w + MLP(LN(w))                     w the m words of one sentence, of c channels
    s ← s + W_b [LN(w_1); ...; LN(w_m)]                           every sentence, prefix tokens not
    s ← s + MSA(LN(s));  s ← s + MLP(LN(s))                     s all sentences and prefix tokens, of d channels

A sentence is a patch of an image (16 x 16 pixels in the paper), its words are the 4 x 4 smaller patches in it. Words
of different sentences never meet; what they found reaches the others through the sentences, and words are never
told. A token carries both: its channels are those of the sentence and then those of its words, word after word, so
that C = d + m c; `pack` and `unpack` go there and back. A prefix token (the class token) has no words: what lies in
those channels passes unchanged. With W_b = 0 the sentences are a plain vision transformer.

This is the whole block with its residuals and norms, x to y, not a branch to be added. Padding is of sentences.

x (B, N, C); inside, queries (B N, h, m, c / h) and (B, H, N, d / H). Time O(N (m c² + m² c + m c d + d²) + N² d).

Source: Han et al., "Transformer in Transformer", 2021 (arXiv:2103.00112), official code
huawei-noah/Efficient-AI-Backbones and, as "legacy", timm, whose later weights have one LN over all words of a sentence,
another behind W_b, and no bias there. Two streams in one token are ours, as are one and three axes.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.core.errors import BadInput
from attlas.core.mask import Mask
from attlas.core.mechanism import Call, Cost, Mixer, Site, Sizes
from attlas.core.registry import register
from attlas.core.spec import Example, Pattern, Spec
from attlas.ops.softmax import softmax_attention

SPEC = Spec(
    name="tnt",
    title="Transformer in Transformer",
    year=2021,
    paper="arXiv:2103.00112",
    equation="w = inner(w), s = outer(s + W LN(w))",
    complexity="O(N² C + N m² c) time",
    patterns=frozenset({Pattern.NONCAUSAL_SELF}),
    examples=(
        Example(
            grid=(2, 3),
            prefix=1,
            dim=24,
            params={"words": 4, "word_dim": 4, "word_heads": 2},
            parameters=(4 * 16 + 4 + 16 * 4 + 4 + 64 + 16 + 3 * 8)
            + (16 * 8 + 8)
            + (4 * 64 + 8 + 8 * 64 + 8 + 32 + 4 * 8),
        ),
        Example(
            grid=(4,),
            params={"words": 2, "word_heads": 1, "ratio": 2.0, "bias": True},
            parameters=(4 * (16 + 4) + 4 * 16 + 8 + 4 + 3 * 8) + (8 * 8 + 8) + (4 * (64 + 8) + 4 * 64 + 16 + 8 + 4 * 8),
        ),
    ),
)


class _Transformer(nn.Module):
    """x + MSA(LN(x)), then x + MLP(LN(x)), on (B, N, C)."""

    def __init__(self, dim: int, heads: int, ratio: float, bias: bool) -> None:
        super().__init__()
        self.dim, self.heads, self.hidden = dim, heads, int(ratio * dim)
        self.norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qk_proj, self.v_proj = nn.Linear(dim, 2 * dim, bias), nn.Linear(dim, dim, bias)
        self.out_proj = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, self.hidden), nn.GELU(), nn.Linear(self.hidden, dim))

    def forward(self, x_BNC: Tensor, keep: Tensor | None, backend: str) -> Tensor:
        y = self.norm(x_BNC)
        parts = (*self.qk_proj(y).chunk(2, -1), self.v_proj(y))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        o = softmax_attention(q, k, v, Mask(keys=keep), backend=backend)
        x_BNC = x_BNC + self.out_proj(o.transpose(1, 2).flatten(2))
        return x_BNC + self.mlp(self.mlp_norm(x_BNC))

    def literal(self, x_NC: Tensor, real: list[int]) -> Tensor:
        """One sequence of which these are real, query by query."""
        y_NC, size = self.norm(x_NC), x_NC.shape[1] // self.heads
        q_NC, k_NC = self.qk_proj(y_NC).chunk(2, -1)
        v_NC, rows = self.v_proj(y_NC), []
        for n in range(len(x_NC)):
            o = [x_NC.new_zeros(0)]
            for h in range(self.heads):
                own = slice(h * size, (h + 1) * size)
                weights = (k_NC[real, own] @ q_NC[n, own] / math.sqrt(size)).softmax(0)
                o.append(weights @ v_NC[real, own])
            rows.append(x_NC[n] + self.out_proj(torch.cat(o)))
        x_NC = torch.stack(rows)
        return x_NC + self.mlp(self.mlp_norm(x_NC))

    def flops(self, tokens: int) -> int:
        """Of one sequence."""
        return 4 * tokens * self.dim * (2 * self.dim + self.hidden + tokens)


@register(SPEC)
class TNT(Mixer):
    """The block of the Transformer in Transformer.

    Args:
        site: where it is installed; its heads are those of the sentences.
        backend: of the softmax attentions.
        words: m, of a sentence.
        word_dim: c; by default words have half of the channels, as in the published sizes.
        word_heads: heads of the words; by default four as published, or as many of them as divide c.
        ratio: how many times wider both MLPs are.
        bias: of the query, key and value projections.
    """

    def __init__(
        self,
        site: Site,
        backend: str = "auto",
        *,
        words: int = 16,
        word_dim: int | None = None,
        word_heads: int | None = None,
        ratio: float = 4.0,
        bias: bool = False,
    ) -> None:
        super().__init__(site, backend)
        if words < 1 or (word_heads is not None and word_heads < 1):
            raise BadInput(f"words and word_heads are at least 1, got {words} and {word_heads}")
        word_dim = site.dim // (2 * words) if word_dim is None else word_dim
        dim = site.dim - words * word_dim
        if word_dim < 1 or dim < 1:
            raise BadInput(
                f"dim holds a sentence and its {words} words: {site.dim} channels leave {dim} for a sentence beside "
                f"words of {word_dim}; take fewer words, or dim = sentence channels + words x word_dim"
            )
        word_heads = math.gcd(4, word_dim) if word_heads is None else word_heads
        for name, count, width in (("heads", site.heads, dim), ("word_heads", word_heads, word_dim)):
            if width % count:
                raise BadInput(f"{name} must divide its channels: {width} do not split into {count}")
        if int(ratio * word_dim) < 1 or int(ratio * dim) < 1:
            least = 1 / min(word_dim, dim)
            raise BadInput(f"ratio says how many times wider the MLPs are, at least {least:.3g} here, got {ratio}")
        self.words, self.dim, self.word_dim = words, dim, word_dim
        self.inner = _Transformer(word_dim, word_heads, ratio, bias)
        self.bridge_norm, self.bridge = nn.LayerNorm(word_dim), nn.Linear(words * word_dim, dim)
        self.outer = _Transformer(dim, site.heads, ratio, bias)

    def pack(self, sentences_BNd: Tensor, words_BNmc: Tensor) -> Tensor:
        """Both streams as tokens (B, P + N, C), where P prefix tokens stand in front of the sentences."""
        batch, tokens = sentences_BNd.shape[:2]
        prefix = tokens - words_BNmc.shape[1]
        words = (batch, tokens - prefix, self.words, self.word_dim)
        if prefix < 0 or sentences_BNd.shape != (batch, tokens, self.dim) or words_BNmc.shape != words:
            raise BadInput(
                f"sentences are (batch, tokens, {self.dim}) and words (batch, tokens without the prefix, {self.words}, "
                f"{self.word_dim}), got {tuple(sentences_BNd.shape)} and {tuple(words_BNmc.shape)}"
            )
        return torch.cat([sentences_BNd, F.pad(words_BNmc.flatten(2), (0, 0, prefix, 0))], -1)

    def unpack(self, x_BNC: Tensor, prefix: int = 0) -> tuple[Tensor, Tensor]:
        """Sentences with the prefix tokens (B, P + N, d), and words (B, N, m, c)."""
        return x_BNC[..., : self.dim], x_BNC[:, prefix:, self.dim :].unflatten(-1, (self.words, self.word_dim))

    def _streams(self, x_BNC: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """Sentences, words, and the channels of words that prefix tokens have; padding is 0."""
        keep, prefix = call.mask.keys, call.grid.prefix
        if keep is not None:
            x_BNC = x_BNC.masked_fill(~keep.unsqueeze(-1), 0)
        return *self.unpack(x_BNC, prefix), x_BNC[:, :prefix, self.dim :]

    def compute(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Words, bridge, sentences."""
        sentences, words, rest = self._streams(x_BNC, call)
        shape = words.shape[:2]
        words = self.inner(words.flatten(0, 1), None, self.backend).unflatten(0, shape)
        told = self.bridge(self.bridge_norm(words).flatten(2))
        sentences = self.outer(sentences + F.pad(told, (0, 0, call.grid.prefix, 0)), call.mask.keys, self.backend)
        return torch.cat([sentences, torch.cat([rest, words.flatten(2)], 1)], -1)

    def oracle(self, x_BNC: Tensor, context_BMC: Tensor | None, call: Call) -> Tensor:
        """Sentence by sentence, word by word."""
        sentences_BNd, words_BNmc, rest = self._streams(x_BNC, call)
        everyone, prefix = list(range(self.words)), call.grid.prefix
        weight_dmc = self.bridge.weight.unflatten(1, (self.words, self.word_dim))
        y_BNC = []
        for b, (sentences_Nd, words_Nmc) in enumerate(zip(sentences_BNd, words_BNmc, strict=True)):
            rows = list(sentences_Nd[:prefix])
            carried = list(rest[b])
            for sentence_d, words_mc in zip(sentences_Nd[prefix:], words_Nmc, strict=True):
                words_mc = self.inner.literal(words_mc, everyone)
                told = sum(weight_dmc[:, w] @ self.bridge_norm(words_mc[w]) for w in everyone)
                rows.append(sentence_d + told + self.bridge.bias)
                carried.append(words_mc.flatten())
            real = [n for n in range(len(rows)) if call.mask.keys is None or call.mask.keys[b, n]]
            sentences_Nd = self.outer.literal(torch.stack(rows), real)
            y_BNC.append(torch.cat([sentences_Nd, torch.stack(carried)], -1))
        return torch.stack(y_BNC)

    def count(self, sizes: Sizes) -> Cost:
        """Both transformers and the bridge; pairs are of sentences."""
        inner = sizes.grid.positions * (self.inner.flops(self.words) + 2 * self.words * self.word_dim * self.dim)
        flops = sizes.batch * (inner + self.outer.flops(sizes.queries))
        return Cost(flops, flops, sizes.batch * self.site.heads * sizes.queries**2)
