"""The identities and counts of `convit`."""

import pytest
import torch
import torch.nn.functional as F

import attlas
from attlas import Grid
from attlas.core.errors import BadInput, Unsupported


def gated(layer, value):
    with torch.no_grad():
        layer.gate.fill_(value)
    return layer.double()


def maps(layer, x, grid):
    return layer.weights(x, Grid(grid), attlas.Mask())


def convit_parameters(dim, heads):
    """Ten blocks of GPSA on 14x14 patches, two of plain attention, a class token, a head."""
    gpsa = sum(p.numel() for p in attlas.mixer("convit", dim, heads).parameters())
    plain = 4 * dim * dim + dim
    block = 2 * 2 * dim + (8 * dim * dim + 5 * dim)
    embedding = 3 * 16 * 16 * dim + dim + 196 * dim + dim
    return 10 * gpsa + 2 * plain + 12 * block + embedding + 2 * dim + 1000 * (dim + 1)


@pytest.mark.parametrize(
    ("dim", "heads", "published"),
    [(192, 4, 5_710_512), (432, 9, 27_777_322), (768, 16, 86_540_040)],
    ids=["tiny", "small", "base"],
)
def test_parameters_of_the_published_models(dim, heads, published):
    assert convit_parameters(dim, heads) == published


@pytest.mark.parametrize(("dim", "heads", "published"), [(192, 4, 1.25e9), (432, 9, 5.75e9), (768, 16, 17.5e9)])
def test_multiplications_of_the_published_models(dim, heads, published):
    macs = 10 * attlas.mixer("convit", dim, heads).cost(1, 196, grid=(14, 14)).flops // 2
    macs += 2 * attlas.mixer("softmax", dim, heads).cost(1, 197).flops // 2
    macs += 8 * dim * dim * (10 * 196 + 2 * 197) + 3 * 16 * 16 * dim * 196 + 1000 * dim
    assert macs == pytest.approx(published, rel=0.01)


