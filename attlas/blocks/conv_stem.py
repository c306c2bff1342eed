"""A stem of 3 x 3 convolutions, each with a norm and all but the last with an activation.

    x ↦ after(norm(conv(σ(norm(conv(x))) ...)))

Source: Xiao et al., "Early Convolutions Help Transformers See Better", 2021 (arXiv:2106.14881), in the forms that
later pyramids have.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from attlas.blocks.embed import MapNorm
from attlas.core.errors import BadInput


class ConvStem(nn.Module):
    """The stem.

    Args:
        in_chans: channels of the pictures.
        widths: channels after each convolution.
        strides: of each convolution.
        norm: makes a norm over the channels of a map.
        activation: σ.
        after: makes one more norm behind all; None for none.
        bias: of the convolutions.
    """

    def __init__(
        self,
        in_chans: int,
        widths: Sequence[int],
        strides: Sequence[int],
        *,
        norm: MapNorm = nn.BatchNorm2d,
        activation: Callable[[], nn.Module] = nn.GELU,
        after: MapNorm | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if len(widths) != len(strides) or not widths or min(*widths, *strides) < 1:
            raise BadInput(
                f"widths and strides count channels and places for each convolution, got {list(widths)} and "
                f"{list(strides)}"
            )
        pairs = itertools.pairwise([in_chans, *widths])
        self.convs = nn.ModuleList(
            nn.Conv2d(dim, out, 3, stride, 1, bias=bias) for (dim, out), stride in zip(pairs, strides, strict=True)
        )
        self.norms = nn.ModuleList(norm(out) for out in widths)
        self.activation = activation()
        self.after = nn.Identity() if after is None else after(widths[-1])

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """A map that is as many times smaller as the strides multiply to."""
        x = image_BCHW
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = norm(conv(x if index == 0 else self.activation(x)))
        return self.after(x)
