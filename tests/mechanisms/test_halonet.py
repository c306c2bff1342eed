"""The identities of `halonet`."""

import pytest
import torch
import torch.nn.functional as F

import attlas
from attlas import Grid
from attlas.core.errors import BadInput


def build(grid, heads=2, size=4, **settings):
    layer = attlas.mixer("halonet", heads * size, heads, grid=grid, **settings).attend.double()
    for table in layer.relative:
        torch.nn.init.normal_(table)
    return layer


def tensors(grid, heads=2, size=4):
    return [torch.randn(2, heads, Grid(grid).tokens, size, dtype=torch.float64, requires_grad=True) for _ in "qkv"]


def zero_padded(q, k, v, tables, grid, block, halo, stride=1):
    """The published procedure, window by window, where zeros beyond the border take part as keys."""
    q, k, v = (x.unflatten(2, grid) for x in (q, k, v))
    k, v = (F.pad(x, (0, 0, halo, halo, halo, halo)) for x in (k, v))
    width = block + 2 * halo
    places = torch.arange(width)
    rows = []
    for top in range(0, grid[0], block):
        row = []
        for left in range(0, grid[1], block):
            keys, values = (x[:, :, top : top + width, left : left + width].flatten(2, 3) for x in (k, v))
            queries = []
            for i in range(0, block, stride):
                for j in range(0, block, stride):
                    query = q[:, :, top + i, left + j].unsqueeze(2)
                    r = tables[0][places - i + width - 1].unsqueeze(1) + tables[1][places - j + width - 1].unsqueeze(0)
                    scores = query @ keys.mT * q.shape[-1] ** -0.5 + query @ r.flatten(0, 1).T
                    queries.append(scores.softmax(-1) @ values)
            side = block // stride
            row.append(torch.cat(queries, 2).unflatten(2, (side, side)))
        rows.append(torch.cat(row, 3))
    return torch.cat(rows, 2)


