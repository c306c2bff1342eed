"""Where sums of many terms are kept."""

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """`x` in float32, or as it is where that is no wider: half precision cannot hold a sum over a sequence."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