def as_convolution(layer, side):
    """The kernel whose tap in row b and column a maps the channels of head K a + b by W_o, and no others."""
    dim, size = layer.site.dim, layer.site.dim // side**2
    kernel = torch.zeros(dim, dim, side, side, dtype=torch.float64)
    for head in range(side**2):
        own = slice(size * head, size * head + size)
        kernel[:, own, head % side, head // side] = layer.out_proj.weight[:, own]
    return kernel


@pytest.mark.parametrize("grid", [(6, 6), (5, 8)])
@pytest.mark.parametrize("side", [3, 5])
def test_narrow_heads_of_an_odd_side_are_a_convolution(side, grid):
    layer = gated(attlas.mixer("convit", 2 * side**2, side**2, strength=50.0), 60.0)
    x = torch.randn(2, grid[0] * grid[1], 2 * side**2, dtype=torch.float64)
    picture = x.transpose(1, 2).unflatten(2, grid)
    inside = F.conv2d(picture, as_convolution(layer, side), layer.out_proj.bias)
    edge = side // 2
    y = layer(x, grid=grid).transpose(1, 2).unflatten(2, grid)[:, :, edge:-edge, edge:-edge]
    assert torch.allclose(y, inside, rtol=0, atol=1e-4)


def test_narrow_heads_of_an_even_side_average_four_places():
    layer = gated(attlas.mixer("convit", 8, 4, strength=50.0), 60.0)
    weights = maps(layer, torch.randn(1, 25, 8, dtype=torch.float64), (5, 5))[0, :, 12].unflatten(1, (5, 5))
    for head, (row, column) in enumerate(((1, 1), (2, 1), (1, 2), (2, 2))):
        expected = torch.zeros(5, 5, dtype=torch.float64)
        expected[row : row + 2, column : column + 2] = 1 / 4
        assert torch.allclose(weights[head], expected, rtol=0, atol=1e-12)


def test_a_closed_gate_leaves_softmax_attention():
    layer = gated(attlas.mixer("convit", 16, 4, local_init=False), -60.0)
    plain = attlas.mixer("softmax", 16, 4, bias=False).double()
    query, key = layer.qk_proj.weight.chunk(2)
    plain.load_state_dict(
        {
            "q_proj.weight": query,
            "k_proj.weight": key,
            "v_proj.weight": layer.v_proj.weight,
            "out_proj.weight": layer.out_proj.weight,
            "out_proj.bias": layer.out_proj.bias,
        }
    )
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    assert torch.allclose(layer(x, grid=(3, 4)), plain(x), rtol=0, atol=1e-12)


def test_rows_sum_to_one_under_any_gate_and_mask():
    layer = attlas.mixer("convit", 16, 4).double()
    x, keep = torch.randn(1, 12, 16, dtype=torch.float64), torch.arange(12)[None] < 7
    for value in (-2.0, 0.0, 3.0):
        weights = gated(layer, value).weights(x, Grid((3, 4)), attlas.Mask.padding(keep))
        assert torch.allclose(weights.sum(-1), torch.ones_like(weights[..., 0]), rtol=0, atol=1e-12)
        assert not weights[..., 7:].any()


def test_weaker_locality_looks_farther():
    x = torch.randn(1, 64, 36, dtype=torch.float64)
    layers = [gated(attlas.mixer("convit", 36, 9, strength=strength), 1.0) for strength in (4.0, 1.0, 0.25, 0.05)]
    near_to_far = torch.stack([layer.locality(x, grid=(8, 8)) for layer in layers])
    assert (near_to_far[:, 4].diff() > 0).all()  # the head that starts at the query itself
    assert (near_to_far.mean(1).diff() > 0).all()


def test_locality_is_the_mean_distance():
    layer = gated(attlas.mixer("convit", 16, 4), 0.3)
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    weights = maps(layer, x, (2, 3))
    expected = torch.zeros(4, dtype=torch.float64)
    for i in range(6):
        for j in range(6):
            distance = ((i // 3 - j // 3) ** 2 + (i % 3 - j % 3) ** 2) ** 0.5
            expected += weights[:, :, i, j].sum(0) * distance / 12
    assert torch.allclose(layer.locality(x, grid=(2, 3)), expected, rtol=0, atol=1e-12)


def test_one_set_of_weights_serves_every_grid():
    layer = gated(attlas.mixer("convit", 16, 4), 60.0)
    x = torch.randn(1, 24, 16, dtype=torch.float64)
    tall, wide = (maps(layer, x, grid)[0, :, 0] for grid in ((8, 3), (3, 8)))
    turned = tall.unflatten(1, (8, 3)).transpose(1, 2).flatten(1)[[0, 2, 1, 3]]  # rows and columns trade heads
    assert torch.allclose(turned, wide, rtol=0, atol=1e-12)


def test_padding_may_hold_anything():
    layer = attlas.mixer("convit", 16, 4)
    x, keep = torch.randn(1, 12, 16), torch.arange(12)[None] < 8
    dirty = x.masked_fill(~keep.unsqueeze(-1), torch.nan)
    y = layer(dirty, mask=keep, grid=(3, 4))
    assert torch.equal(y, layer(x, mask=keep, grid=(3, 4)))
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_far_places_do_not_overflow_half_precision():
    layer = attlas.mixer("convit", 16, 4, strength=200.0).half()
    assert layer(torch.randn(1, 400, 16).half(), grid=(20, 20)).isfinite().all()


def test_dropout_is_on_in_training_only():
    layer, x = attlas.mixer("convit", 16, 4, weight_dropout=0.5, dropout=0.5), torch.randn(1, 12, 16)
    assert not torch.equal(layer(x, grid=(3, 4)), layer(x, grid=(3, 4)))
    layer.eval()
    assert torch.equal(layer(x, grid=(3, 4)), layer(x, grid=(3, 4)))


def test_what_does_not_fit_is_refused():
    with pytest.raises(BadInput, match=r"square number, got 6: take 4 or 9, or local_init=False"):
        attlas.mixer("convit", 24, 6, local_init=True)
    with pytest.raises(BadInput, match="16 channels do not split into 9 heads"):
        attlas.mixer("convit", 16, 9)
    with pytest.raises(BadInput, match="and is positive, got 0"):
        attlas.mixer("convit", 16, 4, strength=0)
    with pytest.raises(BadInput, match="pass grid="):
        attlas.mixer("convit", 16, 4)(torch.randn(1, 9, 16))
    with pytest.raises(Unsupported, match="no prefix tokens"):
        attlas.mixer("convit", 16, 4)(torch.randn(1, 10, 16), grid=Grid((3, 3), prefix=1))
    with pytest.raises(Unsupported, match="causal"):
        attlas.mixer("convit", 16, 4, causal=True)
