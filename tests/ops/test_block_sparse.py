"""Attention over chosen blocks on its torch backend, and windows of blocks; the C++ kernel has its own tests."""

import pytest
import torch

from attlas.core.axis import Axis, Block
from attlas.core.errors import BadInput
from attlas.ops import block_sparse
from attlas.ops.block_sparse import block_sparse_attention
from attlas.ops.neighborhood import neighborhood_attention


def tensors(queries, keys):
    g = torch.Generator().manual_seed(0)
    shapes = (2, 4, queries, 6), (2, 2, keys, 6), (2, 2, keys, 5)
    return [torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(23, 23), (9, 23), (23, 9)])
@pytest.mark.parametrize("at_a_time", [4, 100])
def test_pieces_of_queries_equal_the_oracle(causal, queries, keys, at_a_time, monkeypatch):
    monkeypatch.setattr(block_sparse, "ROWS", at_a_time)
    arrays = tensors(queries, keys)
    chosen = torch.rand(2, 4, -(-queries // 3), -(-keys // 4), generator=torch.Generator().manual_seed(1)) < 0.5
    keep = torch.rand(2, keys, generator=torch.Generator().manual_seed(2)) < 0.7
    options = {"rows": 3, "columns": 4, "causal": causal, "keep": keep}
    got, expected = (block_sparse_attention(*arrays, chosen, **options, backend=b) for b in ("torch", "oracle"))
    assert torch.allclose(got, expected, atol=1e-12)
    seed = torch.randn_like(got)
    for a, b in zip(*(torch.autograd.grad(o, arrays, seed) for o in (got, expected)), strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_all_blocks_are_softmax_attention():
    q, k, v = tensors(10, 10)
    everything = torch.ones(1, 1, 5, 4, dtype=torch.bool)
    got = block_sparse_attention(q, k, v, everything, rows=2, columns=3, backend="torch")
    scores = q @ k.repeat_interleave(2, 1).mT * 6**-0.5
    assert torch.allclose(got, scores.softmax(-1) @ v.repeat_interleave(2, 1), atol=1e-12)


def rolled(q, k, v, window, shift):
    """Swin's way: roll the axis, cut it, mask what came from the other side, roll back."""
    length = q.shape[2]
    q, k, v = (
        x.roll(-shift, 2).unflatten(2, (-1, window)) for x in (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))
    )
    side = (torch.arange(length).roll(-shift) < shift).view(-1, window)
    apart = side.unsqueeze(1) != side.unsqueeze(2)
    weights = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(apart, -torch.inf).softmax(-1)
    return (weights @ v).flatten(2, 3).roll(shift, 2)


@pytest.mark.parametrize("shift", [0, 1, 2])
def test_a_shift_is_a_roll_and_its_mask(shift):
    arrays = tensors(12, 12)
    got = neighborhood_attention(*arrays, (Block(12, 3, shift),), backend="torch")
    assert torch.allclose(got, rolled(*arrays, 3, shift), atol=1e-12)


SHORT = [Axis(3, 5, causal=True), Axis(7, 3, 3, causal=True), Axis(4, 6, 5, 2, causal=True)]


@pytest.mark.parametrize(
    "axis", [Block(13, 4), Block(13, 4, 3), Block(13, 4, 1, 2), Block(4, 4), Block(5, 1), Axis(13, 4, 3), *SHORT]
)
def test_the_ways_to_ask_an_axis_agree(axis):
    places = torch.arange(axis.length)
    seen = axis.sees(places[:, None], places)
    assert axis.pairs() == seen.sum()
    windows = axis.windows(axis.length)
    spread = torch.zeros_like(seen)
    spread[places[:, None].expand_as(windows.key)[windows.seen], windows.key[windows.seen]] = True
    assert torch.equal(spread, seen)
    assert axis.full == bool(windows.seen.all())
    low, high = axis.bounds()
    within = (places >= low[:, None]) & (places <= high[:, None])
    assert torch.equal(within & ((places - places[:, None]) % axis.dilation == 0), seen)
    assert sorted(place for line in axis.lines() for place in line) == places.tolist()
    offset = windows.key - places[:, None]
    assert torch.equal(windows.entry[windows.seen], (offset // axis.dilation + axis.reach)[windows.seen])


@pytest.mark.parametrize("axis", SHORT)
@pytest.mark.parametrize("backend", ["oracle", "torch", "cpu"])
def test_a_causal_axis_may_be_shorter_than_its_window(axis, backend):
    torch.manual_seed(0)
    plane = (axis, Axis(5, 3))
    q, k, v = (torch.randn(2, 2, 5 * axis.length, 8) for _ in "qkv")
    got = neighborhood_attention(q, k, v, plane, bias=torch.zeros(2, 2 * axis.reach + 1, 5), backend=backend)
    row, column = torch.arange(axis.length), torch.arange(5)
    together = (row[:, None] >= row) & ((row[:, None] - row) % axis.dilation == 0)
    near = torch.kron(together, plane[1].sees(column[:, None], column))
    expected = (q @ k.mT * 8**-0.5).masked_fill(~near, -torch.inf).softmax(-1) @ v
    assert torch.allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("axis", "cures"),
    [
        ((16, 17), "a window of at most 16"),
        ((16, 3, 20), "a dilation of at most 5"),
        ((16, 4, 5), "a window of at most 3 or a dilation of at most 4"),
        ((16, 17, 17), "less of both"),
    ],
)
def test_an_axis_that_is_too_short_says_what_would_fit(axis, cures):
    with pytest.raises(BadInput, match=f"the axis has 16; take {cures}$"):
        Axis(*axis)


@pytest.mark.parametrize("backend", ["oracle", "torch", "cpu"])
@pytest.mark.parametrize("shape", [(2, 5), (2, 7), (1, 9), (2, 9, 1), (18,)])
def test_a_bias_of_another_shape_is_refused(shape, backend):
    q = torch.randn(1, 2, 20, 8)
    with pytest.raises(BadInput, match=r"one number per head and offset, \(2, 9\), got"):
        neighborhood_attention(q, q, q, (Axis(20, 5),), bias=torch.zeros(shape), backend=backend)


@pytest.mark.parametrize("backend", ["oracle", "torch", "cpu"])
def test_what_stands_in_padding_has_no_part(backend):
    torch.manual_seed(0)
    q, *kv = (torch.randn(1, 2, 23, 8) for _ in "qkv")
    keep = torch.ones(1, 23, dtype=torch.bool)
    keep[0, [0, 2, 8, 9, 10, 11, 12]] = False  # of context and prefix, a place, a whole block
    options = {"prefix": 2, "context": 1, "keep": keep, "backend": backend}

    def run(filler):
        inputs = [x.clone().requires_grad_() for x in (q[:, :, 1:], *(x.where(keep[..., None], filler) for x in kv))]
        o = neighborhood_attention(*inputs, (Block(20, 5, 2),), **options)
        return o, *torch.autograd.grad(o.square().sum(), inputs)

    for got, expected in zip(run(torch.nan), run(0.0), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("backend", ["oracle", "torch", "cpu"])
def test_a_bias_may_be_of_another_dtype(backend):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 20, 8).bfloat16() for _ in "qkv")
    bias = torch.randn(2, 9).requires_grad_()
    got = neighborhood_attention(q, k, v, (Axis(20, 5),), bias=bias, backend=backend)
    got.float().sum().backward()
    exact = neighborhood_attention(*(x.double() for x in (q, k, v)), (Axis(20, 5),), bias=bias, backend="oracle")
    assert got.dtype == torch.bfloat16
    assert bias.grad.dtype == torch.float32
    assert (got - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("prefix", [0, 2])
def test_scores_may_be_larger_than_float16_holds(prefix):
    torch.manual_seed(0)
    q, k = (200 * torch.randn(1, 2, 20 + prefix, 64).half() for _ in "qk")
    v = torch.randn(1, 2, 20 + prefix, 8).half()
    got = neighborhood_attention(q, k, v, (Axis(20, 5),), prefix=prefix, backend="torch")
    exact = [x.double() for x in (q, k, v)]
    expected = neighborhood_attention(*exact, (Axis(20, 5),), prefix=prefix, backend="oracle")
    assert (got - expected).norm() < 1e-3 * expected.norm()


def test_blocks_see_themselves_and_their_halo():
    places = torch.arange(7)
    seen = Block(7, 3, shift=1, halo=1).sees(places[:, None], places)
    rows = ["##.....", "#####..", "#####..", "#####..", "...####", "...####", "...####"]
    assert ["".join(".#"[int(x)] for x in row) for row in seen.tolist()] == rows


@pytest.mark.parametrize("backend", ["oracle", "torch", "cpu"])
def test_keys_of_a_context_join_the_softmax(backend):
    """One softmax over a window and further keys is the average of both by their sums of exponentials."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 35, 8, generator=g) for _ in range(3))
    more_k, more_v = (torch.randn(1, 2, 4, 8, generator=g) for _ in range(2))
    grid = (Axis(5, 3), Axis(7, 3, 2))
    joined = [torch.cat(x, 2) for x in ((more_k, k), (more_v, v))]
    got = neighborhood_attention(q, *joined, grid, context=4, backend=backend)

    def parts(seen, keys, values):
        scores = (q @ keys.mT * 8**-0.5).masked_fill(~seen, -torch.inf)
        return scores.softmax(-1) @ values, scores.logsumexp(-1, keepdim=True)

    row, column = torch.arange(35) // 7, torch.arange(35) % 7
    near = grid[0].sees(row[:, None], row) & grid[1].sees(column[:, None], column)
    o_near, lse_near = parts(near, k, v)
    o_more, lse_more = parts(torch.ones(35, 4, dtype=torch.bool), more_k, more_v)
    share = (lse_near - lse_more).sigmoid()
    assert torch.allclose(got, share * o_near + (1 - share) * o_more, atol=1e-5)
