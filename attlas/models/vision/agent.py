"""Agent attention in three known networks: Agent-DeiT, Agent-PVT and Agent-Swin.

    y = x + mixer(norm x),    z = y + MLP(norm y)

Agent-DeiT is DeiT with 49 agents in every block; its base size has 81 in the first four blocks and softmax attention
in the others. Agent-PVT is a pyramid of patches, with learned places in every stage and, unlike PVT, keys and values
that are not reduced, no class token and no last norm. Agent-Swin is Swin whose first stages attend to the whole map,
with 9, 16 and 49 agents; stages or blocks behind them keep windows of 7 x 7 places.

On other pictures than the trained ones places and biases are resampled; the official Agent-DeiT and Agent-Swin take
one size, and its Agent-PVT resamples places without a smooth curve.

Source: Han et al., "Agent Attention: On the Integration of Softmax and Linear Attention", 2023 (arXiv:2312.08874),
official code LeapLabTHU/Agent-Attention. Its Agent-CSwin is not among them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from attlas.blocks.drop_path import rising
from attlas.blocks.embed import Downsample, Patches
from attlas.blocks.metaformer import MetaFormerBlock
from attlas.blocks.mlp import Mlp
from attlas.blocks.norms import MapLayerNorm
from attlas.blocks.placed import Placed
from attlas.blocks.stage import TokenStage
from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.core.mechanism import Mixer
from attlas.models.backbone import Head
from attlas.models.isotropic import Isotropic
from attlas.models.key_maps import rename, split
from attlas.models.mixers import Mixers, map_sizes, patch_grid, per_stage, stage_mixers
from attlas.models.pyramid import Pyramid
from attlas.models.registry import State, published
from attlas.models.rules import CLASSIFIER
from attlas.models.stages import check_stages
from attlas.models.vision import swin, vit

STRIDES = (4, 8, 16, 32)

PAPER: Mapping[str, Any] = {
    "title": "Agent Attention: On the Integration of Softmax and Linear Attention",
    "year": 2023,
    "paper": "arXiv:2312.08874",
}

DEIT: Mapping[str, Mapping[str, Any]] = {
    "tiny": {"dim": 192, "depth": 12, "heads": 3, "mixed": 12},
    "small": {"dim": 384, "depth": 12, "heads": 6, "mixed": 12, "drop_path": 0.1},
    "small_448": {"dim": 384, "depth": 12, "heads": 6, "mixed": 12, "drop_path": 0.1, "img_size": 448},
    "base": {"dim": 768, "depth": 12, "heads": 12, "mixed": 4, "agents": 81, "drop_path": 0.3},
    "micro": {"dim": 48, "depth": 4, "heads": 2, "mixed": 3, "agents": 9, "patch": 8, "img_size": 64},
}

PVT: Mapping[str, Mapping[str, Any]] = {
    "tiny": {"depths": (2, 2, 2, 2), "drop_path": 0.1},
    "small": {"depths": (3, 4, 6, 3), "drop_path": 0.1},
    "medium": {"depths": (3, 4, 18, 3), "drop_path": 0.3},
    "large": {"depths": (3, 8, 27, 3), "drop_path": 0.3},
    "micro": {
        "depths": (1, 1, 1, 1),
        "dims": (16, 32, 48, 64),
        "heads": (1, 2, 3, 4),
        "mlp_ratios": (2, 2, 2, 2),
        "agents": (4, 4, 4, 4),
        "img_size": 64,
    },
}

SWIN: Mapping[str, Mapping[str, Any]] = {
    "tiny": {**swin.SIZES["tiny"], "mixed": (2, 2, 6, 0)},
    "small": {**swin.SIZES["small"], "mixed": (2, 2, 0, 0)},
    "base": {**swin.SIZES["base"], "mixed": (2, 2, 2, 0)},
    "micro": {
        "depths": (1, 2, 2, 2),
        "dim": 8,
        "heads": (1, 2, 2, 2),
        "mixed": (1, 2, 1, 0),
        "agents": (4, 4, 4, 4),
        "window": 2,
        "img_size": 64,
    },
}


def deit_from_official(state: State, model: nn.Module) -> State:
    """The names of LeapLabTHU/Agent-Attention for Agent-DeiT."""
    return _agents(vit.from_timm(state, model))


def swin_from_official(state: State, model: nn.Module) -> State:
    """The names of LeapLabTHU/Agent-Attention for Agent-Swin."""
    return _agents(swin.from_official(state, model))


def pvt_from_official(state: State, model: nn.Module) -> State:
    """The names of LeapLabTHU/Agent-Attention for Agent-PVT."""
    stages = range(4)
    state = rename(
        split(state, "attn.kv", ("mixer.k_proj", "mixer.v_proj")),
        (
            *((rf"^patch_embed{i + 1}\.proj\.", f"downsamples.{i}.embed.conv.") for i in stages),
            *((rf"^patch_embed{i + 1}\.norm\.", f"downsamples.{i}.embed.after.") for i in stages),
            *((rf"^pos_embed{i + 1}$", f"downsamples.{i}.places.weight") for i in stages),
            *((rf"^block{i + 1}\.", f"stages.{i}.blocks.") for i in stages),
            (r"\.attn\.q\.", ".mixer.q_proj."),
            (r"\.attn\.proj\.", ".mixer.out_proj."),
            CLASSIFIER,
        ),
    )
    return _agents(
        {key: value.flatten(0, 1) if key.endswith("places.weight") else value for key, value in state.items()}
    )


def _agents(state: State) -> State:
    """Convolution and biases of agent attention, whose agents come before the places here."""
    state = rename(
        state,
        (
            (r"\.attn\.dwc\.", ".mixer.attend.convolution."),
            (r"\.attn\.an_bias$", ".mixer.attend.key_places.table"),
            (r"\.attn\.ah_bias$", ".mixer.attend.key_places.axes.0"),
            (r"\.attn\.aw_bias$", ".mixer.attend.key_places.axes.1"),
            (r"\.attn\.ac_bias$", ".mixer.attend.key_places.prefix"),
            (r"\.attn\.na_bias$", ".mixer.attend.query_places.table"),
            (r"\.attn\.ha_bias$", ".mixer.attend.query_places.axes.0"),
            (r"\.attn\.wa_bias$", ".mixer.attend.query_places.axes.1"),
            (r"\.attn\.ca_bias$", ".mixer.attend.query_places.prefix"),
        ),
    )
    return {key: _vector(key, value) for key, value in state.items()}


def _vector(key: str, value: Tensor) -> Tensor:
    """The biases of one axis, or of prefix tokens, as (H, n, places)."""
    if not key.endswith(("_places.axes.0", "_places.axes.1", "_places.prefix")):
        return value
    value = value.squeeze(0)
    if "query_places" in key:
        return value.flatten(1, -2).transpose(1, 2)
    return value.flatten(2)


def _blocks(mixers: Sequence[Mixer], ratio: int, rates: Sequence[float], eps: float) -> list[nn.Module]:
    return [
        MetaFormerBlock(
            each, Mlp(each.site.dim, ratio * each.site.dim), norm=partial(nn.LayerNorm, eps=eps), drop_path=rate
        )
        for each, rate in zip(mixers, rates, strict=True)
    ]


def _settings(name: str, agents: int, settings: Mapping[str, Any] | None) -> dict[str, Any]:
    return {**({"agents": agents} if name == "agent" else {}), **(settings or {})}


@published(
    {f"agent_deit_{size}": settings for size, settings in DEIT.items()},
    key_maps={"official": deit_from_official},
    **PAPER,
)
def agent_deit(
    *,
    dim: int,
    depth: int,
    heads: int,
    mixed: int,
    agents: int = 49,
    patch: int = 16,
    mixer: str = "agent",
    mixer_settings: Mapping[str, Any] | None = None,
    drop_path: float = 0.0,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
) -> Isotropic:
    """An Agent-DeiT, with any mechanism that takes a prefix token.

    Args:
        dim, depth, heads: channels, blocks, heads of each.
        mixed: how many blocks have the mixer; softmax attention is in those behind them.
        agents: how many, where the mixer is `agent`.
        patch: side of a patch in pixels.
        mixer: the mechanism.
        mixer_settings: of the mechanism.
        drop_path: rate of the last block.
        num_classes: of the head; 0 for features.
        in_chans: channels of the pictures.
        img_size: that it is trained on, a multiple of the patch.
    """
    _check_mixed([mixed], [depth])
    grid = patch_grid(img_size, patch, prefix=1)
    settings = _settings(mixer, agents, mixer_settings)
    mixers = stage_mixers(mixer, mixed, dim, heads, grid, settings, layers=depth)
    mixers += stage_mixers("softmax", depth - mixed, dim, heads, grid, first=mixed, layers=depth)
    (rates,) = rising(drop_path, [depth])
    return Isotropic(
        Patches(in_chans, dim, patch),
        _blocks(mixers, 4, rates, 1e-6),
        dim=dim,
        grid=grid,
        stride=patch,
        norm=nn.LayerNorm(dim, 1e-6),
        num_classes=num_classes,
        in_chans=in_chans,
    )


@published(
    {f"agent_pvt_{size}": settings for size, settings in PVT.items()},
    key_maps={"official": pvt_from_official},
    **PAPER,
)
def agent_pvt(
    *,
    depths: Sequence[int],
    dims: Sequence[int] = (64, 128, 320, 512),
    heads: Sequence[int] = (1, 2, 5, 8),
    mlp_ratios: Sequence[int] = (8, 8, 4, 4),
    agents: Sequence[int] = (9, 16, 49, 49),
    mixer: Mixers = "agent",
    mixer_settings: Mapping[str, Any] | None = None,
    drop_path: float = 0.0,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
) -> Pyramid:
    """An Agent-PVT, with any mechanism.

    Args:
        depths, dims, heads: blocks, channels and heads of each stage.
        mlp_ratios: hidden channels of an MLP per channel in each stage.
        agents: how many in each stage, where the mixer is `agent`.
        mixer: the mechanism of each stage.
        mixer_settings: of the mechanisms.
        drop_path: rate of the last block.
        num_classes: of the head; 0 for features.
        in_chans: channels of the pictures.
        img_size: that it is trained on.
    """
    check_stages(dims=dims, depths=depths, heads=heads, mlp_ratios=mlp_ratios, agents=agents)
    names, rates, widths = per_stage(mixer, len(dims)), rising(drop_path, depths), (in_chans, *dims)
    downsamples, stages = [], []
    for i, size in enumerate(map_sizes(img_size, STRIDES[: len(dims)])):
        grid, side = Grid(size), 4 if i == 0 else 2
        patches = Downsample(widths[i], dims[i], side, side, after=MapLayerNorm, fill=True)
        downsamples.append(Placed(patches, dims[i], grid))
        settings = _settings(names[i], agents[i], mixer_settings)
        mixers = stage_mixers(names[i], depths[i], dims[i], heads[i], grid, settings)
        stages.append(TokenStage(_blocks(mixers, mlp_ratios[i], rates[i], 1e-6)))
    head = Head(dims[-1], num_classes)
    return Pyramid(downsamples, stages, head, in_chans=in_chans, channels=dims, strides=STRIDES)


@published(
    {f"agent_swin_{size}": settings for size, settings in SWIN.items()},
    key_maps={"official": swin_from_official},
    **PAPER,
)
def agent_swin(
    *,
    depths: Sequence[int],
    dim: int,
    heads: Sequence[int],
    mixed: Sequence[int],
    agents: Sequence[int] = (9, 16, 49, 49),
    window: int = 7,
    mixer: Mixers = "agent",
    mixer_settings: Mapping[str, Any] | None = None,
    drop_path: float = 0.0,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
) -> Pyramid:
    """An Agent-Swin, with any mechanism.

    Args:
        depths, heads: blocks of each stage and heads of its mixers.
        dim: channels of the first stage, doubled in each that follows.
        mixed: how many blocks of each stage have the mixer; attention in windows is in those behind them.
        agents: how many in each stage, where the mixer is `agent`.
        window: places of a window on either axis; every second block of a stage shifts them.
        mixer: the mechanism of each stage.
        mixer_settings: of the mechanisms.
        drop_path: rate of the last block.
        num_classes: of the head; 0 for features.
        in_chans: channels of the pictures.
        img_size: that it is trained on.
    """
    check_stages(depths=depths, heads=heads, agents=agents[: len(depths)])
    _check_mixed(mixed, depths)
    names, rates = per_stage(mixer, len(depths)), rising(drop_path, depths)
    dims = [dim * 2**i for i in range(len(depths))]
    stages = []
    for i, size in enumerate(map_sizes(img_size, STRIDES[: len(dims)])):
        grid, settings = Grid(size), _settings(names[i], agents[i], mixer_settings)
        mixers = stage_mixers(names[i], mixed[i], dims[i], heads[i], grid, settings, layers=depths[i])
        behind = {"first": mixed[i], "layers": depths[i]}
        mixers += stage_mixers("swin", depths[i] - mixed[i], dims[i], heads[i], grid, {"window": window}, **behind)
        stages.append(TokenStage(_blocks(mixers, 4, rates[i], 1e-5)))
    return swin.swin_pyramid(stages, dims, in_chans, num_classes)


def _check_mixed(mixed: Sequence[int], depths: Sequence[int]) -> None:
    if len(mixed) != len(depths) or any(not 0 <= count <= depth for count, depth in zip(mixed, depths, strict=True)):
        raise BadInput(f"mixed says how many of {list(depths)} blocks have the mixer, got {list(mixed)}")
