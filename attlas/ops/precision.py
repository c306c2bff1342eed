"""Where sums of many terms are kept."""

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """`x` in float32, float64 as it is: half precision cannot hold a sum over a sequence."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
