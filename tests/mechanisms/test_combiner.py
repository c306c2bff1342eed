"""What the four Combiners hold: their matrices, what makes them exact, which regions they ask, and what that costs."""

from itertools import pairwise

import pytest
import torch

import attlas
from attlas import Grid
from attlas.core.errors import BadInput
from attlas.ops.combiner import combined_weights, pool, regions_before, regions_behind, summarise

ALL = ("combiner_fixed", "combiner_logsparse", "combiner_axial", "combiner_mixture")
BOTH_WAYS = ("combiner_fixed", "combiner_axial", "combiner_mixture")


def build(name, heads=1, size=4, causal=True, **settings):
    torch.manual_seed(0)
    length = None if name == "combiner_logsparse" or settings else 16
    return attlas.make_attend(name, heads, size, causal=causal, length=length, **settings).double()


def tensors(tokens, heads=1, size=4, batch=1):
    return [torch.randn(batch, heads, tokens, size, dtype=torch.float64) for _ in "qkv"]


def matrix(layer, tokens, **call):
    """The weights (N, N) of one head: what the layer makes of the unit vectors as values."""
    q, k, _ = tensors(tokens)
    x = torch.randn(1, tokens, 4, dtype=torch.float64)
    unit = torch.eye(tokens, dtype=torch.float64).view(1, 1, tokens, tokens)
    if layer.spec.name != "combiner_axial":
        return layer(q, k, unit, tokens=x, **call)[0, 0].detach()
    # Its keys are made of values too: without W_s they are not, and the output is linear in the values.
    torch.nn.init.zeros_(layer.summary_proj.weight)
    v = torch.randn(1, 1, tokens, 4, dtype=torch.float64)
    weights = torch.autograd.functional.jacobian(lambda v: layer(q, k, v, tokens=x, **call)[0, 0, :, 0], v)
    return weights[:, 0, 0, :, 0]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("tokens", [16, 13])
