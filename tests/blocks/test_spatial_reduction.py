"""Spatial reduction as in PVT, and agents on it."""

import pytest
import torch
import torch.nn.functional as F

import attlas
from attlas import Grid, Mask
from attlas.blocks.positions import LRPE, ALiBi, Learned, PartRotary, RelativeBias, Rotary
from attlas.blocks.spatial_reduction import SpatialReduction
from attlas.core.errors import BadInput, Unsupported
from attlas.ops.flops import flop_counter

DOUBLE = {"dtype": torch.float64}


def reduced(name, by, /, **settings):
    return SpatialReduction(attlas.make_attend(name, 2, 4, grid=(4, 6), **settings), reduction=by)


def test_it_is_cross_attention_to_the_normed_convolution():
    layer = reduced("softmax", 2).double()
    x = torch.randn(2, 24, 8, **DOUBLE)
    picture = x.mT.unflatten(-1, (4, 6))
    z = F.conv2d(picture, layer.reduce.weight, layer.reduce.bias, stride=2).flatten(2).mT
    z = F.layer_norm(z, (8,), layer.reduce_norm.weight, layer.reduce_norm.bias)
    plain = attlas.mixer("softmax", 8, 2).double()
    plain.load_state_dict({n: p for n, p in layer.state_dict().items() if not n.startswith("reduce")})
    assert torch.allclose(layer(x), plain(x, z), atol=1e-12)


def test_agents_over_reduced_keys_equal_the_formula():
    layer = reduced("agent", 2, agents=4, reduction=2).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    x = torch.randn(2, 24, 8, **DOUBLE, requires_grad=True)
    y = layer(x)
    grads = torch.autograd.grad(y.sum(), layer.parameters())
    assert all(
        grad.any() for name, grad in zip(dict(layer.named_parameters()), grads, strict=True) if name != "k_proj.bias"
    )
    layer.attend.backend = "oracle"
    assert torch.allclose(layer(x), y, atol=1e-10)
    assert layer.attend.key_places.axes[0].shape == (2, 4, 2)
    assert layer.attend.query_places.axes[0].shape == (2, 4, 4)


def test_agents_read_biases_of_the_coarse_grid_and_convolve_stretched_values():
    settings = {"grid": (4, 6), "agents": 4, "reduction": 2}
    local, plain = (attlas.make_attend("agent", 2, 4, kernel=k, **settings).double() for k in (3, 0))
    plain.load_state_dict({n: p for n, p in local.state_dict().items() if not n.startswith("conv")})
    q, k, v = torch.randn(1, 2, 24, 4, **DOUBLE), *torch.randn(2, 1, 2, 6, 4, **DOUBLE)
    picture = F.interpolate(v.mT.reshape(1, 8, 2, 3), (4, 6), mode="bilinear")
    conv = F.conv2d(picture, local.convolution.weight, local.convolution.bias, padding=1, groups=8)
    assert torch.allclose(local(q, k, v) - plain(q, k, v), conv.reshape(1, 2, 4, 24).mT, atol=1e-12)
    agents = F.adaptive_avg_pool2d(q.mT.reshape(1, 8, 4, 6), (2, 2)).reshape(1, 2, 4, 4).mT
    gather = (agents @ k.mT / 2 + plain.key_places(Grid((2, 3)))).softmax(-1)
    read = (q @ agents.mT / 2 + plain.query_places(Grid((4, 6))).mT).softmax(-1)
    assert torch.allclose(plain(q, k, v), read @ gather @ v, atol=1e-12)


def test_agents_over_reduced_keys_run_on_another_grid():
    layer = reduced("agent", 2, agents=4, reduction=2)
    assert layer(torch.randn(2, 8 * 10, 8), grid=(8, 10)).shape == (2, 80, 8)
    assert layer(torch.randn(2, 7 * 5, 8), grid=(7, 5)).shape == (2, 35, 8)


@pytest.mark.parametrize(("name", "settings"), [("softmax", {}), ("agent", {"agents": 4, "reduction": 2})])
def test_the_cost_is_what_runs(name, settings):
    layer = reduced(name, 2, **settings)
    layer.attend.backend = "torch"
    with torch.no_grad(), flop_counter() as counter:
        layer(torch.randn(3, 24, 8))
    assert layer.cost(3, 24).executed == counter.get_total_flops()


