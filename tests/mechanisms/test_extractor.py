"""The four extractors: nested in one another, sums by transforms, the longest context, a Markov chain."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attlas
from attlas.core.errors import BackendUnavailable, BadInput
from attlas.ops.lags import FFT_FROM, lagged_sum

DOUBLE = {"dtype": torch.float64}
ALL = [f"extractor_{name}" for name in ("she", "he", "we", "me")]


def layer(name, dim=8, length=12, **settings):
    mix = attlas.mixer(name, dim, causal=True, length=length, **settings).double()
    with torch.no_grad():
        for parameter in mix.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return mix


def take(mix, other, *names):
    """The parameters of `other` into `mix`."""
    for name in names:
        mix.get_parameter(name).data.copy_(other.get_parameter(name).data)


GATE = ("bias", "adjust_proj.weight", "adjust_proj.bias", "out_proj.weight", "out_proj.bias")


def test_she_of_scaled_projections_is_he():
    she, he = layer(ALL[0]), layer(ALL[1])
    take(she, he, *GATE)
    she.weight.data = torch.stack([he.extract_proj.weight.T @ w_C.diag() for w_C in he.weight.data])
    x = torch.randn(2, 12, 8, **DOUBLE)
    assert torch.allclose(she(x), he(x), rtol=0, atol=1e-12)


def test_he_of_the_identity_is_we():
    he, we = layer(ALL[1]), layer(ALL[2])
    take(he, we, "weight", *GATE)
    nn.init.eye_(he.extract_proj.weight)
    x = torch.randn(2, 12, 8, **DOUBLE)
    assert torch.allclose(he(x), we(x), rtol=0, atol=1e-12)


def test_we_without_gate_and_output_is_me():
    we, me = layer(ALL[2]), layer(ALL[3])
    take(we, me, "weight", "bias")
    with torch.no_grad():
        nn.init.zeros_(we.adjust_proj.weight)
        nn.init.ones_(we.adjust_proj.bias)
        nn.init.eye_(we.out_proj.weight)
        nn.init.zeros_(we.out_proj.bias)
    x = torch.randn(2, 12, 8, **DOUBLE)
    assert torch.allclose(we(x), me(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_the_weights_belong_to_lags(name):
    """What a token adds depends on how far back it is, and a first output is of the first lag alone."""
    mix = layer(name, bias=False)
    x = torch.zeros(1, 12, 8, **DOUBLE)
    x[:, 3] = torch.randn(8, **DOUBLE)
    sums = mix.rows(x)
    total = lagged_sum(sums, mix.weight, 12)
    assert not total[:, :3].any()
    for n in range(3, 12):
        w, row = mix.weight[n - 3], sums[0, 3]
        assert torch.allclose(total[0, n], row @ w if w.ndim == 2 else row * w, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("tokens", "lags", "last"), [(64, 64, 64), (65, 200, 65), (100, 70, 80), (130, 64, 64)])
def test_transforms_equal_sums(tokens, lags, last):
    x, w = torch.randn(2, tokens, 5, **DOUBLE), torch.randn(lags, 5, **DOUBLE)
    expected = lagged_sum(x, w, last, backend="oracle")
    assert expected.shape == (2, last, 5)
    for backend in ("fft", "torch"):
        assert torch.allclose(lagged_sum(x, w, last, backend=backend), expected, rtol=0, atol=1e-11)
        got = lagged_sum(x.float(), w.float(), last, backend=backend)
        assert torch.allclose(got.double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ALL[1:])
def test_long_layers_use_transforms_and_stream_like_short_ones(name):
    mix = layer(name, length=FFT_FROM + 20)
    x = torch.randn(2, FFT_FROM + 9, 8, **DOUBLE)
    assert "fft" in str(attlas.explain(mix, x))
    whole = mix(x)
    mix.backend = "oracle"
    assert torch.allclose(mix(x), whole, rtol=0, atol=1e-11)
    mix.backend = "auto"
    state, parts = mix.initial_state(2), []
    for piece in x.split([FFT_FROM + 2, 1, 1, 5], 1):
        y, state = mix.extend(piece, state)
        parts.append(y)
    assert torch.allclose(torch.cat(parts, 1), whole, rtol=0, atol=1e-11)
    compiled = torch.compile(mix, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_the_state_does_not_grow(name):
    mix, sizes = layer(name), set()
    for tokens in (1, 5, 12):
        _, state = mix.extend(torch.randn(2, tokens, 8, **DOUBLE), mix.initial_state(2))
        sizes.add(attlas.state_bytes(state))
    assert sizes == {8 * 2 * 11 * 8}


@pytest.mark.parametrize("name", ALL[1:])
def test_fewer_products_than_attention_where_context_is_width(name):
    tokens = dim = 128
    attention = attlas.mixer("softmax", dim, 4, causal=True).cost(1, tokens).executed
    assert attention == 2 * (4 * tokens * dim**2 + 2 * tokens**2 * dim)
    assert attlas.mixer(name, dim, causal=True, length=tokens).cost(1, tokens).executed < attention


@pytest.mark.parametrize("name", ALL)
def test_no_context_beyond_the_longest(name):
    mix = layer(name)
    with pytest.raises(BadInput, match="context of 12 tokens, the sequence reaches 13; build it with length=13"):
        mix(torch.randn(1, 13, 8, **DOUBLE))
    _, state = mix.extend(torch.randn(1, 12, 8, **DOUBLE), mix.initial_state(1))
    with pytest.raises(BadInput, match="reaches 13"):
        mix.extend(torch.randn(1, 1, 8, **DOUBLE), state)


def test_bad_input():
    with pytest.raises(BadInput, match="extractor_me learns a weight for each lag: pass length="):
        attlas.mixer("extractor_me", 8, causal=True)
    with pytest.raises(BackendUnavailable, match="a matrix for each lag has no transform"):
        layer("extractor_she", length=FFT_FROM, backend="fft")(torch.randn(1, FFT_FROM, 8, **DOUBLE))
    with pytest.raises(BackendUnavailable, match="fewer than 64 lags"):
        layer("extractor_me", backend="fft")(torch.randn(1, 12, 8, **DOUBLE))


@pytest.mark.parametrize("name", ALL)
def test_a_markov_chain_of_order_three_is_learned(name):
    generator = torch.Generator().manual_seed(0)
    ones = torch.tensor([0.1, 0.9, 0.8, 0.3, 0.95, 0.15, 0.25, 0.7])  # of a 1 behind each three bits: no linear rule
    bits = torch.zeros(256, 36, dtype=torch.long)
    noise = torch.rand(256, 36, generator=generator)
    for t in range(3, 36):
        context = 4 * bits[:, t - 3] + 2 * bits[:, t - 2] + bits[:, t - 1]
        bits[:, t] = noise[:, t] < ones[context]
    p = ones[4 * bits[:, 1:-2] + 2 * bits[:, 2:-1] + bits[:, 3:]][:, 7:-1]  # of the bits that are predicted
    entropy = float(-(p * p.log() + (1 - p) * (1 - p).log()).mean())

    torch.manual_seed(0)
    mix = attlas.mixer(name, 16, causal=True, length=36)
    model = nn.ModuleList([nn.Embedding(2, 16), mix, nn.Linear(16, 48), nn.Linear(48, 2)])

    def logits(tokens):
        x = model[0](tokens)
        return model[3](F.gelu(model[2](x + model[1](x))))

    def loss(tokens):
        return F.cross_entropy(logits(tokens[:, :-1])[:, 10:].flatten(0, 1), tokens[:, 11:].flatten())

    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for step in range(200):
        rows = torch.randint(256, (32,), generator=generator)
        optimizer.zero_grad()
        loss(bits[rows]).backward()
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 + math.cos(math.pi * step / 200)) / 2
    with torch.no_grad():
        assert float(loss(bits)) == pytest.approx(entropy, rel=0.05)
    assert entropy < 0.75 * math.log(2)
