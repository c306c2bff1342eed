"""The bottleneck of residual networks, with a convolution or a token mixer in its middle.

    y = σ(shortcut(x) + norm(W₃ middle(σ(norm(W₁ x)))))

where a middle ends with a norm and σ, and scales the map down where there is a stride.

B batch, C channels, H and W height and width, N tokens, K heads, D and E features of a head.

Source: He et al., "Deep Residual Learning for Image Recognition", 2015 (arXiv:1512.03385).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from attlas.blocks.conv_norm import ConvNorm
from attlas.blocks.drop_path import DropPath
from attlas.core.mechanism import Attend, Mixer
from attlas.ops.maps import to_map, to_tokens

Activation = Callable[[], nn.Module]


class Bottleneck(nn.Module):
    """The block.

    Args:
        dim, out: channels in and out.
        middle: from a map of `inside` channels to one of `leaving`.
        inside, leaving: channels before and behind the middle.
        stride: of the middle, 1 or 2.
        activation: σ.
        drop_path: the share of pictures for which the branch is dropped in training.
    """

    def __init__(
        self,
        dim: int,
        out: int,
        middle: nn.Module,
        inside: int,
        leaving: int,
        *,
        stride: int = 1,
        activation: Activation = nn.ReLU,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.conv1 = ConvNorm(dim, inside)
        self.middle = middle
        self.conv3 = ConvNorm(leaving, out)
        self.shortcut = ConvNorm(dim, out, 1, stride) if stride > 1 or dim != out else nn.Identity()
        self.drop_path = DropPath(drop_path)
        self.activation = activation()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """A map."""
        h = self.conv3(self.middle(self.activation(self.conv1(x_BCHW))))
        return self.activation(self.drop_path(h) + self.shortcut(x_BCHW))


class AttendMap(nn.Module):
    """An attend on a map, with projections of queries, keys and values, without biases and without one of its output.

    Args:
        attend: the mechanism.
        dim: C.
        features: E, of the values.
        stride: which rows and columns of the output are kept.
    """

    def __init__(self, attend: Attend, dim: int, features: int, stride: int = 1) -> None:
        super().__init__()
        site = attend.site
        self.attend, self.stride = attend, stride
        self.q_proj = nn.Linear(dim, site.heads * site.head_dim, bias=False)
        self.k_proj = nn.Linear(dim, site.heads * site.head_dim, bias=False)
        self.v_proj = nn.Linear(dim, site.heads * features, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """A map (B, K E, H / stride, W / stride)."""
        x_BNC, grid = to_tokens(x_BCHW)
        projected = (projection(x_BNC) for projection in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (x.unflatten(2, (self.attend.site.heads, -1)).transpose(1, 2) for x in projected)
        o_BNC = self.attend(q, k, v, grid=grid, tokens=x_BNC).transpose(1, 2).flatten(2)
        return to_map(o_BNC, grid)[:, :, :: self.stride, :: self.stride]


class MixMap(nn.Module):
    """A token mixer on a map; of its output every `stride`-th row and column are kept."""

    def __init__(self, mixer: Mixer, stride: int = 1) -> None:
        super().__init__()
        self.mixer, self.stride = mixer, stride

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """A map."""
        x_BNC, grid = to_tokens(x_BCHW)
        return to_map(self.mixer(x_BNC, grid=grid), grid)[:, :, :: self.stride, :: self.stride]
