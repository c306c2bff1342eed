"""FcaFormer: two stages of ConvNeXt blocks, then two of attention in which tokens of earlier blocks are seen again.

    x ← x + γ₁ ⊙ FCA(LN x, [s of earlier blocks]),    s = merge x,    x ← BN(conv₃ x),    x ← x + γ₂ ⊙ MLP(x)

See `attlas.blocks.fcaformer`. Every block of the deep stages but the last hands on one token for 4 x 4 places, made by
a convolution, and sees those of the latest twelve before it in its own stage. Their number, and the table of biases
for distances, belong to the grid: pictures have one size.

A stem of two 3 x 3 convolutions of stride 2; between the stages 1 x 1, depthwise 3 x 3 of stride 2, 1 x 1, each
convolution with a batch norm. The head takes the mean over places, then a norm.

Source: Zhang et al., "FcaFormer: Forward Cross Attention in Hybrid Vision Transformer", 2022 (arXiv:2211.07198),
official code hkzhang-git/FcaFormer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from attlas.blocks.conv_norm import ConvNorm
from attlas.blocks.conv_stem import ConvStem
from attlas.blocks.convnext import ConvNeXtBlock
from attlas.blocks.drop_path import rising
from attlas.blocks.fcaformer import FcaStage
from attlas.blocks.stage import Stage
from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.models.backbone import Head
from attlas.models.key_maps import rename
from attlas.models.mixers import map_sizes
from attlas.models.pyramid import Pyramid
from attlas.models.registry import State, published
from attlas.ops.maps import to_map, to_tokens

STRIDES = (4, 8, 16, 32)
SIZES: Mapping[str, Mapping[str, Any]] = {
    "l1": {"depths": (2, 2, 6, 2), "dims": (64, 128, 192, 320), "heads": (6, 10)},
    "l2": {"depths": (2, 2, 7, 2), "dims": (96, 192, 320, 480), "heads": (10, 15)},
    "l3": {"depths": (3, 6, 12, 3), "dims": (96, 192, 320, 512), "heads": (10, 16)},
    "l4": {"depths": (3, 6, 12, 3), "dims": (128, 256, 512, 768), "heads": (16, 24)},
    "micro": {"depths": (1, 1, 3, 2), "dims": (16, 16, 32, 48), "heads": (2, 3), "img_size": 64},
}

STEPS = [(i, j) for i in range(3) for j in range(3)]
"""Each convolution of each step between two stages."""


class HandingStage(nn.Module):
    """An `FcaStage` on maps of the one size that it is built for."""

    def __init__(self, stage: FcaStage) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Lay the map out as tokens, mix, lay it back."""
        x_BNC, grid = to_tokens(x_BCHW)
        if grid != self.stage.grid:
            raise BadInput(
                f"this FcaFormer hands on tokens of a {self.stage.grid}, got a {grid}: build it with the img_size that "
                "it is used at"
            )
        return to_map(self.stage(x_BNC), grid)


def thinner(dim: int, out: int) -> nn.Sequential:
    """Half as many places on both axes."""
    return nn.Sequential(
        ConvNorm(dim, out), nn.GELU(), ConvNorm(out, out, 3, 2, groups=out), nn.GELU(), ConvNorm(out, out)
    )


