"""The block of the Transformer in Transformer, in two streams: words mix inside their sentence, then sentences.

    w ← inner(w)                            a MetaFormer block on the m words of each sentence
    s ← s + bridge(w_1 … w_m)               every sentence, prefix tokens not
    s ← outer(s)                            a MetaFormer block on sentences and prefix tokens

Words lie on the fine grid of the picture, sentences on a grid that is `side` times coarser on both axes, m = side². The
mechanism `tnt` is this block with both streams in one token, the bridge of the paper and softmax attention twice.

B batch, N sentences, P prefix tokens, m words of a sentence, c and d channels of words and sentences.

Source: Han et al., "Transformer in Transformer", 2021 (arXiv:2103.00112), official code
huawei-noah/Efficient-AI-Backbones.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from attlas.blocks.metaformer import MetaFormerBlock
from attlas.core.grid import Grid


def by_sentence(words_BMc: Tensor, grid: Grid, side: int) -> Tensor:
    """Words of the fine grid as (B, N, m, c): sentence by sentence, each row by row."""
    rows, columns = grid.shape
    tiles = words_BMc.unflatten(1, (rows // side, side, columns // side, side)).transpose(2, 3)
    return tiles.flatten(3, 4).flatten(1, 2)


def by_place(words_BNmc: Tensor, grid: Grid, side: int) -> Tensor:
    """The words of all sentences back on the fine grid, (B, N m, c)."""
    rows, columns = grid.shape
    tiles = words_BNmc.unflatten(2, (side, side)).unflatten(1, (rows // side, columns // side))
    return tiles.transpose(2, 3).flatten(1, 4)


class Bridge(nn.Module):
    """What the words of a sentence tell it: norm(W norm([w_1; …; w_m])).

    Args:
        words: m.
        word_dim, dim: c and d.
        bias: of W.
        each: the form of the paper, with a norm of every word for itself and none behind W.
    """

    def __init__(self, words: int, word_dim: int, dim: int, *, bias: bool, each: bool = False) -> None:
        super().__init__()
        self.each = each
        self.before = nn.LayerNorm(word_dim if each else words * word_dim)
        self.proj = nn.Linear(words * word_dim, dim, bias)
        self.after = nn.Identity() if each else nn.LayerNorm(dim)

    def forward(self, words_BNmc: Tensor) -> Tensor:
        """(B, N, d)."""
        joined = self.before(words_BNmc).flatten(2) if self.each else self.before(words_BNmc.flatten(2))
        return self.after(self.proj(joined))


class SentenceBlock(nn.Module):
    """The block, on pairs of words and sentences.

    Args:
        inner: of the words, called on (B N, m, c).
        bridge: from words to sentences.
        outer: of the sentences and the prefix tokens in front of them.
        side: words of a sentence on each axis.
    """

    def __init__(self, inner: MetaFormerBlock, bridge: Bridge, outer: MetaFormerBlock, side: int) -> None:
        super().__init__()
        self.inner, self.bridge, self.outer = inner, bridge, outer
        self.side = side

    def forward(self, pair: tuple[Tensor, Tensor], grids: tuple[Grid, Grid]) -> tuple[Tensor, Tensor]:
        """Words, bridge, sentences."""
        (words_BMc, sentences_BNd), (fine, coarse) = pair, grids
        words_BNmc = by_sentence(words_BMc, fine, self.side)
        words_Lmc = self.inner(words_BNmc.flatten(0, 1), Grid((self.side, self.side)))
        words_BNmc = words_Lmc.unflatten(0, words_BNmc.shape[:2])
        told_BNd = F.pad(self.bridge(words_BNmc), (0, 0, coarse.prefix, 0))
        return by_place(words_BNmc, fine, self.side), self.outer(sentences_BNd + told_BNd, coarse)
