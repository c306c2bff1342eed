"""The C++ kernel of attention over some of the pairs against the oracles, and as torch operators."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library
from torch.utils.flop_counter import FlopCounterMode

import attlas
from attlas.core.axis import Axis, Block
from attlas.core.errors import BackendUnavailable, BadInput
from attlas.kernels.cpu import tile_plan, tiles
from attlas.ops.block_sparse import block_sparse_attention
from attlas.ops.neighborhood import neighborhood_attention
from tests.kernels.test_attention_kernel import relative_rms, tensors

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 8e-3}


def compare(op, arrays, *args, bias=None, **options):
    """The kernel's output and gradients against the oracle's in float64."""
    dtype = arrays[0].dtype
    given_ = [*arrays, *([] if bias is None else [bias])]
    exact = [x.detach().double().requires_grad_() for x in given_]
    extra, exact_extra = ({}, {}) if bias is None else ({"bias": given_[3]}, {"bias": exact[3]})
    got = op(*given_[:3], *args, backend="cpu", **extra, **options)
    expected = op(*exact[:3], *args, backend="oracle", **exact_extra, **options)
    assert got.dtype == dtype
    assert relative_rms(got.detach(), expected.detach()) < TOLERANCE[dtype]
    seed = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    grads = torch.autograd.grad(got, given_, seed)
    for what, a, b in zip(
        ["q", "k", "v", "bias"], grads, torch.autograd.grad(expected, exact, seed.double()), strict=False
    ):
        assert a.dtype == dtype
        assert relative_rms(a, b) < 2 * TOLERANCE[dtype], what


def drop(batch, keys):
    return torch.rand(batch, keys, generator=torch.Generator().manual_seed(2)) > 0.3


@st.composite
def axes(draw, most):
    window = draw(st.integers(1, 6))
    if draw(st.booleans()):
        length = draw(st.integers(window, max(window, most)))
        return Block(length, window, shift=draw(st.integers(0, window - 1)), halo=draw(st.integers(0, 3)))
    dilation = draw(st.integers(1, 3))
    length = draw(st.integers(window * dilation, max(window * dilation, most)))
    return Axis(length, window, dilation, stride=draw(st.integers(1, window)), causal=draw(st.booleans()))


@st.composite
def grids(draw):
    rank = draw(st.integers(1, 3))
    return tuple(draw(axes((150, 18, 7)[rank - 1])) for _ in range(rank))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    axes=grids(),
    batch=st.integers(1, 2),
    groups=st.integers(1, 2),
    shared=st.integers(1, 2),
    sizes=st.sampled_from([(1, 5), (16, 16), (33, 20), (64, 47)]),
    prefix=st.integers(0, 3),
    context=st.integers(0, 2),
    padded=st.booleans(),
    biased=st.booleans(),
)
def test_grids(dtype, axes, batch, groups, shared, sizes, prefix, context, padded, biased):
    tokens = prefix + math.prod(axis.length for axis in axes)
    heads = groups * shared
    arrays = tensors(batch, heads, groups, tokens, context + tokens, *sizes, dtype)
    bias = None
    if biased:
        shape = [2 * axis.reach + 1 for axis in axes]
        bias = torch.randn(heads, *shape, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()
    keep = drop(batch, context + tokens) if padded else None
    compare(neighborhood_attention, arrays, axes, bias=bias, prefix=prefix, context=context, keep=keep, scale=0.3)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("queries", "window"), [(1, 5), (40, 5), (77, 64)])
def test_the_last_queries_of_a_sequence(dtype, queries, window):
    arrays = tensors(2, 4, 2, queries, 200, 16, 24, dtype)
    for axis in (Axis(200, window, causal=True), Axis(200, window, dilation=2), Block(200, window, shift=3)):
        compare(neighborhood_attention, arrays, (axis,), keep=drop(2, 200))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.sampled_from([1, 2, 7, 16, 49, 64, 100]),
    columns=st.sampled_from([1, 7, 16, 64, 100]),
    queries=st.integers(1, 160),
    keys=st.integers(1, 230),
    batch=st.integers(1, 2),
    groups=st.integers(1, 2),
    shared=st.integers(1, 2),
    per_batch=st.booleans(),
    per_head=st.booleans(),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    causal=st.booleans(),
    padded=st.booleans(),
)
def test_blocks(
    dtype, rows, columns, queries, keys, batch, groups, shared, per_batch, per_head, density, causal, padded
):
    arrays = tensors(batch, groups * shared, groups, queries, keys, 20, 17, dtype)
    shape = (batch if per_batch else 1, groups * shared if per_head else 1, -(-queries // rows), -(-keys // columns))
    chosen = torch.rand(shape, generator=torch.Generator().manual_seed(4)) < density
    keep = drop(batch, keys) if padded else None
    compare(block_sparse_attention, arrays, chosen, rows=rows, columns=columns, causal=causal, keep=keep)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_more_queries_than_are_sorted_together(backend):
    queries = tile_plan.RANGE + 300
    q, k, v = (x.detach() for x in tensors(1, 1, 1, queries, 40, 8, 8, torch.float32))
    chosen = torch.rand(1, 1, queries, 4, generator=torch.Generator().manual_seed(4)) < 0.4
    for causal in (False, True):
        options = {"rows": 1, "columns": 10, "causal": causal}
        got = block_sparse_attention(q, k, v, chosen, **options, backend=backend)
        assert relative_rms(got, block_sparse_attention(q, k, v, chosen, **options, backend="oracle")) < 3e-6


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_any_number_of_threads(threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    grid = (Axis(20, 5), Axis(30, 7))
    for heads, groups in ((1, 1), (6, 3)):
        arrays = tensors(1, heads, groups, 600, 600, 32, 32, torch.float32)
        bias = torch.randn(heads, 9, 13, generator=torch.Generator().manual_seed(3)).requires_grad_()
        compare(neighborhood_attention, arrays, grid, bias=bias)
        chosen = torch.rand(1, heads, 600, 10, generator=torch.Generator().manual_seed(4)) < 0.3
        compare(block_sparse_attention, arrays, chosen, rows=1, columns=60)


def test_gradients_do_not_depend_on_the_order_of_threads():
    arrays = tensors(1, 3, 1, 900, 900, 16, 16, torch.float32)
    grid = (Axis(30, 7), Axis(30, 7))

    def run():
        o = neighborhood_attention(*arrays, grid, backend="cpu")
        return torch.autograd.grad(o, arrays, torch.ones_like(o))

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_strides_of_the_shell():
    grid = (Axis(5, 3), Axis(10, 3))
    q, k, v = (x.detach() for x in tensors(2, 3, 3, 50, 50, 16, 16, torch.float32))
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    flipped = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
    expected = neighborhood_attention(q, k, v, grid, backend="cpu")
    got = neighborhood_attention(*strided, grid, backend="cpu")
    assert torch.equal(got, expected)
    assert got.transpose(1, 2).is_contiguous()  # merging the heads needs no copy
    assert torch.equal(neighborhood_attention(*flipped, grid, backend="cpu"), expected)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("rows", [1, 20])
def test_what_is_hidden_may_be_anything(dtype, bad, rows):
    q, k, v = (x.detach() for x in tensors(2, 2, 1, 100, 100, 16, 24, dtype))
    keep = drop(2, 100)
    keep[:, 80] = True
    chosen = torch.ones(1, 1, 100 // rows, 10, dtype=torch.bool)
    chosen[:, :, : 40 // rows, 8] = False
    kinds = [
        (neighborhood_attention, ((Axis(100, 21, causal=True),),), {}, 80),
        (block_sparse_attention, (chosen,), {"rows": rows, "columns": 10}, 40),
        (block_sparse_attention, (chosen,), {"rows": rows, "columns": 10, "causal": True}, 80),
    ]
    for op, args, options, blind in kinds:
        expected = op(q, k, v, *args, keep=keep, backend="cpu", **options)
        bad_k, bad_v = (x.masked_fill(~keep[:, None, :, None], bad) for x in (k, v))  # padding
        bad_k[:, :, 80], bad_v[:, :, 80, 3] = bad, bad
        arrays = [x.clone().requires_grad_() for x in (q, bad_k, bad_v)]
        got = op(*arrays, *args, keep=keep, backend="cpu", **options)
        assert torch.equal(got[:, :, :blind], expected[:, :, :blind])
        assert not got[:, :, blind:].isfinite().all()
        (dq,) = torch.autograd.grad(got[:, :, :blind].sum(), arrays[:1])
        assert dq[:, :, :blind].isfinite().all()


@pytest.mark.parametrize("rows", [1, 10])
def test_a_query_that_sees_nothing(rows):
    arrays = tensors(2, 2, 2, 30, 20, 8, 8, torch.float32)  # the first ten of causal queries come before every key
    keep = torch.ones(2, 20, dtype=torch.bool)
    keep[0] = False
    chosen = torch.ones(1, 1, 30 // rows, 4, dtype=torch.bool)
    chosen[:, :, -10 // rows :] = False
    o = block_sparse_attention(*arrays, chosen, rows=rows, columns=5, causal=True, keep=keep, backend="cpu")
    assert not o[0].any()
    assert not o[1, :, :10].any()
    assert not o[1, :, 20:].any()
    assert o[1, :, 10:20].any()
    grads = torch.autograd.grad(o, arrays, torch.ones_like(o))
    assert all(x.isfinite().all() for x in grads)
    assert not any(x[0].any() for x in grads)
    assert all(x[1].any() for x in grads)


@pytest.mark.parametrize("factor", [3e3, 1e6, 1e10, 1e18])
@pytest.mark.parametrize("rows", [1, 35])
def test_large_scores_stay_right(factor, rows):
    arrays = tensors(1, 2, 2, 70, 70, 16, 16, torch.float32)
    chosen = torch.ones(1, 1, 70 // rows, 1, dtype=torch.bool)
    kinds = [
        (neighborhood_attention, ((Axis(70, 9),),), {}),
        (block_sparse_attention, (chosen,), {"rows": rows, "columns": 70}),
    ]
    for op, args, options in kinds:
        found = []
        doubles = [x.detach().double().requires_grad_() for x in arrays]
        for backend, leaves in (("cpu", arrays), ("torch", arrays), ("oracle", doubles)):
            q, k, v = leaves
            o = op(q * factor, k, v, *args, backend=backend, **options)
            found.append((o.detach(), *torch.autograd.grad(o.sum(), (v, k))))
        got, usual, expected = found
        assert all(x.isfinite().all() for x in got)
        for a, b, exact in list(zip(got, usual, expected, strict=True))[:2]:  # scores are rounded in float32 at best
            assert relative_rms(a, exact) < 3e-6 + 2 * relative_rms(b, exact)


def test_large_padding_makes_no_gradient():
    arrays = tensors(2, 2, 2, 40, 40, 16, 16, torch.float32)
    keep = drop(2, 40)
    filled = [x.detach().masked_fill(~keep[:, None, :, None], 1e10).requires_grad_() for x in arrays]
    seed = keep[:, None, :, None].expand(2, 2, 40, 16).float()
    expected, got = (
        torch.autograd.grad(neighborhood_attention(*x, (Axis(40, 7),), keep=keep, backend="cpu"), x, seed)
        for x in (arrays, filled)
    )
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a.where(seed > 0, 0), b.where(seed > 0, 0))


def test_a_query_that_is_nan_reaches_only_what_it_sees():
    arrays = tensors(1, 1, 1, 40, 40, 16, 16, torch.float32)
    spoiled = [arrays[0].detach().clone(), *(x.detach().clone() for x in arrays[1:])]
    spoiled[0][:, :, 20] = torch.nan
    spoiled = [x.requires_grad_() for x in spoiled]
    o = neighborhood_attention(*spoiled, (Axis(40, 5),), backend="cpu")
    for grad in torch.autograd.grad(o.sum(), spoiled[1:]):
        broken = (~grad.isfinite()).any(-1)[0, 0].nonzero().flatten().tolist()
        assert broken == [18, 19, 20, 21, 22]


@pytest.mark.parametrize("queries", [0, 5])
@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("backend", ["cpu", "torch", "oracle"])
def test_nothing_to_attend_to_gives_zeros(queries, batch, rows, backend):
    q, k, v = (x.detach() for x in tensors(batch, 2, 2, queries, 0, 8, 6, torch.float32))
    chosen = torch.ones(batch, 1, -(-queries // rows), 0, dtype=torch.bool)
    o = block_sparse_attention(q, k, v, chosen, rows=rows, columns=4, backend=backend)
    assert o.shape == (batch, 2, queries, 6)
    assert not o.any()


def test_no_sequences_have_no_gradients():
    arrays = tensors(0, 2, 2, 35, 35, 8, 6, torch.float32)
    o = neighborhood_attention(*arrays, (Axis(5, 3), Axis(7, 3)), backend="cpu")
    assert [x.shape for x in torch.autograd.grad(o.sum(), arrays)] == [x.shape for x in arrays]


def test_plans_are_kept_up_to_some_bytes(monkeypatch):
    monkeypatch.setattr(tile_plan, "_kept", {})
    monkeypatch.setattr(tile_plan, "KEPT", 10_000)
    ask = [((Axis(length, 3),), length, 0, 0, False) for length in range(50, 80)]
    plans = [tile_plan.plan_axes(*each) for each in ask]
    assert tile_plan.plan_axes(*ask[-1]) is plans[-1]
    assert tile_plan.plan_axes(*ask[0]) is not plans[0]
    assert sum(plan.nbytes for plan in tile_plan._kept.values()) <= 10_000


def test_compiled_for_one_length_and_another():
    layer = attlas.mixer("neighborhood", 32, 2, causal=True, window=5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for tokens in (40, 41, 57):
        x = torch.randn(1, tokens, 32)
        assert torch.allclose(compiled(x), layer(x), atol=1e-5)


@pytest.mark.parametrize("rows", [1, 64])
def test_the_logarithm_of_the_sum(rows):
    q, k, v = (x.detach() for x in tensors(1, 2, 1, 90, 90, 16, 16, torch.float32))
    chosen = torch.rand(1, 2, -(-90 // rows), 6, generator=torch.Generator().manual_seed(4)) < 0.5
    chosen[:, 0, 0] = False
    _, lse = tiles.block_sparse_attention(q, k, v, chosen, rows=rows, columns=16, causal=False, scale=0.3)
    scores = (q.double() @ k.double().mT) * 0.3
    hidden = ~chosen[:, :, torch.arange(90)[:, None] // rows, torch.arange(90) // 16]
    expected = scores.masked_fill(hidden, -torch.inf).logsumexp(-1)
    assert lse[0, 0, 0] == -torch.inf
    assert torch.allclose(lse.double(), expected, atol=1e-5)


def test_tiles_hold_every_query_once_and_every_visible_pair():
    grid = (Axis(9, 3, stride=2), Block(11, 4, shift=1, halo=1))
    plan = tile_plan.plan_axes(grid, 99, 0, 0, False)
    assert plan.query.sort().values.tolist() == list(range(99))
    assert plan.pairs == math.prod(axis.pairs() for axis in grid)
    assert plan.work >= plan.pairs


def test_flops_are_those_of_the_visible_pairs():
    q, k, v = tensors(2, 4, 2, 60, 60, 8, 12, torch.float32)
    grid = (Axis(6, 3), Axis(10, 5, causal=True))
    with FlopCounterMode(display=False) as counter:
        o = neighborhood_attention(q, k, v, grid, backend="cpu")
        forward = counter.get_total_flops()
        torch.autograd.grad(o.sum(), (q, k, v))
    pairs = 8 * math.prod(axis.pairs() for axis in grid)
    assert forward == 2 * pairs * (8 + 12)
    assert counter.get_total_flops() == forward + 2 * pairs * (3 * 8 + 2 * 12)
    chosen = torch.zeros(1, 4, 6, 4, dtype=torch.bool)
    chosen[0, 0, 5, 3] = chosen[0, 2, 0, 0] = True  # 10 queries with 12 and with 16 keys
    with FlopCounterMode(display=False) as counter:
        block_sparse_attention(q, k, v, chosen, rows=10, columns=16, backend="cpu")
    assert counter.get_total_flops() == 2 * 2 * (10 * 12 + 10 * 16) * (8 + 12)


@pytest.mark.parametrize("rows", [1, 16])
def test_registration(rows):
    q, k, v = tensors(1, 2, 1, 40, 40, 8, 8, torch.float32)
    keep = drop(1, 40)
    chosen = torch.rand(1, 2, -(-40 // rows), 4, generator=torch.Generator().manual_seed(4)) < 0.5
    bias = torch.randn(2, 5, 5).requires_grad_()
    layout = [0, 0, 0, 5, 3, 1, 1, 0, 0, 8, 3, 1, 1, 0]
    library.opcheck(torch.ops.attlas.tiles, (q, k, v, keep, bias, None, layout, False, 0.3))
    library.opcheck(torch.ops.attlas.tiles, (q, k, v, None, None, chosen, [rows, 10], True, 0.3))
    o, lse = torch.ops.attlas.tiles(q, k, v, None, None, chosen, [rows, 10], True, 0.3)
    saved = [x.detach() for x in (q, k, v)], None, None, chosen, o.detach(), lse, torch.randn_like(o)
    arguments = (*saved[0], *saved[1:], [rows, 10], True, 0.3)
    library.opcheck(torch.ops.attlas.tiles_backward, arguments, test_utils=("test_schema", "test_faketensor"))


def test_bad_input_is_refused():
    q, k, v = (x.detach() for x in tensors(1, 2, 1, 40, 40, 8, 8, torch.float32))
    with pytest.raises(BadInput, match="make 41 keys, got 40"):
        neighborhood_attention(q, k, v, (Axis(41, 3),), backend="cpu")
    with pytest.raises(BadInput, match="8 blocks of 5 keys"):
        block_sparse_attention(q, k, v, torch.ones(1, 1, 4, 9, dtype=torch.bool), rows=10, columns=5)
    with pytest.raises(BadInput, match="at least, got rows 0"):
        block_sparse_attention(q, k, v, torch.ones(1, 1, 4, 8, dtype=torch.bool), rows=0, columns=5)
    with pytest.raises(BackendUnavailable, match="not torch"):
        neighborhood_attention(q.double(), k.double(), v.double(), (Axis(40, 3),), backend="cpu")
    with pytest.raises(BadInput, match="larger than the axis"):
        Block(4, 5)
    with pytest.raises(BadInput, match="shift 3 is not less than window 3"):
        Block(9, 3, shift=3)


def test_second_derivatives_are_refused():
    q, k, v = tensors(1, 1, 1, 40, 40, 8, 8, torch.float32)
    o = neighborhood_attention(q, k, v, (Axis(40, 3),), backend="cpu")
    (grad,) = torch.autograd.grad(o.sum(), q, create_graph=True)
    with pytest.raises(BackendUnavailable, match="differentiated once"):
        torch.autograd.grad(grad.sum(), k)
