"""What only strip self-attention holds: scores of rank 1, and keys that are cells."""

import pytest
import torch
import torch.nn.functional as F

import attlas
from attlas.core.errors import BadInput, Unsupported


def build(dim=16, heads=2, **settings):
    torch.manual_seed(0)
    layer = attlas.mixer("s2aformer", dim, heads, **settings).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)
    return layer.eval()


def tokens(*grid, dim=16):
    torch.manual_seed(1)
    return torch.randn(2, *grid, dim, dtype=torch.float64).flatten(1, -2)


def test_the_scores_of_a_head_have_rank_one():
    """With the identity for values and output, the output is the weights: M <= C / H cells."""
    layer, grid = build(dim=24, heads=2), (4, 6)
    layer.v_proj.register_forward_hook(
        lambda module, inputs, output: torch.eye(6, 12, dtype=output.dtype).repeat(2, 1, 2)
    )
    layer.out_proj = torch.nn.Identity()
    weights = layer(tokens(*grid, dim=24), grid=grid).unflatten(-1, (2, 12))[..., :6].transpose(1, 2)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 24, dtype=torch.float64))
    scores = weights.log()
    odds = scores[..., 1:] - scores[..., :1]  # the normaliser of a row falls out
    assert (torch.linalg.matrix_rank(odds, rtol=1e-9) == 1).all()


def test_full_width_without_reduction_is_plain_attention():
    layer, plain = build(reduction=1, width=8), attlas.mixer("softmax", 16, 2).double()
    plain.load_state_dict(layer.state_dict())
    x = tokens(3, 5)
    torch.testing.assert_close(layer(x, grid=(3, 5)), plain(x), rtol=0, atol=1e-12)


def test_scores_cost_one_product_per_query_cell_and_head():
    one, two = (build(width=width).cost(1, 64, grid=(8, 8)).flops for width in (1, 2))
    strips = 2 * (64 + 16) * 16 * 2
    assert two - one - strips == 2 * 64 * 16 * 2


def test_a_token_moves_the_key_of_its_cell_and_no_other():
    layer, x, keys = build(reduction=3), tokens(5, 7), []
    layer.k_proj.register_forward_hook(lambda module, inputs, output: keys.append(output))
    changed = x.clone()
    changed[:, 4 * 7 + 6] += torch.randn(16)  # the last token, in the last cell, which holds 2 x 1 tokens
    for t in (x, changed):
        layer(t, grid=(5, 7))
    assert (keys[0] != keys[1]).any(-1).tolist() == 2 * [[False] * 5 + [True]]


def test_keys_and_values_are_made_of_normalised_cells():
    layer, x, cells = build(reduction=2), tokens(4, 6), []
    layer.k_proj.register_forward_pre_hook(lambda module, inputs: cells.append(inputs[0]))
    layer(x, grid=(4, 6))
    z = layer.reduce(x.mT.unflatten(2, (4, 6))).flatten(2).mT
    torch.testing.assert_close(cells[0], layer.reduce_norm(z), rtol=0, atol=1e-12)


@pytest.mark.parametrize("grid", [(4, 6), (5, 7)])
def test_a_padded_picture_gives_what_it_gives_alone(grid):
    layer = build(reduction=2)
    x = tokens(*grid).unflatten(1, grid)
    padded = F.pad(x, (0, 0, 0, 3, 0, 2), value=torch.nan)
    keep = F.pad(torch.ones(2, *grid, dtype=torch.bool), (0, 3, 0, 2))
    got = layer(padded.flatten(1, 2), mask=keep.flatten(1), grid=keep.shape[1:])
    expected = layer(x.flatten(1, 2), grid=grid)
    torch.testing.assert_close(got[keep.flatten(1)].view_as(expected), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"heads": 3}, "heads must divide dim: 16 channels"),
        ({"reduction": 0}, "reduction and width are at least 1, got 0 and 1"),
        ({"width": 0}, "at least 1, got 2 and 0"),
        ({"reduction": 5, "grid": (4, 9)}, "cells of 5 places .* grid 4x9: take a reduction of at most 4"),
    ],
)
def test_what_has_no_meaning_is_refused(settings, words):
    with pytest.raises(BadInput, match=words):
        build(**settings)


def test_prefix_tokens_lie_in_no_cell():
    with pytest.raises(Unsupported, match="no prefix tokens"):
        build()(tokens(13), grid=attlas.Grid((3, 4), prefix=1))
