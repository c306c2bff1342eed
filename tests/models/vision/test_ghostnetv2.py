"""What only GhostNetV2 holds: where gates are, what they see, and channels that are made of others."""

import pytest
import torch
from torch import nn

from attlas import models
from attlas.blocks.ghost import DecoupledGate, GhostModule
from attlas.models.vision.ghostnetv2 import Bottleneck, rounded
from tests.models.vision.official_names import shaken


def shake(module):
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            if value.is_floating_point():
                value.uniform_(0.5, 1.5) if "running_var" in name else value.normal_(std=0.5)
    return module.double().eval()


def test_all_blocks_but_two_have_a_gate():
    with torch.device("meta"):
        net = models.create("ghostnetv2_100")
    blocks = [module for module in net.modules() if isinstance(module, Bottleneck)]
    assert len(blocks) == 16
    assert {block for block in blocks if block.widen.gate is None} == {net.stages[0].blocks[0], net.downsamples[1]}
    assert all(block.narrow.gate is None for block in blocks)
    assert (net.channels, net.strides) == ((16, 24, 40, 112, 160), (2, 4, 8, 16, 32))


def test_gates_are_factors_and_a_half_without_weights():
    gate, x = shake(DecoupledGate(4, 6)), torch.randn(2, 4, 9, 8, dtype=torch.float64)
    factors = gate(x)
    assert factors.shape == (2, 6, 9, 8)
    assert ((factors > 0) & (factors < 1)).all()
    with torch.no_grad():
        for value in gate.parameters():
            value.zero_()
    assert torch.equal(gate(x), torch.full_like(factors, 0.5))


def test_a_gate_sees_five_rows_and_columns_at_half_the_size():
    gate = shake(DecoupledGate(2, 2))
    x = torch.randn(1, 2, 20, 20, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(gate(x)[0, :, 10, 11].sum(), x)
    rows, columns = (grad[0].abs().sum(0) > 0).nonzero().unbind(1)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (6, 15, 6, 15)
    assert len(rows) == 100


def test_two_convolutions_along_axes_are_one_of_their_products():
    gate, x = shake(DecoupledGate(3, 3)), torch.randn(1, 3, 24, 22, dtype=torch.float64)
    along_rows, along_columns = gate.along_rows.fused(), gate.along_columns.fused()
    with torch.no_grad():
        along_rows.bias.zero_()
        along_columns.bias.zero_()
        product = along_columns.weight @ along_rows.weight
        expected = nn.functional.conv2d(x, product, padding=2, groups=3)
        torch.testing.assert_close(along_columns(along_rows(x)), expected)


def test_half_of_the_channels_are_made_of_the_other():
    module, x = shake(GhostModule(4, 7)), torch.randn(1, 4, 6, 5, dtype=torch.float64)
    y = module(x)
    first, second = y[:, :4], y[:, 4:]
    made = module.cheap(first).relu()
    assert y.shape[1] == 7
    torch.testing.assert_close(first, module.primary(x).relu())
    torch.testing.assert_close(second, made[:, :3])
    assert (shake(GhostModule(4, 6, active=False))(x) < 0).any()


@pytest.mark.parametrize("side", [32, 33, 65, 100])
def test_odd_maps_and_maps_of_one_place(side):
    net = shaken("ghostnetv2_micro")
    maps = net.feature_maps(torch.randn(1, 3, side, side, dtype=torch.float64))
    assert [found.shape[2] for found in maps] == [-(-side // stride) for stride in net.strides]
    assert net(torch.randn(1, 3, side, side, dtype=torch.float64)).isfinite().all()


def test_widths_are_multiples_of_four():
    assert [rounded(width) for width in (16 * 1.3, 184 * 1.6, 5, 1, 960)] == [20, 296, 8, 4, 960]
