"""Batch normalisation of tokens, whose statistics know padding.

B batch, N tokens, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.ops.precision import wide


def scale_and_shift(norm: Any) -> tuple[Tensor, Tensor]:
    """What a batch norm, torch's or this one, does in evaluation: x * scale + shift, per channel."""
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return scale, norm.bias - norm.running_mean * scale


class TokenBatchNorm(nn.Module):
    """weight (x - mean) / sqrt(var + eps) + bias, per channel over all real tokens of the batch.

    In evaluation mean and variance are the running ones. Weights and statistics are those of `nn.BatchNorm2d`;
    without padding so is the result. A batch without a real token leaves the running statistics as they are.

    Args:
        dim: C.
        eps: added to the variance.
        momentum: share of a batch in the running statistics.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, dim: int, *, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x_BNC: Tensor, keep_BN: Tensor | None = None) -> Tensor:
        """Normalise; where there is padding the result is that of 0."""
        x = wide(x_BNC)
        if keep_BN is not None:
            x = x.where(keep_BN.unsqueeze(-1), 0)
        mean, variance = self._statistics(x, keep_BN) if self.training else (self.running_mean, self.running_var)
        scale = self.weight * (wide(variance) + self.eps).rsqrt()
        return ((x - mean) * scale + self.bias).to(x_BNC.dtype)

    def _statistics(self, x_BNC: Tensor, keep_BN: Tensor | None) -> tuple[Tensor, Tensor]:
        real_BN1 = torch.ones_like(x_BNC[..., :1]) if keep_BN is None else keep_BN.unsqueeze(-1).to(x_BNC)
        count = real_BN1.sum()
        mean = x_BNC.sum((0, 1)) / count.clamp(min=1)
        variance = (real_BN1 * (x_BNC - mean).square()).sum((0, 1)) / count.clamp(min=1)
        with torch.no_grad():
            self.num_batches_tracked += count > 0
            share = self.momentum * (count > 0)
            unbiased = variance * count / (count - 1).clamp(min=1)
            self.running_mean += (share * (mean - self.running_mean)).to(self.running_mean.dtype)
            self.running_var += (share * (unbiased - self.running_var)).to(self.running_var.dtype)
        return mean, variance

    def oracle(self, x_BNC: Tensor, keep_BN: Tensor | None = None) -> Tensor:
        """torch's own batch normalisation, of the real tokens alone, put back among zeros."""
        real = torch.ones_like(x_BNC[..., 0], dtype=torch.bool) if keep_BN is None else keep_BN
        mean, variance = self.running_mean.clone(), self.running_var.clone()
        rows = F.batch_norm(x_BNC[real], mean, variance, self.weight, self.bias, self.training, self.momentum, self.eps)
        return torch.zeros_like(x_BNC).masked_scatter(real.unsqueeze(-1), rows)
