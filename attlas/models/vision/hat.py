"""HAT: windows, channel attention and overlapping windows, for super-resolution; and with any other mechanisms.

    n = norm x,    y = x + mixer(n) + 0.01 CA(n),    z = y + MLP(norm y)          a hybrid block
    y = x + overlapping(norm x),    z = y + MLP(norm y)                           after six of them
    g = x + conv(blocks(x))                                                       a group of both
    u = conv(image - mean),    picture = mean + last(shuffle(conv(u + conv(norm(groups(norm u))))))

CA is two 3 x 3 convolutions and a factor per channel; the mixer is window attention, shifted in every second block
(`swin`), the overlapping one `hat`. There is no downsampling; pixels are shuffled out at the end. The published test
code mirrors pictures whose sides the window does not divide, to the right and below, and so does this network. On a
picture one window high or wide no window is shifted here, while the published mask still cuts it.

Source: Chen et al., "Activating More Pixels in Image Super-Resolution Transformer", 2022 (arXiv:2205.04437), official
code XPixelGroup/HAT.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attlas.blocks.drop_path import DropPath, rising
from attlas.blocks.metaformer import MetaFormerBlock
from attlas.blocks.mlp import Mlp
from attlas.blocks.stage import TokenStage
from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.core.mechanism import Mixer
from attlas.mechanisms.local_sparse.hat import Hat
from attlas.models.backbone import start_published
from attlas.models.key_maps import QKV, linear, rename, split
from attlas.models.mixers import Mixers, Settings, per_stage, picture_size, settings_per_stage, stage_mixers
from attlas.models.registry import State, published
from attlas.models.restoration import Restorer
from attlas.ops.channel_attention import ChannelConvs
from attlas.ops.maps import to_map, to_tokens

RGB_MEAN = (0.4488, 0.4371, 0.4040)
SHARE = 0.01
"""Of the convolutions in a hybrid block."""

SIZES: Mapping[str, Mapping[str, Any]] = {
    "hat_s": {"dim": 144, "groups": 6, "compress": 24, "squeeze": 24},
    "hat": {"dim": 180, "groups": 6, "compress": 3, "squeeze": 30},
    "hat_l": {"dim": 180, "groups": 12, "compress": 3, "squeeze": 30},
    "hat_micro": {
        "dim": 24,
        "groups": 2,
        "depth": 2,
        "heads": 2,
        "compress": 3,
        "squeeze": 4,
        "window": 8,
        "features": 16,
        "scale": 2,
        "img_size": 32,
    },
}


class HybridBlock(nn.Module):
    """x + mixer(n) + 0.01 convs(n) with n = norm x, then an MLP behind a norm, beside a residual path.

    Args:
        mixer: of tokens.
        convs: of maps, called with tokens and grid.
        mlp: of channels.
        drop_path: the share of pictures for which mixer or MLP is dropped in training.
    """

    def __init__(self, mixer: Mixer, convs: nn.Module, mlp: nn.Module, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(mixer.site.dim), nn.LayerNorm(mixer.site.dim)
        self.mixer, self.convs, self.mlp = mixer, convs, mlp
        self.drop_path = DropPath(drop_path)

    def forward(self, x_BNC: Tensor, grid: Grid) -> Tensor:
        """Mix tokens, then channels."""
        n_BNC = self.norm1(x_BNC)
        x_BNC = x_BNC + self.drop_path(self.mixer(n_BNC, grid=grid)) + SHARE * self.convs(n_BNC, grid)
        return x_BNC + self.drop_path(self.mlp(self.norm2(x_BNC), grid))


class Group(nn.Module):
    """x + conv(blocks(x)) on maps."""

    def __init__(self, blocks: Sequence[nn.Module], dim: int) -> None:
        super().__init__()
        self.stage, self.conv = TokenStage(blocks), nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Through all blocks and the convolution."""
        return x_BCHW + self.conv(self.stage(x_BCHW))


