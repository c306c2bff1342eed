"""Rotary positions as a function: feature pairs turn by an angle that grows with the position.

B batch, H heads, N tokens, D head size.
"""

from typing import Any

import torch
from torch import Tensor


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
