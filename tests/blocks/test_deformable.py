"""Deformable token merging."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attlas.blocks.deformable import DeformableMerging
from attlas.core.errors import BadInput


def make(dim: int = 3, out: int = 5, **settings: int) -> DeformableMerging:
    torch.manual_seed(0)
    block = DeformableMerging(dim, out, **settings).double().eval()
    with torch.no_grad():
        block.norm.running_mean.normal_()
        block.norm.running_var.uniform_(0.5, 2)
    return block


def moved(block: DeformableMerging, by: float) -> DeformableMerging:
    with torch.no_grad():
        block.offset.weight.normal_(std=by)
        block.offset.bias.normal_(std=by)
    return block


def picture(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_it_starts_as_a_strided_convolution() -> None:
    block, x = make(), picture(2, 3, 6, 8)
    plain = F.conv2d(x, block.conv.weight, block.conv.bias, stride=2)
    torch.testing.assert_close(block(x), F.gelu(block.norm(plain)))


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("sides", [(4, 6), (5, 4), (1, 3)])
@pytest.mark.parametrize("by", [0.3, 3.0])
def test_points_between_places_and_off_the_map(size: int, sides: tuple[int, int], by: float) -> None:
    block, x = moved(make(size=size), by), picture(2, 3, *sides)
    assert block(x).shape == (2, 5, *(-(-side // size) for side in sides))
    torch.testing.assert_close(block(x), block.oracle(x))


def test_the_deformable_convolution_of_torchvision() -> None:
    ops = pytest.importorskip("torchvision.ops")
    block, x = moved(make(), 1.0), picture(2, 3, 8, 6)
    merged = ops.deform_conv2d(x, block.offset(x), block.conv.weight, block.conv.bias, stride=2)
    torch.testing.assert_close(block(x), F.gelu(block.norm(merged)))


def test_offsets_learn_from_their_start() -> None:
    block = make().train()
    block(picture(2, 3, 4, 4)).square().sum().backward()
    assert block.offset.weight.grad.abs().max() > 0
    assert isinstance(block.norm, nn.BatchNorm2d)


def test_bad_input() -> None:
    with pytest.raises(BadInput, match="at least 1"):
        DeformableMerging(3, 5, size=0)
