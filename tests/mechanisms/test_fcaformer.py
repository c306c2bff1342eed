"""What only forward cross-attention holds: one softmax over both kinds of tokens, and what its numbers do."""

import pytest
import torch

import attlas
from attlas.core.errors import BadInput

GRID = (3, 4)


def build(handed=0, **settings):
    torch.manual_seed(0)
    layer = attlas.mixer("fcaformer", 16, 2, handed=handed, grid=GRID, **settings)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return layer.double()


def tokens(count=12):
    return torch.randn(2, count, 16, dtype=torch.float64)


def split(x):
    return x.unflatten(-1, (2, 8)).transpose(1, 2)


def plain(layer, x, bias):
    """Attention of x alone, from the layer's projections."""
    k, v = layer.kv_proj(x).chunk(2, -1)
    o = attlas.attend(split(layer.q_proj(x)), split(k), split(v), mask=attlas.Mask.biased(bias))
    return layer.out_proj(o.transpose(1, 2).flatten(2))


def test_the_first_layer_is_attention_with_a_bias_of_distances():
    layer, x = build(), tokens()
    places = attlas.Grid(GRID).places()
    bias = torch.zeros(2, 12, 12, dtype=torch.float64)
    for n, (y, x_) in enumerate(places.tolist()):
        for m, (y_, x__) in enumerate(places.tolist()):
            bias[:, n, m] = layer.position_bias[:, abs(y - y_), abs(x_ - x__)]
    torch.testing.assert_close(layer(x), plain(layer, x, bias), rtol=0, atol=1e-12)


def test_one_softmax_runs_over_own_and_handed_tokens():
    layer, x, s = build(handed=5), tokens(), tokens(5)
    s_n = layer.handed_norm(s * layer.handed_scale.unsqueeze(-1))
    (k, v), (k_s, v_s) = (layer.kv_proj(t).chunk(2, -1) for t in (x, s_n))
    q = split(layer.q_proj(x))
    apart = (attlas.Grid(GRID).places().unsqueeze(1) - attlas.Grid(GRID).places()).abs().unbind(-1)
    own = q @ split(k).mT / 8**0.5 + layer.position_bias[:, apart[0], apart[1]]
    handed = q @ split(k_s).mT / 8**0.5 + layer.handed_bias.unsqueeze(1)
    total = torch.cat([own, handed], -1).exp().sum(-1, keepdim=True)
    o = (own.exp() @ split(v) + handed.exp() @ split(v_s)) / total
    expected = layer.out_proj(o.transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, s), expected, rtol=0, atol=1e-12)


def test_a_bias_of_minus_infinity_removes_handed_tokens_and_a_scale_of_zero_does_not():
    layer, x, s = build(handed=5), tokens(), tokens(5)
    first = build()
    first.load_state_dict({name: t for name, t in layer.state_dict().items() if not name.startswith("handed")})
    alone = first(x)
    with torch.no_grad():
        layer.handed_scale.zero_()
        assert (layer(x, s) - alone).abs().max() > 1e-3
        torch.testing.assert_close(layer(x, s), layer(x, 2 * s), rtol=0, atol=1e-12)  # LN's bias is all that is left
        layer.handed_bias.fill_(-torch.inf)
    torch.testing.assert_close(layer(x, s), alone, rtol=0, atol=1e-12)


def test_padding_among_handed_tokens_is_a_token_less():
    layer, x, s = build(handed=5), tokens(), tokens(5)
    keep = torch.tensor([[True, True, True, False, False]] * 2)
    fewer = build(handed=3)
    own = {n: t[..., :3] if n in ("handed_scale", "handed_bias") else t for n, t in layer.state_dict().items()}
    fewer.load_state_dict(own)
    torch.testing.assert_close(layer(x, s, mask=keep), fewer(x, s[:, :3]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["torch", "oracle"])
def test_a_token_that_only_asks_is_no_key(backend):
    layer, x = build(backend=backend), tokens()
    keys = torch.ones(2, 12, dtype=torch.bool)
    keys[:, 5] = False
    mask = attlas.Mask(keys=keys, queries=torch.ones_like(keys))
    changed = x.clone()
    changed[:, 5] += 1
    first, second = layer(x, mask=mask), layer(changed, mask=mask)
    assert torch.equal(first[keys], second[keys])
    assert (first[:, 5] - second[:, 5]).abs().max() > 1e-3  # it asks as what it is
    torch.testing.assert_close(first[keys], layer(x, mask=keys)[keys], rtol=0, atol=1e-12)


def test_a_smaller_grid_reads_a_part_of_the_biases():
    layer = build()
    x = torch.randn(2, 2, 3, 16, dtype=torch.float64)
    whole = torch.zeros(2, *GRID, 16, dtype=torch.float64)
    whole[:, :2, :3] = x
    keep = torch.zeros(2, *GRID, dtype=torch.bool)
    keep[:, :2, :3] = True
    padded = layer(whole.flatten(1, 2), mask=keep.flatten(1)).unflatten(1, GRID)[:, :2, :3]
    torch.testing.assert_close(layer(x.flatten(1, 2), grid=(2, 3)), padded.flatten(1, 2), rtol=0, atol=1e-12)


def test_what_has_no_meaning_is_refused():
    for settings, words in (({"handed": -1}, "handed counts the tokens"), ({"grid": None}, "pass grid=")):
        with pytest.raises(BadInput, match=words):
            attlas.mixer("fcaformer", 16, 2, **{"grid": GRID} | settings)
    with pytest.raises(BadInput, match="heads must divide dim"):
        attlas.mixer("fcaformer", 16, 3, grid=GRID)
    with pytest.raises(BadInput, match="built for 5 tokens of earlier layers and called with 4"):
        build(handed=5)(tokens(), tokens(4))
    with pytest.raises(BadInput, match="built for 5 tokens of earlier layers and called with 0"):
        build(handed=5)(tokens())
    with pytest.raises(BadInput, match="distances on 2 axes, got a grid 12"):
        build()(tokens(), grid=(12,))
    with pytest.raises(BadInput, match="got a larger grid 4x3"):
        build()(tokens(), grid=(4, 3))
    with pytest.raises(BadInput, match=r"context is .batch, tokens, 16 channels."):
        build(handed=5)(tokens(), tokens(5)[..., :8])
