"""Which mechanism stands in which stage or block of a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from attlas.blocks.drop_path import rising
from attlas.blocks.factory import mixer as make_mixer
from attlas.blocks.stage import TokenStage
from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.core.mechanism import Mixer
from attlas.models.stages import check_stages

Mixers = str | Sequence[str]
"""One mechanism by name, or one for each stage."""
Settings = Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None
"""Settings of the mechanisms, or for each stage its own."""


def per_stage(mixer: Mixers, stages: int) -> tuple[str, ...]:
    """A name for each stage.

    Raises:
        BadInput: another number of names than stages.
    """
    if isinstance(mixer, str):
        return (mixer,) * stages
    if len(mixer) != stages:
        raise BadInput(f"mixer is one name or one for each of the {stages} stages, got {list(mixer)}")
    return tuple(mixer)


def settings_per_stage(settings: Settings, stages: int) -> tuple[Mapping[str, Any], ...]:
    """Settings for each stage.

    Raises:
        BadInput: another number of mappings than stages, or what is no mapping.
    """
    each = (settings,) * stages if settings is None or isinstance(settings, Mapping) else tuple(settings)
    if len(each) != stages or not all(one is None or isinstance(one, Mapping) for one in each):
        raise BadInput(f"mixer_settings is one mapping or one for each of the {stages} stages, got {settings!r}")
    return tuple(one or {} for one in each)


def stage_mixers(
    name: str,
    depth: int,
    dim: int,
    heads: int,
    grid: Grid,
    settings: Mapping[str, Any] | None = None,
    *,
    first: int = 0,
    layers: int | None = None,
) -> list[Mixer]:
    """The mixers of one stage: `depth` layers of mechanism `name`, of which the first is layer `first` of `layers`."""
    if settings is not None and not isinstance(settings, Mapping):
        raise BadInput(f"mixer_settings are one mapping here, such as {{'bias': False}}, got {settings!r}")
    layers = depth if layers is None else layers
    return [
        make_mixer(name, dim, heads, grid=grid, layer=first + index, layers=layers, **settings or {})
        for index in range(depth)
    ]


def token_stages(
    mixer: Mixers,
    depths: Sequence[int],
    dims: Sequence[int],
    heads: Sequence[int],
    sizes: Sequence[tuple[int, int]],
    block: Callable[[Mixer, float], nn.Module],
    *,
    settings: Settings = None,
    own: Callable[[int, str], Mapping[str, Any]] | None = None,
    drop_path: float = 0.0,
) -> list[TokenStage]:
    """The stages of a pyramid whose blocks are all of one form.

    Args:
        mixer: one mechanism, or one for each stage.
        depths, dims, heads: of each stage.
        sizes: height and width of each stage's map.
        block: makes a block from a mixer and a rate of drop path.
        settings: of the mechanisms, for all stages or for each.
        own: from a stage and its mechanism to settings that hold where `settings` say nothing.
        drop_path: rate of the last block.
    """
    check_stages(most=len(depths), depths=depths, dims=dims, heads=heads)
    names, given = per_stage(mixer, len(depths)), settings_per_stage(settings, len(depths))
    stages = []
    for i, rates in enumerate(rising(drop_path, depths)):
        mixers = stage_mixers(
            names[i],
            depths[i],
            dims[i],
            heads[i],
            Grid(sizes[i]),
            {**(own(i, names[i]) if own else {}), **given[i]},
        )
        stages.append(TokenStage(block(each, rate) for each, rate in zip(mixers, rates, strict=True)))
    return stages


def doubling(first: int, count: int) -> list[int]:
    """first, 2 first, 4 first, ..."""
    return [first * 2**i for i in range(count)]


def map_sizes(img_size: int | tuple[int, int], strides: Sequence[int]) -> list[tuple[int, int]]:
    """Height and width of the map at each stride, rounded up, for a picture of `img_size` pixels."""
    height, width = picture_size(img_size)
    return [(-(-height // stride), -(-width // stride)) for stride in strides]


def sizes_after(img_size: int | tuple[int, int], convolutions: Sequence[tuple[int, int, int]]) -> list[tuple[int, int]]:
    """Height and width behind each of these convolutions in a row: (kernel, stride, padding), sizes rounded down.

    Raises:
        BadInput: a picture of which nothing is left.
    """
    height, width = picture_size(img_size)
    sizes = []
    for kernel, stride, padding in convolutions:
        height, width = ((side + 2 * padding - kernel) // stride + 1 for side in (height, width))
        if min(height, width) < 1:
            raise BadInput(f"img_size={img_size} is too small for this network: nothing is left of the picture")
        sizes.append((height, width))
    return sizes


def patch_grid(img_size: int | tuple[int, int], patch: int, prefix: int = 0) -> Grid:
    """The grid of the patches of a picture.

    Raises:
        BadInput: a picture that does not divide into patches.
    """
    height, width = picture_size(img_size)
    if patch < 1 or height % patch or width % patch:
        raise BadInput(f"img_size is a multiple of the patch, got {height} x {width} and patch={patch}")
    return Grid((height // patch, width // patch), prefix=prefix)


def picture_size(img_size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width; one number is a square."""
    sides = tuple(img_size) if isinstance(img_size, Sequence) else (img_size, img_size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise BadInput(f"img_size is one side or (height, width) in whole pixels, got {img_size}")
    return sides