class Upsample(nn.Sequential):
    """Convolutions and pixel shuffles: by 3, or by 2 as often as needed."""

    def __init__(self, dim: int, scale: int) -> None:
        if scale != 3 and (scale < 2 or scale & (scale - 1)):
            raise BadInput(f"pictures are enlarged by 3 or a power of 2, got scale={scale}")
        steps = [3] if scale == 3 else [2] * int(math.log2(scale))
        layers = [(nn.Conv2d(dim, step * step * dim, 3, padding=1), nn.PixelShuffle(step)) for step in steps]
        super().__init__(*(each for pair in layers for each in pair))


class HAT(Restorer):
    """Groups at the resolution of the picture, pixels shuffled out at the end.

    Args:
        groups: maps to maps.
        dim: channels of the maps.
        features: channels while enlarging.
        in_chans: channels of the pictures; the mean colour is known where they are 3.
        scale: pixels that come out for one, on each side.
        multiple: of how many pixels the sides of a picture are made.
    """

    mean: Tensor

    def __init__(
        self, groups: Sequence[nn.Module], dim: int, *, features: int, in_chans: int, scale: int, multiple: int
    ) -> None:
        super().__init__(in_chans, multiple, scale=scale)
        mean = torch.tensor(RGB_MEAN) if in_chans == 3 else torch.zeros(in_chans)
        self.register_buffer("mean", mean.view(-1, 1, 1), persistent=False)
        self.first = nn.Conv2d(in_chans, dim, 3, padding=1)
        self.norm_in, self.norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.groups: Any = nn.ModuleList(groups)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)
        self.before = nn.Sequential(nn.Conv2d(dim, features, 3, padding=1), nn.LeakyReLU())
        self.upsample = Upsample(features, scale)
        self.last = nn.Conv2d(features, in_chans, 3, padding=1)

    def restore(self, image_BCHW: Tensor) -> Tensor:
        """A picture `scale` times as high and wide."""
        u_BCHW = self.first(image_BCHW - self.mean)
        x_BNC, grid = to_tokens(u_BCHW)
        x_BCHW = to_map(self.norm_in(x_BNC), grid)
        for group in self.groups:
            x_BCHW = group(x_BCHW)
        x_BCHW = to_map(self.norm(to_tokens(x_BCHW)[0]), grid)
        return self.mean + self.last(self.upsample(self.before(u_BCHW + self.conv(x_BCHW))))


def from_official(state: State, model: nn.Module) -> State:
    """The names of XPixelGroup/HAT, and its tables of relative biases turned to offsets key - query."""
    state = {key: value for key, value in state.items() if not key.startswith("relative_position_index")}
    assert isinstance(model, HAT)
    blocks = model.groups[0].stage.blocks
    for key, table_TH in list(state.items()):
        if not key.endswith("relative_position_bias_table") or table_TH.ndim != 2:
            continue
        side = math.isqrt(len(table_TH))
        if side * side != len(table_TH):
            raise BadInput(f"{key} has a number for each offset in a square window, got {len(table_TH)} numbers")
        if "overlap_attn" not in key:
            state[key] = table_TH.T.unflatten(1, (side, side)).flip(1, 2)
        elif isinstance(last := getattr(blocks[-1].mixer, "attend", None), Hat):
            state[key] = _overlapping_bias(key, table_TH, last)
    state = split(linear(state, r"\.attention\."), "attn.qkv", tuple(f"attn.{name}" for name in QKV))
    return rename(
        state,
        (
            (r"^layers\.(\d+)\.residual_group\.blocks\.(\d+)\.", r"groups.\1.stage.blocks.\2."),
            (r"^layers\.(\d+)\.residual_group\.overlap_attn\.", rf"groups.\1.stage.blocks.{len(blocks) - 1}."),
            (r"^layers\.(\d+)\.conv\.", r"groups.\1.conv."),
            (r"(blocks\.\d+)\.(?:attn\.)?relative_position_bias_table$", r"\1.mixer.attend.relative_bias"),
            (r"(blocks\.\d+)\.attn\.proj\.", r"\1.mixer.out_proj."),
            (r"(blocks\.\d+)\.proj\.", r"\1.mixer.out_proj."),
            (r"(blocks\.\d+)\.attn\.", r"\1.mixer."),
            (r"(blocks\.\d+)\.([qkv]_proj)\.", r"\1.mixer.\2."),
            (r"\.conv_block\.cab\.0\.", ".convs.conv1."),
            (r"\.conv_block\.cab\.2\.", ".convs.conv2."),
            (r"\.conv_block\.cab\.3\.attention\.1\.", ".convs.attention.squeeze."),
            (r"\.conv_block\.cab\.3\.attention\.3\.", ".convs.attention.excite."),
            (r"^conv_first\.", "first."),
            (r"^patch_embed\.norm\.", "norm_in."),
            (r"^conv_after_body\.", "conv."),
            (r"^conv_before_upsample\.", "before."),
            (r"^conv_last\.", "last."),
        ),
    )