def test_rows_of_the_matrix_are_positive_on_the_causal_triangle_and_sum_to_one(name, tokens):
    weights = matrix(build(name), tokens)
    assert torch.equal(weights > 0, torch.ones(tokens, tokens).tril().bool())
    assert not weights.triu(1).any()
    torch.testing.assert_close(weights.sum(1), torch.ones(tokens).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", BOTH_WAYS)
@pytest.mark.parametrize("tokens", [16, 13])
def test_rows_of_the_matrix_that_is_not_causal_sum_to_one(name, tokens):
    weights = matrix(build(name, causal=False), tokens)
    seen = torch.ones(tokens, tokens, dtype=torch.bool)
    if name == "combiner_axial" and tokens == 13:  # the last row, of one token, is read through its first column
        seen[:12] = torch.arange(12).unsqueeze(1) % 4 == 0
        seen[:12, :12] = True
    assert torch.equal(weights > 0, seen)
    torch.testing.assert_close(weights.sum(1), torch.ones(tokens).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("tokens", [11, 16])
def test_no_token_changes_an_output_before_it(name, tokens):
    layer = build(name, heads=2)
    q, k, v = tensors(tokens, heads=2)
    x = torch.randn(1, tokens, 8, dtype=torch.float64)
    first = layer(q, k, v, tokens=x)
    for t in range(tokens):
        changed = [y.clone() for y in (q, k, v)]
        for y in changed:
            y[:, :, t:] += torch.randn_like(y[:, :, t:])
        other = x.clone()
        other[:, t:] += 1
        second = layer(*changed, tokens=other)
        assert torch.equal(first[:, :, :t], second[:, :, :t])
        assert not torch.allclose(first[:, :, t], second[:, :, t])


def test_the_fixed_matrix_by_hand():
    """Sixteen tokens in segments of four, from the definition."""
    layer = build("combiner_fixed", segment=4)
    q, k, v = tensors(16)
    weights = torch.zeros(16, 16, dtype=torch.float64)
    query, key = q[0, 0], k[0, 0]
    for i in range(16):
        own = range(i // 4 * 4, i + 1)
        earlier = [range(4 * r, 4 * r + 4) for r in range(i // 4)]
        logits = [query[i] @ key[j] / 2 for j in own]
        logits += [query[i] @ key[list(r)].amax(0) / 2 for r in earlier]
        outer = torch.stack(logits).softmax(0)
        weights[i, list(own)] = outer[: len(own)]
        for r, share in zip(earlier, outer[len(own) :], strict=True):
            inner = (key[list(r)] @ query[list(r)].amax(0) / 2).softmax(0)
            weights[i, list(r)] = share * inner
    torch.testing.assert_close(layer(q, k, v)[0, 0], weights @ v[0, 0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", BOTH_WAYS)
def test_one_segment_is_softmax_attention(name, causal):
    q, k, v = tensors(9, heads=2)
    layer = build(name, heads=2, causal=causal, segment=9)
    got = layer(q, k, v, tokens=torch.randn(1, 9, 8, dtype=torch.float64))
    torch.testing.assert_close(got, attlas.attend(q, k, v, causal=causal), rtol=0, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["max", "mean", "sum"])
def test_segments_of_one_token_are_softmax_attention(kind, causal):
    q, k, v = tensors(9)
    got = build("combiner_fixed", causal=causal, segment=1, pool=kind)(q, k, v)
    torch.testing.assert_close(got, attlas.attend(q, k, v, causal=causal), rtol=0, atol=1e-12)
    mixture = build("combiner_mixture", causal=causal, segment=1)(q, k, v)
    torch.testing.assert_close(mixture, attlas.attend(q, k, v, causal=causal), rtol=0, atol=1e-12)


def test_a_region_of_equal_keys_weighs_as_much_as_one_of_them():
    """With one logit for a segment, however many tokens it holds: softmax attention would give it four times that."""
    layer = build("combiner_fixed", segment=4)
    k = torch.ones(1, 1, 8, 4, dtype=torch.float64)
    unit = torch.eye(8, dtype=torch.float64).view(1, 1, 8, 8)
    last = layer(torch.randn_like(k), k, unit)[0, 0, 7]
    torch.testing.assert_close(last[:4], torch.full((4,), 1 / 20).double())
    torch.testing.assert_close(last[4:], torch.full((4,), 1 / 5).double())


def test_the_blocks_of_logsparse_are_the_digits_of_the_position():
    """Position 13 = 1101₂ asks 0...7, 8...11 and 12, each with one logit."""
    layer = build("combiner_logsparse")
    k = torch.ones(1, 1, 16, 4, dtype=torch.float64)
    unit = torch.eye(16, dtype=torch.float64).view(1, 1, 16, 16)
    rows = layer(torch.randn_like(k), k, unit)[0, 0]
    expected = torch.tensor([1 / 8] * 8 + [1 / 4] * 4 + [1, 1] + [0, 0]).double() / 4
    torch.testing.assert_close(rows[13], expected)
    torch.testing.assert_close(rows[8], torch.tensor([1 / 8] * 8 + [1] + [0] * 7).double() / 2)


def test_a_row_of_the_logsparse_matrix_by_hand():
    """Position 6 = 110₂ asks 0...3 through their largest query and key, then 4 and 5, then itself."""
    q, k, v = tensors(8)
    query, key = q[0, 0], k[0, 0]
    keys = torch.stack([key[:4].amax(0), key[4:6].amax(0), key[6]])
    inner = [(key[block] @ query[block].amax(0) / 2).softmax(0) for block in (slice(0, 4), slice(4, 6))]
    values = torch.stack([inner[0] @ v[0, 0, :4], inner[1] @ v[0, 0, 4:6], v[0, 0, 6]])
    expected = (keys @ query[6] / 2).softmax(0) @ values
    torch.testing.assert_close(build("combiner_logsparse")(q, k, v)[0, 0, 6], expected, rtol=0, atol=1e-12)


def test_what_the_mixture_asks_by_hand():
    """Of nine tokens in rows of three, the one in the middle: 0 and 2 are in two regions of one token each."""
    layer = build("combiner_mixture", segment=3)
    k = torch.ones(1, 1, 9, 4, dtype=torch.float64)
    unit = torch.eye(9, dtype=torch.float64).view(1, 1, 9, 9)
    rows = layer(torch.randn_like(k), k, unit)[0, 0]
    # Direct 1, 3 and 4; columns above {0}, {2}; left {0}, right {2}.
    torch.testing.assert_close(rows[4], torch.tensor([2, 1, 2, 1, 1, 0, 0, 0, 0]).double() / 7)
    # Direct 0, 3, 6; columns above {1, 4}, {2, 5}; right {1, 2}, {4, 5}.
    torch.testing.assert_close(rows[6], torch.tensor([1, 1, 1, 1, 1, 1, 1, 0, 0]).double() / 7)


def test_a_row_is_read_through_the_token_of_the_own_column():
    layer = build("combiner_axial", segment=4)
    q, k, v = tensors(8)
    x = torch.randn(1, 8, 4, dtype=torch.float64)
    found = (q[0, 0, 1] @ k[0, 0, :4].T / 2).softmax(0) @ v[0, 0, :4]
    key = layer.key_proj(layer.norm(layer.summary_proj(found) + x[0, 1]))
    keys, values = torch.stack([k[0, 0, 4], k[0, 0, 5], key]), torch.stack([v[0, 0, 4], v[0, 0, 5], found])
    expected = (keys @ q[0, 0, 5] / 2).softmax(0) @ values
    torch.testing.assert_close(layer(q, k, v, tokens=x)[0, 0, 5], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tokens", [1, 2, 3, 9, 12, 14, 17])
@pytest.mark.parametrize("causal", [False, True])
def test_the_mixture_counts_slots_and_members(tokens, causal):
    """The formula against the lists of the definition."""
    width, slots, made = 4, 0, {}
    width = min(width, tokens)
    places = [divmod(n, width) for n in range(tokens)]
    for n, (s, u) in enumerate(places):
        reach = places[: n + 1] if causal else places
        slots += sum(t == s or w == u for t, w in reach)
        for t, w in reach:
            if t != s and w != u:
                made.setdefault(("above" if t < s else "below", s, w), set()).add((t, w))
                made.setdefault(("left" if w < u else "right", t, u), set()).add((t, w))
        slots += len({(t < s, w) for t, w in reach if t != s and w != u})
        slots += len({(t, w < u) for t, w in reach if t != s and w != u})
    layer = build("combiner_mixture", causal=causal, segment=4)
    assert layer.cost(1, tokens).flops == 4 * 4 * (slots + sum(map(len, made.values())))


@pytest.mark.parametrize("tokens", [1, 2, 3, 9, 12, 14, 17])
@pytest.mark.parametrize("causal", [False, True])
def test_segments_and_rows_count_slots_and_members(tokens, causal):
    width = min(4, tokens)
    segments = [range(start, min(start + width, tokens)) for start in range(0, tokens, width)]
    fixed = axial = 0
    asked, read = set(), set()
    for n in range(tokens):
        own = n // width
        direct = sum(j <= n or not causal for j in segments[own])
        others = [r for r in range(len(segments)) if r < own or (r != own and not causal)]
        through = [(r, n % width) for r in others if n % width < len(segments[r])]
        fixed += direct + len(others)
        axial += direct + len(through)
        asked.update(others)
        read.update(through)
    fixed += sum(len(segments[r]) for r in asked)
    axial += sum(len(segments[r]) for r, _ in read)
    assert build("combiner_fixed", causal=causal, segment=4).cost(1, tokens).flops == 4 * 4 * fixed
    maps = 2 * 2 * 4 * 4 * len(read)
    assert build("combiner_axial", causal=causal, segment=4).cost(1, tokens).flops == 4 * 4 * axial + maps


@pytest.mark.parametrize("tokens", [1, 2, 3, 9, 12, 14, 17])
def test_logsparse_counts_digits_and_blocks(tokens):
    """Its own value, which is no matrix product, is not among them."""
    slots = sum(n.bit_count() for n in range(tokens))
    blocks = {(n >> level, level) for n in range(tokens) for level in range(5) if n >> level & 1}
    made = sum(2**level for _, level in blocks)
    assert build("combiner_logsparse").cost(1, tokens).flops == 4 * (2 * tokens + 4 * slots + 4 * made)


@pytest.mark.parametrize(
    ("name", "times"),
    [("combiner_fixed", 31), ("combiner_logsparse", 163), ("combiner_axial", 16), ("combiner_mixture", 7)],
)
def test_at_4096_tokens_few_of_the_products_are_left(name, times):
    """Ten times fewer is published; the mixture, which asks five groups of slots, stays above a tenth."""
    cost = attlas.make_attend(name, 8, 64, causal=True, length=4096).cost(1, 4096)
    full = attlas.make_attend("softmax", 8, 64, causal=True).cost(1, 4096)
    assert cost.pairs == full.pairs
    maps = 4 * 63 * 64 * 512**2 if name == "combiner_axial" else 0  # W_s and W_k of the rows that are read
    assert full.flops // (cost.flops - maps) == times


def test_products_grow_with_the_power_of_three_halves():
    costs = [attlas.make_attend("combiner_fixed", 1, 64, causal=True, length=n).cost(1, n).flops for n in (4**7, 4**8)]
    assert costs[1] / costs[0] == pytest.approx(8, rel=0.02)


@pytest.mark.parametrize("name", ALL)
def test_a_long_stream_of_odd_pieces_equals_the_whole(name):
    torch.manual_seed(1)
    layer = attlas.mixer(name, 8, 2, causal=True, length=37).double()
    x = torch.randn(2, 37, 8, dtype=torch.float64)
    keep = torch.rand(2, 37) > 0.2
    cuts = [0, 1, 2, 9, 9, 22, 23, 37]
    with torch.no_grad():
        for mask in (None, keep):
            state, parts = layer.initial_state(2), []
            for start, stop in pairwise(cuts):
                part = None if mask is None else mask[:, start:stop]
                y, state = layer.extend(x[:, start:stop], state, keep=part)
                parts.append(y)
            real = torch.ones_like(keep) if mask is None else keep
            whole = layer(x, mask=mask)
            torch.testing.assert_close(torch.cat(parts, 1)[real], whole[real], rtol=0, atol=1e-12)


SETTINGS = [(name, {}) for name in ALL] + [("combiner_fixed", {"pool": kind}) for kind in ("mean", "sum")]


@pytest.mark.parametrize(("name", "settings"), SETTINGS, ids=str)
def test_scores_that_float16_cannot_hold(name, settings):
    torch.manual_seed(0)
    layer = attlas.make_attend(name, 2, 8, causal=True, length=16, **settings).half()
    q, k, v = (torch.randn(1, 2, 16, 8).half() for _ in "qkv")
    q, k, x = q * 1000, k * 1000, torch.randn(1, 16, 16).half()
    got = layer(q, k, v, tokens=x)
    assert got.dtype == torch.float16
    state, parts = layer.initial_state(1, q), []
    for *part, tokens in zip(q.split(3, 2), k.split(3, 2), v.split(3, 2), x.split(3, 1), strict=True):
        o, state = layer.advance(*part, state, None, tokens)
        parts.append(o)
    expected = layer.double()(q.double(), k.double(), v.double(), tokens=x.double())
    for o in (got, torch.cat(parts, 2)):
        torch.testing.assert_close(o.double(), expected, rtol=0, atol=5e-3)


@pytest.mark.parametrize(("name", "settings"), SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_stream_in_half_precision_keeps_its_summaries_in_float32(name, settings, dtype):
    """Nothing but the order of sums differs from the full pass, and hardly an output is rounded otherwise."""
    torch.manual_seed(0)
    layer = attlas.make_attend(name, 2, 8, causal=True, length=37, **settings).to(dtype)
    q, k, v = (torch.randn(2, 2, 37, 8).to(dtype) for _ in "qkv")
    x, keep, state, parts = torch.randn(2, 37, 16).to(dtype), torch.rand(2, 37) > 0.2, layer.initial_state(2, q), []
    for start, stop in pairwise([0, 1, 2, 9, 22, 23, 37]):
        new = slice(start, stop)
        o, state = layer.advance(q[:, :, new], k[:, :, new], v[:, :, new], state, keep[:, new], x[:, new])
        assert o.dtype == dtype
        parts.append(o)
    whole = layer(q, k, v, mask=attlas.Mask.padding(keep), tokens=x)
    rows = keep.unsqueeze(1).expand(-1, 2, -1)
    assert (torch.cat(parts, 2) != whole)[rows].double().mean() < 0.02


@pytest.mark.parametrize("name", ALL)
def test_at_ties_parameters_get_the_gradients_of_the_oracle(name):
    """Of equal tokens: which of them the gradient of a maximum goes to is open, what it tells of them together not."""
    layer = attlas.mixer(name, 8, 2, causal=True, length=9).double()
    token = torch.randn(1, 3, 8, dtype=torch.float64, requires_grad=True)
    wanted, found = [token, *layer.parameters()], []
    for backend in ("auto", "oracle"):
        layer.attend.backend = backend
        found.append(torch.autograd.grad(layer(token.repeat(1, 3, 1)).square().sum(), wanted))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def test_the_state_of_fixed_segments_is_their_summaries():
    layer = attlas.mixer("combiner_fixed", 8, 2, causal=True, segment=4)
    state = layer.initial_state(1)
    with torch.no_grad():
        for _ in range(41):
            _, state = layer.extend(torch.randn(1, 1, 8), state)
    assert state.attend.finished.k.rows.shape[2] == 10
    assert state.attend.open.k.rows.shape[2] == 1


def test_a_grid_has_its_own_rows():
    q, k, v = tensors(12)
    x = torch.randn(1, 12, 4, dtype=torch.float64)
    for name in ("combiner_axial", "combiner_mixture"):
        rows = build(name, segment=4)
        plane = build(name, grid=(3, 4))
        assert torch.equal(rows(q, k, v, tokens=x), plane(q, k, v, grid=(3, 4), tokens=x))
        assert not torch.equal(rows(q, k, v, tokens=x), plane(q, k, v, grid=(4, 3), tokens=x))


def test_running_regions_are_pooled_over_what_comes_before_and_behind():
    q, k, v = (t[0, 0] for t in tensors(6))
    real = torch.tensor([True, False, True, True, False, True])
    for regions, members in (
        (regions_before(q, k, v, real, 0.5), lambda n: slice(0, n)),
        (regions_behind(q, k, v, real, 0.5), lambda n: slice(n + 1, 6)),
    ):
        for n in range(6):
            inside = [x[members(n)][real[members(n)]] for x in (q, k, v)]
            assert regions.live[n] == bool(len(inside[0]))
            if len(inside[0]):
                expected = summarise(*inside, torch.ones(len(inside[0]), dtype=torch.bool), 0.5)
                torch.testing.assert_close(regions.keys[n], expected.keys)
                torch.testing.assert_close(regions.values[n], expected.values)
            else:
                assert not regions.keys[n].any()
                assert not regions.values[n].any()


@pytest.mark.parametrize("kind", ["max", "mean", "sum"])
def test_pools_leave_padding_out(kind):
    x = torch.tensor([[-3.0, 5], [torch.nan, torch.nan], [-1, -2]])
    expected = {"max": [-1.0, 5], "mean": [-2, 1.5], "sum": [-4, 3]}[kind]
    assert pool(x, torch.tensor([True, False, True]), kind).tolist() == expected
    assert pool(x, torch.zeros(3, dtype=torch.bool), kind).tolist() == [0, 0]


def test_the_written_out_matrix_is_softmax_where_there_are_no_regions():
    q, k, _ = tensors(5, heads=2)
    got = combined_weights(q, k, None, lambda n: (range(5), []), 0.5)
    torch.testing.assert_close(got, (q @ k.mT / 2).softmax(-1))


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("combiner_fixed", {}, "pass length=, or segment="),
        ("combiner_fixed", {"segment": 0}, "at least 1, got 0"),
        ("combiner_fixed", {"segment": 2.5}, "a whole number of at least 1, got 2.5"),
        ("combiner_axial", {"segment": 2.5}, "a whole number of at least 1, got 2.5"),
        ("combiner_fixed", {"segment": 4, "pool": "last"}, "'max', 'mean', 'sum', got 'last'"),
        ("combiner_fixed", {"segment": 4, "activation": "gelu"}, "'deepset', got 'gelu'"),
        ("combiner_axial", {"grid": (3, 4), "segment": 4}, "rows are those of the grid 3x4: leave segment=4 out"),
        ("combiner_axial", {"grid": (2, 3, 4)}, "a grid of two axes, or cut from one axis, got the grid 2x3x4"),
        ("combiner_mixture", {"grid": (2, 3, 4), "segment": 4}, "a grid of two axes, or cut from one axis"),
        ("combiner_mixture", {}, "pass length=, or segment="),
    ],
)
def test_what_has_no_meaning_is_refused_at_construction(name, settings, words):
    with pytest.raises(BadInput, match=words):
        attlas.mixer(name, 16, 2, **settings)


@pytest.mark.parametrize("name", ALL)
def test_every_token_is_a_query(name):
    q, k, v = tensors(16)
    with pytest.raises(BadInput, match="every token is a query: got 3 queries for 16 keys"):
        build(name)(q[:, :, -3:], k, v, grid=Grid((3,)), tokens=torch.randn(1, 3, 4))


def test_summaries_of_rows_need_the_tokens():
    with pytest.raises(BadInput, match="pass tokens="):
        build("combiner_axial")(*tensors(16))
