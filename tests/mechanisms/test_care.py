"""CARE: four groups of channels, two interactions."""

import pytest
import torch
import torch.nn.functional as F

import attlas
from attlas.core.errors import BadInput, Unsupported
from attlas.core.grid import Grid


def make(dim=16, heads=2, grid=(6, 5), **settings):
    layer = attlas.mixer("care", dim, heads, grid=grid, **settings).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return layer


def silence(*interactions):
    with torch.no_grad():
        for interaction in interactions:
            interaction.narrow.weight.zero_()
            interaction.narrow.bias.zero_()


def test_its_parameters_are_those_of_the_published_mixer_and_interaction():
    # Counted in the official code: a block of width 128 with ratios 2 and 4, its layer scale apart.
    assert sum(p.numel() for p in attlas.mixer("care", 128, 2, ratios=(2, 4)).parameters()) == 180_384


def test_attention_equals_its_weights_on_a_plane_of_196():
    layer = make(grid=(14, 14))
    silence(layer.local_global, layer.memory)
    x = torch.randn(2, 196, 16, dtype=torch.float64)
    a = x[..., 4:8]
    q, k = (F.elu(z) + 1 for z in layer.qk_proj(a).chunk(2, -1))
    heads = []
    for h in (slice(0, 2), slice(2, 4)):
        weights = q[..., h] @ k[..., h].mT
        heads.append(weights / weights.sum(-1, keepdim=True) @ a[..., h])
    assert torch.allclose(layer(x)[..., 4:8], torch.cat(heads, -1), atol=1e-5)  # but for ε


def test_without_interactions_the_memory_passes_and_groups_stay_apart():
    layer = make()
    silence(layer.local_global, layer.memory)
    x = torch.randn(2, 30, 16, dtype=torch.float64)
    y = layer(x)
    assert torch.equal(y[..., :4], x[..., :4])
    picture = x.mT.unflatten(-1, (6, 5))
    for channels, conv in ((slice(8, 12), layer.small), (slice(12, 16), layer.large)):
        assert torch.allclose(y[..., channels], conv(picture[:, channels]).flatten(2).mT, atol=1e-12)
    assert layer.small.kernel_size == (3, 3)
    assert layer.large.kernel_size == (7, 7)


def test_the_first_interaction_leaves_the_memory_alone_and_the_second_does_not():
    layer, x = make(), torch.randn(2, 30, 16, dtype=torch.float64)
    silence(layer.memory)
    first = layer(x)
    assert torch.equal(first[..., :4], x[..., :4])
    other = torch.cat([torch.randn_like(x[..., :4]), x[..., 4:]], -1)
    assert torch.equal(layer(other)[..., 4:], first[..., 4:])
    both = make()
    assert not torch.allclose(both(x)[..., :4], x[..., :4])
    assert not torch.allclose(both(other)[..., 4:], both(x)[..., 4:])


def test_it_takes_any_plane():
    layer = make()
    for grid in ((6, 6), (8, 8), (2, 9)):
        x = torch.randn(1, grid[0] * grid[1], 16, dtype=torch.float64)
        assert layer(x, grid=grid).shape == x.shape


@pytest.mark.parametrize("padded", [False, True])
def test_in_training_it_equals_the_oracle_and_padding_enters_no_statistics(padded):
    layer, x = make().train(), torch.randn(3, 30, 16, dtype=torch.float64)
    keep = torch.rand(3, 30) > 0.3 if padded else torch.ones(3, 30, dtype=torch.bool)
    mask = keep if padded else None
    layer.backend = "oracle"
    expected = layer(x, mask=mask)
    layer.backend = "auto"
    got = layer(x.masked_fill(~keep.unsqueeze(-1), torch.nan), mask=mask)
    assert torch.allclose(got[keep], expected[keep], atol=1e-12)
    mean = layer.memory.norm.running_mean
    assert torch.isfinite(mean).all()
    assert torch.allclose(mean[:4], 0.1 * x[..., :4][keep].mean(0), atol=1e-12)


def test_dropout_is_on_in_training_alone():
    layer, x = make(dropout=0.5), torch.randn(1, 30, 16, dtype=torch.float64)
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_what_has_no_meaning_is_refused():
    for dim, heads in ((18, 1), (16, 3)):
        with pytest.raises(BadInput, match=f"a multiple of 4 \\* heads = {4 * heads}, got {dim}"):
            attlas.mixer("care", dim, heads)
    for ratios in ((4,), (0, 4), (1, 2, 3)):
        with pytest.raises(BadInput, match="ratios are two widths"):
            attlas.mixer("care", 16, 2, ratios=ratios)
    with pytest.raises(BadInput, match="dropout"):
        attlas.mixer("care", 16, 2, dropout=1.0)
    with pytest.raises(Unsupported, match="causal"):
        attlas.mixer("care", 16, 2, causal=True)
    layer = attlas.mixer("care", 16, 2)
    x = torch.randn(1, 12, 16)
    with pytest.raises(BadInput, match="pass grid="):
        layer(x)
    with pytest.raises(Unsupported, match="no prefix tokens"):
        layer(x, grid=Grid((11, 1), prefix=1))
