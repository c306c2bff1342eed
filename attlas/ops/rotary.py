"""Rotary positions as functions: feature pairs turn by an angle that grows with the position.

B batch, H heads, N tokens, M keys, D head size, R axes of a grid.
"""

from typing import Any

import torch
from torch import Tensor

from attlas.core.errors import BadInput


def rotate(x_BHND: Tensor, start: int, *, features: int | None = None, base: float = 10000.0) -> Tensor:
    """Turn pairs (i, i + R/2) of the first R features by position / base^(2i / R); the others stay.

    Angles are float64: half precision cannot tell position 90,000 from 90,001.

    Args:
        x_BHND: queries or keys.
        start: position of the first token.
        features: R, an even number; all by default.
        base: of the angles.
    """
    features = x_BHND.shape[-1] if features is None else features
    axis: dict[str, Any] = {"device": x_BHND.device, "dtype": torch.float64}
    frequency = base ** (-torch.arange(0, features, 2, **axis) / features)
    angle = torch.outer(torch.arange(start, start + x_BHND.shape[2], **axis), frequency)
    cos, sin = angle.cos().to(x_BHND.dtype), angle.sin().to(x_BHND.dtype)
    first, second, still = x_BHND.split([features // 2, features // 2, x_BHND.shape[-1] - features], -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, still], -1)


def rotate_axes(x_BHND: Tensor, places_NR: Tensor, *, base: float = 10000.0) -> Tensor:
    """Turn neighbouring features (2i, 2i + 1) by places on a grid, an equal share of the features for each axis.

    The P pairs of an axis turn by place / base^(i / (P - 1)): the first by one radian per place, the last `base`
    times less. A token at place 0 on every axis stays as it is.

    Args:
        x_BHND: queries or keys.
        places_NR: where each token stands on the R axes.
        base: of the angles.

    Raises:
        BadInput: features that do not split into pairs for every axis.
    """
    features, axes = x_BHND.shape[-1], places_NR.shape[1]
    if features % (2 * axes):
        raise BadInput(
            f"on {axes} axes pairs of features turn for each, so the head size is a multiple of {2 * axes}, "
            f"got {features}: choose other heads"
        )
    exponent = torch.linspace(0, 1, features // (2 * axes), device=x_BHND.device, dtype=torch.float64)
    angle = (places_NR.to(exponent).unsqueeze(-1) * base**-exponent).flatten(1)
    cos, sin = angle.cos().to(x_BHND.dtype), angle.sin().to(x_BHND.dtype)
    first, second = x_BHND.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([first * cos - second * sin, second * cos + first * sin], -1).flatten(-2)


def relative_turn(
    queries_NR: Tensor, keys_MR: Tensor, features: int, *, base: float = 10000.0
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angle between the pairs of two tokens turned by `rotate_axes`, (N, M, pairs) each.

    With q = (a, b) and k = (c, d) the product of the turned pairs is (ac + bd) cos - (bc - ad) sin.
    """
    axes = queries_NR.shape[1]
    pairs = features // (2 * axes)
    apart_NMR = (queries_NR[:, None] - keys_MR).double()
    angles = [apart_NMR[..., r] / base ** (i / max(pairs - 1, 1)) for r in range(axes) for i in range(pairs)]
    angle_NMP = torch.stack(angles, -1)
    return angle_NMP.cos(), angle_NMP.sin()
