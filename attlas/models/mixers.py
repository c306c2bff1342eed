"""Which mechanism stands in which stage or block of a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attlas.blocks.factory import mixer as make_mixer
from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.core.mechanism import Mixer

Mixers = str | Sequence[str]
"""One mechanism by name, or one for each stage."""


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
    layers = depth if layers is None else layers
    return [
        make_mixer(name, dim, heads, grid=grid, layer=first + index, layers=layers, **settings or {})
        for index in range(depth)
    ]


def map_sizes(img_size: int | tuple[int, int], strides: Sequence[int]) -> list[tuple[int, int]]:
    """Height and width of the map at each stride, rounded up, for a picture of `img_size` pixels."""
    height, width = picture_size(img_size)
    return [(-(-height // stride), -(-width // stride)) for stride in strides]


def picture_size(img_size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width; one number is a square."""
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    if min(height, width) < 1:
        raise BadInput(f"img_size is one side or (height, width) in pixels, got {img_size}")
    return height, width