def from_official(state: State, model: nn.Module) -> State:
    """The names of hkzhang-git/FcaFormer."""
    assert isinstance(model, Pyramid)
    deep = {
        f"stages.{index}.": stage.stage for index, stage in enumerate(model.stages) if isinstance(stage, HandingStage)
    }
    state = rename(
        state,
        (
            (r"^patch_embed\.seq\.0\.c\.", "downsamples.0.convs.0."),
            (r"^patch_embed\.seq\.0\.bn\.", "downsamples.0.norms.0."),
            (r"^patch_embed\.seq\.2\.c\.", "downsamples.0.convs.1."),
            (r"^patch_embed\.seq\.2\.bn\.", "downsamples.0.norms.1."),
            *((rf"^layer_{i}\.downsample\.conv{j + 1}\.", rf"downsamples.{i + 1}.{2 * j}.") for i, j in STEPS),
            (r"^(downsamples\.[123]\.\d)\.c\.", r"\1.conv."),
            (r"^(downsamples\.[123]\.\d)\.bn\.", r"\1.norm."),
            (r"^layer_([01])\.", r"stages.\1."),
            (r"^layer_([23])\.", r"stages.\1.stage."),
            (r"\.dwconv\.", ".conv."),
            (r"\.pwconv([12])\.", r".mlp.fc\1."),
            (r"\.gamma$", ".scale.weight"),
            (r"\.gamma_1$", ".scale.weight"),
            (r"\.gamma_2$", ".mlp_scale.weight"),
            (r"\.dw_conv\.", ".merge."),
            (r"\.s_token_bias$", ".mix.handed_bias"),
            (r"\.s_norm\.", ".mix.handed_norm."),
            (r"\.s_scale_factors$", ".mix.handed_scale"),
            (r"\.attention_biases$", ".mix.position_bias"),
            (r"\.norm1\.", ".norm."),
            (r"\.proj\.", ".mix.out_proj."),
            (r"\.local_conv\.c\.", ".local."),
            (r"\.local_conv\.bn\.", ".local_norm."),
            (r"\.norm2\.", ".mlp.0."),
            (r"(stage\.blocks\.\d+)\.mlp\.norm\.", r"\1.mlp.1."),
            (r"(stage\.blocks\.\d+)\.mlp\.fc1\.", r"\1.mlp.2."),
            (r"(stage\.blocks\.\d+)\.mlp\.fc2\.", r"\1.mlp.4."),
            (r"^norm_head\.", "head.after."),
            (r"^head\.(weight|bias)$", r"head.classifier.\1"),
        ),
    )
    ours: State = {}
    for key, value in state.items():
        if ".qkv." in key:
            third = len(value) // 3
            query, key_value = value.tensor_split([third])
            ours[key.replace("qkv", "mix.q_proj")], ours[key.replace("qkv", "mix.kv_proj")] = query, key_value
        elif key.endswith("position_bias"):
            grid = next((stage.grid for start, stage in deep.items() if key.startswith(start)), None)
            if grid is None or value.shape[1:] != (grid.positions,):
                raise BadInput(f"{key} has a number for each place of a {grid}, got the shape {tuple(value.shape)}")
            ours[key] = value.unflatten(1, grid.shape)
        elif key.endswith(("handed_bias", "handed_scale")):
            if value.ndim < 3:
                raise BadInput(f"{key} has the shape (1, heads, 1, ...), got {tuple(value.shape)}")
            ours[key] = value[0, :, 0]
        else:
            ours[key] = value
    return ours


@published(
    {f"fcaformer_{size}": settings for size, settings in SIZES.items()},
    title="FcaFormer: Forward Cross Attention in Hybrid Vision Transformer",
    year=2022,
    paper="arXiv:2211.07198",
    key_maps={"official": from_official},
)
def fcaformer(
    *,
    depths: Sequence[int],
    dims: Sequence[int],
    heads: Sequence[int],
    latest: int = 12,
    drop_path: float = 0.1,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
) -> Pyramid:
    """The network.

    Args:
        depths, dims: blocks and channels of each stage; the last stages have attention.
        heads: of the stages with attention.
        latest: of how many blocks before it one sees the tokens.
        drop_path: rate of the last block.
        num_classes: of the head; 0 for features.
        in_chans: channels of the pictures.
        img_size: of all pictures.
    """
    rates, sizes = rising(drop_path, depths), map_sizes(img_size, STRIDES)
    shallow = len(dims) - len(heads)
    downsamples = [
        thinner(dims[i - 1], dims[i]) if i else ConvStem(in_chans, (dims[0] // 2, dims[0]), (2, 2), bias=False)
        for i in range(len(dims))
    ]
    stages: list[nn.Module] = [
        Stage(ConvNeXtBlock(dims[i], drop_path=rate) for rate in rates[i]) for i in range(shallow)
    ]
    for i, count in enumerate(heads, shallow):
        stage = FcaStage(dims[i], count, Grid(sizes[i]), depths[i], latest=latest, drop_path=rates[i])
        stages.append(HandingStage(stage))
    head = Head(dims[-1], num_classes, after=nn.LayerNorm)
    return Pyramid(downsamples, stages, head, in_chans=in_chans, channels=dims, strides=STRIDES)
