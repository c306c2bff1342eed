"""What only neighborhood attention holds: whose window is whose, its limits, and its bias."""

from itertools import product

import pytest
import torch

import attlas
from attlas.analysis.visible import visible_pairs
from attlas.core.errors import BadInput
from attlas.ops.neighborhood import Axis, neighborhood_attention

# Windows that NATTEN 0.21's mask gives for each query of one axis.
PUBLISHED = {
    "even window": (
        Axis(13, 4),
        "0-3 0-3 0-3 1-4 2-5 3-6 4-7 5-8 6-9 7-10 8-11 9-12 9-12",
    ),
    "stride": (
        Axis(13, 5, stride=3),
        "0-4 0-4 0-4 2-6 2-6 2-6 5-9 5-9 5-9 8-12 8-12 8-12 8-12",
    ),
    "causal stride": (
        Axis(13, 5, stride=3, causal=True),
        "0-0 0-1 0-2 1-3 1-4 1-5 4-6 4-7 4-8 7-9 7-10 7-11 8-12",
    ),
    "unequal groups": (
        Axis(13, 3, dilation=4),
        "0-8 1-9 2-10 3-11 0-8 1-9 2-10 3-11 4-12 1-9 2-10 3-11 4-12",
    ),
    "even stride, unequal groups": (
        Axis(17, 4, dilation=3, stride=2),
        "0-9 1-10 2-11 0-9 1-10 2-11 3-12 4-13 5-14 3-12 4-13 5-14 6-15 7-16 5-14 6-15 7-16",
    ),
    "causal dilated stride": (
        Axis(13, 3, dilation=3, stride=2, causal=True),
        "0-0 1-1 2-2 0-3 1-4 2-5 3-6 4-7 5-8 3-9 4-10 5-11 6-12",
    ),
}