def _overlapping_bias(key: str, table_TH: Tensor, attend: Hat) -> Tensor:
    """The published rows, which are counted from a negative number, by offset key - query."""
    window, halo = attend.window[0], attend.halo[0]
    side = 2 * (window + halo) - 1
    if len(table_TH) != side * side:
        raise BadInput(f"{key} is of other windows: {side * side} offsets here, {len(table_TH)} in the checkpoint")
    entry = torch.arange(side) + 2 - window - 2 * halo
    rows = (entry.unsqueeze(1) * side + entry) % len(table_TH)
    return table_TH.T[:, rows]


@published(
    SIZES,
    title="Activating More Pixels in Image Super-Resolution Transformer",
    year=2022,
    paper="arXiv:2205.04437",
    task="restoration",
    key_maps={"official": from_official},
)
def hat(
    *,
    dim: int,
    groups: int,
    compress: int,
    squeeze: int,
    depth: int = 6,
    heads: int = 6,
    window: int = 16,
    features: int = 64,
    mixer: Mixers = "swin",
    mixer_settings: Settings = None,
    overlapping: str | None = "hat",
    drop_path: float = 0.1,
    scale: int = 4,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 64,
) -> HAT:
    """HAT with any mechanisms.

    Args:
        dim, groups: channels, groups of blocks.
        compress, squeeze: how many times fewer channels are between the convolutions of a hybrid block, and inside its
            channel attention.
        depth, heads: hybrid blocks of a group, heads of each.
        window: places of a window; sides of pictures are made multiples of it.
        features: channels while enlarging.
        mixer: the mechanism of the hybrid blocks, one for all groups or one for each.
        mixer_settings: of that mechanism, for all groups or for each; `swin` has the window where they say nothing.
        overlapping: the mechanism of the block after them; None for no such block.
        drop_path: rate of the last hybrid block.
        scale: pixels that come out for one, on each side: 3 or a power of 2.
        in_chans: channels of the pictures.
        img_size: that it is trained on, for mechanisms that depend on it.
    """
    grid = Grid(tuple(side + -side % window for side in picture_size(img_size)))
    names, rates = per_stage(mixer, groups), rising(drop_path, [depth] * groups)
    given = settings_per_stage(mixer_settings, groups)

    def blocks(group: int) -> list[nn.Module]:
        name = names[group]
        settings = {**({"window": window} if name == "swin" else {}), **given[group]}
        even = depth + depth % 2  # windows of every group's first block are not shifted
        mixers = stage_mixers(name, depth, dim, heads, grid, settings, first=group * even, layers=groups * even)
        made: list[nn.Module] = [
            HybridBlock(each, ChannelConvs(dim, dim // compress, dim // squeeze), Mlp(dim, 2 * dim), rate)
            for each, rate in zip(mixers, rates[group], strict=True)
        ]
        if overlapping is not None:
            own = {"window": window} if overlapping == "hat" else {}
            (last,) = stage_mixers(overlapping, 1, dim, heads, grid, own)
            made.append(MetaFormerBlock(last, Mlp(dim, 2 * dim)))
        return made

    made = [Group(blocks(group), dim) for group in range(groups)]
    net = HAT(made, dim, features=features, in_chans=in_chans, scale=scale, multiple=window)
    return start_published(net)
