"""The pyramid: stages on maps that get smaller and wider.

B batch, C channels, H and W height and width.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from attlas.models.backbone import Backbone


class Pyramid(Backbone):
    """stage(downsample(...)) one after another, then the head; one feature map per stage.

    Args:
        downsamples: maps to smaller maps, one before each stage; the first is the stem.
        stages: maps to maps of the same size, such as `TokenStage`.
        head: the last map to logits.
        in_chans: channels of the pictures.
        channels, strides: of the maps after each stage.
    """

    def __init__(
        self,
        downsamples: Sequence[nn.Module],
        stages: Sequence[nn.Module],
        head: nn.Module,
        *,
        in_chans: int,
        channels: Sequence[int],
        strides: Sequence[int] = (4, 8, 16, 32),
    ) -> None:
        super().__init__(in_chans, channels, strides[: len(channels)])
        self.downsamples, self.stages = nn.ModuleList(downsamples), nn.ModuleList(stages)
        self.head = head

    def forward_features(self, image_BCHW: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        """The last map; every stage's is appended to `maps`."""
        x = image_BCHW
        for downsample, stage in zip(self.downsamples, self.stages, strict=True):
            x = stage(downsample(x))
            if maps is not None:
                maps.append(x)
        return x
