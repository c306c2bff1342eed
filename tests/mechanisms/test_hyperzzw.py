"""HyperZ.Z.W: kernels from coordinates, products of maps, and what of the batch an image may see."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attlas
from attlas.core.errors import BadInput, Unsupported
from attlas.mechanisms.conv.hyperzzw import HyperZZW, LocalSlowNet, SlowNet, slow_neural_loss, standardised

SMALL = {"global_hidden": 6, "spatial_hidden": 4, "local_hidden": 4, "channel_hidden": 4, "interaction_hidden": 4}


def build(side=5, dim=4, **settings):
    torch.manual_seed(0)
    return attlas.mixer("hyperzzw", dim, grid=(side, side), **SMALL | settings).double()


def images(side=5, dim=4, batch=3):
    return torch.randn(batch, side * side, dim, dtype=torch.float64)


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def test_the_published_layer_has_as_many_parameters_as_counted_by_hand():
    def slow(axes, points, hidden, channels, layers):
        waves = (layers + 1) * (axes * hidden + hidden)
        return waves + layers * (hidden**2 + hidden) + hidden * channels + channels + points

    c, positions = 12, 32 * 32
    locally = sum(
        slow(2, k * k, 32, c, 2) + (32 * c + 32) + (32**2 + 32) + 2 * (32**2 + 32) + c * c + 1 for k in (3, 9, 5, 7)
    )
    units = 2 * (3 * (c * c + c) + c * c + positions)
    networks = slow(2, positions, 64, c, 2) + slow(1, c, 32, 1, 2) + slow(1, c, 16, 1, 2) + slow(2, positions, 64, 1, 2)
    layer = attlas.mixer("hyperzzw", c, grid=(32, 32))
    assert parameters(layer) == networks + locally + units + c * c + 10 * c * c + c


def test_a_slow_network_grows_with_its_kernel_by_the_bias_of_the_points_alone():
    small, large = (SlowNet((side, side), 16, 8, 2, 1.0) for side in (5, 40))
    assert parameters(large) - parameters(small) == 40**2 - 5**2
    narrow, wide = (SlowNet((channels,), 16, 1, 2, 1.0) for channels in (12, 144))
    assert parameters(wide) - parameters(narrow) == 144 - 12


def test_a_finer_grid_of_coordinates_samples_the_same_kernel():
    coarse, fine = (SlowNet((side, side), 8, 3, 2, 0.2).double() for side in (9, 17))
    weights = {name: t for name, t in coarse.state_dict().items() if name != "bias"}
    fine.load_state_dict(weights, strict=False)
    assert torch.allclose(fine().view(17, 17, 3)[::2, ::2], coarse().view(9, 9, 3), rtol=0, atol=1e-12)


def test_branches_are_standardised():
    x = standardised(3 + images(8))
    assert torch.allclose(x.mean(1), torch.zeros(3, 4).double(), atol=1e-5)
    assert torch.allclose(x.var(1, unbiased=False), torch.ones(3, 4).double(), atol=1e-4)


def test_the_product_in_a_gated_unit_is_kept_wide():
    layer = build(8, 16).half().eval()
    unit, x = layer.gated, (150 * images(8, 16)).half()
    assert not (unit.k(x) * unit.q(unit.v(x))).isfinite().all()
    assert layer(x).isfinite().all()
    got = unit(x).float().detach()
    assert torch.allclose(got, unit.float()(x.float()), rtol=0.02, atol=0.02 * float(got.abs().max()))


def test_the_global_branch_is_a_matrix_product_of_maps():
    """With the output reading the first global branch alone."""
    layer = build().eval()
    with torch.no_grad():
        layer.out_proj.weight.zero_()
        layer.out_proj.weight[:, :4] = torch.eye(4)
    x = images()
    z = x.mT.unflatten(2, (5, 5)) * layer.global_kernel()
    fast = standardised(layer.gated_global(z.flatten(2).mT) + layer.gated(x)).mT.unflatten(2, (5, 5))
    expected = torch.einsum("bcik,bckj->bcij", z, fast)
    assert torch.allclose(layer(x).mT.unflatten(2, (5, 5)), expected, rtol=0, atol=1e-10)


def test_every_position_sees_every_other():
    layer = build().eval()
    x = images(batch=1).requires_grad_()
    for n in (0, 7, 24):
        (grad,) = torch.autograd.grad(layer(x)[0, n].sum(), x)
        assert (grad.abs().sum(-1) > 0).all()


def test_in_training_the_batch_counts_and_in_evaluation_it_does_not():
    layer = build(dim=3)
    x = images(dim=3)
    other = x.clone()
    other[1:] = images(dim=3)[1:]
    assert not torch.allclose(layer(x)[0], layer(other)[0])
    layer.eval()
    assert torch.equal(layer(x)[0], layer(other)[0])
    assert torch.allclose(layer(x[:1]), layer(x)[:1], rtol=0, atol=1e-12)


def test_running_statistics_follow_those_of_the_batch():
    layer = build(dim=3)
    x = images(dim=3)
    with torch.no_grad():
        for _ in range(150):
            trained = layer(x)
    assert torch.allclose(layer.local[0].slow.pooled, _pooled(x, 3), rtol=0, atol=1e-6)
    # A running variance is of n - 1 in n, as in every batch normalisation.
    assert torch.allclose(layer.eval()(x), trained, rtol=0.02, atol=0.02)


def _pooled(x, size):
    return F.adaptive_avg_pool2d(x.mT.unflatten(2, (5, 5)), size).mean(0).flatten(1).T


def test_forward_and_gradients_equal_the_oracle_in_training():
    layer, x = build().train(), images()
    results = []
    for backend in ("oracle", "auto"):
        layer.backend = backend
        y = layer(x)
        torch.manual_seed(1)
        results.append((y, torch.autograd.grad((y * torch.randn(y.shape)).sum(), list(layer.parameters()))))
    (expected, expected_grads), (got, grads) = results
    assert torch.allclose(got, expected, rtol=0, atol=1e-9)
    for a, b in zip(grads, expected_grads, strict=True):
        assert torch.allclose(a, b, rtol=1e-7, atol=1e-8)


def test_renormalisation_lets_no_gradient_through_the_length():
    net = LocalSlowNet(3, 4, 2, 1.0).double()
    hidden = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    said = torch.randn(9, 4, dtype=torch.float64)
    (grad,) = torch.autograd.grad(net.modulated(hidden, 0, said).square().sum(), hidden)
    assert torch.allclose((grad * hidden).sum(0), torch.zeros(4).double(), atol=1e-10)
    assert grad.abs().max() > 1e-3
    plain = net.modulated(hidden, 0, said) / net.modulations[0](said)
    assert torch.allclose(plain, hidden * (1 + 0.1 / hidden.norm(dim=0)))


def test_the_slow_loss_is_zero_where_deep_kernels_are_tiled_shallow_ones():
    shallow = torch.randn(3, 4, 4)
    assert slow_neural_loss([shallow, shallow.repeat(4, 1, 1), shallow.repeat(12, 1, 1)]) == 0
    apart = slow_neural_loss([shallow, shallow.repeat(2, 1, 1) + 1, shallow.repeat(2, 1, 1)])
    assert apart == pytest.approx(1 + 0 + 1)
    assert slow_neural_loss([]) == slow_neural_loss([shallow]) == 0
    with pytest.raises(BadInput, match="a multiple of those before"):
        slow_neural_loss([shallow, torch.randn(4, 4, 4)])
    model = nn.Sequential(build(), build())
    kernels = [m.global_kernel() for m in model.modules() if isinstance(m, HyperZZW)]
    assert slow_neural_loss(kernels) == 0
    with torch.no_grad():
        model[1].slow_global.out.bias += 2
    kernels = [m.global_kernel() for m in model.modules() if isinstance(m, HyperZZW)]
    assert slow_neural_loss(kernels).item() == pytest.approx(4)


def test_two_layers_without_residuals_learn_to_tell_gratings():
    torch.manual_seed(0)
    model = nn.ModuleList(attlas.mixer("hyperzzw", 6, grid=(6, 6), kernels=(3, 3, 3, 5), **SMALL) for _ in range(2))
    lift, head = nn.Linear(1, 6), nn.Linear(6, 3)
    optimiser = torch.optim.Adam([*model.parameters(), *lift.parameters(), *head.parameters()], lr=6e-3)
    places = torch.arange(6.0)

    def batch(size):
        label = torch.randint(3, (size,))
        along = torch.stack([places.expand(6, 6), places.view(6, 1).expand(6, 6), places + places.view(6, 1)])
        phase = 2 * math.pi * torch.rand(size, 1, 1)
        return ((math.pi / 2 * along[label] + phase).sin() + 0.3 * torch.randn(size, 6, 6)).view(size, 36, 1), label

    def logits(x):
        x = lift(x)
        for layer in model:
            x = F.gelu(standardised(layer(x)))
        return head(x.mean(1))

    for _ in range(40):
        x, label = batch(24)
        optimiser.zero_grad()
        F.cross_entropy(logits(x), label).backward()
        optimiser.step()
    model.eval()
    x, label = batch(200)
    assert (logits(x).argmax(1) == label).double().mean() > 0.85


def test_what_has_no_meaning_is_refused():
    for grid in (None, (4, 5), (1, 1)):
        with pytest.raises(BadInput, match=r"build it with grid=\(side, side\)"):
            attlas.mixer("hyperzzw", 4, grid=grid)
    with pytest.raises(Unsupported, match="does not serve a grid 16"):
        attlas.mixer("hyperzzw", 4, grid=(16,))
    for kernels in ((3, 5, 7), (3, 5, 7, 8), (1, 3, 5, 7)):
        with pytest.raises(BadInput, match="four odd sizes of at least 3"):
            build(kernels=kernels)
    with pytest.raises(BadInput, match="hidden sizes are at least 1"):
        build(local_hidden=0)
    with pytest.raises(BadInput, match="has kernels for a grid 5x5, got a grid 4x4"):
        build()(images(4), grid=(4, 4))
    with pytest.raises(Unsupported, match="a mask with padding"):
        build()(images(), mask=torch.ones(3, 25, dtype=torch.bool))
    with pytest.raises(Unsupported, match="causal use"):
        attlas.mixer("hyperzzw", 4, grid=(4, 4), causal=True)
