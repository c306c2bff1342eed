"""FFNet: a pyramid in which both halves of a block are MLPs, one over space and one over channels.

    y = x + s₁ ⊙ mixer(x),    z = y + s₂ ⊙ W₂ GELU(W₁ DW(y))

There are no norms in front: they stand behind the convolutions, inside mixer and MLP. DW is a depthwise convolution of
7 x 7 with one of 3 x 3 beside it, in FFNet-1 one of 3 x 3 alone; the mixers have 3 x 3 in the first two stages and
7 x 7 in the others. Only FFNet-3 and 4 have layer scales, which start at 1e-6. The stem is two 3 x 3 convolutions of
stride 2; between stages stand a depthwise convolution of 7 x 7 and stride 2, which doubles the channels, and
x + W BN(x).

`attlas.blocks.conv_norm.fuse` makes one convolution of each with its BN and the one beside it: the parameters that were
published are counted after that.

Source: Yun et al., "MetaMixer Is All You Need", 2024 (arXiv:2406.02021), official code ysj9909/FFNet. With another
mechanism inside, there are 2, 4, 8 and 16 heads where it has heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attlas.blocks.conv_norm import ConvNorm, TwoKernels
from attlas.blocks.metaformer import MetaFormerBlock
from attlas.blocks.mlp import Mlp
from attlas.core.grid import Grid
from attlas.models.backbone import Head, start_published
from attlas.models.key_maps import linear, rename
from attlas.models.mixers import Mixers, Settings, doubling, map_sizes, token_stages
from attlas.models.pyramid import Pyramid
from attlas.models.registry import State, published
from attlas.models.stages import check_stages
from attlas.ops.batch_norm import scale_and_shift
from attlas.ops.maps import to_map, to_tokens

STEM = 64

SIZES: Mapping[str, Mapping[str, Any]] = {
    "1": {"depths": (2, 2, 8, 2), "dim": 80, "mlp_kernel": 3, "drop_path": 0.1},
    "2": {"depths": (3, 3, 15, 3), "dim": 88, "drop_path": 0.15},
    "3": {"depths": (4, 4, 22, 5), "dim": 96, "scale": 1e-6, "drop_path": 0.35},
    "4": {"depths": (4, 4, 27, 3), "dim": 128, "scale": 1e-6, "drop_path": 0.4, "img_size": 384},
    "micro": {"depths": (1, 1, 1, 1), "dim": 8, "stem": 8, "img_size": 64},
}


class ConvFirstMlp(Mlp):
    """W₂ GELU(W₁ DW(x)).

    Args:
        dim, hidden: channels outside and inside.
        kernel: of the convolution; 7 has one of 3 beside it.
    """

    def __init__(self, dim: int, hidden: int, kernel: int) -> None:
        super().__init__(dim, hidden)
        self.conv = TwoKernels(dim, dim) if kernel == 7 else ConvNorm(dim, dim, kernel, groups=dim)

    def forward(self, x_BNC: Tensor, grid: Grid | None = None) -> Tensor:
        """Neighbours, then channels."""
        assert grid is not None
        return super().forward(to_tokens(self.conv(to_map(x_BNC, grid)))[0])


class NormProjection(nn.Module):
    """x + W BN(x) on maps."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(dim)
        self.conv = nn.Conv2d(dim, dim, 1, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Place by place."""
        return x_BCHW + self.conv(self.norm(x_BCHW))

    @torch.no_grad()
    def fused(self) -> nn.Conv2d:
        """One convolution with a bias that does what this does in evaluation."""
        weight = self.conv.weight[:, :, 0, 0]
        scale, shift = scale_and_shift(self.norm)
        one = nn.Conv2d(len(weight), len(weight), 1).to(weight)
        one.weight = nn.Parameter((weight * scale + torch.eye(len(weight)).to(weight))[:, :, None, None])
        one.bias = nn.Parameter(weight @ shift)
        return one


def from_official(state: State, model: nn.Module) -> State:
    """The names of ysj9909/FFNet."""
    rules = [(r"^patch_embed\.", "downsamples.0.")]
    for stage in range(4):
        depth = len(model.stages[stage].blocks)  # type: ignore[index,union-attr]
        places = ((block + (stage > 0), block) for block in range(depth))
        rules += [(rf"^stages\.{stage}\.{old}\.", f"stages.{stage}.blocks.{new}.") for old, new in places]
    state = {
        key: value.flatten() if key.endswith("layer_scale") else value
        for key, value in linear(state, r"(main\.fc\.c|main\.fc\d)\.weight").items()
    }
    return rename(
        state,
        (
            *rules,
            (r"^stages\.([123])\.0\.proj\.0\.conv\.", r"downsamples.\1.0.large."),
            (r"^stages\.([123])\.0\.proj\.0\.conv1\.", r"downsamples.\1.0.small."),
            (r"^stages\.([123])\.0\.proj\.1\.conv\.", r"downsamples.\1.1."),
            (r"\.token_mixer\.0\.layer_scale$", ".scale1.weight"),
            (r"\.channel_mixer\.layer_scale$", ".scale2.weight"),
            (r"\.token_mixer\.0\.main\.fc\.c\.", ".mixer.query.proj."),
            (r"\.token_mixer\.0\.main\.fc\.bn\.", ".mixer.query.norm."),
            (r"\.token_mixer\.0\.main\.conv1\.", ".mixer.keys."),
            (r"\.token_mixer\.0\.main\.conv2\.", ".mixer.values."),
            (r"\.(keys|values)\.(weight|bias)$", r".\1.conv.\2"),
            (r"\.(keys|values)\.conv\.c\.weight$", r".\1.weights.0"),
            (r"\.(keys|values)\.conv1\.c\.weight$", r".\1.weights.1"),
            (r"\.(keys|values)\.conv\.bn\.", r".\1.norms.0."),
            (r"\.(keys|values)\.conv1\.bn\.", r".\1.norms.1."),
            (r"\.channel_mixer\.main\.conv\.(c|bn)\.", r".mlp.conv.\1."),
            (r"\.channel_mixer\.main\.conv\.conv\.", ".mlp.conv.large."),
            (r"\.channel_mixer\.main\.conv\.conv1\.", ".mlp.conv.small."),
            (r"\.channel_mixer\.main\.fc([12])\.", r".mlp.fc\1."),
            (r"\.c\.weight$", ".conv.weight"),
            (r"\.bn\.", ".norm."),
            (r"^norm\.", "head.before."),
            (r"^head\.(weight|bias)$", r"head.classifier.\1"),
        ),
    )


@published(
    {f"ffnet_{size}": settings for size, settings in SIZES.items()},
    title="MetaMixer Is All You Need",
    year=2024,
    paper="arXiv:2406.02021",
    key_maps={"official": from_official},
)
def ffnet(
    *,
    depths: Sequence[int],
    dim: int,
    stem: int = STEM,
    kernels: Sequence[int] = (3, 3, 7, 7),
    mlp_kernel: int = 7,
    mixer: Mixers = "ffnet",
    mixer_settings: Settings = None,
    scale: float | None = None,
    drop_path: float = 0.0,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 256,
) -> Pyramid:
    """FFNified attention, or another mechanism, in the pyramid of FFNet.

    Args:
        depths: blocks of each stage.
        dim: channels of the first stage; each one after has twice as many.
        stem: channels between the convolutions of the stem.
        kernels: of FFNified attention in each stage, where that is the mechanism; 7 has one of 3 beside it.
        mlp_kernel: of the convolutions in the MLPs; 7 has one of 3 beside it.
        mixer: the mechanism, one for all stages or one for each.
        mixer_settings: of the mechanisms, for all stages or for each, before `kernels`.
        scale: starting value of the layer scales; None for none.
        drop_path: rate of the last block.
        num_classes: of the head; 0 for features.
        in_chans: channels of the pictures.
        img_size: that it is trained on, for mechanisms that depend on it.
    """
    check_stages(depths=depths, kernels=kernels)
    dims, strides = doubling(dim, len(depths)), doubling(4, len(depths))
    first = nn.Sequential(ConvNorm(in_chans, stem, 3, 2), nn.GELU(), ConvNorm(stem, dim, 3, 2))
    between = [
        nn.Sequential(TwoKernels(dims[i - 1], dims[i], stride=2), NormProjection(dims[i])) for i in range(1, len(dims))
    ]
    stages = token_stages(
        mixer,
        depths,
        dims,
        doubling(2, len(depths)),
        map_sizes(img_size, strides),
        lambda each, rate: MetaFormerBlock(
            each,
            ConvFirstMlp(each.site.dim, 3 * each.site.dim, mlp_kernel),
            norm=lambda _: nn.Identity(),
            scale=scale,
            drop_path=rate,
        ),
        settings=mixer_settings,
        own=lambda i, name: {"kernel": kernels[i], "branch": 3 if kernels[i] == 7 else 0} if name == "ffnet" else {},
        drop_path=drop_path,
    )
    head = Head(dims[-1], num_classes, before=nn.BatchNorm2d)
    net = Pyramid([first, *between], stages, head, in_chans=in_chans, channels=dims, strides=strides)
    return start_published(net, kinds=(nn.Linear, nn.Conv2d), own=["ffnet"])
