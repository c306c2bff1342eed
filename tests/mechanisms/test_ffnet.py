"""What only FFNified attention holds: an MLP over space, channel by channel, whose kernels become one."""

import copy

import pytest
import torch
from torch.nn import functional as F

import attlas
from attlas.blocks.conv_norm import fuse
from attlas.core.errors import BadInput
from attlas.core.grid import Grid

DIM = 4
GRID = (15, 14)


def build(**settings):
    torch.manual_seed(0)
    layer = attlas.mixer("ffnet", DIM, **{"grid": GRID} | settings).double()
    with torch.no_grad():
        for name, value in [*layer.named_parameters(), *layer.named_buffers()]:
            if value.is_floating_point():
                value.uniform_(0.5, 1.5) if "running_var" in name else value.normal_(std=0.5)
    return layer.eval()


def tokens(*grid, batch=2):
    torch.manual_seed(1)
    return torch.randn(batch, *grid, DIM, dtype=torch.float64).flatten(1, -2)


def keys_and_values(layer, q):
    grid = Grid(GRID)
    return layer.values(F.gelu(layer.keys(q, grid, None, "torch")), grid, None, "torch")


def test_convolutions_and_norms_on_a_map():
    layer, x = build(), tokens(*GRID)
    norm = lambda y, bn: F.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias)  # noqa: E731

    def pair(z, part):
        sizes = ((part.weights[0], 3), (part.weights[1], 1))
        both = [norm(F.conv2d(z, w, padding=p, groups=DIM), bn) for (w, p), bn in zip(sizes, part.norms, strict=True)]
        return sum(both)

    z = x.mT.unflatten(2, GRID)
    z = norm(F.conv2d(z, layer.query.proj.weight[..., None, None]), layer.query.norm)
    expected = pair(F.gelu(pair(z, layer.keys)), layer.values).flatten(2).mT
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-11)


def test_fused_it_is_the_same_with_two_convolutions():
    layer, x = build(), tokens(*GRID)
    one = fuse(copy.deepcopy(layer))
    torch.testing.assert_close(one(x), layer(x), rtol=0, atol=1e-11)
    assert sum(p.numel() for p in one.parameters()) == DIM * (DIM + 1) + 2 * DIM * (49 + 1)
    assert not list(one.buffers())


def test_channels_meet_in_the_query_alone():
    layer, q = build(), tokens(*GRID, batch=1)
    jacobian = torch.autograd.functional.jacobian(lambda t: keys_and_values(layer, t).sum(1), q)
    assert torch.equal(jacobian.abs().sum((0, 2, 3)) > 0, torch.eye(DIM, dtype=torch.bool))


@pytest.mark.parametrize(("settings", "reach"), [({}, 6), ({"kernel": 3, "branch": 0}, 2)])
def test_a_position_sees_both_kernels(settings, reach):
    layer, x = build(**settings), tokens(*GRID, batch=1)
    leaf = x.clone().requires_grad_()
    place = 7 * 14 + 7
    (grad,) = torch.autograd.grad(layer(leaf)[0, place].sum(), leaf)
    places = Grid(GRID).places()
    near = ((places - places[place]).abs() <= reach).all(-1)
    assert torch.equal(grad[0].abs().sum(-1) > 0, near)


def test_padding_enters_no_statistics_of_a_training_step():
    alone, padded = build().train(), build().train()
    x = tokens(3, 4).unflatten(1, (3, 4))
    keep = F.pad(torch.ones(2, 3, 4, dtype=torch.bool), (1, 2, 0, 1))
    expected = alone(x.flatten(1, 2), grid=(3, 4))
    filled = F.pad(x, (0, 0, 1, 2, 0, 1), value=torch.nan).flatten(1, 2)
    got = padded(filled, mask=keep.flatten(1), grid=keep.shape[1:])
    torch.testing.assert_close(got[keep.flatten(1)].view_as(expected), expected, rtol=0, atol=1e-10)
    for name, value in alone.named_buffers():
        torch.testing.assert_close(padded.get_buffer(name), value, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grid": None}, "pass grid"),
        ({"kernel": 4}, "kernel is odd"),
        ({"branch": 7}, "smaller"),
        ({"branch": -1}, "smaller"),
        ({"branch": 2}, "kernel is odd"),
    ],
)
def test_settings_that_mean_nothing(settings, message):
    with pytest.raises(BadInput, match=message):
        build(**settings)


def test_a_grid_of_other_axes():
    with pytest.raises(BadInput, match="built for 2 axes"):
        build()(tokens(20), grid=(20,))
