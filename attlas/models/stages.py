"""What the stages of a pyramid have in common: checks of what is said for each of them, and enhanced attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attlas.blocks.factory import SHELL, make_attend
from attlas.blocks.local_enhancement import LocallyEnhanced
from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.core.mechanism import Mixer

OWN = SHELL | {"of", "kernel", "turned"}


def check_stages(least: int = 1, most: int = 4, **told: Sequence[Any] | None) -> None:
    """Refuse a network of fewer stages than `least` or more than `most`, or told of another number in places.

    The first of `told` is what counts the stages; what is None says nothing.

    Raises:
        BadInput: naming what does not fit, or depths that are no counts.
    """
    (name, first), *others = ((key, value) for key, value in told.items() if value is not None)
    if not least <= len(first) <= most:
        counts = f"{least} to {most} stages" if least < most else f"{least} stages"
        raise BadInput(f"the network has {counts}, got {len(first)}: {name}={first!r}")
    for key, value in others:
        if len(value) != len(first):
            raise BadInput(
                f"{key} has one entry for each of the {len(first)} stages of {name}={first!r}, not {value!r}"
            )
    depths = told.get("depths") or ()
    if any(not isinstance(depth, int) or depth < 0 for depth in depths):
        raise BadInput(f"depths count the blocks of each stage, got {depths!r}")


def enhanced_softmax(
    depth: int, dim: int, heads: int, grid: Grid, settings: Mapping[str, Any] | None = None, **shell: Any
) -> list[Mixer]:
    """`depth` layers of softmax attention with a convolution beside it.

    Args:
        depth, dim, heads, grid: as for `stage_mixers`.
        settings: of softmax attention and of its shell, which go before `shell`.
        **shell: settings of `LocallyEnhanced`.

    Raises:
        BadInput: heads that do not divide the channels, or a setting that neither has.
    """
    if heads < 1 or dim % heads:
        raise BadInput(f"heads must divide dim: {dim} channels do not split into {heads} heads")
    settings = {**shell, **(settings or {})}
    outside = {key: value for key, value in settings.items() if key in OWN}
    inside = {key: value for key, value in settings.items() if key not in OWN}
    return [
        LocallyEnhanced(make_attend("softmax", heads, dim // heads, grid=grid, **inside), **outside)
        for _ in range(depth)
    ]
