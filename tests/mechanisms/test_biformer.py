"""Bi-level routing attention: which regions are chosen, and what that costs."""

import pytest
import torch

import attlas
from attlas.core.errors import BadInput

HEADS, SIZE = 2, 4


def qkv(tokens, batch=2):
    return [torch.randn(batch, HEADS, tokens, SIZE, dtype=torch.float64) for _ in "qkv"]


def build(grid, **settings):
    return attlas.make_attend("biformer", HEADS, SIZE, grid=grid, **{"kernel": 0} | settings).double()


def region_numbers(grid, sides):
    """The region of each position, from the side lengths of a region."""
    place = attlas.Grid(grid).places() // torch.tensor(sides)
    return place.unique(dim=0, return_inverse=True)[1]


def routed(q, k, region, top, keep=None):
    """The visible pairs (B, N, N), from sums over one-hot regions."""
    one_hot = torch.nn.functional.one_hot(region).to(q).expand(len(q), -1, -1)
    if keep is not None:
        one_hot = one_hot * keep.unsqueeze(-1)
    size = one_hot.sum(1)
    mean = [torch.einsum("bhnd,bnr->brhd", x, one_hot).flatten(2) / size.clamp(min=1).unsqueeze(-1) for x in (q, k)]
    product = (mean[0] @ mean[1].mT).masked_fill(size.unsqueeze(1) == 0, -torch.inf)
    least = product.topk(top, -1).values[..., -1:]
    chosen = (product >= least) & (size > 0).unsqueeze(1)
    return (one_hot @ chosen.to(q) @ one_hot.mT) > 0


def seen_by_gradient(layer, q, k, v, **call):
    """Which values each output depends on, (B, N, N)."""
    v = v.requires_grad_()
    o = layer(q, k, v, **call)
    rows = [torch.autograd.grad(o[:, :, n].sum(), v, retain_graph=True)[0] for n in range(o.shape[2])]
    return torch.stack([row.abs().sum((1, 3)) > 0 for row in rows], 1)


@pytest.mark.parametrize(
    ("grid", "regions", "sides", "top"),
    [
        ((6, 8), (3, 2), (2, 4), 3),
        ((7, 5), 3, (2, 1), 4),  # three and a smaller one, and five
        ((13,), 4, (3,), 2),
        ((4, 3, 4), 2, (2, 1, 2), 5),
    ],
)
def test_the_chosen_regions_are_those_of_an_independent_routing(grid, regions, sides, top):
    q, k, v = qkv(attlas.Grid(grid).tokens)
    layer = build(grid, regions=regions, top=top)
    expected = routed(q, k, region_numbers(grid, sides), top)
    assert torch.equal(seen_by_gradient(layer, q, k, v, grid=grid), expected)
    dense = attlas.attend(q * (HEADS * SIZE) ** -0.5 * SIZE**0.5, k, v, mask=attlas.Mask.pairs_(expected.unsqueeze(1)))
    torch.testing.assert_close(layer(q, k, v, grid=grid), dense, rtol=0, atol=1e-12)


def test_all_regions_are_full_attention_and_the_convolution():
    grid = (6, 4)
    q, k, v = qkv(24)
    layer = build(grid, regions=2, top=4, kernel=5)
    scores = q @ k.mT * (HEADS * SIZE) ** -0.5
    picture = v.transpose(2, 3).flatten(1, 2).unflatten(-1, grid)
    local = layer.convolution(picture).flatten(2).unflatten(1, (HEADS, SIZE)).transpose(2, 3)
    torch.testing.assert_close(layer(q, k, v, grid=grid), scores.softmax(-1) @ v + local, rtol=0, atol=1e-12)


