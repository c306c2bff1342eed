"""ResNet, plain or with a mechanism that weighs or mixes what each block has computed; ECA-Net is that with ECA.

    x ← ReLU(mixer(BN(conv ... ReLU(BN(conv x)))) + shortcut x)

Blocks of 3 x 3 and 3 x 3, or of 1 x 1, 3 x 3 and 1 x 1 convolutions with four times as many channels at their ends; the
first of a stage halves the map in its first 3 x 3 convolution, its shortcut is a 1 x 1 convolution. The stem is 7 x 7,
stride 2, and a pooling of 3 x 3, stride 2. In the `d` networks of timm the stem is three convolutions of 3 x 3 and the
shortcut takes means of 2 x 2 first; `t` is the same with a narrower start, `light` has only the latter.

Sources: He et al., "Deep Residual Learning for Image Recognition", 2015 (arXiv:1512.03385), as in torchvision and timm;
Wang et al., "ECA-Net", 2019 (arXiv:1910.03151), official code BangguWu/ECANet. `eca_resnet*` have the kernels of the
released checkpoints, one for each stage; timm's `ecaresnet*` those of the paper's rule. Attention, where a mixer has
heads, has heads of 64 channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from attlas.blocks.conv_norm import ConvNorm
from attlas.blocks.drop_path import DropPath, rising
from attlas.blocks.stage import Stage
from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.core.mechanism import Mixer
from attlas.models.backbone import Head
from attlas.models.key_maps import rename
from attlas.models.mixers import Mixers, Settings, map_sizes, per_stage, settings_per_stage, stage_mixers
from attlas.models.pyramid import Pyramid
from attlas.models.registry import State, published
from attlas.models.stages import check_stages
from attlas.ops.maps import to_map, to_tokens

STRIDES = (4, 8, 16, 32)
HEAD_DIM = 64
DIMS = (64, 128, 256, 512)

PLAIN: Mapping[str, Mapping[str, Any]] = {
    "18": {"depths": (2, 2, 2, 2), "expansion": 1},
    "34": {"depths": (3, 4, 6, 3), "expansion": 1},
    "50": {"depths": (3, 4, 6, 3)},
    "101": {"depths": (3, 4, 23, 3)},
    "152": {"depths": (3, 8, 36, 3)},
}
KERNELS = {"18": (3, 5, 7, 7), "34": (3, 3, 5, 7), "50": (3, 5, 5, 7), "101": (3, 3, 5, 7), "152": (3, 3, 5, 7)}
D: Mapping[str, Any] = {"stem": (32, 32), "pooled_shortcut": True, "mixer": "eca"}
TIMM: Mapping[str, Mapping[str, Any]] = {
    "26t": {**D, "depths": (2, 2, 2, 2), "stem": (24, 32), "img_size": 256},
    "50d": {**D, "depths": (3, 4, 6, 3)},
    "50t": {**D, "depths": (3, 4, 6, 3), "stem": (24, 32)},
    "light": {**D, "depths": (1, 1, 11, 3), "stem": ()},
    "101d": {**D, "depths": (3, 4, 23, 3)},
    "200d": {**D, "depths": (3, 24, 36, 3), "img_size": 256},
    "269d": {**D, "depths": (3, 30, 48, 8), "img_size": 320},
}
MICRO: Mapping[str, Any] = {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 24), "img_size": 64}


class Block(nn.Module):
    """Convolutions, then a mixer, beside a shortcut.

    Args:
        dim: channels in.
        inside: channels of the 3 x 3 convolutions.
        expansion: channels out, as a multiple of these; with 1 there are no 1 x 1 convolutions.
        stride: 1 or 2.
        pooled_shortcut: whether the shortcut halves the map by means.
        mixer: of what was computed; None for none.
        drop_path: the share of pictures for which the branch is dropped in training.
    """

    def __init__(
        self,
        dim: int,
        inside: int,
        expansion: int,
        *,
        stride: int = 1,
        pooled_shortcut: bool = False,
        mixer: Mixer | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        out = expansion * inside
        three = (ConvNorm(dim, inside), ConvNorm(inside, inside, 3, stride), ConvNorm(inside, out))
        self.convs = nn.ModuleList(three if expansion > 1 else (ConvNorm(dim, out, 3, stride), ConvNorm(out, out, 3)))
        self.mixer = mixer
        self.drop_path = DropPath(drop_path)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or dim != out:
            pool = stride > 1 and pooled_shortcut
            means = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False) if pool else nn.Identity()
            self.shortcut = nn.Sequential(means, ConvNorm(dim, out, stride=1 if pool else stride))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """The next map."""
        y = x_BCHW
        for index, conv in enumerate(self.convs):
            y = conv(F.relu(y) if index else y)
        if self.mixer is not None:
            y_BNC, grid = to_tokens(y)
            y = to_map(self.mixer(y_BNC, grid=grid), grid)
        return F.relu(self.drop_path(y) + self.shortcut(x_BCHW))


def from_timm(state: State, model: nn.Module) -> State:
    """The names of timm; those of torchvision and of the official code of ECA-Net differ in nothing that is here."""
    first = 0 if any(key.endswith("downsample.0.weight") for key in state) else 1
    return rename(
        state,
        (
            *((rf"^layer{i + 1}\.", f"stages.{i}.blocks.") for i in range(4)),
            (r"^conv1\.weight$", "downsamples.0.0.conv.weight"),
            (r"^conv1\.0\.", "downsamples.0.0.conv."),
            (r"^conv1\.1\.", "downsamples.0.0.norm."),
            (r"^conv1\.3\.", "downsamples.0.2.conv."),
            (r"^conv1\.4\.", "downsamples.0.2.norm."),
            (r"^conv1\.6\.", "downsamples.0.4.conv."),
            (r"^bn1\.", f"downsamples.0.{4 if 'conv1.6.weight' in state else 0}.norm."),
            *((rf"(blocks\.\d+)\.conv{i + 1}\.", rf"\1.convs.{i}.conv.") for i in range(3)),
            *((rf"(blocks\.\d+)\.bn{i + 1}\.", rf"\1.convs.{i}.norm.") for i in range(3)),
            (rf"\.downsample\.{first}\.", ".shortcut.1.conv."),
            (rf"\.downsample\.{first + 1}\.", ".shortcut.1.norm."),
            (r"\.(se|eca)\.conv\.", ".mixer.conv."),
            (r"^fc\.", "head.classifier."),
        ),
    )


@published(
    {f"resnet{size}": settings for size, settings in PLAIN.items()} | {"resnet_micro": MICRO},
    title="Deep Residual Learning for Image Recognition",
    year=2015,
    paper="arXiv:1512.03385",
    key_maps={"timm": from_timm, "official": from_timm},
)
@published(
    {f"eca_resnet{size}": {**PLAIN[size], "mixer": "eca", "kernels": kernels} for size, kernels in KERNELS.items()}
    | {f"ecaresnet{size}": settings for size, settings in TIMM.items()}
    | {"ecaresnet_micro": {**MICRO, "mixer": "eca", "stem": (4, 6), "pooled_shortcut": True}},
    title="ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks",
    year=2019,
    paper="arXiv:1910.03151",
    key_maps={"timm": from_timm, "official": from_timm},
)
def resnet(
    *,
    depths: Sequence[int],
    dims: Sequence[int] = DIMS,
    expansion: int = 4,
    stem: Sequence[int] = (),
    pooled_shortcut: bool = False,
    mixer: Mixers | None = None,
    mixer_settings: Settings = None,
    kernels: Sequence[int] | None = None,
    drop_path: float = 0.0,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
) -> Pyramid:
    """A ResNet with any mechanism, or none, at the end of its blocks.

    Args:
        depths, dims: blocks of each stage, and channels of their 3 x 3 convolutions.
        expansion: channels of the maps, as a multiple of these.
        stem: channels of the first two of three convolutions; none for one of 7 x 7.
        pooled_shortcut: whether shortcuts halve the map by means of 2 x 2.
        mixer: the mechanism, one for all stages or one for each; None for a plain ResNet.
        mixer_settings: of the mechanisms, for all stages or for each, before `kernels`.
        kernels: of ECA in each stage, where that is the mechanism.
        drop_path: rate of the last block.
        num_classes: of the head; 0 for features.
        in_chans: channels of the pictures.
        img_size: that it is trained on, for mechanisms that depend on it.
    """
    check_stages(depths=depths, dims=dims, kernels=kernels)
    if mixer is None and mixer_settings:
        raise BadInput(
            f"mixer_settings are of mechanisms and there is none, got {mixer_settings!r}: pass mixer= as well"
        )
    names = None if mixer is None else per_stage(mixer, len(depths))
    given = settings_per_stage(mixer_settings, len(depths))
    rates, layers = rising(drop_path, depths), sum(depths)
    dim = dims[0]
    convs: list[nn.Module] = [ConvNorm(in_chans, dim, 7, 2)]
    if stem:
        convs = [
            ConvNorm(in_chans, stem[0], 3, 2),
            nn.ReLU(),
            ConvNorm(stem[0], stem[1], 3),
            nn.ReLU(),
            ConvNorm(stem[1], dim, 3),
        ]
    downsamples = [nn.Sequential(*convs, nn.ReLU(), nn.MaxPool2d(3, 2, 1)), *(nn.Identity() for _ in dims[1:])]
    stages, channels = [], [expansion * inside for inside in dims]
    for i, size in enumerate(map_sizes(img_size, STRIDES[: len(dims)])):
        mixers: Sequence[Mixer | None] = [None] * depths[i]
        if names is not None:
            own = {"kernel": kernels[i]} if kernels is not None and names[i] == "eca" else {}
            mixers = stage_mixers(
                names[i],
                depths[i],
                channels[i],
                max(1, channels[i] // HEAD_DIM),
                Grid(size),
                {**own, **given[i]},
                layers=layers,
            )
        blocks = []
        for j, (each, rate) in enumerate(zip(mixers, rates[i], strict=True)):
            stride = 2 if i and j == 0 else 1
            blocks.append(
                Block(
                    dim,
                    dims[i],
                    expansion,
                    stride=stride,
                    pooled_shortcut=pooled_shortcut,
                    mixer=each,
                    drop_path=rate,
                )
            )
            dim = channels[i]
        stages.append(Stage(blocks))
    head = Head(dim, num_classes)
    net = Pyramid(downsamples, stages, head, in_chans=in_chans, channels=channels, strides=STRIDES)
    for module in net.modules():
        if isinstance(module, ConvNorm):
            nn.init.kaiming_normal_(module.conv.weight, mode="fan_out", nonlinearity="relu")
    return net
