"""The U: levels that get coarser, a bottleneck, and the way back up, joined with what the levels saw.

    e_i = encoder_i(x_i),    x_{i+1} = down_i(e_i)
    s = fuse(e, bottleneck(x_depth))
    d_i = decoder_i([up_i(d_{i+1}), s_i])

B batch, C channels, H and W height and width.

Source: Ronneberger et al., "U-Net: Convolutional Networks for Biomedical Image Segmentation", 2015 (arXiv:1505.04597).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class UShaped(nn.Module):
    """The skeleton; any blocks stand in its levels.

    Args:
        encoders: for each level, finest first, a map (and what stands `beside` it) to a map of the same size.
        downs: from each level to the next coarser one, the last to the bottleneck.
        bottleneck: maps to maps.
        ups: from below to each level.
        decoders: for each level, a map and its skip one upon the other to a map.
        fuse: from the list of the encoders' maps and that of the bottleneck to a skip for every level; the encoders'
            maps themselves by default.
    """

    def __init__(
        self,
        encoders: Sequence[nn.Module],
        downs: Sequence[nn.Module],
        bottleneck: nn.Module,
        ups: Sequence[nn.Module],
        decoders: Sequence[nn.Module],
        fuse: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.encoders, self.downs = nn.ModuleList(encoders), nn.ModuleList(downs)
        self.bottleneck, self.fuse = bottleneck, fuse
        self.ups, self.decoders = nn.ModuleList(ups), nn.ModuleList(decoders)

    def forward(
        self, x_BCHW: Tensor, beside: Sequence[tuple[Tensor | None, ...]] | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The maps of all encoders and of all decoders, finest first.

        Args:
            x_BCHW: the finest map.
            beside: further arguments of each encoder.
        """
        encoded, x = [], x_BCHW
        for index, (encoder, down) in enumerate(zip(self.encoders, self.downs, strict=True)):
            encoded.append(encoder(x, *beside[index]) if beside is not None else encoder(x))
            x = down(encoded[-1])
        x = self.bottleneck(x)
        skips = encoded if self.fuse is None else self.fuse(encoded, x)
        decoded = []
        for skip, up, decoder in reversed(list(zip(skips, self.ups, self.decoders, strict=True))):
            x = decoder(torch.cat([up(x), skip], 1))
            decoded.append(x)
        return encoded, decoded[::-1]
