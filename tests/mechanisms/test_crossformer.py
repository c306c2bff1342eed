"""What only long-short distance attention holds: who is in whose group, and a bias without a table."""

import itertools

import pytest
import torch

import attlas
from attlas.core.errors import BadInput


def build(layer=0, heads=2, **settings):
    torch.manual_seed(0)
    attend = attlas.mixer("crossformer", 16 * heads, heads, layer=layer, **settings).attend.double()
    with torch.no_grad():
        for parameter in attend.parameters():
            parameter.normal_()
    return attend


def qkv(tokens, heads=2, size=16):
    torch.manual_seed(1)
    return [torch.randn(2, heads, tokens, size, dtype=torch.float64) for _ in "qkv"]


def sees(attend, grid):
    """Which (n, m) have an output at n that moves with the value at m."""
    tokens = attlas.Grid(grid).tokens
    q, k, v = (t[:1, :1] for t in qkv(tokens, size=attend.site.head_dim))
    q, k, v = (t.expand(-1, attend.site.heads, -1, -1) for t in (q, k, v))
    moved = torch.autograd.functional.jacobian(lambda t: attend(q, k, t, grid=grid).sum((1, 3)), v)
    return moved[0, :, 0].abs().sum((1, 3)) > 0


def short(group, a, b):
    return all(x // group == y // group for x, y in zip(a, b, strict=True))


def long(group, intervals, a, b):
    """The same remainder on both axes, inside the same square of group * interval places."""
    return all(x % i == y % i and x // (group * i) == y // (group * i) for x, y, i in zip(a, b, intervals, strict=True))


@pytest.mark.parametrize(
    ("grid", "group", "interval", "intervals"),
    [
        ((8, 8), 4, 2, (2, 2)),
        ((9, 7), 2, 3, (3, 3)),
        ((9, 7), 4, None, (3, 2)),
        ((7, 5), 3, 2, (2, 2)),
        ((9, 6), 4, 5, (5, 5)),
        ((7, 5), 2, 9, (9, 9)),
    ],
)
def test_groups_are_windows_and_every_so_manyth_token(grid, group, interval, intervals):
    places = list(itertools.product(*map(range, grid)))
    for layer, rule in ((0, lambda a, b: short(group, a, b)), (1, lambda a, b: long(group, intervals, a, b))):
        attend = build(layer, group=group, interval=interval)
        seen = torch.tensor([[rule(a, b) for b in places] for a in places])
        assert torch.equal(sees(attend, grid), seen)
        assert attend.cost(3, len(places), grid=grid).pairs == 3 * 2 * int(seen.sum())


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("grid", [(8, 8), (7, 6)])
def test_output_is_dense_attention_under_mask_and_bias(layer, grid):
    group, interval = 4, 2
    attend = build(layer, group=group, interval=interval)
    places = list(itertools.product(*map(range, grid)))
    step = (1, interval)[layer]
    seen = torch.tensor([[long(group, (step, step), a, b) for b in places] for a in places])
    inside = torch.tensor([[x // step % group for x in place] for place in places], dtype=torch.float64)
    bias = attend.position_bias(inside[:, None] - inside).permute(2, 0, 1)
    mask = attlas.Mask.pairs_(seen) & attlas.Mask.biased(bias)
    q, k, v = qkv(len(places))
    torch.testing.assert_close(attend(q, k, v, grid=grid), attlas.attend(q, k, v, mask=mask), rtol=0, atol=1e-12)


@pytest.mark.parametrize("interval", [None, 2, 5, 8, 100])
def test_groups_that_reach_over_the_border_cost_little(interval):
    attend = build(1, group=7, interval=interval)
    cost = attend.cost(1, 14 * 14, grid=(14, 14))
    assert cost.flops <= cost.executed < 2 * cost.flops
    q, k, v = qkv(14 * 14)
    oracle = build(1, group=7, interval=interval, backend="oracle")
    torch.testing.assert_close(attend(q, k, v, grid=(14, 14)), oracle(q, k, v, grid=(14, 14)), rtol=0, atol=1e-12)


def test_a_short_and_a_long_layer_connect_everything():
    near, far = (sees(build(layer, group=3), (9, 9)) for layer in (0, 1))
    both = far.float() @ near.float()
    assert (both > 0).all()
    assert not near.all()
    assert not far.all()


def test_default_intervals_are_the_published_ones_at_224_pixels():
    attend = build(1)
    intervals = [attend.groups(attlas.Grid((side, side)))[1][0] for side in (56, 28, 14, 7)]
    assert intervals == [8, 4, 2, 1]


def test_layers_take_turns():
    assert [build(layer).distance for layer in range(4)] == ["short", "long"] * 2
    assert build(0, distance="long").distance == "long"


def test_a_group_as_large_as_the_grid_is_a_window_in_both_kinds_of_layer():
    q, k, v = qkv(5 * 12)
    first, second = (build(layer, group=7)(q, k, v, grid=(5, 12)) for layer in (0, 1))
    assert torch.equal(first, second)
    window = (torch.arange(12) // 5).repeat(5)
    assert torch.equal(sees(build(1, group=7), (5, 12)), window[:, None] == window)


def test_one_bias_serves_groups_of_any_size():
    """Offsets that two sizes share have the same bias: the smaller table is the middle of the larger."""
    attend = build()
    small, large = attend._table((3, 3)), attend._table((6, 6))
    assert large.shape == (2, 11, 11)
    torch.testing.assert_close(large[:, 3:-3, 3:-3], small, rtol=0, atol=1e-12)


def test_the_bias_depends_on_query_minus_key():
    attend = build(group=2)
    for row, column in itertools.product((-1, 0, 1), repeat=2):  # entries stand at key - query
        expected = attend.position_bias(torch.tensor([float(-row), float(-column)], dtype=torch.float64))
        torch.testing.assert_close(attend._table((2, 2))[:, row + 1, column + 1], expected, rtol=0, atol=1e-12)


def linear(inputs, outputs):
    return inputs * outputs + outputs


@pytest.mark.parametrize(
    ("dim", "heads", "depths", "count"),
    [
        (64, 2, (1, 1, 8, 6), 27_776_794),
        (96, 3, (2, 2, 6, 2), 30_657_394),
        (128, 4, (2, 2, 18, 2), 91_971_184),
    ],
)
def test_parameters_of_the_published_models(dim, heads, depths, count):
    """All of the model but the mixers is written out: cross-scale embeddings, norms, MLPs and the head."""
    parts = ((4, dim // 2), (8, dim // 4), (16, dim // 8), (32, dim // 8))
    total = sum(linear(3 * side**2, width) for side, width in parts) + 2 * dim
    for stage, depth in enumerate(depths):
        width = dim * 2**stage
        if stage:
            half = width // 2
            total += 2 * half + linear(half * 2**2, half) + linear(half * 4**2, half)
        own = sum(p.numel() for p in attlas.mixer("crossformer", width, heads * 2**stage).parameters())
        total += depth * (4 * width + own + linear(width, 4 * width) + linear(4 * width, width))
    assert total + 2 * width + linear(width, 1000) == count


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"group": 0}, "group and interval are at least 1, got 0"),
        ({"interval": 0}, "group and interval are at least 1, got 7 and 0"),
        ({"distance": "medium"}, "'short', 'long' or None .*, got 'medium'"),
        ({"dim": 8}, "take a dim of at least 16, got 8"),
    ],
)
def test_what_has_no_meaning_is_refused(settings, words):
    with pytest.raises(BadInput, match=words):
        attlas.mixer("crossformer", **{"dim": 32, "heads": 2} | settings)
