"""What only Kolmogorov-Arnold attention holds: its functions, its counts, one operator for many layers."""

import copy
import math

import numpy as np
import pytest
import torch

import attlas
from attlas.core.errors import BadInput

DOUBLE = {"dtype": torch.float64}
KEYS, RANK = 7, 3
WAVELETS = ("mexican_hat", "morlet", "dog", "meyer", "shannon")


def build(heads=2, keys=KEYS, rank=RANK, **settings):
    attend = attlas.make_attend("karat", heads, 4, length=keys, rank=rank, **settings).double()
    with torch.no_grad():
        for parameter in attend.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return attend


def tensors(heads=2, keys=KEYS, batch=2):
    return [torch.randn(batch, heads, keys, 4, **DOUBLE) for _ in range(3)]


def vision(dim, heads, layers, frequencies, universal):
    """The attention layers of a ViT at 224 x 224, and what they hold above those of softmax."""
    host, ours, operator = [], [], None
    for _ in range(layers):
        host.append(attlas.mixer("softmax", dim, heads))
        settings = {"operator": operator} if operator else {"frequencies": frequencies}
        layer = attlas.mixer("karat", dim, heads, grid=attlas.Grid((14, 14), prefix=1), **settings)
        operator = layer.attend.operator if universal else None
        ours.append(layer)
    count = [sum(p.numel() for p in torch.nn.ModuleList(m).parameters()) for m in (ours, host)]
    return count[0] - count[1]


@pytest.mark.parametrize(
    ("dim", "heads", "frequencies", "universal", "published"),
    [
        (768, 12, 1, False, 1_702_080),
        (768, 12, 1, True, 141_840),
        (384, 6, 3, False, 1_531_872),
        (384, 6, 3, True, 127_656),
        (192, 3, 3, False, 765_936),
        (192, 3, 3, True, 63_828),
    ],
    ids=["Base G1B", "Base G1U", "Small G3B", "Small G3U", "Tiny G3B", "Tiny G3U"],
)
def test_published_increments_over_the_vision_transformer(dim, heads, frequencies, universal, published):
    with torch.device("meta"):
        assert vision(dim, heads, 12, frequencies, universal) == published


def test_the_products_are_the_printed_triple_sum():
    attend, (q, k, v) = build(frequencies=2), tensors()
    operator = attend.operator
    phi = torch.zeros(2, 2, KEYS, RANK, **DOUBLE)
    scores = torch.einsum("bhnd,bhmd->bhnm", q, k) / 2
    for m in range(KEYS):
        for g in (1, 2):
            angle = (g * scores[..., m]).unsqueeze(-1)
            a = operator.cosine[g - 1, :, m] * operator.cosine_scale[:, m]
            b = operator.sine[g - 1, :, m] * operator.sine_scale[:, m]
            phi = phi + angle.cos() * a.unsqueeze(1) + angle.sin() * b.unsqueeze(1)
    expected = torch.einsum("bhnr,hmr,bhme->bhne", phi, operator.weight, v)
    got = attend(q, k, v)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    seed, parameters = torch.randn_like(got), list(attend.parameters())
    for left, right in zip(*(torch.autograd.grad(o, parameters, seed) for o in (got, expected)), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-12)


def test_scores_of_any_size_give_bounded_sums_and_a_full_turn_changes_nothing():
    operator = build(frequencies=3).operator
    scores = torch.randn(2, 2, 5, KEYS, **DOUBLE)
    bound = (operator.cosine * operator.cosine_scale).abs().sum((0, 2)) + (
        (operator.sine * operator.sine_scale).abs().sum((0, 2))
    )
    for size in (1, 1e3, 1e6):
        assert (operator(scores * size, None).abs() <= bound.unsqueeze(1)).all()
    turned = operator(scores + 2 * math.pi, None)
    torch.testing.assert_close(turned, operator(scores, None), rtol=0, atol=1e-12)
    assert not torch.allclose(operator(scores + 1, None), operator(scores, None))


def printed(name, z):
    """The wavelets of the paper's table at height 1."""
    if name == "mexican_hat":
        return 2 / (np.pi**0.25 * np.sqrt(3)) * (1 - z**2) * np.exp(-(z**2) / 2)
    if name == "morlet":
        return np.cos(5 * z) * np.exp(-(z**2) / 2)
    if name == "dog":
        step = 1e-5
        return -(np.exp(-((z + step) ** 2) / 2) - np.exp(-((z - step) ** 2) / 2)) / (2 * step)
    if name == "meyer":
        t = 2 * np.abs(z) - 1
        falling = np.cos(np.pi / 2 * t**4 * (35 - 84 * t + 70 * t**2 - 20 * t**3))
        return np.sin(np.pi * np.abs(z)) * np.where(t <= 0, 1, np.where(t >= 1, 0, falling))
    return np.where(z == 0, 1, np.sin(z) / np.where(z == 0, 1, z))


