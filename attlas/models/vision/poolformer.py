"""PoolFormer, and MetaFormer with any mixer: a pyramid whose blocks mix tokens by pooling.

    y = x + s₁ ⊙ mixer(norm x),    z = y + s₂ ⊙ MLP(norm y)

A stem of 7 x 7, stride 4, and 3 x 3 convolutions of stride 2 between the stages, none with a norm; the norm is one
group over all tokens and channels; s starts at 1e-5, in networks of more than 24 blocks at 1e-6.

Source: Yu et al., "MetaFormer Is Actually What You Need for Vision", 2021 (arXiv:2111.11418), official code
sail-sg/poolformer. As there, the last norm comes before the mean over places; timm's port takes the mean first, so its
logits differ, while its weights and its last map are the same. In `metaformer_*` a mixer that has heads has heads of 32
channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from attlas.blocks.embed import Downsample
from attlas.blocks.metaformer import MetaFormerBlock
from attlas.blocks.mlp import Mlp
from attlas.blocks.norms import TokenGroupNorm
from attlas.models.backbone import Head, start_published
from attlas.models.key_maps import linear, rename
from attlas.models.mixers import Mixers, Settings, doubling, sizes_after, token_stages
from attlas.models.pyramid import Pyramid
from attlas.models.registry import State, published
from attlas.models.stages import check_stages

HEAD_DIM = 32

SIZES: Mapping[str, Mapping[str, Any]] = {
    "s12": {"depths": (2, 2, 6, 2), "dims": (64, 128, 320, 512), "scale": 1e-5, "drop_path": 0.1},
    "s24": {"depths": (4, 4, 12, 4), "dims": (64, 128, 320, 512), "scale": 1e-5, "drop_path": 0.1},
    "s36": {"depths": (6, 6, 18, 6), "dims": (64, 128, 320, 512), "scale": 1e-6, "drop_path": 0.2},
    "m36": {"depths": (6, 6, 18, 6), "dims": (96, 192, 384, 768), "scale": 1e-6, "drop_path": 0.3},
    "m48": {"depths": (8, 8, 24, 8), "dims": (96, 192, 384, 768), "scale": 1e-6, "drop_path": 0.4},
    "micro": {"depths": (1, 1, 1, 1), "dims": (32, 32, 64, 64), "scale": 1e-5, "img_size": 64},
}


def from_timm(state: State, model: nn.Module) -> State:
    """The names of timm, whose networks hold the official weights."""
    return rename(
        linear(state, r"mlp\.fc\d\.weight"),
        (
            (r"^stem\.", "downsamples.0."),
            (r"^stages\.(\d)\.downsample\.", r"downsamples.\1."),
            (r"\.norm([12])\.", r".norm\1.norm."),
            (r"layer_scale([12])\.scale", r"scale\1.weight"),
            (r"^head\.norm\.", "head.before."),
            (r"^head\.fc\.", "head.classifier."),
        ),
    )


@published(
    {f"poolformer_{size}": {**settings, "mixer": "pool"} for size, settings in SIZES.items()}
    | {f"metaformer_{size}": settings for size, settings in SIZES.items()},
    title="MetaFormer Is Actually What You Need for Vision",
    year=2021,
    paper="arXiv:2111.11418",
    key_maps={"timm": from_timm},
)
def metaformer(
    *,
    depths: Sequence[int],
    dims: Sequence[int],
    scale: float,
    mixer: Mixers = "softmax",
    mixer_settings: Settings = None,
    drop_path: float = 0.0,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
) -> Pyramid:
    """Any mechanism, one for all stages or one for each, in the pyramid of PoolFormer.

    Args:
        depths, dims: blocks and channels of each stage.
        scale: starting value of the layer scales.
        mixer: the mechanism of each stage; they may have heads of 32 channels.
        mixer_settings: of the mechanisms, for all stages or for each.
        drop_path: rate of the last block.
        num_classes: of the head; 0 for features.
        in_chans: channels of the pictures.
        img_size: that it is trained on, for mechanisms that depend on it.
    """
    check_stages(depths=depths, dims=dims)
    stem, between = (7, 4, 2), (3, 2, 1)
    widths = (in_chans, *dims)
    downsamples = [
        Downsample(widths[i], widths[i + 1], kernel, stride, padding=padding)
        for i, (kernel, stride, padding) in enumerate([stem, *[between] * (len(dims) - 1)])
    ]
    stages = token_stages(
        mixer,
        depths,
        dims,
        [max(1, dim // HEAD_DIM) for dim in dims],
        sizes_after(img_size, [stem, *[between] * (len(dims) - 1)]),
        lambda each, rate: MetaFormerBlock(
            each, Mlp(each.site.dim, 4 * each.site.dim), norm=TokenGroupNorm, scale=scale, drop_path=rate
        ),
        settings=mixer_settings,
        drop_path=drop_path,
    )
    head = Head(dims[-1], num_classes, before=lambda dim: nn.GroupNorm(1, dim))
    strides = doubling(4, len(dims))
    return start_published(Pyramid(downsamples, stages, head, in_chans=in_chans, channels=dims, strides=strides))
