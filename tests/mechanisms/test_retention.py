"""Retention: turning and fading with the distance."""

import cmath
import math

import pytest
import torch
import torch.nn.functional as F

import attlas
from attlas.core.errors import BadInput, Unsupported

DOUBLE = {"dtype": torch.float64}


def layer_of(dim=16, heads=2, **settings):
    return attlas.mixer("retention", dim, heads, causal=True, **settings).double()


def louder(layer):
    """Outputs far above what the norm adds against a division by 0."""
    with torch.no_grad():
        for proj in (layer.q_proj, layer.k_proj, layer.v_proj):
            proj.weight.mul_(100)
    return layer


def test_every_head_fades_at_its_own_rate():
    layer = layer_of(32, 8)
    expected = [31 / 32, 63 / 64, 127 / 128, 255 / 256, 511 / 512, 1023 / 1024, 2047 / 2048, 4095 / 4096]
    assert torch.allclose((-layer.slopes).exp(), torch.tensor(expected, **DOUBLE), rtol=1e-14)
    layer.bfloat16()
    assert layer.slopes.dtype == layer.angles.dtype == torch.float64


def test_angles_fall_from_one_to_a_ten_thousandth():
    assert torch.allclose(layer_of(20, 2).angles, torch.tensor([1, 0.1, 0.01, 0.001, 0.0001], **DOUBLE), rtol=1e-12)


def test_one_head_of_two_features_by_hand():
    layer, x = louder(layer_of(2, 1)), torch.randn(1, 5, 2, **DOUBLE)
    q, k = (proj(x)[0].tolist() for proj in (layer.q_proj, layer.k_proj))
    v, rows = layer.v_proj(x)[0], []
    for n in range(5):
        row = torch.zeros(4, **DOUBLE)
        for m in range(n + 1):
            fade = (31 / 32 * cmath.exp(1j)) ** (n - m)
            row = row + (complex(*q[n]) * complex(*k[m]).conjugate() * fade).real / math.sqrt(2) * v[m]
        rows.append(row)
    o = F.rms_norm(torch.stack(rows), (4,), eps=1e-6)
    expected = layer.out_proj(F.silu(layer.gate_proj(x[0])) * o)
    assert torch.allclose(layer(x)[0], expected, atol=1e-12)


def test_only_distances_matter():
    layer, x = louder(layer_of()), torch.randn(2, 30, 16, **DOUBLE)
    state = layer.initial_state(2, x)
    late, _ = layer.extend(x, state._replace(tokens=state.tokens + 1000))
    assert torch.allclose(late, layer(x), atol=1e-9)
    turned = layer.extend(x[:, 15:], layer.extend(x[:, :15], state)[1]._replace(tokens=state.tokens + 14))[0]
    assert not torch.allclose(turned, layer(x)[:, 15:], atol=1e-3)  # the segment too near by one place


def test_pairs_blocks_and_recurrence_agree():
    layer, x = louder(layer_of(24, 3)), torch.randn(2, 150, 24, **DOUBLE)
    whole = layer(x)
    layer.backend = "oracle"
    assert torch.allclose(layer(x), whole, atol=1e-9)
    layer.backend = "auto"
    state, parts = layer.initial_state(2, x), []
    for piece in x.split([1, 70, 1, 78], 1):
        y, state = layer.extend(piece, state)
        parts.append(y)
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-9)


def test_the_norm_hides_the_size_of_what_is_retained():
    layer, x = louder(layer_of()), torch.randn(2, 12, 16, **DOUBLE)
    first = layer(x)
    with torch.no_grad():
        layer.k_proj.weight.mul_(1000)
    assert torch.allclose(layer(x), first, atol=1e-4)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_sums_beyond_float16_are_normed_away(backend):
    layer, x = louder(layer_of(32, backend=backend)), 1 + torch.randn(1, 64, 32, **DOUBLE)
    expected = layer(x)
    with torch.autocast("cpu", torch.float16):
        mixed = layer.float()(x.float())
    for y in (mixed, layer.half()(x.half())):
        assert (y - expected).norm() < 2e-2 * expected.norm()


def test_a_model_laid_out_on_meta_keeps_its_rates():
    with torch.device("meta"):
        layer = attlas.mixer("retention", 16, 2, causal=True)
    layer, x = layer.to_empty(device="cpu"), torch.randn(1, 5, 16)
    filled = attlas.mixer("retention", 16, 2, causal=True)
    layer.load_state_dict(filled.state_dict())
    assert torch.equal(layer(x), filled(x))


def test_padding_is_skipped():
    layer, x, keep = louder(layer_of()), torch.randn(2, 20, 16, **DOUBLE), torch.rand(20) > 0.4
    y = layer(x, mask=keep.expand(2, -1))
    assert torch.allclose(y[:, keep], layer(x[:, keep]), atol=1e-10)
    assert not y[:, ~keep].any()


def test_the_state_is_a_matrix_and_a_number():
    layer, x = layer_of(32, 4), torch.randn(3, 40, 32, **DOUBLE)
    keep = torch.arange(40).expand(3, -1) > 9
    _, state = layer.extend(x, layer.initial_state(3, x), keep=keep)
    assert state.tokens.tolist() == [30, 30, 30]
    assert attlas.state_bytes(state) == 8 * 3 * (4 * 8 * 16 + 1)


def test_published_sizes():
    layer = layer_of(64, 4)
    assert sum(p.numel() for p in layer.parameters()) == 8 * 64**2
    assert layer.cost(1, 4096).flops == 4 * layer.cost(1, 1024).flops


def test_what_has_no_meaning_is_refused():
    with pytest.raises(BadInput, match="5 is odd"):
        layer_of(15, 3)
    with pytest.raises(BadInput, match="heads must divide dim: 16 channels"):
        layer_of(16, 3)
    with pytest.raises(BadInput, match="expand_v times dim"):
        layer_of(expand_v=-1.0)
    with pytest.raises(Unsupported, match="causal=True"):
        attlas.mixer("retention", 16, 2)
