"""NiNformer: patches as tokens, each gated by what an MLP-Mixer block makes of all of them.

    y = x + P(norm x) ⊙ mixer(norm x),    z = y + MLP(norm y)

Both norms of a block are one module. There is no class token, no position encoding (the mixers' weights belong to
places, so that pictures have one size) and no norm before the mean over tokens. The published network is for pictures
of 32 x 32 and 10 classes, with a dropout of 1/2 in every MLP.

Source: Abdullah and Aydin, "NiNformer: A Network in Network Transformer with Token Mixing Generated Gating Function",
2024 (arXiv:2403.02411), official code Abdullah-88/NiNformer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from attlas.blocks.drop_path import rising
from attlas.blocks.embed import Patches
from attlas.blocks.metaformer import MetaFormerBlock
from attlas.blocks.mlp import Mlp
from attlas.core.grid import Grid
from attlas.core.mechanism import Mixer
from attlas.models.isotropic import Isotropic
from attlas.models.key_maps import in_stages, rename
from attlas.models.mixers import patch_grid, stage_mixers
from attlas.models.registry import State, published

SIZES: Mapping[str, Mapping[str, Any]] = {
    "cifar": {"dim": 256, "depth": 4, "patch": 4, "hidden": 512, "drop": 0.5, "img_size": 32, "num_classes": 10},
    "micro": {"dim": 64, "depth": 4, "patch": 8, "hidden": 128, "drop": 0.1, "img_size": 64},
}


def one_norm(state: State, model: nn.Module, rules: Sequence[tuple[str, str]]) -> State:
    """The names of a network with one norm in each block and the classifier around it, as of a `mean_of_patches`."""
    assert isinstance(model, Isotropic)
    state = rename(
        state,
        (
            (r"^patcher\.", "embed.conv."),
            (r"^classifier\.", "head."),
            (r"^model\.(\d+)\.", r"blocks.\1."),
            (r"\.ffn\.net\.0\.", ".mlp.fc1."),
            (r"\.ffn\.net\.3\.", ".mlp.fc2."),
            (r"^(blocks\.\d+)\.norm\.", r"\1.norm1."),
            *rules,
        ),
    )
    if any(".mlp." in key for key in state):
        state |= {key.replace("norm1", "norm2"): value for key, value in state.items() if ".norm1." in key}
    return in_stages(state, model.depths)


def mean_of_patches(
    mixers: Sequence[Mixer],
    *,
    grid: Grid,
    patch: int,
    hidden: int | None,
    drop: float,
    drop_path: float,
    num_classes: int,
    in_chans: int,
) -> Isotropic:
    """Patches through blocks whose two norms are one module, then their mean: no class token, places or last norm.

    Args:
        mixers: one for each block.
        grid: of the patches.
        patch: side of a patch in pixels.
        hidden: channels inside the MLPs; None for blocks without.
        drop: dropout of the MLPs.
        drop_path: rate of the last block.
        num_classes: of the head; 0 for features.
        in_chans: channels of the pictures.
    """
    (rates,), dim = rising(drop_path, [len(mixers)]), mixers[0].site.dim
    blocks = []
    for each, rate in zip(mixers, rates, strict=True):
        block = MetaFormerBlock(each, None if hidden is None else Mlp(dim, hidden, drop=drop), drop_path=rate)
        if hidden is not None:
            block.norm2 = block.norm1
        blocks.append(block)
    return Isotropic(
        Patches(in_chans, dim, patch),
        blocks,
        dim=dim,
        grid=grid,
        stride=patch,
        norm=nn.Identity(),
        num_classes=num_classes,
        in_chans=in_chans,
        places=False,
        pool="mean",
    )


def from_official(state: State, model: nn.Module) -> State:
    """The names of Abdullah-88/NiNformer with the classifier around it."""
    return one_norm(
        state,
        model,
        (
            (r"\.mgu\.proj\.", ".mixer.proj."),
            (r"\.mgu\.Mixer\.(token|channel)_mix\.0\.", r".mixer.\1_norm."),
            (r"\.mgu\.Mixer\.(token|channel)_mix\.\d\.net\.0\.", r".mixer.\1_mlp.fc1."),
            (r"\.mgu\.Mixer\.(token|channel)_mix\.\d\.net\.3\.", r".mixer.\1_mlp.fc2."),
        ),
    )


@published(
    {f"ninformer_{size}": settings for size, settings in SIZES.items()},
    title="NiNformer: A Network in Network Transformer with Token Mixing Generated Gating Function",
    year=2024,
    paper="arXiv:2403.02411",
    key_maps={"official": from_official},
)
def ninformer(
    *,
    dim: int,
    depth: int,
    patch: int,
    hidden: int,
    drop: float,
    mixer: str = "ninformer",
    mixer_settings: Mapping[str, Any] | None = None,
    drop_path: float = 0.0,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
) -> Isotropic:
    """The network, with its own or any other mechanism.

    Args:
        dim, depth: channels and blocks.
        patch: side of a patch in pixels.
        hidden: channels inside the MLPs, those of the mixer included.
        drop: dropout of the MLPs, those of the mixer included.
        mixer: the mechanism; it has one head.
        mixer_settings: of the mechanism.
        drop_path: rate of the last block.
        num_classes: of the head; 0 for features.
        in_chans: channels of the pictures.
        img_size: of all pictures, a multiple of the patch.
    """
    grid = patch_grid(img_size, patch)
    own = {"hidden": hidden, "dropout": drop} if mixer == "ninformer" else {}
    mixers = stage_mixers(mixer, depth, dim, 1, grid, {**own, **(mixer_settings or {})})
    return mean_of_patches(
        mixers,
        grid=grid,
        patch=patch,
        hidden=hidden,
        drop=drop,
        drop_path=drop_path,
        num_classes=num_classes,
        in_chans=in_chans,
    )