def test_with_a_frame_of_zeros_it_is_the_published_procedure():
    grid, block, halo = (8, 12), 4, 2
    inputs = tensors(grid)
    framed = tuple(length + 2 * block for length in grid)
    layer = build(framed, block=block, halo=halo)
    frame = (0, 0, block, block, block, block)
    got = layer(*(F.pad(x.unflatten(2, grid), frame).flatten(2, 3) for x in inputs), grid=framed)
    got = got.unflatten(2, framed)[:, :, block:-block, block:-block]
    expected = zero_padded(*inputs, layer.relative, grid, block, halo)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    weight, wanted = torch.randn_like(got), [*inputs, *layer.relative]
    pairs = zip(torch.autograd.grad(got, wanted, weight), torch.autograd.grad(expected, wanted, weight), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_zeros_beyond_the_border_are_the_published_procedure_without_a_frame():
    for grid, block, halo in (((8, 12), 4, 2), ((4, 4), 4, 1), ((8, 4), 2, 3)):
        inputs = tensors(grid)
        layer = build(grid, block=block, halo=halo, border="zeros")
        got = layer(*inputs, grid=grid).unflatten(2, grid)
        expected = zero_padded(*inputs, layer.relative, grid, block, halo)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
        weight, wanted = torch.randn_like(got), [*inputs, *layer.relative]
        pairs = zip(
            torch.autograd.grad(got, wanted, weight), torch.autograd.grad(expected, wanted, weight), strict=True
        )
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_a_map_that_blocks_do_not_divide_is_filled_up_with_zeros():
    grid, whole, block = (5, 7), (6, 9), 3
    inputs = tensors(grid)
    layer = build(grid, block=block, halo=1, border="zeros")
    padded = [F.pad(x.unflatten(2, grid), (0, 0, 0, 2, 0, 1)).flatten(2, 3) for x in inputs]
    expected = zero_padded(*padded, layer.relative, whole, block, 1)[:, :, :5, :7]
    torch.testing.assert_close(layer(*inputs, grid=grid).unflatten(2, grid), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_zeros_beyond_the_border_in_half_precision(dtype):
    layer, inputs = build((6, 6), block=3, halo=1, border="zeros"), tensors((6, 6))
    expected = layer(*inputs, grid=(6, 6))
    found = layer.to(dtype)(*(x.to(dtype) for x in inputs), grid=(6, 6))
    torch.testing.assert_close(found.double(), expected, rtol=0.1, atol=0.1)


def test_without_the_frame_only_windows_at_the_border_differ():
    grid = (12, 12)
    layer, inputs = build(grid, block=4, halo=1), tensors(grid)
    got = layer(*inputs, grid=grid).unflatten(2, grid)
    expected = zero_padded(*inputs, layer.relative, grid, 4, 1)
    same = torch.isclose(got, expected, rtol=0, atol=1e-12).all(-1)[0, 0]
    inner = torch.zeros(grid, dtype=torch.bool)
    inner[4:8, 4:8] = True
    assert torch.equal(same, inner)


def test_a_strided_layer_is_the_full_one_with_every_second_output():
    grid = (12, 12)
    layer, inputs = build(grid, block=4, halo=1), tensors(grid)
    got = layer(*inputs, grid=grid).unflatten(2, grid)[:, :, 4:8:2, 4:8:2]
    expected = zero_padded(*inputs, layer.relative, grid, 4, 1, stride=2)[:, :, 2:4, 2:4]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def reached(layer, grid, row, column):
    q, k, v = tensors(grid)
    (grad,) = torch.autograd.grad(layer(q, k, v, grid=grid).unflatten(2, grid)[:, :, row, column].sum(), v)
    return grad.abs().sum((0, 1, 3)).view(grid) > 0


@pytest.mark.parametrize(
    ("grid", "place", "rows", "columns"),
    [
        ((8, 8), (0, 0), (0, 5), (0, 5)),
        ((8, 8), (3, 3), (0, 5), (0, 5)),
        ((8, 8), (4, 3), (3, 8), (0, 5)),
        ((13, 10), (5, 9), (3, 9), (7, 10)),  # the last blocks are smaller
        ((13, 10), (12, 4), (11, 13), (3, 9)),
    ],
)
def test_a_query_sees_its_block_and_the_halo(grid, place, rows, columns):
    expected = torch.zeros(grid, dtype=torch.bool)
    expected[slice(*rows), slice(*columns)] = True
    assert torch.equal(reached(build(grid, block=4, halo=1), grid, *place), expected)


def test_without_halo_and_embeddings_it_is_window_attention():
    grid = (7, 9)
    layer, (q, k, v) = build(grid, block=3, halo=0), tensors(grid)
    for table in layer.relative:
        torch.nn.init.zeros_(table)
    expected = attlas.attend(q, k, v, "davit_window", grid=grid, window=3)
    torch.testing.assert_close(layer(q, k, v, grid=grid), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("settings", [{"block": (4, 5), "halo": 0}, {"block": 9, "halo": 2}, {"block": 2, "halo": 4}])
def test_a_window_of_the_whole_map_is_global_attention_with_relative_embeddings(settings):
    grid = (4, 5)
    layer, (q, k, v) = build(grid, **settings), tensors(grid)
    bias = torch.zeros(2, 2, 20, 20, dtype=torch.float64)
    for place, table, halo in zip(Grid(grid).places().T, layer.relative, layer.halo, strict=True):
        r = table[place - place.unsqueeze(1) + len(table) // 2 + halo]
        bias = bias + (q.unsqueeze(3) * r).sum(-1)
    expected = attlas.attend(q, k, v, mask=attlas.Mask.biased(bias))
    torch.testing.assert_close(layer(q, k, v, grid=grid), expected, rtol=0, atol=1e-12)


def test_the_first_entries_belong_to_no_pair():
    grid, block, halo = (12, 12), 4, 2
    layer, inputs = build(grid, block=block, halo=halo), tensors(grid)
    for table in torch.autograd.grad(layer(*inputs, grid=grid).square().sum(), list(layer.relative)):
        read = torch.ones(2 * 8 - 1, dtype=torch.bool)
        read[: 2 * halo] = False
        assert torch.equal(table.any(-1), read)


def test_published_sizes():
    layer = attlas.mixer("halonet", 64, 4)
    assert sum(p.numel() for p in layer.parameters()) == 4 * 64**2 + 2 * (2 * 14 - 1) * 16
    assert layer.cost(1, 24 * 24, grid=(24, 24)).pairs == 4 * (8 * (11 + 14 + 11)) ** 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"block": 0}, "a block holds a place at least"),
        ({"halo": -1}, "halo is not negative, got block 8 and halo -1"),
        ({"block": (4, 4, 4)}, "is for 3 axes, the grid has 2"),
    ],
)
def test_what_has_no_meaning_is_refused(settings, words):
    with pytest.raises(BadInput, match=words):
        attlas.mixer("halonet", 16, 2, **settings)


def test_a_grid_of_other_axes_is_refused():
    with pytest.raises(BadInput, match="built for 2 axes, the call has a grid 24"):
        attlas.mixer("halonet", 16, 2)(torch.randn(1, 24, 16))


def test_a_border_of_another_kind_is_refused():
    with pytest.raises(BadInput, match="'end' or 'zeros', got 'wrap'"):
        attlas.mixer("halonet", 16, 2, border="wrap")
