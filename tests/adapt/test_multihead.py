import itertools

import pytest
import torch
from torch import nn

import attlas
from attlas.core.errors import BadInput, UnknownName, Unsupported

B, N, M, C, H = 3, 5, 7, 16, 4


def pair(**arguments):
    theirs = nn.MultiheadAttention(C, H, **arguments)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.3)
    ours = attlas.MultiheadAttention(C, H, **arguments)
    assert set(ours.state_dict()) == set(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    return ours.eval(), theirs.eval()


def assert_same(ours, theirs, *args, **kwargs):
    got, got_weights = ours(*args, **kwargs)
    expected, expected_weights = theirs(*args, **kwargs)
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 1e-6 * expected.abs().max().clamp(min=1)
    assert (got_weights is None) == (expected_weights is None)
    if got_weights is not None:
        assert got_weights.shape == expected_weights.shape
        assert (got_weights - expected_weights).abs().max() <= 1e-6


SETTINGS = [
    {},
    {"batch_first": True},
    {"bias": False},
    {"kdim": 6, "vdim": 10},
    {"add_bias_kv": True, "add_zero_attn": True},
]


@pytest.mark.parametrize("arguments", SETTINGS, ids=str)
@pytest.mark.parametrize("need_weights", [True, False])
def test_equals_torch_with_its_weights(arguments, need_weights):
    ours, theirs = pair(**arguments)
    query = torch.randn(N, B, C)
    key, value = torch.randn(M, B, arguments.get("kdim", C)), torch.randn(M, B, arguments.get("vdim", C))
    if arguments.get("batch_first"):
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    padding = torch.zeros(B, M, dtype=torch.bool)
    padding[0, 5:] = True
    pairs = torch.rand(B * H, N, M) > 0.6
    pairs[..., 0] = False  # torch gives NaN where a query may attend to nothing
    square = torch.rand(N, M).masked_fill(torch.ones(N, M, dtype=torch.bool).triu(3), -torch.inf)
    for key_padding_mask, attn_mask in itertools.product(
        (None, padding), (None, pairs, square, pairs[0], torch.randn(B * H, N, M))
    ):
        if key_padding_mask is not None and attn_mask is not None and attn_mask.is_floating_point():
            key_padding_mask = torch.zeros(B, M).masked_fill(padding, -torch.inf)
        assert_same(
            ours,
            theirs,
            query,
            key,
            value,
            key_padding_mask=key_padding_mask,
            attn_mask=attn_mask,
            need_weights=need_weights,
        )


def test_equals_torch_without_a_batch_and_per_head():
    ours, theirs = pair()
    query, key = torch.randn(N, C), torch.randn(M, C)
    assert_same(ours, theirs, query, key, key, average_attn_weights=False)
    assert_same(ours, theirs, query, key, key, key_padding_mask=torch.tensor([False] * 5 + [True] * 2))


def test_gradients_equal_torch():
    ours, theirs = pair()
    x = torch.randn(N, B, C)
    for module in (ours, theirs):
        module(x, x, x)[0].square().sum().backward()
    for name, parameter in theirs.named_parameters():
        expected = parameter.grad
        got = dict(ours.named_parameters())[name].grad
        assert (got - expected).abs().max() <= 1e-5 * max(1, float(expected.abs().max())), name


def test_causal_needs_no_mask_and_is_bottom_right():
    ours, theirs = pair(batch_first=True)
    x = torch.randn(B, N, C)
    triangle = nn.Transformer.generate_square_subsequent_mask(N)
    expected = theirs(x, x, x, attn_mask=triangle, need_weights=False)[0]
    for arguments in ({"is_causal": True}, {"attn_mask": triangle, "is_causal": True}):
        assert (ours(x, x, x, **arguments)[0] - expected).abs().max() <= 1e-6
    last = ours(x[:, -2:], x, x, is_causal=True)[0]
    assert (last - expected[:, -2:]).abs().max() <= 1e-6


def test_a_query_that_sees_nothing_is_finite():
    ours, _ = pair(batch_first=True)
    x = torch.randn(B, N, C, requires_grad=True)
    y, _ = ours(x, x, x, key_padding_mask=torch.ones(B, N, dtype=torch.bool))
    y.sum().backward()
    assert torch.allclose(y, ours.out_proj.bias.expand_as(y))
    assert torch.isfinite(x.grad).all()


def test_other_mechanisms_serve_an_encoder_layer():
    x = torch.randn(B, N, C)
    encoder = nn.TransformerEncoderLayer(C, H, 32, dropout=0.0, batch_first=True).eval()
    expected = encoder(x)
    mechanism = attlas.MultiheadAttention(C, H, batch_first=True, mechanism="sigmoid").eval()
    mechanism.load_state_dict(encoder.self_attn.state_dict())
    encoder.self_attn = mechanism
    with torch.no_grad():
        swapped = encoder(x)  # torch's fast path would ignore the mechanism here
    assert (swapped - expected).abs().max() > 1e-3
    padding = torch.zeros(B, N, dtype=torch.bool)
    padding[:, 3:] = True
    other = x.clone()
    other[:, 3:] = 9
    first, second = (encoder(t, src_key_padding_mask=padding)[:, :3] for t in (x, other))
    assert torch.allclose(first, second, atol=1e-6)


def test_a_causal_mechanism_takes_torchs_triangle():
    x = torch.randn(B, N, C)
    layer = attlas.MultiheadAttention(C, H, batch_first=True, mechanism="linear", causal=True).eval()
    triangle = nn.Transformer.generate_square_subsequent_mask(N)
    for mask in (triangle, triangle == -torch.inf):
        assert torch.equal(layer(x, x, x, attn_mask=mask)[0], layer(x, x, x)[0])
    with pytest.raises(Unsupported, match="pairs"):
        layer(x, x, x, attn_mask=torch.rand(N, N) > 0.5)


@pytest.mark.parametrize("appending", ["add_bias_kv", "add_zero_attn"])
def test_a_causal_mechanism_has_no_keys_appended(appending):
    with pytest.raises(BadInput, match="tokens would see ahead"):
        attlas.MultiheadAttention(C, H, mechanism="linear", causal=True, **{appending: True})


def test_query_and_key_are_one_tensor_or_two():
    layer = attlas.MultiheadAttention(C, H, batch_first=True, mechanism="neighborhood", window=3).eval()
    x = torch.randn(B, N, C)
    assert layer(x, x, x)[0].shape == x.shape
    with pytest.raises(Unsupported, match="cross"):
        layer(x, x.detach(), x)


@pytest.mark.parametrize("mechanism", ["softmax", "linear"])
def test_compiled_in_one_graph_with_float_masks(mechanism):
    torch._dynamo.reset()
    layer = attlas.MultiheadAttention(C, H, batch_first=True, mechanism=mechanism, causal=True).eval()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(B, N, C)
    padding = torch.zeros(B, N)
    padding[0, 3:] = -torch.inf
    masks = {"key_padding_mask": padding, "attn_mask": nn.Transformer.generate_square_subsequent_mask(N)}
    torch.testing.assert_close(compiled(x, x, x, **masks)[0], layer(x, x, x, **masks)[0])
    other = {"attn_mask": torch.randn(N, N)}
    if mechanism == "softmax":
        torch.testing.assert_close(compiled(x, x, x, **other)[0], layer(x, x, x, **other)[0])
    else:
        with pytest.raises(RuntimeError, match="no mask but the causal triangle"):
            compiled(x, x, x, **other)


def test_bad_input_is_named():
    with pytest.raises(BadInput, match="num_heads must divide embed_dim, got 3 and 16"):
        attlas.MultiheadAttention(16, 3)
    with pytest.raises(UnknownName, match="'softmax'"):
        attlas.MultiheadAttention(16, 4, mechanism="sofmax")
    with pytest.raises(Unsupported, match="no q, k, v"):
        attlas.MultiheadAttention(16, 4, mechanism="pool")
    x = torch.randn(B, N, C)
    with pytest.raises(BadInput, match="attn_mask ends in"):
        attlas.MultiheadAttention(C, H, batch_first=True)(x, x, x, attn_mask=torch.zeros(N, N + 1))