@pytest.mark.parametrize("name", WAVELETS)
def test_wavelets_are_the_printed_ones(name):
    operator = build(1, 5, 1, basis=name).operator
    scores = torch.linspace(-3, 3, 60, **DOUBLE).view(1, 1, 12, 5)
    s, t, w = (x.detach()[0, :, 0].numpy() for x in (operator.scale, operator.place, operator.height))
    window = 0.54 - 0.46 * np.cos(2 * np.pi * np.arange(5) / 4) if name == "shannon" else 1
    expected = (w * window * printed(name, (scores[0, 0].numpy() - t) / s)).sum(-1)
    assert np.allclose(operator(scores, None)[0, 0, :, 0].detach().numpy(), expected, rtol=0, atol=1e-7)


def test_rational_functions_are_the_printed_ones():
    operator = build(1, 1, 1, basis="rational", degrees=(3, 2)).operator
    x = torch.linspace(-4, 4, 50, **DOUBLE)
    above, below = (p.detach().flatten().tolist() for p in (operator.above, operator.below))
    expected = np.polyval(above[::-1], x.numpy()) / (1 + np.abs(np.polyval([*below[::-1], 0], x.numpy())))
    assert np.allclose(operator(x.view(1, 1, 50, 1), None).detach().flatten().numpy(), expected)


def test_a_base_function_is_added_once_for_each_key():
    plain, base = (build(basis="fourier", base=name).operator for name in (None, "silu"))
    base.load_state_dict(plain.state_dict())
    scores = torch.randn(2, 2, 5, KEYS, **DOUBLE)
    added = torch.nn.functional.silu(scores).sum(-1, keepdim=True).expand(-1, -1, -1, RANK)
    torch.testing.assert_close(base(scores, None) - plain(scores, None), added, rtol=0, atol=1e-12)


def test_rows_begin_at_order_one():
    for basis in ("fourier", "morlet", "dog", "shannon"):
        operator = attlas.make_attend("karat", 3, 64, length=197, basis=basis).operator
        y = operator(torch.randn(1, 3, 197, 197), None)
        assert 0.2 < y.std() < 2


def test_layers_that_share_an_operator_hold_one_and_add_up_its_gradients():
    first = attlas.mixer("karat", 16, 2, length=KEYS, rank=RANK).double()
    second = attlas.mixer("karat", 16, 2, length=KEYS, operator=first.attend.operator).double()
    assert first.attend.operator.cosine is second.attend.operator.cosine
    model = torch.nn.Sequential(first, second)
    apart = torch.nn.Sequential(first, copy.deepcopy(second))
    x = torch.randn(2, KEYS, 16, **DOUBLE)
    for built in (apart, model):
        built.zero_grad()
        built(x).square().sum().backward()
        if built is apart:
            parts = [layer.attend.operator.cosine.grad.clone() for layer in apart]
    torch.testing.assert_close(first.attend.operator.cosine.grad, parts[0] + parts[1], rtol=1e-10, atol=1e-12)
    assert len(list(model.parameters())) == len(list(apart.parameters())) - 5


@pytest.mark.parametrize("basis", ["fourier", "rational", "morlet"])
def test_padding_counts_for_nothing_even_where_it_is_nan(basis):
    attend, (q, k, v) = build(basis=basis), tensors()
    keep = torch.arange(KEYS).expand(2, -1) < 5
    expected = build(basis=basis, keys=5)
    with torch.no_grad():
        for ours, theirs in zip(expected.parameters(), attend.parameters(), strict=True):
            ours.copy_(theirs[..., :5, :])
    first = expected(q[:, :, :5], k[:, :, :5], v[:, :, :5])
    k[:, :, 5:], v[:, :, 5:] = torch.nan, torch.nan
    q.requires_grad_()
    got = attend(q, k, v, mask=keep)
    torch.testing.assert_close(got[:, :, :5], first, rtol=0, atol=1e-12)
    (grad,) = torch.autograd.grad(got.sum(), q)
    assert torch.isfinite(grad).all()


def test_a_model_of_it_can_be_copied_and_saved(tmp_path):
    attend, (q, k, v) = build(base="identity"), tensors()
    torch.save(attend, tmp_path / "whole.pt")
    loaded = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert torch.equal(loaded(q, k, v), attend(q, k, v))


def test_what_does_not_fit_is_refused():
    q, k, v = tensors(keys=8)
    with pytest.raises(BadInput, match=r"functions for 7 keys, got 8.*pad shorter"):
        build()(q, k, v)
    with pytest.raises(BadInput, match="functions for 7 keys, got 6"):
        build()(q[:, :, :6], k[:, :, :6], v[:, :, :6])
    with pytest.raises(BadInput, match="pass length="):
        attlas.mixer("karat", 16, 2)
    with pytest.raises(BadInput, match=r"basis is one of fourier.*got 'spline'"):
        build(basis="spline")
    with pytest.raises(BadInput, match=r"base is None.*got 'relu'"):
        build(base="relu")
    with pytest.raises(BadInput, match="rank must be at least 1, got 0"):
        build(rank=0)
    with pytest.raises(BadInput, match="operator is for 2 heads and 7 keys, this layer has 2 heads and 9 keys"):
        attlas.make_attend("karat", 2, 4, length=9, operator=build().operator)
    with pytest.raises(BadInput, match="operator brings its own basis"):
        attlas.make_attend("karat", 2, 4, length=7, rank=5, operator=build().operator)
