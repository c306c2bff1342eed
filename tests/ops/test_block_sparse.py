"""Attention over chosen blocks on its torch backend, and windows of blocks; the C++ kernel has its own tests."""

import pytest
import torch

from attlas.core.axis import Axis, Block
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


@pytest.mark.parametrize(
    "axis", [Block(13, 4), Block(13, 4, 3), Block(13, 4, 1, 2), Block(4, 4), Block(5, 1), Axis(13, 4, 3)]
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
