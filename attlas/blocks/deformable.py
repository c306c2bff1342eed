"""Deformable token merging: k x k neighbouring places become one, and the map says where exactly they lie.

    y_p = σ(BN(b + Σ_t W_t x(k p + t + δ_t(p)))),    t over the k x k taps,    δ = conv(x)

x at a point between places is interpolated linearly on both axes, and 0 off the map. δ, two numbers per tap, is a
k x k convolution of x with stride k that starts at 0, so that training starts from a plain strided convolution; it is
published with a hundredth of the learning rate.

B batch, C channels, H and W height and width, h and w those of y.

Sources: Dai et al., "Deformable Convolutional Networks", 2017 (arXiv:1703.06211); Pan et al., "Less is More: Pay Less
Attention in Vision Transformers", 2021 (arXiv:2105.14217), which merges tokens by it; official code ziplab/LITv2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.blocks.embed import filled
from attlas.core.errors import BadInput
from attlas.ops.precision import wide


class DeformableMerging(nn.Module):
    """The merging.

    Args:
        dim, out: channels in and out.
        size: k, places that become one on either axis.
    """

    def __init__(self, dim: int, out: int, size: int = 2) -> None:
        super().__init__()
        if size < 1:
            raise BadInput(f"size counts places that become one on either axis, at least 1, got {size}")
        self.size = size
        self.conv = nn.Conv2d(dim, out, size, size)
        self.offset = nn.Conv2d(dim, 2 * size * size, size, size)
        nn.init.zeros_(self.offset.weight)
        if self.offset.bias is not None:
            nn.init.zeros_(self.offset.bias)
        self.norm = nn.BatchNorm2d(out)
        self.activation = nn.GELU()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """A smaller map; sides that do not divide are filled with zeros."""
        x_BCHW = filled(x_BCHW, self.size)
        sampled_BKhw = self._sample(x_BCHW, self.offset(x_BCHW))
        weight_OK11 = self.conv.weight.flatten(1)[..., None, None]
        return self.activation(self.norm(F.conv2d(sampled_BKhw, weight_OK11, self.conv.bias)))

    def _sample(self, x_BCHW: Tensor, offset_BThw: Tensor) -> Tensor:
        """The map at the taps, (B, C k², h, w); offsets are (row, column) for each tap, in places."""
        k, sides = self.size, x_BCHW.shape[2:]
        offset_BT2hw = wide(offset_BThw).unflatten(1, (k * k, 2))
        points = []
        for axis, side in enumerate(sides):
            place = torch.arange(side, device=x_BCHW.device, dtype=offset_BT2hw.dtype).unflatten(0, (-1, k))
            # (h, k) becomes (k, 1, h, 1) for rows, (w, k) becomes (1, k, 1, w) for columns.
            shape = (k, 1, side // k, 1) if axis == 0 else (1, k, 1, side // k)
            start_TThw = place.T.reshape(shape).expand(k, k, sides[0] // k, sides[1] // k)
            point_BThw = start_TThw.flatten(0, 1) + offset_BT2hw[:, :, axis]
            points.append((2 * point_BThw + 1) / side - 1)
        grid_BPhw2 = torch.stack([points[1], points[0]], -1).flatten(1, 2)
        sampled = F.grid_sample(wide(x_BCHW), grid_BPhw2, align_corners=False)
        return sampled.unflatten(2, (k * k, -1)).flatten(1, 2).to(x_BCHW.dtype)

    def oracle(self, x_BCHW: Tensor) -> Tensor:
        """Place by place and tap by tap, each of the four neighbours of a point by its own weight."""
        x_BCHW, k = filled(x_BCHW, self.size), self.size
        offset_BThw, (height, width) = self.offset(x_BCHW), x_BCHW.shape[2:]
        y = x_BCHW.new_zeros(len(x_BCHW), self.conv.out_channels, height // k, width // k)
        bias_C = self.conv.bias
        assert bias_C is not None
        for b, row, column in torch.cartesian_prod(*map(torch.arange, (len(y), height // k, width // k))).tolist():
            total_C: Tensor = bias_C
            for tap in range(k * k):
                point = offset_BThw[b, 2 * tap : 2 * tap + 2, row, column]
                point = point + point.new_tensor([k * row + tap // k, k * column + tap % k])
                for i in range(height):
                    for j in range(width):
                        near = (1 - (point - point.new_tensor([i, j])).abs()).clamp(min=0).prod()
                        total_C = total_C + near * (self.conv.weight[:, :, tap // k, tap % k] @ x_BCHW[b, :, i, j])
            y[b, :, row, column] = total_C
        return self.activation(self.norm(y))
