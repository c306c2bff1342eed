"""Where sums of many terms are kept."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """`x` in float32, float64 as it is: half precision cannot hold a sum over a sequence."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def as_written(x: Tensor) -> AbstractContextManager[object]:
    """Inside, autocast on x's device leaves dtypes alone: what must not be rounded, or overflow, is computed there."""
    return nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)
