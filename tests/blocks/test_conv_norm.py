"""Convolutions with a norm behind: what they compute, and that they become one convolution."""

import pytest
import torch
from torch import nn

from attlas.blocks.conv_norm import ConvNorm, Residual, TwoKernels, fuse
from attlas.core.errors import BadInput
from attlas.ops.channel_attention import ChannelAttention, MapChannelAttention


def shake(module):
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            if value.is_floating_point():
                value.uniform_(0.5, 1.5) if "running_var" in name else value.normal_(std=0.5)
    return module.double().eval()


PARTS = {
    "1 x 1": lambda: ConvNorm(4, 6),
    "3 x 3, stride 2, groups": lambda: ConvNorm(4, 6, 3, 2, groups=2),
    "1 x 5, depthwise": lambda: ConvNorm(4, 4, (1, 5), groups=4),
    "5 x 1, stride 2": lambda: ConvNorm(4, 3, (5, 1), 2),
    "two kernels": lambda: TwoKernels(4, 4),
    "two kernels, stride 2": lambda: TwoKernels(4, 8, 5, 1, stride=2),
}


@pytest.mark.parametrize("make", PARTS.values(), ids=PARTS)
def test_fused_it_is_one_convolution_that_gives_the_same(make):
    part = shake(make())
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    one = part.fused()
    assert isinstance(one, nn.Conv2d)
    assert one.weight.requires_grad
    torch.testing.assert_close(one(x), part(x))


def test_fuse_looks_inside():
    net = shake(nn.Sequential(Residual(nn.Sequential(ConvNorm(4, 8), nn.ReLU(), ConvNorm(8, 4))), TwoKernels(4, 4)))
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    expected = net(x)
    assert fuse(net) is net
    assert not any(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    torch.testing.assert_close(net(x), expected)


def test_in_training_nothing_is_fused():
    net = nn.Sequential(ConvNorm(4, 8), nn.ReLU())
    with pytest.raises(BadInput, match="eval"):
        fuse(net)
    assert isinstance(net[0], ConvNorm)


def test_a_part_by_itself_is_fused_too():
    part, x = shake(ConvNorm(4, 6)), torch.randn(1, 4, 5, 5, dtype=torch.float64)
    one = fuse(part)
    assert isinstance(one, nn.Conv2d)
    torch.testing.assert_close(one(x), part(x))


def test_a_branch_that_starts_at_nothing():
    block = Residual(ConvNorm(4, 4, 3, start=0)).eval()
    x = torch.randn(1, 4, 5, 5)
    assert torch.equal(block(x), x)


def test_channel_attention_of_maps_is_that_of_tokens():
    tokens = ChannelAttention(6, 4, gate=nn.Hardsigmoid)
    maps = MapChannelAttention(6, 4, gate=nn.Hardsigmoid)
    maps.load_state_dict(tokens.state_dict())
    x = torch.randn(2, 6, 3, 5)
    torch.testing.assert_close(maps(x).flatten(2).mT, tokens(x.flatten(2).mT))
