"""HaloNet: a residual network whose 3 x 3 convolutions are attention of blocks to what lies in and around them.

    y = σ(shortcut(x) + norm(W₃ σ(norm(mixer(σ(norm(W₁ x)))))))

A stem of 7 x 7, stride 2, and a maximum over 3 x 3 places of stride 2; the first block of stages 2 to 4 halves both
sides, by leaving out every second output; σ is SiLU. Four heads in the first stage, eight in the others. Values are r_v
times as wide as queries and a stage's output r_b times, l₃ are the blocks of stage 3, and d_f channels a last 1 x 1
convolution has.

`halonet50ts` is timm's: a stem of three 3 x 3 convolutions, and convolutions in most blocks.

Places beyond the border of a map take part as keys and values of zero, as in all code that there is.

Source: Vaswani et al., "Scaling Local Self-Attention for Parameter Efficient Visual Backbones", 2021
(arXiv:2103.12731). A reconstruction: there is no official code; blocks are those of timm and sizes those that give the
published numbers of parameters. timm's `halonet_h1` has eight heads in the first stage, too, and its strided attention,
like that of `halonet26t`, counts the places of the queries that it keeps one by one, so neither can be loaded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from attlas.blocks.bottleneck import AttendMap, Bottleneck, MixMap
from attlas.blocks.conv_norm import ConvNorm
from attlas.blocks.drop_path import rising
from attlas.blocks.factory import make_attend, resolve
from attlas.blocks.factory import mixer as make_mixer
from attlas.blocks.stage import Stage
from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.core.mechanism import Attend
from attlas.models.backbone import Head
from attlas.models.key_maps import rename
from attlas.models.mixers import Mixers, map_sizes, per_stage
from attlas.models.pyramid import Pyramid
from attlas.models.registry import State, published
from attlas.models.stages import check_stages

STRIDES = (4, 8, 16, 32)
STEM = 64


def _all_attention(depth: int) -> tuple[str, ...]:
    return "aaa", "aaa", "a" * depth, "aaa"


SIZES: Mapping[str, Mapping[str, Any]] = {
    "h0": {"layout": _all_attention(7), "expansion": 0.5, "img_size": 256},
    "h1": {"layout": _all_attention(10), "img_size": 256},
    "h2": {"layout": _all_attention(11), "expansion": 1.25, "img_size": 256},
    "h3": {"layout": _all_attention(12), "expansion": 1.5, "block": 10, "last": 1024, "img_size": 320},
    "h4": {"layout": _all_attention(12), "expansion": 3, "block": 12, "halo": 2, "last": 1280, "img_size": 384},
    "h5": {
        "layout": _all_attention(23),
        "values": 2.5,
        "expansion": 2,
        "block": 14,
        "halo": 2,
        "last": 1536,
        "img_size": 448,
    },
    "h6": {"layout": _all_attention(24), "values": 3, "expansion": 2.75, "halo": 4, "last": 1536, "img_size": 512},
    "h7": {"layout": _all_attention(26), "values": 4, "expansion": 3.5, "block": 10, "last": 2048, "img_size": 600},
    "micro": {
        "layout": ("ca", "a"),
        "dims": (32, 64),
        "heads": (2, 4),
        "values": 1.5,
        "block": 4,
        "halo": 1,
        "last": 64,
        "img_size": 32,
    },
}
TIMM: Mapping[str, Any] = {
    "layout": ("ccc", "ccca", "cacaca", "cac"),
    "heads": (4, 4, 8, 8),
    "expansion": 4,
    "tiered": True,
    "img_size": 256,
}


def from_timm(state: State, model: nn.Module) -> State:
    """The names of timm's residual networks with attention.

    Raises:
        BadInput: attention with a stride, which means something else there.
    """
    strided = [key for key, layer in model.named_modules() if isinstance(layer, AttendMap) and layer.stride > 1]
    if strided:
        raise BadInput(
            f"{strided[0]} is attention with a stride, where timm counts the places of the queries that are kept one "
            "by one: its weights mean something else; what can be loaded is a layout like that of halonet50ts"
        )
    state = rename(
        state,
        (
            (r"\.bn\.", ".norm."),
            (r"^stem\.conv1\.", "downsamples.0.0."),
            (r"^stem\.conv2\.", "downsamples.0.2."),
            (r"^stem\.conv3\.", "downsamples.0.4."),
            (r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
            (r"\.conv1_1x1\.", ".conv1."),
            (r"\.conv2_kxk\.", ".middle.0."),
            (r"\.conv3_1x1\.", ".conv3."),
            (r"\.self_attn\.pos_embed\.height_rel$", ".middle.0.attend.relative.0"),
            (r"\.self_attn\.pos_embed\.width_rel$", ".middle.0.attend.relative.1"),
            (r"\.self_attn\.q\.", ".middle.0.q_proj."),
            (r"\.self_attn\.kv\.", ".middle.0.kv_proj."),
            (r"\.post_attn\.", ".middle.1."),
            (r"^head\.fc\.", "head.classifier."),
        ),
    )
    modules, parts = dict(model.named_modules()), State()
    for key, value in state.items():
        found = re.fullmatch(r"(.*\.middle\.0)\.(q|kv)_proj\.weight", key)
        if found is None:
            parts[key] = value
            continue
        layer = modules[found[1]]
        assert isinstance(layer, AttendMap)
        heads, weight = layer.attend.site.heads, value.flatten(1)
        if found[2] == "q":
            parts[key] = weight
        else:
            for name, chunk in zip("kv", weight.unflatten(0, (heads, 2, -1)).unbind(1), strict=True):
                parts[f"{found[1]}.{name}_proj.weight"] = chunk.flatten(0, 1)
    return parts


@published(
    {f"halonet_{size}": settings for size, settings in SIZES.items()} | {"halonet50ts": TIMM},
    title="Scaling Local Self-Attention for Parameter Efficient Visual Backbones",
    year=2021,
    paper="arXiv:2103.12731",
    key_maps={"timm": from_timm},
    reconstruction=True,
)
def halonet(
    *,
    layout: Sequence[str],
    dims: Sequence[int] = (64, 128, 256, 512),
    heads: Sequence[int] = (4, 8, 8, 8),
    values: float = 1,
    expansion: float = 1,
    block: int = 8,
    halo: int = 3,
    last: int | None = None,
    tiered: bool = False,
    mixer: Mixers = "halonet",
    mixer_settings: Mapping[str, Any] | None = None,
    drop_path: float = 0.0,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
) -> Pyramid:
    """A HaloNet with any mechanism.

    Args:
        layout: a letter for each block of each stage, "c" with a convolution and "a" with the mixer.
        dims, heads: channels inside the blocks of each stage and heads of its mixers.
        values: r_v, channels of the values per channel of the queries, for mechanisms on queries, keys and values.
        expansion: r_b, channels of a block's output per channel inside.
        block, halo: of the mixer `halonet`.
        last: d_f, channels of a last convolution; None for none.
        tiered: whether the stem has three convolutions instead of one.
        mixer: the mechanism of each stage, whose layers are counted from the start of the stage.
        mixer_settings: of the mechanisms.
        drop_path: rate of the last block.
        num_classes: of the head; 0 for features.
        in_chans: channels of the pictures.
        img_size: that it is trained on, for mechanisms that depend on it.
    """
    wrong = [letters for letters in layout if set(letters) - set("ca")]
    if wrong:
        raise BadInput(f"layout has a letter per block, 'c' for a convolution or 'a' for the mixer, got {wrong}")
    check_stages(layout=layout, dims=dims[: len(layout)], heads=heads[: len(layout)])
    names = per_stage(mixer, len(layout))
    rates = rising(drop_path, [len(letters) for letters in layout])
    sizes = map_sizes(img_size, STRIDES[: len(layout)])
    outs = [int(expansion * width) for width in dims]
    stages, dim = [], STEM
    for i, letters in enumerate(layout):
        blocks = []
        for j, letter in enumerate(letters):
            stride = 2 if i and not j else 1
            leaving = dims[i]
            if letter == "c":
                middle: nn.Module = ConvNorm(dims[i], dims[i], 3, stride)
                after: list[nn.Module] = []
            else:
                own = {"block": block, "halo": halo, "border": "zeros"} if names[i] == "halonet" else {}
                settings = {
                    "grid": Grid(sizes[i - 1] if stride > 1 else sizes[i]),
                    "layer": letters[:j].count("a"),
                    "layers": letters.count("a"),
                    **own,
                    **(mixer_settings or {}),
                }
                if issubclass(resolve(names[i])[0], Attend):
                    size = dims[i] // heads[i]
                    leaving = heads[i] * int(values * size)
                    attend = make_attend(names[i], heads[i], size, **settings)
                    middle = AttendMap(attend, dims[i], int(values * size), stride)
                else:
                    middle = MixMap(make_mixer(names[i], dims[i], heads[i], **settings), stride)
                after = [nn.BatchNorm2d(leaving)]
            middle = nn.Sequential(middle, *after, nn.SiLU())
            blocks.append(
                Bottleneck(
                    dim, outs[i], middle, dims[i], leaving, stride=stride, activation=nn.SiLU, drop_path=rates[i][j]
                )
            )
            dim = outs[i]
        stages.append(Stage(blocks))
    tail = None if last is None else lambda width: nn.Sequential(ConvNorm(dim, width), nn.SiLU())
    head = Head(dim if last is None else last, num_classes, before=tail)
    ways = [_stem(in_chans, tiered), *[nn.Identity() for _ in layout[1:]]]
    net = Pyramid(ways, stages, head, in_chans=in_chans, channels=outs, strides=STRIDES)
    net.num_features = dim if last is None else last
    return net


def _stem(in_chans: int, tiered: bool) -> nn.Sequential:
    widths = (in_chans, 3 * STEM // 8, STEM // 2, STEM) if tiered else (in_chans, STEM)
    layers: list[nn.Module] = []
    for i, out in enumerate(widths[1:]):
        layers += [ConvNorm(widths[i], out, 3 if tiered else 7, 1 if i else 2), nn.SiLU()]
    return nn.Sequential(*layers, nn.MaxPool2d(3, 2, 1))
