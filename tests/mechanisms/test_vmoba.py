"""Mixture of blocks on a video: which pairs are kept, by scope and mode, and what that is worth."""

import pytest
import torch

import attlas
from attlas.core.errors import BadInput

HEADS, SIZE = 2, 4
GRID = (4, 4, 6)
TOKENS = 96
PARTITIONS = {"1-D": (2, None, None), "2-D": (None, 2, 3), "3-D": (2, 2, 2), "uneven": (3, 3, 4)}
SCOPES = ("head", "query", "block", "all")
MODES = [{"threshold": 0.25}, {"threshold": 0.6}, {"top": 2}, {"top": 3}]


def qkv(tokens=TOKENS, batch=2):
    return [torch.randn(batch, HEADS, tokens, SIZE, dtype=torch.float64) for _ in "qkv"]


def block_numbers(block, grid=GRID):
    sides = [length if side is None else side for side, length in zip(block, grid, strict=True)]
    return (attlas.Grid(grid).places() // torch.tensor(sides)).unique(dim=0, return_inverse=True)[1]


def gate(q, k, number):
    """Queries times mean keys (B, H, N, T)."""
    return torch.stack([(q @ k[:, :, number == t].mean(2).unsqueeze(-1))[..., 0] for t in number.unique()], -1)


def scopes_of(x, scope):
    """(B, H, N, T) as rows of what competes; and back, as a function."""
    batch, heads, tokens, blocks = x.shape
    if scope == "block":
        return x.permute(0, 3, 1, 2).flatten(2), lambda y: y.view(batch, blocks, heads, tokens).permute(0, 2, 3, 1)
    return x.flatten({"all": 1, "head": 2, "query": 3}[scope]), lambda y: y.view(x.shape)


def selected(q, k, number, scope="head", threshold=0.25, top=None):
    """The kept (query, block) pairs entry by entry: one stays where those above it are too few."""
    g = gate(q, k, number)
    own = (number.unsqueeze(1) == torch.arange(g.shape[-1])).expand_as(g)
    rows, back = scopes_of(g, scope)
    own_rows, _ = scopes_of(own, scope)
    others = rows.masked_fill(own_rows, -torch.inf)
    rank = (others.unsqueeze(-2) > others.unsqueeze(-1)).sum(-1)
    if top is not None:
        return back(own_rows | (~own_rows & (rank < (top - 1) * own_rows.sum(-1, keepdim=True))))
    low, high = rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
    share = (rows - low) / (high - low)
    share = share / share.sum(-1, keepdim=True)
    above = torch.where(others.unsqueeze(-2) > others.unsqueeze(-1), share.unsqueeze(-2), 0).sum(-1)
    missing = threshold - share.where(own_rows, 0).sum(-1, keepdim=True)
    return back(own_rows | (~own_rows & ((above < missing) | (rank == 0))))


def kept_pairs(q, k, grid=GRID, **settings):
    """The visible (query, key) pairs, read off by values that are unit vectors."""
    v = torch.eye(k.shape[2], dtype=q.dtype).expand(*k.shape[:2], -1, -1)
    return attlas.attend(q, k, v, "vmoba", grid=grid, **settings) > 0


@pytest.mark.parametrize("block", PARTITIONS.values(), ids=PARTITIONS)
@pytest.mark.parametrize(
    ("scope", "mode"), [(s, m) for s in SCOPES for m in MODES if s != "block" or "top" not in m], ids=str
)
def test_it_is_softmax_over_the_union_of_the_kept_blocks(block, scope, mode):
    q, k, v = qkv(batch=1)
    number = block_numbers(block)
    seen = selected(q, k, number, scope, **mode)[..., number]
    settings = {"grid": GRID, "blocks": (block,), "scope": scope, **mode}
    assert torch.equal(kept_pairs(q, k, **settings), seen)
    tensors = [t.requires_grad_() for t in (q, k, v)]
    outputs = (attlas.attend(q, k, v, "vmoba", **settings), attlas.attend(q, k, v, mask=attlas.Mask.pairs_(seen)))
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-12)
    weight = torch.randn_like(v)
    for got, expected in zip(*(torch.autograd.grad(o, tensors, weight) for o in outputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("block", PARTITIONS.values(), ids=PARTITIONS)
@pytest.mark.parametrize("scope", SCOPES)
def test_a_threshold_of_one_keeps_everything(block, scope):
    q, k, v = qkv()
    got = attlas.attend(q, k, v, "vmoba", grid=GRID, blocks=(block,), scope=scope, threshold=1)
    torch.testing.assert_close(got, attlas.attend(q, k, v), rtol=0, atol=1e-12)
    # In float32 the largest shares add up to 1 before the least similar block, whose share is 0.
    assert kept_pairs(q.float(), k.float(), blocks=(block,), scope=scope, threshold=1).all()


@pytest.mark.parametrize("scope", SCOPES)
def test_a_threshold_of_zero_keeps_own_blocks_and_one_other_in_each_scope(scope):
    q, k, _ = qkv()
    number = block_numbers(PARTITIONS["3-D"])
    blocks = int(number.max()) + 1
    kept = kept_pairs(q, k, blocks=(PARTITIONS["3-D"],), scope=scope, threshold=0)
    scopes = {"head": HEADS, "query": HEADS * TOKENS, "block": blocks, "all": 1}[scope]
    assert kept[..., number.unsqueeze(1) == number].all()
    assert kept.sum((1, 2, 3)).tolist() == [8 * (HEADS * TOKENS + scopes)] * 2  # 8 keys in a block


@pytest.mark.parametrize("scope", SCOPES)
def test_a_larger_threshold_never_removes_a_pair(scope):
    q, k, _ = qkv()
    before = torch.zeros(2, HEADS, TOKENS, TOKENS, dtype=torch.bool)
    counts = []
    for threshold in (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1):
        kept = kept_pairs(q, k, blocks=(PARTITIONS["uneven"],), scope=scope, threshold=threshold)
        assert not (before & ~kept).any()
        counts.append(int(kept.sum()))
        before = kept
    assert counts == sorted(counts)
    assert counts[0] < counts[3] < counts[-1] == before.numel()


@pytest.mark.parametrize("scope", SCOPES)
def test_how_large_queries_and_keys_are_decides_nothing(scope):
    q, k, _ = qkv()
    settings = {"blocks": (PARTITIONS["3-D"],), "scope": scope}
    expected = kept_pairs(q, k, **settings)
    for scale in (1e-4, 1e-8):
        assert torch.equal(kept_pairs(q * scale, k * scale, **settings), expected)


@pytest.mark.parametrize("scope", SCOPES)
def test_where_all_similarities_are_equal_everything_is_kept(scope):
    q, k, _ = qkv()
    assert kept_pairs(q, torch.ones_like(k) * 0.1, blocks=(PARTITIONS["uneven"],), scope="query").all()
    assert kept_pairs(torch.ones_like(q) * 0.1, torch.ones_like(k) * 0.1, blocks=((2, 2, 2),), scope=scope).all()


@pytest.mark.parametrize(
    ("grid", "block"), [((40,), (16,)), ((9,), (9,)), ((7, 3), (4, 3)), ((2, 4, 4), (2, None, None))]
)
def test_default_blocks_are_cut_to_the_grid(grid, block):
    assert attlas.make_attend("vmoba", HEADS, SIZE, grid=grid)._block(attlas.Grid(grid)) == block


def test_layers_use_the_partitions_in_turn():
    blocks = tuple(PARTITIONS[name] for name in ("1-D", "2-D", "3-D"))
    layers = [attlas.mixer("vmoba", 16, 2, grid=GRID, layer=n, blocks=blocks) for n in range(5)]
    assert [layer.attend._block(attlas.Grid(GRID)) for layer in layers] == [*blocks, *blocks[:2]]
    default = attlas.mixer("vmoba", 16, 2, grid=(21, 20, 32), layer=0)
    counts = [attlas.mixer("vmoba", 16, 2, grid=(21, 20, 32), layer=n).attend for n in range(3)]
    assert [attend._order(default.attend.site.grid).tiles for attend in counts] == [7, 40, 60]


def test_a_peaked_head_keeps_fewer_pairs_than_a_flat_one():
    k = torch.randn(1, HEADS, TOKENS, SIZE, dtype=torch.float64) * 0.1
    q = torch.randn_like(k)
    number = block_numbers(PARTITIONS["3-D"])
    q[:, 0], k[:, 0, number == 5] = torch.ones(SIZE), 3.0  # head 0: one block is far more similar than the others
    kept = kept_pairs(q, k, blocks=(PARTITIONS["3-D"],), threshold=0.5).sum((0, 2, 3))
    assert 2 * kept[0] < kept[1]


def test_what_repeats_at_one_place_of_all_frames_is_found_by_tiles_and_not_by_frames():
    grid, size = (8, 8, 8), 16
    place = attlas.Grid(grid).places()
    tile = (place[:, 1] < 2) & (place[:, 2] < 2)
    q, k, v = torch.randn(3, 1, 1, 512, size, dtype=torch.float64)
    target = torch.zeros(size, dtype=torch.float64)
    target[0] = 1
    k = 0.1 * k
    k[:, :, tile] = 4 * target  # the same content in one corner of every frame, which every query asks for
    q = 0.1 * q + 12 * target
    errors, shares = {}, {}
    full = attlas.attend(q, k, v)
    for name, block in {"frames": (1, None, None), "tiles": (None, 2, 2)}.items():
        settings = {"grid": grid, "blocks": (block,), "scope": "query", "top": 2}
        got = attlas.attend(q, k, v, "vmoba", **settings)
        errors[name] = float((got - full).norm() / full.norm())
        shares[name] = attlas.make_attend("vmoba", 1, size, **settings | {"grid": grid}).cost(1, 512).pairs / 512**2
    assert shares["tiles"] == 2 / 16
    assert errors["tiles"] < 1e-2
    assert shares["frames"] == 2 / 8
    assert errors["frames"] > 0.5  # twice the pairs, and most of what matters is in the other frames


def test_useful_flops_are_the_gate_and_the_kept_pairs():
    layer = attlas.make_attend("vmoba", 12, 128, grid=(21, 20, 32), blocks=((None, 4, 4),), top=8)
    tokens, width, blocks = 21 * 20 * 32, 12 * 128, 40
    gate_flops, pairs = 2 * tokens * width * blocks, 12 * tokens * 8 * (tokens // blocks)
    assert layer.cost(1, tokens).pairs == pairs
    assert layer.cost(1, tokens).flops == gate_flops + 4 * 128 * pairs
    full = attlas.make_attend("softmax", 12, 128).cost(1, tokens)
    assert 4.5 < full.flops / layer.cost(1, tokens).flops < 5


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(("poison", "sign"), [(1e6, 1), (torch.nan, -1)])
@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
def test_padding_is_in_no_mean_and_in_no_scope(scope, poison, sign, threshold):
    q, k, v = qkv(48)
    q, k = sign * (3 + q), 1 + 0.1 * k  # so that 0 would be by far the least similar, or the most
    settings = {"blocks": ((3, 2),), "scope": scope, "threshold": threshold}
    keep = torch.ones(2, 48, dtype=torch.bool)
    keep[1, 24:] = False  # half of the blocks: what stays is a grid of its own
    expected = attlas.attend(q[1:, :, :24], k[1:, :, :24], v[1:, :, :24], "vmoba", grid=(6, 4), **settings)
    q, k, v = (x.masked_fill(~keep[:, None, :, None], poison) for x in (q, k, v))
    got = attlas.attend(q, k, v, "vmoba", grid=(12, 4), mask=keep, **settings)
    torch.testing.assert_close(got[1:, :, :24], expected, rtol=0, atol=1e-12)
    assert not got[1:, :, 24:].any()


def test_one_block_sees_itself():
    q, k, v = qkv(12)
    got = attlas.attend(q, k, v, "vmoba", grid=(12,), blocks=((None,),), threshold=0)
    torch.testing.assert_close(got, attlas.attend(q, k, v), rtol=0, atol=1e-12)


def test_no_other_block_leaves_the_own_one():
    q, k, v = qkv(12)
    got = attlas.attend(q, k, v, "vmoba", grid=(12,), blocks=((5,),), scope="query", top=1)
    torch.testing.assert_close(got, attlas.attend(q, k, v, mask=attlas.Mask.block(5)), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"scope": "heads"}, "scope is one of 'all', 'head', 'block', 'query', got 'heads'"),
        ({"threshold": 1.5}, "threshold is a share, 0 to 1, got 1.5"),
        ({"top": 0}, "top counts blocks"),
        ({"top": 2, "scope": "block"}, "scope 'block' does not"),
        ({"top": 1.5}, "whole number of at least 1, got 1.5"),
        ({"blocks": ()}, "at least one"),
        ({"blocks": (2, 2)}, r"sequence of shapes, .* as \(\(2, 2\),\): got \(2, 2\)"),
        ({"blocks": ((2.0, 2),)}, "a shape has a whole number"),
        ({"blocks": "22"}, "a shape has a whole number"),
        ({"blocks": ((0, 2),)}, "of at least 1, or None"),
        ({"blocks": ((2, 2),), "grid": GRID}, "are for 2 axes, the grid has 3"),
        ({"blocks": ((5, 2, 2),), "grid": GRID}, r"blocks of \(5, 2, 2\) .* at most \(4, 4, 6\)"),
        ({"grid": (2, 4, 4), "blocks": ((3, None, None),)}, r"blocks of \(3, None, None\) reach over the grid 2x4x4"),
    ],
)
def test_what_has_no_meaning_is_refused(settings, words):
    with pytest.raises(BadInput, match=words):
        attlas.make_attend("vmoba", HEADS, SIZE, **settings)


def test_a_grid_of_other_axes_is_refused_at_the_call():
    with pytest.raises(BadInput, match="a number, or None for all, per axis"):
        attlas.attend(*qkv(12), "vmoba", grid=(3, 4), blocks=((2, 2, 2),))
