"""ConViT: a ViT whose first layers start as convolutions and learn how far to leave them.

    y = x + GPSA(norm x),    z = y + MLP(norm y)        local layers, on the patches alone
    y = x + MSA(norm x),     z = y + MLP(norm y)        the layers after them, with the class token

GPSA is the mechanism `convit`: softmax over contents and softmax over places, mixed by a gate of each head. The
class token, which has no place, stands in front from layer 11 of 12 on; the learned places are added to the patches
only. Heads have 48 channels and are a square number, so that they can be the taps of a convolution.

Source: d'Ascoli et al., "ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases", 2021
(arXiv:2103.10697), official code facebookresearch/convit, whose names are also timm's.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from attlas.blocks.drop_path import rising
from attlas.blocks.embed import Patches
from attlas.blocks.metaformer import MetaFormerBlock
from attlas.blocks.mlp import Mlp
from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.mechanisms.softmax.convit import ConViT
from attlas.models.backbone import start_normal, start_published
from attlas.models.isotropic import Isotropic
from attlas.models.key_maps import QKV, in_stages, rename, split, tables
from attlas.models.mixers import patch_grid, stage_mixers
from attlas.models.registry import State, published

SIZES: Mapping[str, Mapping[str, Any]] = {
    "tiny": {"dim": 192, "heads": 4, "drop_path": 0.1},
    "small": {"dim": 432, "heads": 9, "drop_path": 0.1},
    "base": {"dim": 768, "heads": 16, "drop_path": 0.1},
    "micro": {"dim": 64, "heads": 4, "depth": 4, "local": 3, "patch": 8, "img_size": 64},
}


def from_timm(state: State, model: nn.Module) -> State:
    """The names of timm and of the official checkpoints."""
    state = split(state, "attn.qkv", tuple(f"mixer.{name}" for name in QKV))
    state = rename(
        state,
        (
            (r"^patch_embed\.proj\.", "embed.conv."),
            (r"^cls_token$", "prefix"),
            (r"^pos_embed$", "places.weight"),
            (r"\.attn\.(qk|v)\.", r".mixer.\1_proj."),
            (r"\.attn\.proj\.", ".mixer.out_proj."),
            (r"\.attn\.pos_proj\.", ".mixer.position_proj."),
            (r"\.attn\.gating_param$", ".mixer.gate"),
        ),
    )
    assert isinstance(model, Isotropic)
    return in_stages(tables(state, "prefix", "places.weight"), model.depths)


@published(
    {f"convit_{size}": settings for size, settings in SIZES.items()},
    title="ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases",
    year=2021,
    paper="arXiv:2103.10697",
    key_maps={"timm": from_timm, "official": from_timm},
)
def convit(
    *,
    dim: int,
    heads: int,
    depth: int = 12,
    local: int = 10,
    patch: int = 16,
    mixer: str = "convit",
    mixer_settings: Mapping[str, Any] | None = None,
    drop_path: float = 0.0,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
) -> Isotropic:
    """A ViT with local layers, and softmax attention after them.

    Args:
        dim, heads, depth: channels, heads and blocks.
        local: how many blocks come before the class token.
        patch: side of a patch in pixels.
        mixer: the mechanism of the local blocks.
        mixer_settings: of that mechanism; `{"strength": 2.0}` starts narrower.
        drop_path: rate of the last block.
        num_classes: of the head; 0 for features.
        in_chans: channels of the pictures.
        img_size: that it is trained on, a multiple of the patch.
    """
    if not 0 <= local < depth:
        raise BadInput(
            f"the class token comes in before one of the {depth} blocks, local=0 to {depth - 1}, got {local}"
        )
    grid = patch_grid(img_size, patch)
    joined = Grid(grid.shape, prefix=1)
    mixers = [
        *stage_mixers(mixer, local, dim, heads, grid, mixer_settings, layers=depth),
        *stage_mixers("softmax", depth - local, dim, heads, joined, {"bias": False}, first=local, layers=depth),
    ]
    norm = partial(nn.LayerNorm, eps=1e-6)
    (rates,) = rising(drop_path, [depth])
    blocks = [
        MetaFormerBlock(each, Mlp(dim, 4 * dim), norm=norm, drop_path=rate)
        for each, rate in zip(mixers, rates, strict=True)
    ]
    net = Isotropic(
        Patches(in_chans, dim, patch),
        blocks,
        dim=dim,
        grid=joined,
        stride=patch,
        norm=norm(dim),
        num_classes=num_classes,
        in_chans=in_chans,
        joins=local,
    )
    for each in mixers:
        if isinstance(each, ConViT):  # its values and positions start as those of a convolution
            start_normal(each.qk_proj)
            start_normal(each.out_proj)
            nn.init.zeros_(each.position_proj.bias)
    return start_published(net)
