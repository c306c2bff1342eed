"""RAVLT: rank-augmented linear attention on the large maps, gated softmax attention on the small ones.

    u = x + conv(x),    y = u + s₁ ⊙ mixer(norm u),    z = y + s₂ ⊙ MLP(norm y)
    MLP(x) = W₂ (h + conv(h)),    h = σ(W₁ x)

Four 3 x 3 convolutions lead to a map of stride 4, one of stride 2 to every further stage, each with a batch norm; so
does a last 1 x 1 convolution to 1024 channels, with SiLU, before the mean over places. The first two stages are
linear attention, the last two softmax attention, whose queries and keys turn by their places; in all of them a 5 x 5
convolution of the values stands beside the attention, and a gate without activation multiplies the sum. All stages
are linear with `mixer="rala"`.

Source: Fan et al., "Breaking the Low-Rank Dilemma of Linear Attention", 2024 (arXiv:2411.07635), official code
qhfan/RALA.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from attlas.blocks.conv_stem import ConvStem
from attlas.blocks.drop_path import rising
from attlas.blocks.embed import Downsample
from attlas.blocks.metaformer import MetaFormerBlock
from attlas.blocks.mlp import ConvMlp
from attlas.blocks.stage import TokenStage
from attlas.core.grid import Grid
from attlas.core.mechanism import Mixer
from attlas.models.backbone import Head
from attlas.models.key_maps import QKV, linear, rename, split
from attlas.models.mixers import Mixers, map_sizes, per_stage, stage_mixers
from attlas.models.pyramid import Pyramid
from attlas.models.registry import State, published
from attlas.models.rules import BETWEEN, CLASSIFIER
from attlas.models.stages import check_stages, enhanced_softmax

STRIDES = (4, 8, 16, 32)

SIZES: Mapping[str, Mapping[str, Any]] = {
    "tiny": {"depths": (2, 2, 6, 2), "dims": (64, 128, 256, 512), "heads": (1, 2, 4, 8), "drop_path": 0.1},
    "small": {"depths": (3, 5, 9, 3), "dims": (64, 128, 320, 512), "heads": (1, 2, 5, 8), "drop_path": 0.15},
    "base": {
        "depths": (4, 6, 12, 6),
        "dims": (96, 192, 384, 512),
        "heads": (1, 2, 6, 8),
        "scales": (1.0, 1.0, 1e-6, 1e-6),
        "drop_path": 0.4,
    },
    "large": {
        "depths": (4, 7, 19, 8),
        "dims": (96, 192, 448, 640),
        "heads": (1, 2, 7, 10),
        "scales": (1e-6, 1e-6, 1e-6, 1e-6),
        "drop_path": 0.55,
    },
    "micro": {
        "depths": (1, 1, 1, 1),
        "dims": (16, 32, 48, 64),
        "heads": (1, 2, 3, 4),
        "features": 128,
        "img_size": 64,
    },
}


def from_official(state: State, model: nn.Module) -> State:
    """The names of qhfan/RALA."""
    assert isinstance(model, Pyramid)
    state = {key: value for key, value in state.items() if not key.endswith("RoPE.angle")}
    state = linear(state, r"(attn\.(qkvo|proj)|ffn\.fc\d|^head)\.weight$")
    state = {key: value.flatten() if "gamma_" in key else value for key, value in state.items()}
    state = rename(state, BETWEEN)
    own = sorted({key.split(".")[1] for key in model.state_dict() if ".attend.lepe." in key})
    state = rename(
        state,
        (
            *((rf"^patch_embed\.proj\.{3 * i}\.", f"downsamples.0.convs.{i}.") for i in range(4)),
            *((rf"^patch_embed\.proj\.{3 * i + 1}\.", f"downsamples.0.norms.{i}.") for i in range(4)),
            (r"^(downsamples\.\d\.)reduction\.", r"\1conv."),
            (r"^(downsamples\.[123]\.)norm\.", r"\1after."),
            (r"^layers\.", "stages."),
            *((rf"^(stages\.{i}\..*)\.attn\.lepe\.", r"\1.mixer.attend.lepe.") for i in own),
            (r"\.attn\.lepe\.", ".mixer.conv."),
            (r"\.attn\.(proj|out_proj)\.", ".mixer.out_proj."),
            (r"\.attn\.ln\.", ".mixer.output_norm."),
            (r"\.attn\.qkv[og]\.", ".mixer.fused."),
            (r"\.norm([12])\.norm\.", r".norm\1."),
            (r"\.gamma_([12])$", r".scale\1.weight"),
            (r"\.pos\.", ".position1.conv."),
            (r"\.cpe([12])\.", r".position\1.conv."),
            (r"\.ffn\.dwconv\.", ".mlp.conv."),
            (r"\.ffn\.", ".mlp."),
            (r"^proj\.", "head.before.0."),
            (r"^norm\.", "head.before.1."),
            CLASSIFIER,
        ),
    )
    return split(state, "fused", (*QKV, "gate_proj"))


@published(
    {f"ravlt_{size}": settings for size, settings in SIZES.items()},
    title="Breaking the Low-Rank Dilemma of Linear Attention",
    year=2024,
    paper="arXiv:2411.07635",
    key_maps={"official": from_official},
)
def ravlt(
    *,
    depths: Sequence[int],
    dims: Sequence[int],
    heads: Sequence[int],
    mlp_ratio: float = 3.5,
    scales: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    features: int = 1024,
    mixer: Mixers = ("rala", "rala", "softmax", "softmax"),
    mixer_settings: Mapping[str, Any] | None = None,
    drop_path: float = 0.0,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
) -> Pyramid:
    """A RAVLT, with any mechanism.

    Args:
        depths, dims, heads: blocks, channels and heads of each stage.
        mlp_ratio: hidden channels of an MLP per channel.
        scales: starting value of the layer scales in each stage.
        features: channels that the classifier reads.
        mixer: the mechanism of each stage. "softmax" has the turn, the convolution and the gate.
        mixer_settings: of the mechanisms; softmax attention has them where every stage has softmax attention.
        drop_path: rate of the last block.
        num_classes: of the head; 0 for features.
        in_chans: channels of the pictures.
        img_size: that it is trained on.
    """
    return gated_pyramid(
        depths=depths,
        dims=dims,
        heads=heads,
        mlp_ratio=mlp_ratio,
        scales=scales,
        features=features,
        mixer=mixer,
        mixer_settings=mixer_settings,
        shell={"gate": "linear"},
        positions=(True, False),
        drop_path=drop_path,
        num_classes=num_classes,
        in_chans=in_chans,
        img_size=img_size,
    )


def gated_pyramid(
    *,
    depths: Sequence[int],
    dims: Sequence[int],
    heads: Sequence[int],
    mlp_ratio: float,
    scales: Sequence[float],
    features: int,
    mixer: Mixers,
    mixer_settings: Mapping[str, Any] | None,
    shell: Mapping[str, Any],
    positions: tuple[bool, bool],
    drop_path: float,
    num_classes: int,
    in_chans: int,
    img_size: int | tuple[int, int],
) -> Pyramid:
    """The layout of RAVLT, which others have too.

    Args:
        shell: settings of the softmax attention's shell.
        positions: whether a convolution of x stands before the mixer and before the MLP.
        depths, dims, heads, mlp_ratio, scales, features, mixer, mixer_settings: see `ravlt`.
        drop_path, num_classes, in_chans, img_size: see `ravlt`.
    """
    check_stages(dims=dims, depths=depths, heads=heads, scales=scales[: len(dims)])
    names, rates = per_stage(mixer, len(dims)), rising(drop_path, depths)
    shared = mixer_settings if set(names) == {"softmax"} else None
    stages = []
    for i, size in enumerate(map_sizes(img_size, STRIDES[: len(dims)])):
        dim, grid = dims[i], Grid(size)
        mixers: list[Mixer]
        if names[i] == "softmax":
            mixers = enhanced_softmax(depths[i], dim, heads[i], grid, shared, turned=True, **shell)
        else:
            mixers = stage_mixers(names[i], depths[i], dim, heads[i], grid, mixer_settings)
        stages.append(
            TokenStage(
                MetaFormerBlock(
                    each,
                    ConvMlp(dim, int(mlp_ratio * dim), residual=True, late=True),
                    norm=partial(nn.LayerNorm, eps=1e-6),
                    scale=float(scales[i]),
                    drop_path=rate,
                    positions=positions,
                )
                for each, rate in zip(mixers, rates[i], strict=True)
            )
        )
    half = dims[0] // 2
    stem = ConvStem(in_chans, (half, half, half, dims[0]), (2, 1, 1, 2))
    between = [Downsample(dims[i], dims[i + 1], 3, 2, after=nn.BatchNorm2d) for i in range(len(dims) - 1)]
    head = Head(
        features,
        num_classes,
        before=lambda out: nn.Sequential(nn.Conv2d(dims[-1], out, 1), nn.BatchNorm2d(out), nn.SiLU()),
    )
    net = Pyramid([stem, *between], stages, head, in_chans=in_chans, channels=dims, strides=STRIDES)
    net.num_features = features
    return net
