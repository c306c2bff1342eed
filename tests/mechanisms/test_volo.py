"""What only outlook attention holds: windows without queries and keys, summed where they overlap."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import attlas
from attlas.core.errors import BadInput, Unsupported


def build(dim=8, heads=2, **settings):
    torch.manual_seed(0)
    layer = attlas.mixer("volo", dim, heads, **settings).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)
    return layer.eval()


def tokens(*shape, dim=8):
    torch.manual_seed(1)
    return torch.randn(2, *shape, dim, dtype=torch.float64).flatten(1, -2)


def support(layer, x, grid):
    """Which (n, m) have an output at n that moves with the token at m."""
    moved = torch.autograd.functional.jacobian(lambda t: layer(t, grid=grid).sum(-1), x[:1])
    return moved[0, :, 0].abs().sum(-1) > 0


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 3)])
def test_tokens_see_those_that_share_a_window(kernel, stride):
    grid = (5, 7)
    places = list(itertools.product(*map(range, grid)))
    seen = torch.zeros(35, 35, dtype=torch.bool)
    for top, left in itertools.product(range(0, 5, stride), range(0, 7, stride)):
        window = [n for n, (y, x) in enumerate(places) if max(abs(y - top), abs(x - left)) <= kernel // 2]
        for n, m in itertools.product(window, repeat=2):
            seen[n, m] = True
    layer = build(kernel=kernel, stride=stride)
    assert torch.equal(support(layer, tokens(*grid), grid), seen)
    assert layer.cost(3, 35, grid=grid).pairs == 3 * 2 * int(seen.sum())


@pytest.mark.parametrize("grid", [(6, 8), (5, 7)])
def test_uniform_weights_give_sums_of_window_means(grid):
    layer = build()
    with torch.no_grad():
        layer.weight_proj.weight.zero_()
        layer.weight_proj.bias.zero_()
    x = tokens(*grid)
    v = layer.v_proj(x).mT.unflatten(2, grid)
    means = F.avg_pool2d(v, 3, 2, 1)  # zeros off the grid are counted
    spread = F.conv_transpose2d(
        means, means.new_ones(8, 1, 3, 3), None, 2, 1, [(length - 1) % 2 for length in grid], groups=8
    )
    expected = layer.out_proj(spread.flatten(2).mT)
    torch.testing.assert_close(layer(x, grid=grid), expected, rtol=0, atol=1e-12)


def test_weights_are_a_softmax_over_the_last_nine_scaled_by_the_head_size():
    """One window on a grid of 2 x 2 places with stride 2: its matrix can be written out."""
    layer = build(dim=4, heads=1)
    x = tokens(2, 2, dim=4)
    matrix = (layer.weight_proj(x.mean(1)).unflatten(1, (9, 9)) / 2).softmax(-1)
    inside = torch.tensor([4, 5, 7, 8])  # the middle of the window is place 0
    mixed = matrix[:, inside][:, :, inside] @ layer.v_proj(x)
    torch.testing.assert_close(layer(x, grid=(2, 2)), layer.out_proj(mixed), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("heads", "bias"), [(6, False), (12, True)])
def test_parameters_of_the_published_layers(heads, bias):
    layer = attlas.mixer("volo", 192, heads, bias=bias)
    count = 192 * 192 + (192 + 1) * 81 * heads + 192 * 192 + 192 + 192 * bias
    assert sum(p.numel() for p in layer.parameters()) == count


def linear(inputs, outputs):
    return inputs * outputs + outputs


def test_parameters_of_the_published_model():
    """VOLO-D1. All of it but the outlookers' mixers is written out; 26.632 million are published."""
    first, width = 192, 384
    stem = 64 * 3 * 7**2 + 2 * 64 * 64 * 3**2 + 3 * 2 * 64 + linear(64 * 4**2, first)
    outlook = sum(p.numel() for p in attlas.mixer("volo", first, 6).parameters())
    outlooker = 4 * first + outlook + linear(first, 3 * first) + linear(3 * first, first)
    between = linear(first * 2**2, width) + 14 * 14 * width
    block = 4 * width + 3 * width**2 + linear(width, width) + linear(width, 3 * width) + linear(3 * width, width)
    head = width + 2 * width + 2 * linear(width, 1000)
    total = stem + 4 * outlooker + between + (14 + 2) * block + head
    assert round(total / 1e6, 3) == 26.632


@pytest.mark.parametrize("grid", [(4, 6), (5, 5)])
def test_a_padded_picture_gives_what_it_gives_alone(grid):
    layer = build(bias=True)
    x = tokens(*grid).unflatten(1, grid)
    padded = F.pad(x, (0, 0, 0, 3, 0, 2), value=torch.nan)
    keep = F.pad(torch.ones(2, *grid, dtype=torch.bool), (0, 3, 0, 2))
    got = layer(padded.flatten(1, 2), mask=keep.flatten(1), grid=keep.shape[1:])
    expected = layer(x.flatten(1, 2), grid=grid)
    torch.testing.assert_close(got[keep.flatten(1)].view_as(expected), expected, rtol=0, atol=1e-12)


def test_time_is_linear_in_the_tokens():
    layer = attlas.mixer("volo", 192, 6)
    small, large = (layer.cost(1, side**2, grid=(side, side)).executed for side in (28, 56))
    assert large == 4 * small


def test_prefix_tokens_lie_in_no_window():
    layer, x = build(), tokens(4, 4)
    front = torch.randn(2, 1, 8, dtype=torch.float64)
    got = layer(torch.cat([front, x], 1), grid=attlas.Grid((4, 4), prefix=1))
    assert not got[:, 0].any()
    assert torch.equal(got[:, 1:], layer(x, grid=(4, 4)))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"heads": 3}, "heads must divide dim: 8 channels .* 3 heads"),
        ({"kernel": 4}, "kernel is odd, got 4"),
        ({"stride": 3}, "stride of 1 to 2, got 3"),
        ({"stride": 0}, "stride of 1 to 2, got 0"),
        ({"weight_dropout": 1.0}, "weight_dropout is a share"),
    ],
)
def test_what_has_no_meaning_is_refused(settings, words):
    with pytest.raises(BadInput, match=words):
        attlas.mixer("volo", 8, **{"heads": 2} | settings)


def test_a_sequence_has_no_windows():
    with pytest.raises(BadInput, match="pass grid="):
        build()(tokens(9))
    with pytest.raises(Unsupported, match="grid 9"):
        build()(tokens(9), grid=(9,))
