"""LITv2: two stages of convolutional MLPs alone, then two with attention at high and low frequencies.

    stages 1, 2    z = x + MLP(norm x)
    stages 3, 4    y = x + mixer(norm x),    z = y + MLP(norm y)
    MLP(x) = W₂ σ(conv(W₁ x)), a 3 x 3 convolution of each hidden channel in place of positions

Patches of 4 x 4 pixels, deformable token merging between the stages, a norm before the mean over places. Nine tenths
of the heads are low, rounded down; windows are 2 x 2 in the third stage and one place in the fourth, where all
attention is global.

Source: Pan, Cai and Zhuang, "Fast Vision Transformers with HiLo Attention", 2022 (arXiv:2205.13213), official code
ziplab/LITv2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from attlas.blocks.deformable import DeformableMerging
from attlas.blocks.drop_path import DropPath, rising
from attlas.blocks.embed import Downsample
from attlas.blocks.metaformer import MetaFormerBlock
from attlas.blocks.mlp import ConvMlp
from attlas.blocks.norms import MapLayerNorm
from attlas.blocks.stage import TokenStage
from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.models.backbone import Head
from attlas.models.key_maps import rename
from attlas.models.mixers import Mixers, map_sizes, per_stage, stage_mixers
from attlas.models.pyramid import Pyramid
from attlas.models.registry import State, published
from attlas.models.rules import BETWEEN, CLASSIFIER, LAST_NORM
from attlas.models.stages import check_stages

STRIDES = (4, 8, 16, 32)
MIXING = (2, 3)
"""The stages that have a mixer."""

SIZES: Mapping[str, Mapping[str, Any]] = {
    "small": {"depths": (2, 2, 6, 2), "dim": 96, "heads": (3, 6, 12, 24), "drop_path": 0.2},
    "medium": {"depths": (2, 2, 18, 2), "dim": 96, "heads": (3, 6, 12, 24), "drop_path": 0.3},
    "base": {"depths": (2, 2, 18, 2), "dim": 128, "heads": (4, 8, 16, 32), "drop_path": 0.5},
    "micro": {"depths": (1, 1, 1, 1), "dim": 8, "heads": (1, 1, 2, 4), "alpha": 0.5, "img_size": 64},
}


class MlpBlock(nn.Module):
    """x + drop(MLP(norm x)), without a mixer.

    Args:
        dim: channels.
        drop_path: the share of pictures for which the MLP is dropped in training.
    """

    def __init__(self, dim: int, drop_path: float) -> None:
        super().__init__()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = ConvMlp(dim, 4 * dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """Mix channels."""
        return x_BNC + self.drop_path(self.mlp(self.norm2(x_BNC), grid))


def from_official(state: State, model: nn.Module) -> State:
    """The names of ziplab/LITv2."""
    return rename(
        state,
        (
            *BETWEEN,
            (r"^(downsamples\.\d\.)dconv\.conv_offset\.", r"\1offset."),
            (r"^(downsamples\.\d\.)dconv\.", r"\1conv."),
            (r"^(downsamples\.\d\.)norm_layer\.", r"\1norm."),
            (r"^patch_embed\.proj\.", "downsamples.0.conv."),
            (r"^patch_embed\.norm\.", "downsamples.0.after."),
            (r"^layers\.", "stages."),
            (r"\.attn\.l_proj\.", ".mixer.low_out."),
            (r"\.attn\.h_proj\.", ".mixer.high_out."),
            (r"\.attn\.l_", ".mixer.low_"),
            (r"\.attn\.h_", ".mixer.high_"),
            (r"\.mlp\.dwconv\.dwconv\.", ".mlp.conv."),
            LAST_NORM,
            CLASSIFIER,
        ),
    )


@published(
    {f"litv2_{size}": settings for size, settings in SIZES.items()},
    title="Fast Vision Transformers with HiLo Attention",
    year=2022,
    paper="arXiv:2205.13213",
    key_maps={"official": from_official},
)
def litv2(
    *,
    depths: Sequence[int],
    dim: int,
    heads: Sequence[int],
    windows: Sequence[int] = (2, 1),
    alpha: float = 0.9,
    mixer: Mixers = "hilo",
    mixer_settings: Mapping[str, Any] | None = None,
    drop_path: float = 0.0,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
) -> Pyramid:
    """A LITv2, with any mechanism in its last two stages.

    Args:
        depths, heads: blocks of each stage and heads of its mixers.
        dim: channels of the first stage, doubled in each that follows.
        windows: places of a window on either axis in the last two stages, where the mixer is `hilo`; at most those of
            the map, that of a picture at the call too.
        alpha: share of the heads that are low, where the mixer is `hilo`.
        mixer: the mechanism of the last two stages, or one for each of the two.
        mixer_settings: of the mechanisms.
        drop_path: rate of the last block.
        num_classes: of the head; 0 for features.
        in_chans: channels of the pictures.
        img_size: that it is trained on.
    """
    check_stages(4, depths=depths, heads=heads)
    check_stages(len(MIXING), len(MIXING), windows=windows)
    names, rates = per_stage(mixer, len(MIXING)), rising(drop_path, depths)
    dims = [dim * 2**i for i in range(len(depths))]
    stages: list[nn.Module] = []
    for i, size in enumerate(map_sizes(img_size, STRIDES)):
        if i not in MIXING:
            stages.append(TokenStage(MlpBlock(dims[i], rate) for rate in rates[i]))
            continue
        name, window = names[i - MIXING[0]], windows[i - MIXING[0]]
        if name == "hilo" and window > min(size):
            raise BadInput(
                f"windows of {window} places are larger than the map of stage {i}, {size[0]} x {size[1]}: larger "
                "pictures (img_size=), or windows=(1, 1), in which all heads are low"
            )
        settings = {**({"window": window, "alpha": alpha} if name == "hilo" else {}), **(mixer_settings or {})}
        mixers = stage_mixers(name, depths[i], dims[i], heads[i], Grid(size), settings)
        stages.append(
            TokenStage(
                MetaFormerBlock(each, ConvMlp(dims[i], 4 * dims[i]), drop_path=rate)
                for each, rate in zip(mixers, rates[i], strict=True)
            )
        )
    patches = Downsample(in_chans, dim, 4, 4, after=MapLayerNorm, fill=True)
    between = [DeformableMerging(width, 2 * width) for width in dims[:-1]]
    head = Head(dims[-1], num_classes, before=MapLayerNorm)
    return Pyramid([patches, *between], stages, head, in_chans=in_chans, channels=dims, strides=STRIDES)
