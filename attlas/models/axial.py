"""Axial Transformer: an autoregressive model of images whose every pixel depends on all before it, one axis at a time.

For one channel, an image x of symbols with embedding e, positions p and whatever is known beside it, c:

    u = e + p + c,  then by turns: attention along rows, causal attention along columns;  u moved down by one row
    h = (e moved right by one) + u + p + c,  then causal attention along rows;  logits = W LayerNorm(h)

so that u at row r knows all of the rows above and h at column c what stands to its left in row r, and together they are
exactly what comes before the pixel in raster order. What is moved in is 0. A block is x += attention(LayerNorm(x)),
then x += W₂ f(W₁ LayerNorm(x)), f(x) = x σ(1.702 x); W₂, the output of the attention and W begin near 0.

Channels are modelled one after the other, p(x) = Π p(x_c | x_<c): c is then what blocks along rows and columns, not
causal, make of a 3 x 3 convolution of the channels before (the others 0) and of which channel is next.

To draw an image, u is wanted once for each row and not for each pixel, and the pixels of a row stream through the inner
blocks: H passes of the outer blocks in place of H W.

B batch, H rows, W columns, N = H W pixels, C channels of the image, D channels of the network, K symbols.

Source: Ho et al., "Axial Attention in Multidimensional Transformers", 2019 (arXiv:1912.12180), official code
google-research/google-research, axial, which runs the inner blocks on the whole row for each of its pixels. Not here
are its model of channels as rows, and the network over the frames of a video.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import log
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.blocks.factory import mixer
from attlas.core.errors import BadInput, share

PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "imagenet32": {"height": 32, "width": 32, "dim": 1536, "heads": 16, "dropout": 0.04},
    "imagenet64": {"height": 64, "width": 64, "dim": 2048, "heads": 16},
}
"""Arguments of the published models: `AxialImageModel(**PUBLISHED["imagenet32"])`."""

SLIGHT = 1e-10
"""Scale of the weights that begin near 0."""


class AxialBlock(nn.Module):
    """Attention along one axis of a grid of two and two linear maps, each behind a norm and added.

    Args:
        dim, heads: D and the heads it is split into.
        grid: (H, W).
        axis: along which positions attend: 0 along columns, 1 along rows.
        masked: whether the attention is causal.
        factor: how many times D the two maps are wide between them.
        dropout: on what is added, in training.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        grid: tuple[int, int],
        *,
        axis: int,
        masked: bool,
        factor: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = mixer("axial", dim, heads, axis=axis, causal=masked, grid=grid, dropout=dropout)
        self.w1, self.w2 = nn.Linear(dim, factor * dim), nn.Linear(factor * dim, dim)
        self.dropout = share("dropout", dropout)
        _scale(self)
        _scale(self.attention.get_submodule("out_proj"), SLIGHT)
        _scale(self.w2, SLIGHT)

    def forward(self, x_BND: Tensor) -> Tensor:
        """Mix positions, then channels."""
        return self._mlp(x_BND + self.attention(self.attention_norm(x_BND)))

    def extend(self, x_BND: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Likewise for positions that follow `state` in raster order, and the state behind them."""
        added, state = self.attention.extend(self.attention_norm(x_BND), state)
        return self._mlp(x_BND + added), state

    def _mlp(self, x: Tensor) -> Tensor:
        hidden = self.w1(self.mlp_norm(x))
        return x + F.dropout(self.w2(hidden * (1.702 * hidden).sigmoid()), self.dropout, self.training)


class AxialTransformer(nn.Module):
    """The model of one channel.

    >>> model = AxialTransformer(4, 6, symbols=8, dim=16, heads=2, outer=2, inner=1)
    >>> model(torch.zeros(3, 4, 6, dtype=torch.int64)).shape
    torch.Size([3, 4, 6, 8])

    Args:
        height, width: H and W.
        symbols: K.
        dim, heads: of the network.
        outer: blocks of u, an even number.
        inner: blocks of h.
        factor, dropout: of the blocks.
    """

    def __init__(
        self,
        height: int,
        width: int,
        *,
        symbols: int = 256,
        dim: int = 1536,
        heads: int = 16,
        outer: int = 8,
        inner: int = 8,
        factor: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if symbols < 2:
            raise BadInput(f"symbols counts what a pixel can be, at least 2, got {symbols}")
        if inner < 0:
            raise BadInput(f"inner counts blocks, at least 0, got {inner}")
        self.height, self.width, self.symbols = height, width, symbols
        self.embedding = nn.Parameter(_embedding(symbols, dim))
        self.positions = _Positions(height, width, dim)
        settings: dict[str, Any] = {"heads": heads, "factor": factor, "dropout": dropout}
        self.outer = _alternating("outer", outer, dim, (height, width), masked=True, **settings)
        self.inner = nn.ModuleList(
            AxialBlock(dim, grid=(height, width), axis=1, masked=True, **settings) for _ in range(inner)
        )
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, symbols)
        _scale(self.head, SLIGHT)

    def forward(self, x_BHW: Tensor, condition_BHWD: Tensor | None = None) -> Tensor:
        """The logits (B, H, W, K) of each pixel, given those before it and the condition."""
        x_BHW = _symbols(x_BHW, (self.height, self.width), self.symbols)
        self._check(x_BHW, condition_BHWD)
        h_BHWD = self.beside(x_BHW, self.context(x_BHW, condition_BHWD), condition_BHWD)
        h_BND = h_BHWD.flatten(1, 2)
        for block in self.inner:
            h_BND = block(h_BND)
        return self.head(self.norm(h_BND)).unflatten(1, (self.height, self.width))

    def _check(self, x: Tensor, condition: Tensor | None) -> None:
        wanted = (*x.shape, self.embedding.shape[1])
        if condition is not None and condition.shape != wanted:
            raise BadInput(f"the condition is {wanted}, got {tuple(condition.shape)}")

    def context(self, x_BHW: Tensor, condition_BHWD: Tensor | None = None) -> Tensor:
        """u (B, H, W, D): at each row, what stands in the rows above."""
        u_BHWD = F.embedding(x_BHW, self.embedding) + self.positions()
        if condition_BHWD is not None:
            u_BHWD = u_BHWD + condition_BHWD
        u_BHWD = self.outer(u_BHWD.flatten(1, 2)).view_as(u_BHWD)
        return F.pad(u_BHWD, (0, 0, 0, 0, 1, 0))[:, :-1]

    def beside(self, x_BHW: Tensor, u_BHWD: Tensor, condition_BHWD: Tensor | None = None) -> Tensor:
        """What enters the inner blocks: u and the pixel to the left."""
        left_BHWD = F.pad(F.embedding(x_BHW, self.embedding), (0, 0, 1, 0))[:, :, :-1]
        h_BHWD = left_BHWD + u_BHWD + self.positions()
        return h_BHWD if condition_BHWD is None else h_BHWD + condition_BHWD

    @torch.no_grad()
    def sample(self, noise_BHWK: Tensor, condition_BHWD: Tensor | None = None) -> Tensor:
        """Images (B, H, W): each symbol is that whose logit and noise are largest together.

        With Gumbel noise (see `gumbel`) these are samples of the model. The outer blocks run once for each row; a
        pixel of it is one step of a stream through the inner ones.
        """
        x_BHW = self._blank(noise_BHWK)
        self._check(x_BHW, condition_BHWD)
        blocks = [block for block in self.inner if isinstance(block, AxialBlock)]
        states = [block.attention.initial_state(x_BHW.shape[0], self.embedding) for block in blocks]
        for row in range(self.height):
            u_BHWD = self.context(x_BHW, condition_BHWD)
            for column in range(self.width):
                h_B1D = self.beside(x_BHW, u_BHWD, condition_BHWD)[:, row, column : column + 1]
                for number, block in enumerate(blocks):
                    h_B1D, states[number] = block.extend(h_B1D, states[number])
                logits_BK = self.head(self.norm(h_B1D))[:, 0]
                x_BHW[:, row, column] = (logits_BK + noise_BHWK[:, row, column]).argmax(-1)
        return x_BHW

    @torch.no_grad()
    def sample_slowly(self, noise_BHWK: Tensor, condition_BHWD: Tensor | None = None) -> Tensor:
        """The same images from the whole model, once for each pixel."""
        x_BHW = self._blank(noise_BHWK)
        for row in range(self.height):
            for column in range(self.width):
                logits_BK = self(x_BHW, condition_BHWD)[:, row, column]
                x_BHW[:, row, column] = (logits_BK + noise_BHWK[:, row, column]).argmax(-1)
        return x_BHW

    def _blank(self, noise: Tensor) -> Tensor:
        wanted = (self.height, self.width, self.symbols)
        if noise.ndim != 4 or noise.shape[1:] != wanted:
            raise BadInput(f"noise is (batch, {', '.join(map(str, wanted))}), got {tuple(noise.shape)}")
        return torch.zeros(noise.shape[:3], dtype=torch.int64, device=noise.device)


class AxialImageModel(nn.Module):
    """The model of all channels, one after the other.

    Args:
        height, width, channels: of the image.
        symbols: K.
        dim, heads: of the network.
        exterior: blocks that make the condition of the channels before, an even number.
        outer, inner: blocks of the model of one channel.
        factor, dropout: of the blocks.
    """

    def __init__(
        self,
        height: int,
        width: int,
        channels: int = 3,
        *,
        symbols: int = 256,
        dim: int = 1536,
        heads: int = 16,
        exterior: int = 8,
        outer: int = 8,
        inner: int = 8,
        factor: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if channels < 1:
            raise BadInput(f"channels counts those of the image, at least 1, got {channels}")
        self.channels = channels
        settings: dict[str, Any] = {"heads": heads, "factor": factor, "dropout": dropout}
        self.convolution = nn.Conv2d(2 * channels, dim, 3, padding=1)
        _scale(self.convolution)
        self.positions = _Positions(height, width, dim)
        self.exterior = _alternating("exterior", exterior, dim, (height, width), masked=False, **settings)
        self.slices = AxialTransformer(height, width, symbols=symbols, dim=dim, outer=outer, inner=inner, **settings)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """The logits (B, H, W, C, K) of every channel of every pixel, given what comes before."""
        x_BHWC = self._check(x_BHWC)
        batch = x_BHWC.shape[:1]
        return torch.stack([self._channel(x_BHWC, x_BHWC.new_full(batch, c))[1] for c in range(self.channels)], 3)

    def _check(self, x: Tensor) -> Tensor:
        return _symbols(x, (self.slices.height, self.slices.width, self.channels), self.slices.symbols)

    def _channel(self, x_BHWC: Tensor, channel_B: Tensor) -> tuple[Tensor, Tensor]:
        """One channel of each image, and its logits (B, H, W, K)."""
        place = channel_B.view(-1, 1, 1, 1).expand(-1, *x_BHWC.shape[1:3], 1)
        x_BHW = x_BHWC.gather(3, place).squeeze(3)
        return x_BHW, self.slices(x_BHW, self.condition(x_BHWC, channel_B))

    def condition(self, x_BHWC: Tensor, channel_B: Tensor) -> Tensor:
        """What the channels before `channel_B` tell about it, (B, H, W, D); of the others nothing is read."""
        number_C = torch.arange(self.channels, device=x_BHWC.device)
        before_BC, next_BC = (compare(number_C, channel_B.unsqueeze(1)) for compare in (torch.lt, torch.eq))
        known_BHWC = (x_BHWC * before_BC[:, None, None]).to(self.convolution.weight.dtype) / (self.slices.symbols - 1)
        shown_BHWC = torch.cat([known_BHWC, next_BC[:, None, None].to(known_BHWC).expand_as(known_BHWC)], 3)
        c_BHWD = self.convolution(shown_BHWC.movedim(3, 1)).movedim(1, 3) + self.positions()
        return self.exterior(c_BHWD.flatten(1, 2)).view_as(c_BHWD)

    def loss(self, x_BHWC: Tensor, channel_B: Tensor | None = None) -> Tensor:
        """Bits for each symbol of one channel of each image; a random one by default, which has the mean of all."""
        x_BHWC = self._check(x_BHWC)
        if channel_B is None:
            channel_B = torch.randint(self.channels, x_BHWC.shape[:1], device=x_BHWC.device)
        if channel_B.shape != x_BHWC.shape[:1]:
            raise BadInput(f"channel_B is one channel for each of {len(x_BHWC)} images, got {tuple(channel_B.shape)}")
        channel_B = _whole("channels", channel_B, self.channels)
        x_BHW, logits_BHWK = self._channel(x_BHWC, channel_B)
        return bits(logits_BHWK, x_BHW)

    @torch.no_grad()
    def sample(self, noise_BHWCK: Tensor) -> Tensor:
        """Images (B, H, W, C), channel by channel, with `AxialTransformer.sample`."""
        wanted = (self.slices.height, self.slices.width, self.channels, self.slices.symbols)
        if noise_BHWCK.ndim != 5 or noise_BHWCK.shape[1:] != wanted:
            raise BadInput(f"noise is (batch, {', '.join(map(str, wanted))}), got {tuple(noise_BHWCK.shape)}")
        x_BHWC = torch.zeros(noise_BHWCK.shape[:4], dtype=torch.int64, device=noise_BHWCK.device)
        for c in range(self.channels):
            condition = self.condition(x_BHWC, x_BHWC.new_full(x_BHWC.shape[:1], c))
            x_BHWC[..., c] = self.slices.sample(noise_BHWCK[..., c, :], condition)
        return x_BHWC


def bits(logits_K: Tensor, x: Tensor) -> Tensor:
    """The mean number of bits for each symbol."""
    return F.cross_entropy(logits_K.flatten(0, -2), x.flatten()) / log(2)


def gumbel(*shape: int, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """Noise with which the largest of noise and logits is a sample of their softmax, at a temperature."""
    return -temperature * torch.empty(shape).exponential_(generator=generator).log()


def _symbols(x: Tensor, shape: tuple[int, ...], count: int) -> Tensor:
    """The images (batch, *shape) as int64."""
    if x.ndim != len(shape) + 1 or x.shape[1:] != shape:
        raise BadInput(f"an image is integers (batch, {', '.join(map(str, shape))}), got {x.dtype} {tuple(x.shape)}")
    return _whole("symbols", x, count)


def _whole(name: str, x: Tensor, count: int) -> Tensor:
    """`x` as int64, all of them 0 to `count` - 1; a graph that is compiled asks no more than the dtype."""
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise BadInput(f"{name} are integers, got {x.dtype}")
    x = x.long()
    if x.numel() and not torch.compiler.is_compiling() and not 0 <= x.min() <= x.max() < count:
        raise BadInput(f"{name} are 0 to {count - 1}, got {x.min()} to {x.max()}")
    return x


class _Positions(nn.Module):
    """p (H, W, D): a vector for each row plus one for each column."""

    def __init__(self, height: int, width: int, dim: int) -> None:
        super().__init__()
        self.rows, self.columns = (nn.Parameter(_embedding(length, dim)) for length in (height, width))

    def forward(self) -> Tensor:
        return self.rows.unsqueeze(1) + self.columns


def _embedding(rows: int, dim: int) -> Tensor:
    return torch.randn(rows, dim) * 5 / dim**0.5


def _alternating(
    name: str, count: int, dim: int, grid: tuple[int, int], *, masked: bool, **settings: Any
) -> nn.Sequential:
    """Blocks by turns along rows, never masked, and along columns."""
    if count < 0 or count % 2:
        raise BadInput(f"{name} blocks come in pairs, along rows and along columns: an even number, got {count}")
    blocks = []
    for _ in range(count // 2):
        blocks.append(AxialBlock(dim, grid=grid, axis=1, masked=False, **settings))
        blocks.append(AxialBlock(dim, grid=grid, axis=0, masked=masked, **settings))
    return nn.Sequential(*blocks)


def _scale(module: nn.Module, scale: float = 1.0) -> None:
    """Weights of variance `scale` over the inputs of a unit, cut off at two standard deviations; biases 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            inputs = layer.weight[0].numel()
            std = (scale / inputs) ** 0.5 / 0.8796  # what is left of a normal's deviation by the cut
            nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