def pvt_parameters(depths):
    total, before = 0, 3
    stages = zip((64, 128, 320, 512), (1, 2, 5, 8), (8, 8, 4, 4), depths, (9, 16, 49, 49), (56, 28, 14, 7), strict=True)
    for dim, heads, mlp, depth, agents, side in stages:
        patch = 4 if before == 3 else 2
        total += before * patch**2 * dim + 3 * dim + side**2 * dim  # embedding, its norm, positions
        layer = attlas.mixer("agent", dim, heads, grid=(side, side), agents=agents)
        total += depth * (sum(p.numel() for p in layer.parameters()) + 2 * mlp * dim**2 + (mlp + 5) * dim)
        before = dim
    return total + 512 * 1000 + 1000


@pytest.mark.parametrize(
    ("depths", "millions"),
    [((2, 2, 2, 2), 11.6), ((3, 4, 6, 3), 20.6), ((3, 4, 18, 3), 35.9), ((3, 8, 27, 3), 48.7)],
    ids=["tiny", "small", "medium", "large"],
)
def test_parameters_of_agent_pvt(depths, millions):
    assert round(pvt_parameters(depths) / 1e6, 1) == millions


@pytest.mark.parametrize(
    "position", [RelativeBias(2, (4, 6)), ALiBi(2), Rotary(4), PartRotary(2, 2), LRPE(2, 4), Learned(8, 24)]
)
def test_reduced_keys_stand_at_no_position(position):
    attend = attlas.make_attend("softmax", 2, 4, grid=(4, 6))
    with pytest.raises(BadInput, match=f"so that {type(position).__name__} has no place here"):
        SpatialReduction(attend, reduction=2, position=position)
    assert SpatialReduction(attend, reduction=2, position=None)(torch.randn(1, 24, 8)).shape == (1, 24, 8)


@pytest.mark.parametrize(
    "mask",
    [
        Mask(causal=True),
        Mask.window(2),
        Mask.biased(torch.zeros(1, 1, 24, 24)),
        Mask.padding(torch.ones(1, 24, dtype=torch.bool)),
        Mask(queries=torch.ones(1, 24, dtype=torch.bool)),
    ],
)
def test_masks_over_tokens_are_refused(mask):
    with pytest.raises(Unsupported, match=r"without padding, causality.* take attlas.mixer\('softmax', ...\)"):
        reduced("softmax", 2)(torch.randn(1, 24, 8), mask=mask)


def test_what_does_not_fit_is_refused():
    with pytest.raises(BadInput, match="noncausal attend with grid"):
        SpatialReduction(attlas.make_attend("softmax", 2, 4), reduction=2)
    for reduction in (0, 2.5):
        with pytest.raises(BadInput, match=f"reduction is a whole number, at least 1, got {reduction}"):
            reduced("softmax", reduction)
    with pytest.raises(BadInput, match="by 5 each, got a grid 4x6"):
        reduced("softmax", 5)(torch.randn(1, 24, 8))
    layer = reduced("softmax", 2)
    with pytest.raises(BadInput, match="grid 4x6 after 1 prefix"):
        layer(torch.randn(1, 25, 8), grid=Grid((4, 6), prefix=1))
    with pytest.raises(BadInput, match="reduction is at least 1, as many keys"):
        attlas.make_attend("agent", 2, 4, grid=(4, 6), agents=4, reduction=0)
    with pytest.raises(BadInput, match="the keys' 2 times coarser on each axis, got 24 queries and 24 keys"):
        attlas.mixer("agent", 8, 2, grid=(4, 6), agents=4, reduction=2)(torch.randn(1, 24, 8))
    with pytest.raises(Unsupported, match="no prefix"):
        attlas.make_attend("agent", 2, 4, grid=Grid((4, 6), prefix=1), agents=4, reduction=2)
    with pytest.raises(BadInput, match="grid 2x6 cannot be reduced by 4"):
        attlas.make_attend("agent", 2, 4, grid=(2, 6), agents=4, reduction=4)
