"""GhostNetV2: inverted bottlenecks of ghost modules, whose widening half sees along rows and columns.

    x ← ghost₂(SE(BN(DWConv(ghost₁(x)))))  +  shortcut x

ghost₁ widens, from the third block on with a gate (see `attlas.blocks.ghost`), ghost₂ narrows without an activation.
The depthwise convolution is there where the block halves the map, the channel attention in some blocks; the shortcut
is the identity, or a depthwise and a 1 x 1 convolution where shapes differ. Strides are 2 to 32, with a feature map at
each; behind the last stand a 1 x 1 convolution, the mean over places and a hidden layer of 1280.

Source: Tang et al., "GhostNetV2: Enhance Cheap Operation with Long-Range Attention", 2022 (arXiv:2211.12905), official
code huawei-noah/Efficient-AI-Backbones. Drop path, which it does not have, is on the blocks that keep their shape. What
mixes tokens is woven into the bottleneck, so that no other mechanism can stand in its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from attlas.blocks.conv_norm import ConvNorm
from attlas.blocks.drop_path import DropPath, rising
from attlas.blocks.ghost import GhostModule
from attlas.blocks.stage import Stage
from attlas.core.errors import share
from attlas.models.backbone import Head, classifier
from attlas.models.key_maps import linear, rename
from attlas.models.pyramid import Pyramid
from attlas.models.registry import State, published
from attlas.ops.channel_attention import MapChannelAttention

STRIDES = (2, 4, 8, 16, 32)
HIDDEN = 1280

Row = tuple[int, int, int, bool]
"""Kernel of the depthwise convolutions, wide channels, channels out, and whether there is channel attention."""

STAGES: Sequence[Sequence[Row]] = (
    ((3, 16, 16, False),),
    ((3, 48, 24, False), (3, 72, 24, False)),
    ((5, 72, 40, True), (5, 120, 40, True)),
    (
        (3, 240, 80, False),
        (3, 200, 80, False),
        (3, 184, 80, False),
        (3, 184, 80, False),
        (3, 480, 112, True),
        (3, 672, 112, True),
    ),
    ((5, 672, 160, True), (5, 960, 160, False), (5, 960, 160, True), (5, 960, 160, False), (5, 960, 160, True)),
)
TINY: Sequence[Sequence[Row]] = (
    ((3, 8, 8, False),),
    ((3, 16, 8, False), (3, 16, 8, True)),
    ((5, 16, 12, True),),
    ((3, 24, 16, False), (3, 28, 16, False)),
    ((5, 32, 16, True), (5, 32, 16, False)),
)

SIZES: Mapping[str, Mapping[str, Any]] = {
    "100": {"width": 1.0},
    "130": {"width": 1.3},
    "160": {"width": 1.6},
    "micro": {"stages": TINY, "hidden": 64, "img_size": 64},
}


def rounded(channels: float) -> int:
    """The nearest multiple of 4, and the next where that is less than 90 %."""
    near = max(4, int(channels + 2) // 4 * 4)
    return near + 4 if near < 0.9 * channels else near


class Bottleneck(nn.Module):
    """Widen, halve the map, attend to channels, narrow; beside a shortcut.

    Args:
        dim, wide, out: channels in, inside and out.
        kernel: of the depthwise convolutions.
        stride: 1 or 2.
        attention: whether channels are weighed in the middle.
        gated: whether the first ghost module has a gate.
        drop_path: the share of pictures for which the branch is dropped in training, where shapes stay.
    """

    def __init__(
        self,
        dim: int,
        wide: int,
        out: int,
        *,
        kernel: int,
        stride: int,
        attention: bool,
        gated: bool,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        same = dim == out and stride == 1
        self.widen = GhostModule(dim, wide, gated=gated)
        self.conv = ConvNorm(wide, wide, kernel, stride, groups=wide) if stride > 1 else nn.Identity()
        self.attention = (
            MapChannelAttention(wide, rounded(wide / 4), gate=nn.Hardsigmoid) if attention else nn.Identity()
        )
        self.narrow = GhostModule(wide, out, active=False)
        self.drop_path = DropPath(drop_path if same else 0.0)
        self.shortcut = (
            nn.Identity() if same else nn.Sequential(ConvNorm(dim, dim, kernel, stride, groups=dim), ConvNorm(dim, out))
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """The next map."""
        y = self.narrow(self.attention(self.conv(self.widen(x_BCHW))))
        return self.drop_path(y) + self.shortcut(x_BCHW)


def from_timm(state: State, model: nn.Module) -> State:
    """The names of timm, which are those of the official code."""
    return rename(
        linear(state, r"(conv_reduce|conv_expand|^conv_head)\.weight"),
        (
            (r"^conv_stem\.", "downsamples.0.0.conv."),
            (r"^bn1\.", "downsamples.0.0.norm."),
            (r"^blocks\.9\.0\.conv\.", "head.0.conv."),
            (r"^blocks\.9\.0\.bn1\.", "head.0.norm."),
            (r"^conv_head\.", "head.3."),
            (r"^classifier\.", "head.6."),
            (r"^blocks\.0\.0\.", "stages.0.blocks.0."),
            *((rf"^blocks\.{2 * i - 1}\.0\.", f"downsamples.{i}.") for i in (1, 2, 3, 4)),
            *((rf"^blocks\.{2 * i}\.(\d)\.", rf"stages.{i}.blocks.\1.") for i in (1, 2, 3, 4)),
            (r"\.ghost1\.", ".widen."),
            (r"\.ghost2\.", ".narrow."),
            (r"\.primary_conv\.", ".primary."),
            (r"\.cheap_operation\.", ".cheap."),
            (r"\.(primary|cheap)\.0\.", r".\1.conv."),
            (r"\.(primary|cheap)\.1\.", r".\1.norm."),
            (r"\.short_conv\.0\.", ".gate.project.conv."),
            (r"\.short_conv\.1\.", ".gate.project.norm."),
            (r"\.short_conv\.2\.", ".gate.along_rows.conv."),
            (r"\.short_conv\.3\.", ".gate.along_rows.norm."),
            (r"\.short_conv\.4\.", ".gate.along_columns.conv."),
            (r"\.short_conv\.5\.", ".gate.along_columns.norm."),
            (r"\.conv_dw\.", ".conv.conv."),
            (r"\.bn_dw\.", ".conv.norm."),
            (r"\.se\.conv_reduce\.", ".attention.squeeze."),
            (r"\.se\.conv_expand\.", ".attention.excite."),
            (r"\.shortcut\.3\.", ".shortcut.1.norm."),
            (r"\.shortcut\.2\.", ".shortcut.1.conv."),
            (r"\.shortcut\.1\.(?!conv|norm)", ".shortcut.0.norm."),
            (r"\.shortcut\.0\.(?!conv|norm)", ".shortcut.0.conv."),
        ),
    )


@published(
    {f"ghostnetv2_{size}": settings for size, settings in SIZES.items()},
    title="GhostNetV2: Enhance Cheap Operation with Long-Range Attention",
    year=2022,
    paper="arXiv:2211.12905",
    key_maps={"timm": from_timm, "official": from_timm},
)
def ghostnetv2(
    *,
    stages: Sequence[Sequence[Row]] = STAGES,
    width: float = 1.0,
    hidden: int = HIDDEN,
    plain: int = 2,
    drop: float = 0.2,
    drop_path: float = 0.0,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
) -> Pyramid:
    """The network.

    Args:
        stages: the blocks of each stage; the first of every stage but the first halves the map.
        width: of all channels, as a factor.
        hidden: channels of the layer before the classifier.
        plain: blocks at the start without a gate.
        drop: dropout before the classifier.
        drop_path: rate of the last block.
        num_classes: of the head; 0 for features, without what follows the last stage.
        in_chans: channels of the pictures.
        img_size: of the pictures; any will do.
    """
    rates = rising(drop_path, [len(rows) for rows in stages])
    dim = rounded(stages[0][0][2] * width)
    downsamples: list[nn.Module] = [nn.Sequential(ConvNorm(in_chans, dim, 3, 2), nn.ReLU())]
    built, channels, before = [], [], 0
    for i, rows in enumerate(stages):
        blocks = []
        for j, (kernel, wide, out, attention) in enumerate(rows):
            block = Bottleneck(
                dim,
                rounded(wide * width),
                rounded(out * width),
                kernel=kernel,
                stride=2 if i and j == 0 else 1,
                attention=attention,
                gated=before + j >= plain,
                drop_path=rates[i][j],
            )
            blocks.append(block)
            dim = rounded(out * width)
        if i:
            downsamples.append(blocks.pop(0))
        built.append(Stage(blocks))
        channels.append(dim)
        before += len(rows)
    head: nn.Module = Head(dim, 0)
    if num_classes:
        tail = rounded(stages[-1][-1][1] * width)
        head = nn.Sequential(
            ConvNorm(dim, tail),
            nn.ReLU(),
            Head(tail, 0),
            nn.Linear(tail, hidden),
            nn.ReLU(),
            nn.Dropout(share("drop", drop)),
            classifier(hidden, num_classes),
        )
    return Pyramid(downsamples, built, head, in_chans=in_chans, channels=channels, strides=STRIDES)