def all_axes(longest=12):
    for length, dilation, causal in product(range(1, longest + 1), range(1, 4), (False, True)):
        for window in range(1, length // dilation + 1 + 3 * causal):  # a causal axis may be shorter than its window
            for stride in range(1, window + 1):
                yield Axis(length, window, dilation, stride, causal)


def seen_by_rule(axis):
    place = torch.arange(axis.length)
    return axis.sees(place.unsqueeze(1), place)


def tensors(tokens, heads=2, kv_heads=None, size=4):
    return [torch.randn(2, h, tokens, size, dtype=torch.float64) for h in (heads, *2 * [kv_heads or heads])]


@pytest.mark.parametrize(("axis", "windows"), PUBLISHED.values(), ids=PUBLISHED)
def test_windows_are_the_published_ones(axis, windows):
    for query, (seen, window) in enumerate(zip(seen_by_rule(axis), windows.split(), strict=True)):
        first, last = map(int, window.split("-"))
        assert seen.nonzero().flatten().tolist() == list(range(first, last + 1, axis.dilation)), query


def test_table_and_count_follow_the_rule_on_every_short_axis():
    for axis in all_axes():
        seen, windows = seen_by_rule(axis), axis.windows(axis.length)
        counted = torch.zeros(axis.length, axis.length, dtype=torch.long)
        counted.scatter_add_(1, windows.key, windows.seen.long())
        assert torch.equal(counted, seen.long()), axis
        assert axis.pairs() == seen.sum(), axis


def test_windows_are_shifted_at_borders_and_never_cut():
    for axis in all_axes():
        if axis.causal:
            continue
        seen = seen_by_rule(axis)
        assert (seen.sum(1) == axis.window).all(), axis
        if axis.stride == 1:  # the corner sees what its neighbour of the same group further inside sees
            inner = axis.dilation * (axis.window // 2)
            assert torch.equal(seen[0], seen[inner]), axis


@pytest.mark.parametrize(
    ("grid", "settings"),
    [
        ((13,), {"window": 4, "stride": 3, "dilation": 3}),
        ((7, 6), {"window": (3, 4), "dilation": (2, 1), "stride": (1, 3)}),
        ((5, 4, 6), {"window": (3, 2, 3), "dilation": (1, 2, 2), "causal_axes": (True, False, False)}),
        ((5, 3, 7), {"window": (4, 2, 3), "stride": (3, 1, 2), "causal_axes": (True, False, True)}),
        ((6, 4), {"window": (6, 2), "dilation": (1, 2), "stride": (4, 2), "causal_axes": (False, True)}),
    ],
)
def test_output_equals_dense_attention_under_the_mask(grid, settings):
    layer = attlas.make_attend("neighborhood", 4, 4, kv_heads=2, **settings)
    whole = attlas.Grid(grid, prefix=2)
    inputs = [t.requires_grad_() for t in tensors(whole.tokens, 4, 2)]
    seen = torch.ones(whole.tokens, whole.tokens, dtype=torch.bool)
    places = list(product(*map(range, grid)))
    axes = layer._axes(whole)
    for (n, query), (m, key) in product(enumerate(places), repeat=2):
        pairs = zip(axes, query, key, strict=True)
        seen[2 + n, 2 + m] = all(bool(seen_by_rule(axis)[a, b]) for axis, a, b in pairs)
    expected = attlas.attend(*inputs, mask=attlas.Mask.pairs_(seen))
    got = layer(*inputs, grid=whole)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    weight = torch.randn_like(got)
    for a, b in zip(
        torch.autograd.grad(got, inputs, weight), torch.autograd.grad(expected, inputs, weight), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_a_causal_window_that_slides_is_full_after_its_length():
    for axis in all_axes():
        if axis.causal and axis.stride == 1:
            place = torch.arange(axis.length) // axis.dilation
            assert torch.equal(seen_by_rule(axis).sum(1), (place + 1).clamp(max=axis.window)), axis


def test_a_dilated_axis_is_its_interleaved_parts():
    for length, window, dilation in product(range(14, 40), (3, 5, 7), range(2, 6)):
        if window * dilation > length:
            continue
        seen = seen_by_rule(Axis(length, window, dilation))
        for first in range(dilation):
            part = seen[first::dilation, first::dilation]
            assert torch.equal(part, seen_by_rule(Axis(len(part), window))), (length, window, dilation)
            seen[first::dilation, first::dilation] = False
        assert not seen.any(), (length, window, dilation)


def test_every_query_depends_on_a_full_window_and_the_corner_on_that_of_its_inner_neighbour():
    layer = attlas.mixer("neighborhood", 8, 2, window=(3, 5), dilation=(2, 1))
    seen = visible_pairs(layer, grid=(7, 9)).view(2, 7, 9, 7, 9)
    assert (seen.sum((-1, -2)) == 15).all()
    assert torch.equal(seen[:, 0, 0], seen[:, 2, 2])
    assert torch.equal(seen[:, 6, 8], seen[:, 4, 6])


@pytest.mark.parametrize("grid", [(9,), (4, 5), (2, 3, 4)])
def test_a_window_of_the_whole_grid_is_full_attention(grid):
    q, k, v = tensors(attlas.Grid(grid).tokens)
    got = attlas.attend(q, k, v, "neighborhood", grid=grid, window=grid)
    torch.testing.assert_close(got, attlas.attend(q, k, v), rtol=0, atol=1e-12)


def test_a_stride_of_the_window_is_block_attention():
    q, k, v = tensors(12)
    got = attlas.attend(q, k, v, "neighborhood", window=4, stride=4)
    torch.testing.assert_close(got, attlas.attend(q, k, v, mask=attlas.Mask.block(4)), rtol=0, atol=1e-12)


def test_a_stride_of_the_window_on_two_axes_is_attention_inside_each_cell():
    q, k, v = (t.unflatten(2, (2, 3, 3, 2)) for t in tensors(36))
    flat = (t.flatten(2, 5) for t in (q, k, v))
    got = attlas.attend(*flat, "neighborhood", grid=(6, 6), window=(3, 2), stride=(3, 2)).unflatten(2, (2, 3, 3, 2))
    for row, column in product(range(2), range(3)):
        cell = (t[:, :, row, :, column].flatten(2, 3) for t in (q, k, v))
        expected = attlas.attend(*cell)
        torch.testing.assert_close(got[:, :, row, :, column].flatten(2, 3), expected, rtol=0, atol=1e-12)


def test_causal_is_the_last_keys_and_queries_may_be_the_last_positions():
    q, k, v = tensors(12)
    got = attlas.attend(q, k, v, "neighborhood", window=5, causal=True)
    expected = attlas.attend(q, k, v, causal=True, mask=attlas.Mask.window(4, 0))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    last = attlas.attend(q[:, :, -3:], k, v, "neighborhood", window=5, causal=True)
    torch.testing.assert_close(last, expected[:, :, -3:], rtol=0, atol=1e-12)


def test_dilation_is_plain_attention_on_interleaved_maps():
    q, k, v = (t.unflatten(2, (9, 8)) for t in tensors(72))
    got = attlas.attend(*(t.flatten(2, 3) for t in (q, k, v)), "neighborhood", grid=(9, 8), window=3, dilation=(2, 2))
    expected = torch.empty_like(q)
    for a, b in product(range(2), repeat=2):
        parts = [t[:, :, a::2, b::2] for t in (q, k, v)]
        grid = parts[0].shape[2:4]
        part = attlas.attend(*(t.flatten(2, 3) for t in parts), "neighborhood", grid=tuple(grid), window=3)
        expected[:, :, a::2, b::2] = part.unflatten(2, grid)
    torch.testing.assert_close(got, expected.flatten(2, 3), rtol=0, atol=1e-12)


def test_causal_time_and_free_space():
    q, k, v = (t.unflatten(2, (4, 9)) for t in tensors(36))
    settings = {"grid": (4, 3, 3), "window": (2, 3, 3), "causal_axes": (True, False, False)}

    def run(values):
        return attlas.attend(q.flatten(2, 3), k.flatten(2, 3), values.flatten(2, 3), "neighborhood", **settings)

    changed = v.clone()
    changed[:, :, 2] += 1
    moved = (run(changed) - run(v)).abs().amax((0, 1, 3)).view(4, 9) > 0
    assert moved.all(1).tolist() == [False, False, True, True]  # the frame itself and the next, in full
    assert moved.any(1).tolist() == [False, False, True, True]


def test_prefix_tokens_share_the_softmax():
    q, k, v = tensors(14)
    axis, prefix = Axis(12, 3), 2
    got = neighborhood_attention(q, k, v, (axis,), prefix=prefix)[:, :, prefix:]
    scores = (q @ k.mT / 2)[:, :, prefix:]
    near = scores[..., prefix:].masked_fill(~seen_by_rule(axis), -torch.inf)
    parts = [(scores[..., :prefix], v[:, :, :prefix]), (near, v[:, :, prefix:])]
    total = torch.stack([s.logsumexp(-1) for s, _ in parts]).logsumexp(0)
    merged = sum((s.logsumexp(-1) - total).exp().unsqueeze(-1) * (s.softmax(-1) @ w) for s, w in parts)
    torch.testing.assert_close(got, merged, rtol=0, atol=1e-12)


def test_the_bias_counts_in_places_of_the_dilation_group():
    layer = attlas.make_attend("neighborhood", 1, 4, window=(3, 5), dilation=(1, 2), relative_bias=True)
    with torch.no_grad():
        layer.relative_bias.zero_()[0, 2 + 1, 4 - 2] = 1e4  # one row down, two places to the left
    q, k, v = tensors(5 * 13, heads=1)
    got = layer.double()(q, k, v, grid=(5, 13)).unflatten(2, (5, 13))
    v = v.unflatten(2, (5, 13))
    torch.testing.assert_close(got[:, :, 1:3, 4:9], v[:, :, 2:4, 0:5], rtol=0, atol=1e-12)


def test_dilation_with_a_bias_is_attention_with_that_bias_on_interleaved_maps():
    layer = attlas.make_attend(
        "neighborhood", 2, 4, window=3, dilation=(2, 3), relative_bias=True, grid=(7, 10)
    ).double()
    part = attlas.make_attend("neighborhood", 2, 4, window=3, relative_bias=True, grid=(3, 3)).double()
    with torch.no_grad():
        part.relative_bias.copy_(layer.relative_bias.normal_())
    q, k, v = tensors(70)
    got = layer(q, k, v, grid=(7, 10)).unflatten(2, (7, 10))
    for first in product(range(2), range(3)):
        maps = [t.unflatten(2, (7, 10))[:, :, first[0] :: 2, first[1] :: 3] for t in (q, k, v)]
        expected = part(*(t.flatten(2, 3) for t in maps), grid=tuple(maps[0].shape[2:4]))
        own = got[:, :, first[0] :: 2, first[1] :: 3].flatten(2, 3)
        torch.testing.assert_close(own, expected, rtol=0, atol=1e-12)


def test_full_window_with_bias_is_full_attention_with_bias():
    layer = attlas.make_attend("neighborhood", 2, 4, window=7, relative_bias=True).double()
    with torch.no_grad():
        layer.relative_bias.normal_()
    q, k, v = tensors(7)
    offset = torch.arange(7) - torch.arange(7).unsqueeze(1) + 6
    expected = attlas.attend(q, k, v, mask=attlas.Mask.biased(layer.relative_bias[:, offset]))
    torch.testing.assert_close(layer(q, k, v), expected, rtol=0, atol=1e-12)


def test_the_state_is_as_long_as_the_window():
    layer = attlas.mixer("neighborhood", 16, 2, causal=True, window=4, dilation=3).double()
    x = torch.randn(1, 40, 16, dtype=torch.float64)
    state, sizes, parts = layer.initial_state(1), set(), []
    with torch.no_grad():
        for piece in x.split(5, 1):
            y, state = layer.extend(piece, state)
            sizes.add(attlas.state_bytes(state))
            parts.append(y)
        whole = layer(x)
    assert len(sizes) == 1
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tokens", [1, 3, 11, 12])
def test_fewer_tokens_than_a_causal_window_make_a_pass_that_equals_the_stream(tokens):
    layer = attlas.mixer("neighborhood", 16, 2, causal=True, window=4, dilation=3).double()
    x = torch.randn(2, tokens, 16, dtype=torch.float64)
    streamed, _ = layer.extend(x, layer.initial_state(2))
    torch.testing.assert_close(layer(x), streamed, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"window": 9, "grid": (14, 8)}, "window 9 .* axis has 8; take a window of at most 8"),
        ({"window": 3, "dilation": 4, "grid": (9,)}, "spans 12 positions, the axis has 9"),
        ({"window": 3, "stride": 4}, "stride 4 is more than window 3"),
        ({"window": 0}, "at least 1"),
        ({"window": (3, 3), "grid": (9,)}, "window .* is for 2 axes, the grid has 1"),
        ({"window": 4, "relative_bias": True}, "odd windows"),
        ({"window": 3, "causal": True, "causal_axes": (True, False)}, "every axis causal"),
    ],
)
def test_what_has_no_meaning_is_refused_at_construction(settings, words):
    with pytest.raises(BadInput, match=words):
        attlas.mixer("neighborhood", 16, 2, **settings)


def test_what_has_no_meaning_is_refused_at_the_call():
    q, k, v = tensors(6)
    with pytest.raises(BadInput, match="window 7 with dilation 1 spans 7"):
        attlas.attend(q, k, v, "neighborhood")
    layer = attlas.make_attend("neighborhood", 2, 4, window=3, relative_bias=True)
    with pytest.raises(BadInput, match="built for 1 axes"):
        layer(*tensors(12), grid=(3, 4))
    with pytest.raises(BadInput, match="every token is a query"):
        layer(q[:, :, -3:], *tensors(12)[1:], grid=attlas.Grid((2,), prefix=1))
    with pytest.raises(BadInput, match="does not stream"):
        attlas.mixer("neighborhood", 16, 2, window=4, stride=2, causal=True).initial_state(1)
    with pytest.raises(BadInput, match="streams run along one axis"):
        attlas.mixer("neighborhood", 16, 2, window=3, grid=(4, 4), causal=True).initial_state(1)
