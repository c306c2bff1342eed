"""What only positional attention holds: constant weights, linearity, exact algorithms at any scale."""

import pytest
import torch

import attlas
from attlas.core.errors import BadInput, Unsupported
from attlas.models.positional import ConcatLayer, PositionalTransformer

DOUBLE = {"dtype": torch.float64}


def build(dim=16, heads=2, length=9, **settings):
    return attlas.mixer("positional", dim, heads, length=length, **settings).double()


def test_weights_are_the_double_loop_over_codes_and_rows_sum_to_one():
    codes = torch.randn(6, 5, **DOUBLE)
    layer = build(heads=2, codes=codes)
    torch.nn.init.normal_(layer.qk_proj.bias)
    weight, bias = layer.qk_proj.weight.view(2, 2, 5, 5), layer.qk_proj.bias.view(2, 2, 5)
    expected = torch.empty(2, 6, 6, **DOUBLE)
    for h in range(2):
        for i in range(6):
            for j in range(6):
                q, k = (weight[h, part] @ codes[at].to(layer.codes) + bias[h, part] for part, at in ((0, i), (1, j)))
                expected[h, i, j] = q @ k / 5**0.5
    torch.testing.assert_close(layer.weights(6)[0], expected.softmax(-1), rtol=0, atol=1e-6)
    assert layer.weights(6).shape == (1, 2, 6, 6)


def test_two_inputs_are_mixed_by_the_same_matrix():
    layer = build(dim=9, heads=1)
    with torch.no_grad():
        for linear in (layer.v_proj, layer.out_proj):
            linear.weight.copy_(torch.eye(9))
    x, weights = torch.randn(2, 9, 9, **DOUBLE), layer.weights(9)[0, 0]
    assert torch.equal(weights, layer.weights(9)[0, 0])
    torch.testing.assert_close(layer(x), weights @ x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_without_biases_of_values_it_is_linear(causal):
    layer = build(causal=causal)
    x, y = torch.randn(2, 3, 9, 16, **DOUBLE)
    combined = layer(2.5 * x - 40 * y)
    torch.testing.assert_close(combined, 2.5 * layer(x) - 40 * layer(y), rtol=1e-10, atol=1e-10)


def test_published_parameter_count_of_the_scale_experiment():
    model = PositionalTransformer(8)
    attention = 2 * 2 * (9 * 9 + 9) + 2 * (64 * 64 + 64)
    mlp = (128 * 64 + 64) + (64 * 64 + 64)
    assert len(model.layers) == 4
    assert sum(p.numel() for p in model.parameters()) == (64 + 64) + 4 * (attention + mlp) + (64 + 1)


def prefix_sum(length, gap=40.0):
    """The positional network whose layer k adds what stands 2^k places before, or the scratch token's 0."""
    model = PositionalTransformer(length, dim=2, heads=1, hidden=4, layers=length.bit_length() - 1).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.encode.weight[0, 0] = model.decode.weight[0, 0] = 1
        for k, layer in enumerate(model.layers):
            attend, size = layer.attend, length + 1
            query, key = attend.qk_proj.weight.view(2, size, size)
            key.copy_(torch.eye(size))
            for i in range(size):
                before = i - 2**k if 2**k <= i < length else length
                query[before, i] = gap * size**0.5
            attend.v_proj.weight.copy_(torch.eye(2))
            attend.out_proj.weight.copy_(torch.eye(2))
            first, second = (linear.weight for linear in layer.maps)
            first[0, [0, 2]], first[1, [0, 2]] = 1, -1
            second[0, :2] = torch.tensor([1.0, -1.0])
            # What the scratch token holds stays 0, for it attends to itself.
    return model


@pytest.mark.parametrize("length", [2, 8, 16])
def test_log_n_layers_are_the_exact_prefix_sum_at_any_scale(length):
    model = prefix_sum(length)
    for scale in (1.0, 1e3, 1e-3):
        x = torch.randn(5, length, 1, **DOUBLE) * scale
        torch.testing.assert_close(model(x), x.cumsum(1), rtol=0, atol=1e-10 * scale)


def test_a_layer_is_an_mlp_of_the_concatenation_without_residual():
    layer = ConcatLayer(build(), hidden=24).double()
    x = torch.randn(2, 9, 16, **DOUBLE)
    first, second = layer.maps
    expected = second(first(torch.cat([x, layer.attend(x)], -1)).relu())
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)


def test_the_baseline_sees_codes_and_the_positional_network_does_not():
    assert PositionalTransformer(8).encode.in_features == 1
    baseline = PositionalTransformer(8, mechanism="softmax")
    assert baseline.encode.in_features == 1 + 9
    assert baseline(torch.randn(3, 8, 1)).shape == (3, 8, 1)


def test_padding_counts_for_nothing_even_where_it_is_nan():
    layer, x = build(), torch.randn(2, 9, 16, **DOUBLE)
    keep = torch.arange(9).expand(2, -1) < 6
    expected = layer(x[:, :6])
    x[:, 6:] = torch.nan
    torch.testing.assert_close(layer(x, mask=keep)[:, :6], expected, rtol=0, atol=1e-12)


def test_the_causal_state_holds_values_alone():
    layer = build(causal=True)
    _, state = layer.extend(torch.randn(2, 6, 16, **DOUBLE), layer.initial_state(2))
    assert attlas.state_bytes(state) == 2 * 6 * 16 * 8


def test_what_does_not_fit_is_refused():
    with pytest.raises(BadInput, match="pass length="):
        attlas.mixer("positional", 16, 2)
    with pytest.raises(BadInput, match="15 channels do not split into 2 heads"):
        build(dim=15)
    with pytest.raises(BadInput, match=r"codes are \(positions, features\).*got \(3,\)"):
        build(codes=torch.ones(3))
    with pytest.raises(BadInput, match=r"codes for 9 positions, got 12: build positional with codes=12"):
        build()(torch.randn(1, 12, 16, **DOUBLE))
    with pytest.raises(Unsupported, match="positional does not serve causal cross"):
        build(causal=True)(*torch.randn(2, 1, 9, 16, **DOUBLE))
    with pytest.raises(BadInput, match=r"values are \(batch, 8 tokens, 1 values\), got \(3, 9, 1\)"):
        PositionalTransformer(8)(torch.randn(3, 9, 1))
    with pytest.raises(BadInput, match="length is at least 1"):
        PositionalTransformer(0)
    with pytest.raises(BadInput, match="depth counts the linear maps of the MLP and is at least 1, got 0"):
        PositionalTransformer(8, depth=0)
    with pytest.raises(BadInput, match=r"at least one of each, got \(0, 0\)"):
        build(codes=-1)
