"""Rank-augmented linear attention: keys reweighed by a global query, outputs by a gate."""

import pytest
import torch
import torch.nn.functional as F

import attlas
from attlas.core.errors import BadInput, Unsupported
from attlas.core.grid import Grid
from attlas.core.mask import Mask
from attlas.core.mechanism import Call
from attlas.mechanisms.linear import rala as rala_module
from attlas.ops.elu import elu_plus_one
from attlas.ops.rotary import rotate_axes


def random_qkv(queries, keys=None, size=8):
    keys = queries if keys is None else keys
    return [torch.randn(2, 3, tokens, size, dtype=torch.float64) for tokens in (queries, keys, keys)]


def plain(size=8, **settings):
    return attlas.make_attend("rala", 3, size, kernel=0, **settings)


def test_it_is_the_published_sum_over_pairs():
    q, k, v = random_qkv(12)
    phi_q, phi_k = F.elu(q) + 1, F.elu(k) + 1
    alpha = 12 * (phi_q.mean(2, keepdim=True) @ phi_k.mT / 8**0.5).softmax(-1)
    places = Grid((3, 4)).places()
    turned = rotate_axes(phi_q, places) @ rotate_axes(phi_k, places).mT
    expected = (alpha * turned) @ v / (alpha * (phi_q @ phi_k.mT)).sum(-1, keepdim=True)
    assert torch.allclose(plain()(q, k, v, grid=(3, 4)), expected, rtol=1e-5)  # but for ε


@pytest.mark.parametrize("padded", [False, True])
def test_alpha_is_one_in_the_mean(padded):
    q, k, _ = random_qkv(10)
    keep = torch.arange(10).expand(2, -1) < torch.tensor([[7], [10]]) if padded else None
    shares = plain()._shares(elu_plus_one(q), elu_plus_one(k), Call(Mask(keys=keep, queries=keep), Grid((10,))))
    assert torch.allclose(shares.sum(-1), torch.ones(2, 3).double())
    assert keep is None or not shares[0, :, 7:].any()


def test_with_equal_alpha_and_no_places_it_is_linear_attention(monkeypatch):
    monkeypatch.setattr(rala_module, "EPS", 0.0)
    q, k, v = random_qkv(9, 14)
    q = q - 40  # a global query near 0 gives every key the same share
    assert torch.allclose(plain()(q, k, v, cross=True), attlas.attend(q, k, v, "linear"), atol=1e-9)


def test_the_gate_has_no_activation_and_multiplies_before_the_projection():
    layer = attlas.mixer("rala", 64, 4, grid=(7, 9))
    assert sum(p.numel() for p in layer.parameters()) == 5 * (64 * 64 + 64) + 64 * 26
    x, seen = torch.randn(2, 63, 64), []
    layer.attend.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        y = layer(x)
        merged = seen[0].transpose(1, 2).flatten(2)
        assert torch.allclose(y, layer.out_proj(merged * layer.gate_proj(x)), atol=1e-6)


def effective_rank(x):
    singular = torch.linalg.svdvals(x)
    return float(torch.special.entr(singular / singular.sum()).sum().exp())


def test_the_gate_lifts_the_rank_of_smooth_features():
    y, x = torch.meshgrid(torch.linspace(0, 1, 14), torch.linspace(0, 1, 14), indexing="ij")
    waves = [torch.sin(6 * (a * x + b * y) + 3 * c) for a, b, c in 3 * torch.rand(64, 3)]
    features = torch.stack(waves, -1).reshape(1, 196, 64)
    layer = attlas.mixer("rala", 64, 1, kernel=0)
    seen = []
    layer.attend.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        layer(features, grid=(14, 14))
        o = seen[0][0, 0]
        assert effective_rank(o * layer.gate_proj(features)[0]) > 1.3 * effective_rank(o)


def test_without_places_order_is_nothing():
    q, k, v = random_qkv(9, 14)
    layer, order = plain(), torch.randperm(14)
    o = layer(q, k, v, cross=True)
    assert torch.allclose(layer(q, k[:, :, order], v[:, :, order], cross=True), o, atol=1e-12)
    order = torch.randperm(9)
    assert torch.allclose(layer(q[:, :, order], k, v, cross=True), o[:, :, order], atol=1e-12)


def test_padding_has_no_share_and_no_query():
    q, k, v = random_qkv(12)
    keep = torch.arange(12).expand(2, -1) < 8
    layer = attlas.make_attend("rala", 3, 8, grid=(3, 4)).double()
    whole = layer(q, k, v, mask=keep, grid=(3, 4))
    real = layer(q[:, :, :8], k[:, :, :8], v[:, :, :8], grid=(2, 4))  # the first two rows
    assert torch.allclose(whole[:, :, :8], real, atol=1e-12)


def test_what_has_no_meaning_is_refused():
    q, k, v = random_qkv(6)
    with pytest.raises(Unsupported, match="causal"):
        plain(causal=True)
    with pytest.raises(BadInput, match="pass grid="):
        attlas.make_attend("rala", 3, 8)
    with pytest.raises(BadInput, match="odd, got 2"):
        attlas.make_attend("rala", 3, 8, grid=(2, 3), kernel=2)
    with pytest.raises(BadInput, match="6 queries and 4 keys"):
        plain()(q, k[:, :, :4], v[:, :, :4])
    with pytest.raises(BadInput, match="a multiple of 6, got 8"):
        plain()(q, k, v, grid=(1, 2, 3))
    built = attlas.make_attend("rala", 3, 8, grid=(2, 3)).double()
    with pytest.raises(BadInput, match="built for 2 axes"):
        built(q, k, v, grid=(6,))
    with pytest.raises(BadInput, match="values of 8 features, got 5"):
        built(q, k, v[..., :5], grid=(2, 3))
