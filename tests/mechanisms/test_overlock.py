"""The identities of `overlock`, context-mixing dynamic convolution."""

import pytest
import torch
import torch.nn.functional as F

import attlas
from attlas.blocks.conv_norm import fuse
from attlas.core.errors import BadInput, Unsupported
from attlas.core.grid import Grid
from attlas.ops.dilated_reparam import BRANCHES, DilatedReparam


def build(grid, dim=12, **settings):
    torch.manual_seed(0)
    layer = attlas.mixer("overlock", dim, 1, grid=grid, **{"context": 4, "kernel": 5, "small": 3} | settings)
    for name, value in [*layer.named_parameters(), *layer.named_buffers()]:
        if value.is_floating_point():
            torch.nn.init.uniform_(value, 0.5, 1.5) if "running_var" in name else torch.nn.init.normal_(value, std=0.3)
    return layer.double().eval()


def test_dynamic_kernels_are_the_published_unfolded_and_replicated_ones():
    grid = Grid((9, 11))
    layer = build(grid)
    x, f = torch.randn(2, 99, 12, dtype=torch.float64), torch.randn(2, 99, 8, dtype=torch.float64)
    q, k = layer._keyed(x, grid)
    logits = layer.taps_proj(q @ k.mT)
    parts = []
    for side, bias, start, value in ((3, layer.small_bias, 0, f[..., :4]), (5, layer.large_bias, 9, f[..., 4:])):
        own = logits[..., start : start + side * side].unflatten(2, grid.shape)
        place = [torch.arange(length) for length in grid.shape]
        first = [(p - side // 2).clamp(0, len(p) - side) - p + side - 1 for p in place]
        entry = [each[:, None] + torch.arange(side) for each in first]
        own = own + bias[:, entry[0][:, None, :, None], entry[1][None, :, None, :]].flatten(3)
        near = F.unfold(value.mT.unflatten(2, grid.shape), side).unflatten(2, (10 - side, 12 - side))
        near = F.pad(near, [side // 2] * 4, mode="replicate").unflatten(1, (2, 2, side * side))
        parts.append(torch.einsum("bghwt,bgdthw->bgdhw", own.softmax(-1), near).flatten(1, 2))
    expected = torch.cat(parts, 1).flatten(2).mT
    torch.testing.assert_close(layer._mixed(x, f, grid), expected, rtol=0, atol=1e-12)


def test_constant_logits_make_a_box_filter():
    grid = Grid((7, 8))
    layer = build(grid)
    for value in (layer.taps_proj.weight, layer.taps_proj.bias, layer.small_bias, layer.large_bias):
        torch.nn.init.zeros_(value)
    f = torch.randn(1, 56, 8, dtype=torch.float64)
    mixed = layer._mixed(torch.randn(1, 56, 12, dtype=torch.float64), f, grid)
    picture = f.view(7, 8, 8)
    torch.testing.assert_close(mixed.view(7, 8, 8)[3, 4, :4], picture[2:5, 3:6, :4].mean((0, 1)))
    torch.testing.assert_close(mixed.view(7, 8, 8)[0, 7, 4:], picture[:5, 3:, 4:].mean((0, 1)))  # shifted inwards


def test_kernels_depend_on_the_whole_picture_but_sum_over_their_window():
    grid = Grid((14, 14))
    layer = build(grid)
    x, f = (torch.randn(1, 196, width, dtype=torch.float64, requires_grad=True) for width in (12, 8))
    by_kernel, by_value = torch.autograd.grad(layer._mixed(x, f, grid).view(14, 14, 8)[7, 7].sum(), (x, f))
    assert (by_kernel.view(14, 14, 12)[..., 8:].abs().sum(-1) > 0).all()  # the context, everywhere
    assert (by_value.view(14, 14, 8).abs().sum(-1) > 0).sum() == 25


@pytest.mark.parametrize("shape", [(3, 3), (2, 9), (9, 4), (1, 1)])
def test_small_maps_are_enlarged(shape):
    layer = build(Grid(shape))
    assert layer(torch.randn(2, shape[0] * shape[1], 12, dtype=torch.float64), grid=shape).isfinite().all()


@pytest.mark.parametrize(("kernel", "shape"), [(15, (11, 11)), (15, (11, 13)), (13, (7, 7)), (17, (3, 30))])
def test_no_enlarged_side_is_below_the_kernel(kernel, shape):
    size = build(Grid(shape), kernel=kernel)._enlarged(Grid(shape))
    assert min(size) == kernel
    assert size[1] == kernel * shape[1] // shape[0]


def test_fused_it_is_the_same_in_evaluation():
    layer, x = build(Grid((8, 8))), torch.randn(2, 64, 12, dtype=torch.float64)
    expected, parameters = layer(x), sum(value.numel() for value in layer.parameters())
    fuse(layer)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)
    layer.backend = "oracle"
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-10)
    assert sum(value.numel() for value in layer.parameters()) < parameters
    assert layer.local.fused() is layer.local


@pytest.mark.parametrize("kernel", BRANCHES)
def test_every_large_kernel_holds_its_branches(kernel):
    conv = DilatedReparam(3, kernel).double().eval()
    for norm in conv.norms:
        torch.nn.init.uniform_(norm.running_var, 0.5, 2)
        torch.nn.init.normal_(norm.running_mean)
    x, grid = torch.randn(1, 400, 3, dtype=torch.float64), Grid((20, 20))
    expected = conv(x, grid)
    torch.testing.assert_close(conv.fused()(x, grid), expected, rtol=0, atol=1e-12)


def test_bad_input():
    with pytest.raises(BadInput, match="two for each head"):
        build(Grid((8, 8)), dim=13)
    with pytest.raises(BadInput, match="small is odd"):
        build(Grid((8, 8)), small=7)
    with pytest.raises(BadInput, match="kernel is one of 5, 7"):
        build(Grid((8, 8)), kernel=6)
    with pytest.raises(Unsupported, match="padding"):
        build(Grid((8, 8)))(torch.randn(1, 64, 12).double(), mask=torch.ones(1, 64, dtype=torch.bool), grid=(8, 8))
