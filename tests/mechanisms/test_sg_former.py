"""What only self-guided attention holds: whose attention counts, who is merged with whom, and nothing flows back."""

import pytest
import torch
import torch.nn.functional as F

import attlas
from attlas.core.errors import BadInput, Unsupported
from attlas.core.grid import Grid
from attlas.mechanisms.local_sparse.sg_former import GROUPS, HybridScale, SelfGuided

DIM = 8


def randomly(module):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)
    return module.double().eval()


def tokens(*grid):
    torch.manual_seed(1)
    return torch.randn(2, *grid, DIM, dtype=torch.float64).flatten(1, -2)


@pytest.mark.parametrize(
    ("reduction", "side", "merged"), [(8, 56, [4, 28, 28]), (4, 28, [4, 28, 28]), (2, 14, [49, 98])]
)
def test_merged_tokens_at_224_pixels(reduction, side, merged):
    assert SelfGuided(DIM, 2, GROUPS[reduction]).merged(side**2) == merged


@pytest.mark.parametrize(("grid", "reduction", "window"), [((8, 12), 2, 4), ((14, 14), 7, 7)])
def test_significance_is_a_mean_of_attention(grid, reduction, window):
    """Each query gives one unit to the cells and one to its window."""
    hybrid = randomly(HybridScale(DIM, 4, reduction, window))
    _, s = hybrid(tokens(*grid), Grid(grid))
    windows = (grid[0] // window) * (grid[1] // window)
    torch.testing.assert_close(s.sum(1), torch.full((2,), float(reduction**2 + windows), dtype=torch.float64))
    assert (s > 0).all()


def test_half_of_the_heads_look_at_windows():
    hybrid, grid = randomly(HybridScale(DIM, 2, 2, 2)), Grid((5, 6))
    with torch.no_grad():
        for parameter in [*hybrid.cell_v.parameters(), *hybrid.local.conv.parameters()]:
            parameter.zero_()
    moved = torch.autograd.functional.jacobian(lambda t: hybrid(t, grid)[0].sum(-1), tokens(5, 6)[:1])
    window = grid.places() // 2
    assert torch.equal(moved[0, :, 0].abs().sum(-1) > 0, (window[:, None] == window).all(-1))


def test_groups_of_one_are_full_attention():
    guided, grid = randomly(SelfGuided(DIM, 2, (1, 1))), Grid((3, 4))
    with torch.no_grad():
        for merge in guided.merge:
            merge.weight.fill_(1)
            merge.bias.zero_()
    plain = attlas.mixer("softmax", DIM, 2).double()
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(plain, name).load_state_dict(getattr(guided, name).state_dict())
    with torch.no_grad():
        plain.out_proj.weight.copy_(torch.eye(DIM))
        plain.out_proj.bias.zero_()
    x = tokens(3, 4)
    local = guided.local.conv(guided.local.proj(x).mT.unflatten(2, (3, 4))).flatten(2).mT
    got = guided(x, torch.rand(2, 12), grid)
    torch.testing.assert_close(got, guided.local.out_proj(plain(x) + local), rtol=0, atol=1e-12)


def test_the_least_significant_are_merged_the_most():
    """Ten tokens: the lowest quarter by threes, the middle half by twos, the highest quarter one by one."""
    guided = randomly(SelfGuided(DIM, 2, (3, 2, 1)))
    x = tokens(10)
    order = torch.tensor([7, 2, 9, 0, 4, 1, 8, 3, 6, 5])
    s = torch.zeros(2, 10).index_copy(1, order, torch.arange(10.0).expand(2, -1))
    members = [order[[0, 1]], order[[2, 3]], order[[4, 5]], order[[6]], order[[7]], order[[8]], order[[9]]]
    layers = [0, 1, 1, 1, 2, 2, 2]
    expected = [
        (guided.merge[part].weight[:, : len(group)] @ x[:, group]).squeeze(1) + guided.merge[part].bias
        for part, group in zip(layers, members, strict=True)
    ]
    got, live = guided._merge(x, s, None)
    torch.testing.assert_close(got, torch.stack(expected, 1), rtol=0, atol=1e-12)
    assert live is None


def test_nothing_flows_back_through_the_order():
    hybrid, guided, grid = randomly(HybridScale(DIM, 2, 2, 2)), randomly(SelfGuided(DIM, 2, (2, 1))), Grid((4, 6))
    _, s = hybrid(tokens(4, 6), grid)
    assert not s.requires_grad
    guided(tokens(4, 6), s, grid).sum().backward()
    assert all(parameter.grad is None for parameter in hybrid.parameters())
    assert all(merge.weight.grad.any() for merge in guided.merge)


def test_one_order_serves_rows_and_columns():
    """A picture that is read column by column is merged into the same tokens: its significances differ."""
    hybrid, guided, grid = randomly(HybridScale(DIM, 2, 2, 3)), randomly(SelfGuided(DIM, 2, (5, 3, 2))), Grid((6, 9))
    with torch.no_grad():
        guided.local.conv.weight.zero_()  # it knows rows from columns
    x = tokens(6, 9)
    _, s = hybrid(x, grid)
    turned_x, turned_s = (t.unflatten(1, (6, 9)).transpose(1, 2).flatten(1, 2) for t in (x, s))
    got = guided(turned_x, turned_s, Grid((9, 6))).unflatten(1, (9, 6)).transpose(1, 2).flatten(1, 2)
    torch.testing.assert_close(got, guided(x, s, grid), rtol=0, atol=1e-12)
    assert (guided(x, s.flip(1), grid) - got).abs().max() > 1e-3  # the order matters


def test_the_guided_side_sees_what_the_hybrid_one_has_added():
    layer, x, grid = randomly(attlas.mixer("sg_former", DIM, 2, reduction=2, window=3)), tokens(6, 9), Grid((6, 9))
    u, s = layer.hybrid(x, grid)
    torch.testing.assert_close(layer(x, grid=grid), u + layer.guided(x + u, s, grid), rtol=0, atol=1e-12)


def test_a_cell_is_one_token_through_a_norm_and_gelu():
    hybrid, x, cells = randomly(HybridScale(DIM, 2, 2, 3)), tokens(6, 8), []
    hybrid.cell_v.register_forward_pre_hook(lambda module, inputs: cells.append(inputs[0]))
    hybrid(x, Grid((6, 8)))
    z = hybrid.reduce(x.mT.unflatten(2, (6, 8))).flatten(2).mT
    torch.testing.assert_close(cells[0], F.gelu(hybrid.reduce_norm(z)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (3, 1)])
@pytest.mark.parametrize("groups", [(1, 1, 1), (2, 1)])
def test_parts_without_a_token_merge_nothing(grid, groups):
    settings = {"reduction": 1, "window": 1, "groups": groups}
    layer, oracle = (
        randomly(attlas.mixer("sg_former", DIM, 2, backend=backend, **settings)) for backend in ("auto", "oracle")
    )
    x = tokens(*grid)
    torch.testing.assert_close(layer(x, grid=grid), oracle(x, grid=grid), rtol=0, atol=1e-12)


def linear(inputs, outputs):
    return inputs * outputs + outputs


@pytest.mark.parametrize(
    ("dim", "depths", "count"),
    [(64, (2, 4, 16, 1), 22_545_981), (64, (2, 6, 28, 2), 38_689_316), (96, (4, 6, 24, 2), 77_950_293)],
)
def test_parameters_of_the_published_models(dim, depths, count):
    """All of the model but the two attentions is written out: embeddings, norms, MLPs, the last stage and the head."""
    total = 9 * 3 * dim + 2 * 9 * dim**2 + 4 * 2 * dim + 56**2 * dim
    for stage, depth in enumerate(depths):
        width = dim * 2**stage
        if stage:
            total += width // 2 * width + 9 * width + width**2 + 3 * 2 * width
        reduction = 8 // 2**stage
        if reduction > 1:
            pair = HybridScale(width, 2, reduction, 7), SelfGuided(width, 2, GROUPS[reduction])
            total += depth // 2 * sum(p.numel() for side in pair for p in side.parameters())
        else:
            total += depth * (5 * linear(width, width) + 10 * width)
        mlp = linear(width, 4 * width) + 10 * 4 * width + linear(4 * width, width)
        total += depth * (4 * width + mlp) + 2 * width
    assert total + linear(width, 1000) == count


def test_the_cost_of_a_line_is_refused():
    with pytest.raises(Unsupported, match="sg_former does not serve a grid 9"):
        attlas.mixer("sg_former", DIM, 2, reduction=2, window=3).cost(1, 9)


def test_half_precision_sorts_as_float32_does():
    hybrid, grid = randomly(HybridScale(DIM, 2, 2, 3)).bfloat16(), Grid((9, 9))
    x = tokens(9, 9).bfloat16()
    _, half = hybrid(x, grid)
    with torch.autocast("cpu", torch.bfloat16):
        _, cast = hybrid.float()(x.float(), grid)
    _, exact = hybrid.double()(x.double(), grid)
    assert torch.equal(half.argsort(1), exact.argsort(1))
    assert torch.equal(cast.argsort(1), exact.argsort(1))


@pytest.mark.parametrize("grid", [(4, 6), (5, 7)])
@pytest.mark.parametrize("groups", [(3, 2), (4, 3, 2)])
def test_a_padded_picture_gives_what_it_gives_alone(grid, groups):
    layer = randomly(attlas.mixer("sg_former", DIM, 2, reduction=2, window=3, groups=groups))
    x = tokens(*grid).unflatten(1, grid)
    padded = F.pad(x, (0, 0, 0, 3, 0, 2), value=torch.nan)
    keep = F.pad(torch.ones(2, *grid, dtype=torch.bool), (0, 3, 0, 2))
    got = layer(padded.flatten(1, 2), mask=keep.flatten(1), grid=keep.shape[1:])
    expected = layer(x.flatten(1, 2), grid=grid)
    torch.testing.assert_close(got[keep.flatten(1)].view_as(expected), expected, rtol=0, atol=1e-12)


def test_parts_never_grow_beyond_those_of_the_whole_grid():
    """Fewer real tokens must fit into the room that all of them have."""
    for groups in ((2, 3, 1), (5, 2)):
        guided = SelfGuided(DIM, 2, groups)
        for count in range(1, 40):
            room = guided.merged(count)
            assert all(small <= large for small, large in zip(guided.merged(count - 1), room, strict=True)), count


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"heads": 1}, "half of the heads are global"),
        ({"reduction": 3}, "published for a reduction of 8, 4 or 2; give groups="),
        ({"reduction": 0}, "at least 1, got 0 and 7"),
        ({"groups": (2,)}, "two or three counts"),
        ({"groups": (2, 0)}, "at least one token, got \\(2, 0\\)"),
        ({"grid": (14, 6)}, "reduction of at most 6"),
        ({"grid": (14, 6), "reduction": 2}, "window of 7 places .* at most 6"),
    ],
)
def test_what_has_no_meaning_is_refused(settings, words):
    with pytest.raises(BadInput, match=words):
        attlas.mixer("sg_former", DIM, **{"heads": 2} | settings)


def test_a_smaller_grid_is_refused_at_the_call():
    layer = attlas.mixer("sg_former", DIM, 2, reduction=2, window=5).double()
    with pytest.raises(BadInput, match="window of 5 places"):
        layer(tokens(4, 6), grid=(4, 6))
    with pytest.raises(Unsupported, match="no prefix tokens"):
        layer(tokens(31), grid=Grid((5, 6), prefix=1))
