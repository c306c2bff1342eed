"""What networks share that make a better picture of a picture.

B batch, C channels, H and W height and width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from attlas.blocks.stage import set_checkpointing
from attlas.core.errors import BadInput


class Restorer(nn.Module, ABC):
    """Pictures (B, in_chans, H, W) -> pictures (B, C, scale H, scale W), of any size.

    A picture whose sides the network cannot divide is mirrored at its borders, and the result is cut.
    Subclasses write `restore`.

    Attributes:
        in_chans: channels of the pictures.
        multiple: of how many pixels the sides must be inside.
        scale: pixels that come out for one, on each side.
        centred: whether a picture is mirrored on both sides or on the right and below alone.
    """

    def __init__(self, in_chans: int, multiple: int, *, scale: int = 1, centred: bool = False) -> None:
        super().__init__()
        self.in_chans, self.multiple, self.scale, self.centred = in_chans, multiple, scale, centred

    @abstractmethod
    def restore(self, image_BCHW: Tensor) -> Tensor:
        """Hook: the work, on sides that divide."""

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """The better picture.

        Raises:
            BadInput: not a batch of pictures with `in_chans` channels.
        """
        restored = self.restore(self.mirrored(image_BCHW))
        for axis, length in enumerate(image_BCHW.shape[2:], 2):
            before = self._before(length)
            restored = restored.narrow(axis, self.scale * before, self.scale * length)
        return restored

    def mirrored(self, image_BCHW: Tensor) -> Tensor:
        """The picture with sides that are multiples, its border pixels not repeated."""
        if image_BCHW.ndim != 4 or image_BCHW.shape[1] != self.in_chans:
            raise BadInput(
                f"pictures are (batch, {self.in_chans}, height, width), got {tuple(image_BCHW.shape)}; for other "
                "channels build with in_chans="
            )
        for axis, length in enumerate(image_BCHW.shape[2:], 2):
            if length % self.multiple:
                before, period = self._before(length), max(1, 2 * length - 2)
                place = torch.arange(-before, length + -length % self.multiple - before, device=image_BCHW.device)
                place = place % period
                image_BCHW = image_BCHW.index_select(axis, torch.minimum(place, period - place).clamp(0, length - 1))
        return image_BCHW

    def _before(self, length: int) -> int:
        return -length % self.multiple // 2 if self.centred else 0

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute activations inside blocks again in the backward pass instead of keeping them."""
        set_checkpointing(self, enable)