def test_no_gradient_passes_through_the_choice():
    grid = (6, 4)
    tensors = [t.requires_grad_() for t in qkv(24)]
    layer = build(grid, regions=2, top=2)
    frozen = routed(*tensors[:2], region_numbers(grid, (3, 2)), 2).unsqueeze(1)
    q, k, v = tensors
    scores = (q @ k.mT * (HEADS * SIZE) ** -0.5).masked_fill(~frozen, -torch.inf)
    outputs = (layer(q, k, v, grid=grid), scores.softmax(-1) @ v)
    weight = torch.randn_like(v)
    for got, expected in zip(*(torch.autograd.grad(o, tensors, weight) for o in outputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_regions_may_stand_in_any_order():
    grid, region = (4, 6), region_numbers((4, 6), (2, 2))
    q, k, v = qkv(24, batch=1)
    layer = build(grid, regions=(2, 3), top=2)
    turned = torch.randperm(6)
    by_region = torch.stack([(region == r).nonzero().flatten() for r in range(6)])
    moved = torch.empty(24, dtype=torch.long)
    moved[by_region.flatten()] = by_region[turned].flatten()
    got = layer(q, k[:, :, moved], v[:, :, moved], grid=grid)
    torch.testing.assert_close(got, layer(q, k, v, grid=grid), rtol=0, atol=1e-12)


def test_one_choice_is_made_for_all_heads():
    grid = (6, 8)
    q, k, v = qkv(48)
    v.requires_grad_()
    o = build(grid, regions=(3, 4), top=2)(q, k, v, grid=grid)
    for n in range(0, 48, 5):
        seen = torch.autograd.grad(o[:, :, n].sum(), v, retain_graph=True)[0].abs().sum(-1) > 0
        assert torch.equal(seen[:, 0], seen[:, 1])


@pytest.mark.parametrize("poison", [1e6, torch.nan])
def test_padding_moves_no_mean_and_is_in_no_chosen_region(poison):
    grid, region = (5, 6), region_numbers((5, 6), (2, 2))
    q, k, v = qkv(30)
    keep = torch.rand(2, 30) > 0.4
    keep[1, region == 4] = False  # a region of padding alone
    layer, expected = build(grid, regions=(2, 3), top=4), routed(q, k, region, 4, keep)
    dense = attlas.attend(q * (HEADS * SIZE) ** -0.5 * SIZE**0.5, k, v, mask=attlas.Mask.pairs_(expected.unsqueeze(1)))
    q, k, v = (x.masked_fill(~keep[:, None, :, None], poison) for x in (q, k, v))
    got = layer(q, k, v, grid=grid, mask=keep)
    real = keep[:, None, :, None]
    torch.testing.assert_close(got.where(real, 0), dense.where(real, 0), rtol=0, atol=1e-12)


def test_fewer_live_regions_than_chosen_ones_are_all_attended_to():
    grid = (4, 4)
    q, k, v = qkv(16)
    keep = torch.zeros(2, 16, dtype=torch.bool)
    keep[:, :2] = True  # one region of four
    got = build(grid, regions=2, top=3)(q, k, v, grid=grid, mask=keep)
    expected = (q[:, :, :2] @ k[:, :, :2].mT * (HEADS * SIZE) ** -0.5).softmax(-1) @ v[:, :, :2]
    torch.testing.assert_close(got[:, :, :2], expected, rtol=0, atol=1e-12)


def test_useful_products_are_a_share_of_k_by_s_squared():
    layer, whole = build((56, 56), top=4), build((56, 56), top=49)
    routing = 2 * HEADS * SIZE * 49**2
    assert layer.cost(1, 56**2).pairs * 49 == whole.cost(1, 56**2).pairs * 4 == HEADS * 56**4 * 4
    assert (layer.cost(1, 56**2).flops - routing) * 49 == (whole.cost(1, 56**2).flops - routing) * 4
    assert layer.cost(1, 56**2).flops == routing + 4 * HEADS * SIZE * 56**2 * 4 * 64


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"regions": 0}, "regions and top count regions"),
        ({"top": 0}, "regions and top count regions"),
        ({"regions": "22"}, "whole numbers of at least 1, got '22'"),
        ({"regions": 2.0}, "whole numbers of at least 1, got 2.0"),
        ({"regions": (2.0, 2)}, "whole numbers"),
        ({"top": 2.5}, "whole numbers of at least 1, got 7 and 2.5"),
        ({"regions": 9}, r"cannot be cut into \(9, 9\) regions: take at most \(8, 10\)"),
        ({"regions": (2, 2, 2)}, "for 3 axes, the grid has 2"),
        ({"regions": 2, "top": 5}, "top is 5 regions and the grid 8x10 has 4"),
        ({"regions": 2, "kernel": 4}, "kernel is odd"),
    ],
)
def test_what_has_no_meaning_is_refused_at_construction(settings, words):
    with pytest.raises(BadInput, match=words):
        build((8, 10), **settings)


def test_what_has_no_meaning_is_refused_at_the_call():
    with pytest.raises(BadInput, match="when building it, or kernel=0"):
        attlas.make_attend("biformer", HEADS, SIZE)
    layer = attlas.make_attend("biformer", HEADS, SIZE, kernel=0, regions=4).double()
    with pytest.raises(BadInput, match="cannot be cut"):
        layer(*qkv(9), grid=(3, 3))
