"""Outliers of activations: how far the largest stands out, and what they cost in eight bits.

    inf_norm(x)  = max |x|               of each sequence
    kurtosis(x)  = mean ((x - μ) / σ)⁴   of each sequence; 3 for a Gaussian
    int8(x)      = x rounded to 256 even steps from min(x) to max(x), 0 among them

x (B, ...). One large value stretches the steps of the whole tensor: the error of all others grows with it.

Source: Bondarenko et al., "Quantizable Transformers: Removing Outliers by Helping Attention Heads Do Nothing",
2023 (arXiv:2306.12929), official code Qualcomm-AI-research/outlier-free-transformers.
"""

import torch
from torch import Tensor

from attlas.ops.precision import wide


def inf_norm(x: Tensor) -> Tensor:
    """The largest magnitude in each sequence, (B, ...) -> (B,)."""
    return x.abs().flatten(1).amax(1)


def kurtosis(x: Tensor) -> Tensor:
    """The fourth standardised moment of all numbers of each sequence, (B, ...) -> (B,); 0 of a constant."""
    x_BF = wide(x).flatten(1)
    centred = x_BF - x_BF.mean(1, keepdim=True)
    variance = centred.square().mean(1)
    return torch.where(variance > 0, centred.pow(4).mean(1) / variance.square(), 0)


def int8(x: Tensor) -> Tensor:
    """x as eight bits and one range for the whole tensor would keep it, in its own dtype."""
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)  # 0 stays exact
    step = (high - low) / 255
    step = torch.where(step > 0, step, 1)
    zero = (-low / step).round()
    return ((x / step).round().clamp(-zero, 255 - zero)) * step
