"""FocalNet: a pyramid of focal modulation, in which a token is multiplied by what it gathers around it.

    y = x + s₁ ⊙ mixer(norm x),    z = y + s₂ ⊙ MLP(norm y)

Patches of 4 x 4 pixels, 2 x 2 places merged between the stages, both with a LayerNorm behind; `srf` gathers with
kernels of 3 and 5, `lrf` with 3, 5 and 7. The larger networks have their norms behind mixer and MLP, layer scales that
start at 1e-4 and overlapping convolutions (7 x 7 and 3 x 3) for patches; `fl3` and `fl4` say how many kernels, and the
huge ones have one more LayerNorm inside the modulation. The isotropic ones are one stage on patches of 16 x 16.

Source: Yang et al., "Focal Modulation Networks", 2022 (arXiv:2203.11926), official code microsoft/FocalNet. Its
configuration of `focalnet_large_fl4` divides the modulator by the number of its levels, timm's does not: `from_timm`
multiplies the weight behind by that number, so that timm's checkpoint gives timm's logits. With another mechanism
inside, heads have 32 channels where it has heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from attlas.blocks.embed import Downsample
from attlas.blocks.metaformer import MetaFormerBlock
from attlas.blocks.mlp import Mlp
from attlas.blocks.norms import MapLayerNorm
from attlas.models.backbone import Head, start_published
from attlas.models.key_maps import linear, rename
from attlas.models.mixers import Mixers, Settings, doubling, sizes_after, token_stages
from attlas.models.pyramid import Pyramid
from attlas.models.registry import State, published

HEAD_DIM = 32
SMALL, BIG, ISOTROPIC = (2, 2, 6, 2), (2, 2, 18, 2), (12,)
SHORT, LONG = {"levels": 2}, {"levels": 3}
LARGE: Mapping[str, Any] = {
    "depths": BIG,
    "scale": 1e-4,
    "post_norm": True,
    "overlap": True,
    "drop_path": 0.5,
    "num_classes": 21842,
}

SIZES: Mapping[str, Mapping[str, Any]] = {
    "tiny_srf": {"depths": SMALL, "dim": 96, "focal": SHORT, "drop_path": 0.2},
    "tiny_lrf": {"depths": SMALL, "dim": 96, "focal": LONG, "drop_path": 0.2},
    "small_srf": {"depths": BIG, "dim": 96, "focal": SHORT, "drop_path": 0.3},
    "small_lrf": {"depths": BIG, "dim": 96, "focal": LONG, "drop_path": 0.3},
    "base_srf": {"depths": BIG, "dim": 128, "focal": SHORT, "drop_path": 0.5},
    "base_lrf": {"depths": BIG, "dim": 128, "focal": LONG, "drop_path": 0.5},
    "large_fl3": {**LARGE, "dim": 192, "focal": {"levels": 3, "window": 5}, "img_size": 384},
    "large_fl4": {**LARGE, "dim": 192, "focal": {"levels": 4, "normalize": True}, "img_size": 384},
    "xlarge_fl3": {**LARGE, "dim": 256, "focal": {"levels": 3, "window": 5}, "img_size": 384},
    "xlarge_fl4": {**LARGE, "dim": 256, "focal": {"levels": 4}, "img_size": 384},
    "huge_fl3": {**LARGE, "dim": 352, "focal": {"levels": 3, "norm": True}},
    "huge_fl4": {**LARGE, "dim": 352, "focal": {"levels": 4, "norm": True}},
    "tiny_iso": {"depths": ISOTROPIC, "dim": 192, "patch": 16, "focal": LONG, "drop_path": 0.2},
    "small_iso": {"depths": ISOTROPIC, "dim": 384, "patch": 16, "focal": LONG, "drop_path": 0.2},
    "base_iso": {
        "depths": ISOTROPIC,
        "dim": 768,
        "patch": 16,
        "focal": LONG,
        "scale": 1e-4,
        "post_norm": True,
        "drop_path": 0.2,
    },
    "micro": {"depths": (1, 1, 1, 1), "dim": 16, "focal": SHORT, "img_size": 64},
}


def from_timm(state: State, model: nn.Module) -> State:
    """The names of timm."""
    state = dict(state)
    for name, module in model.named_modules():
        # By timm's names, so that weights which are ours already stay what they are.
        theirs = name.replace("stages.", "layers.").replace(".mixer", ".modulation.h.weight")
        if getattr(module, "normalize", False) and theirs in state:
            state[theirs] = state[theirs] * (len(module.kernels) + 1)
    return rename(
        linear(state, r"(modulation\.(f|h|proj)|mlp\.fc\d)\.weight"),
        (
            (r"^stem\.", "downsamples.0."),
            (r"^layers\.(\d)\.downsample\.", r"downsamples.\1."),
            (r"^(downsamples\.\d)\.proj\.", r"\1.conv."),
            (r"^(downsamples\.\d)\.norm\.", r"\1.after."),
            (r"^layers\.", "stages."),
            (r"\.norm([12])_post\.", r".norm\1."),
            (r"\.ls([12])\.gamma$", r".scale\1.weight"),
            (r"\.modulation\.f\.", ".mixer.in_proj."),
            (r"\.modulation\.h\.", ".mixer.context_proj."),
            (r"\.modulation\.proj\.", ".mixer.out_proj."),
            (r"\.modulation\.norm\.", ".mixer.norm."),
            (r"\.modulation\.focal_layers\.(\d)\.0\.weight$", r".mixer.convs.\1"),
            (r"^norm\.", "head.before."),
            (r"^head\.fc\.", "head.classifier."),
        ),
    )


def from_official(state: State, model: nn.Module) -> State:
    """The names of microsoft/FocalNet."""
    return rename(
        linear(state, r"modulation\.h\.weight"),
        (
            (r"^patch_embed\.", "downsamples.0."),
            *((rf"^layers\.{i}\.downsample\.", f"downsamples.{i + 1}.") for i in range(3)),
            (r"^(downsamples\.\d)\.proj\.", r"\1.conv."),
            (r"^(downsamples\.\d)\.norm\.", r"\1.after."),
            (r"^layers\.", "stages."),
            (r"\.gamma_([12])$", r".scale\1.weight"),
            (r"\.modulation\.f\.", ".mixer.in_proj."),
            (r"\.modulation\.h\.", ".mixer.context_proj."),
            (r"\.modulation\.proj\.", ".mixer.out_proj."),
            (r"\.modulation\.ln\.", ".mixer.norm."),
            (r"\.modulation\.focal_layers\.(\d)\.0\.weight$", r".mixer.convs.\1"),
            (r"^norm\.", "head.before."),
            (r"^head\.(weight|bias)$", r"head.classifier.\1"),
        ),
    )


@published(
    {f"focalnet_{size}": settings for size, settings in SIZES.items()},
    title="Focal Modulation Networks",
    year=2022,
    paper="arXiv:2203.11926",
    key_maps={"timm": from_timm, "official": from_official},
)
def focalnet(
    *,
    depths: Sequence[int],
    dim: int,
    focal: Mapping[str, Any],
    patch: int = 4,
    mixer: Mixers = "focalnet",
    mixer_settings: Settings = None,
    scale: float | None = None,
    post_norm: bool = False,
    overlap: bool = False,
    drop_path: float = 0.0,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
) -> Pyramid:
    """Focal modulation, or another mechanism, in the pyramid of FocalNet.

    Args:
        depths: blocks of each stage.
        dim: channels of the first stage; each one after has twice as many.
        focal: settings of focal modulation where that is the mechanism.
        patch: pixels of a side of the first patches.
        mixer: the mechanism, one for all stages or one for each.
        mixer_settings: of the mechanisms, for all stages or for each, before those of `focal`.
        scale: starting value of the layer scales; None for none.
        post_norm: whether norms stand behind mixer and MLP.
        overlap: whether convolutions of 7 x 7 (stride 4) and 3 x 3 make the patches.
        drop_path: rate of the last block.
        num_classes: of the head; 0 for features.
        in_chans: channels of the pictures.
        img_size: that it is trained on, for mechanisms that depend on it.
    """
    dims, strides = doubling(dim, len(depths)), doubling(patch, len(depths))
    stem = (7, 4, 2) if overlap else (patch, patch, 0)
    between = (3, 2, 1) if overlap else (2, 2, 0)
    convolutions = [stem, *[between] * (len(depths) - 1)]
    downsamples = [
        Downsample(before, after, kernel, stride, padding=padding, after=MapLayerNorm)
        for before, after, (kernel, stride, padding) in zip([in_chans, *dims[:-1]], dims, convolutions, strict=True)
    ]
    stages = token_stages(
        mixer,
        depths,
        dims,
        [max(1, dim // HEAD_DIM) for dim in dims],
        sizes_after(img_size, convolutions),
        lambda each, rate: MetaFormerBlock(
            each, Mlp(each.site.dim, 4 * each.site.dim), scale=scale, drop_path=rate, post_norm=post_norm
        ),
        settings=mixer_settings,
        own=lambda _, name: focal if name == "focalnet" else {},
        drop_path=drop_path,
    )
    head = Head(dims[-1], num_classes, before=MapLayerNorm)
    net = Pyramid(downsamples, stages, head, in_chans=in_chans, channels=dims, strides=strides)
    return start_published(net, kinds=(nn.Linear, nn.Conv2d), own=["focalnet"])
