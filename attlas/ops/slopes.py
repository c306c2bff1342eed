"""One fixed slope per head: of a linear bias (ALiBi), or of an exponential decay (TransNormerLLM)."""

import math

import torch
from torch import Tensor


def alibi_slopes(heads: int) -> Tensor:
    """The slopes 2^(-8 (h+1) / H), on the CPU; between powers of two, every second slope of the doubled list fills up.

    Source: Press et al., ALiBi, 2021 (arXiv:2108.12409).
    """
    below = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (h + 1) / below) for h in range(below)]
    doubled = [2 ** (-8 * (h + 1) / (2 * below)) for h in range(2 * below)]
    return torch.tensor(slopes + doubled[0::2][: heads - below], device="cpu")
