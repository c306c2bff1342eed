"""The p-adapter: what p and μ do to messages over the attention graph."""

import pytest
import torch
import torch.nn.functional as F

import attlas
from attlas.core.errors import BadInput
from attlas.mechanisms.softmax.p_adapter import PAdapter, calibrate
from attlas.ops.softmax import attention_weights

DIM, HEADS, TOKENS = 32, 2, 9


def build(**settings):
    layer = attlas.mixer("p_adapter", DIM, HEADS, **{"reduction": 4} | settings).double()
    with torch.no_grad():
        layer.gate.weight.zero_()
        layer.gate.bias.fill_(30.0)  # GELU passes it: the message comes out times 30
        layer.up.weight.copy_(torch.eye(DIM, dtype=torch.float64)[:, :8] / 30)
        layer.up.bias.zero_()
    return layer


def tokens(batch=2, length=TOKENS):
    return torch.randn(batch, length, DIM, dtype=torch.float64)


def message(layer, x, *context):
    """F' of a layer that `build` made, and the parts that it is made of."""
    source = context[0] if context else x
    split = (HEADS, DIM // HEADS)
    q, k, v = (
        proj(y).unflatten(-1, split).transpose(1, 2)
        for proj, y in ((layer.q_proj, x), (layer.k_proj, source), (layer.v_proj, source))
    )
    weights = attention_weights(q, k)
    h = layer.out_proj((weights @ v).transpose(1, 2).flatten(2))

    def features(nodes):
        return layer.down(layer.out_proj(nodes)).unflatten(-1, (HEADS, -1)).transpose(1, 2)

    merged = (layer(x, *context) - h)[..., :8].unflatten(-1, (HEADS, -1)).transpose(1, 2)
    return merged, weights, features(layer.v_proj(source)), features(layer.q_proj(x))


def test_with_p_two_it_is_a_graph_convolution():
    layer, x = build(p=2.0, mu=0.3), tokens()
    got, weights, f, _ = message(layer, x)
    adjacency = weights * (1 - torch.eye(TOKENS, dtype=torch.float64))
    expected = (adjacency @ f + 0.6 * f) / (adjacency.sum(-1, keepdim=True) + 0.6)  # 2 μ / p = 2 μ₀
    assert torch.allclose(got, expected, rtol=0, atol=1e-7)
    with_itself = message(build_like(layer, p=2.0, mu=0.3, released=True), x)[0]
    assert torch.allclose(with_itself, (weights @ f + 0.6 * f) / 1.6, rtol=0, atol=1e-7)


def build_like(layer, **settings):
    other = build(**settings)
    other.load_state_dict(layer.state_dict())
    return other


def test_a_large_mu_keeps_every_node_as_it_is():
    layer, x = build(mu=1e9), tokens()
    got, _, f, _ = message(layer, x)
    assert torch.allclose(got, f, rtol=0, atol=1e-6)


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("p", [1.25, 2.0, 2.5])
def test_the_weights_of_a_node_sum_to_one(cross, p):
    layer, x = build(p=p), tokens()
    with torch.no_grad():
        layer.down.weight.zero_()
        layer.down.bias.copy_(torch.linspace(1, 2, 8))
    context = (tokens(length=30),) if cross else ()
    got, _, f, _ = message(layer, x, *context)
    assert torch.allclose(got, f[:, :, :1].expand_as(got), rtol=0, atol=1e-9)  # the mean of what is all the same


def test_the_released_code_barely_passes_messages_in_self_attention():
    layer, x = build(), tokens()
    masked, _, f, _ = message(layer, x)
    released = message(build_like(layer, released=True), x)[0]
    assert (released - f).abs().max() < 2e-3 * f.abs().max()
    assert (masked - f).abs().max() > 0.1 * f.abs().max()


def test_the_released_code_drops_the_own_term_in_cross_attention():
    layer, x, context = build(pooled_keys=50), tokens(), tokens(length=11)
    got, weights, f, own = message(layer, x, context)
    released = message(build_like(layer, pooled_keys=50, released=True), x, context)[0]
    graph = calibrate(weights, own, f, layer.p)
    kept = 2 * 0.2 / 1.25
    alpha = 1 / (graph.sum(-1, keepdim=True) + kept)
    assert torch.allclose(got, alpha * (graph @ f + kept * own), rtol=0, atol=1e-9)
    assert torch.allclose(released, alpha * (graph @ f), rtol=0, atol=1e-9)


def test_weights_and_values_are_pooled_alike():
    layer, x, context = build(p=2.0, pooled_keys=4, released=True), tokens(), tokens(length=12)
    got, weights, _, _ = message(layer, x, context)
    weights = weights.unflatten(-1, (4, 3)).mean(-1)
    v = layer.v_proj(context).unflatten(1, (4, 3)).mean(2)
    f = layer.down(layer.out_proj(v)).unflatten(-1, (HEADS, -1)).transpose(1, 2)
    assert torch.allclose(weights.sum(-1), torch.full_like(weights[..., 0], 1 / 3))
    assert torch.allclose(got, weights @ f / (1 / 3 + 0.2), rtol=0, atol=1e-7)


@pytest.mark.parametrize("settings", [{}, {"causal": True}, {"context_dim": 24}])
def test_an_adapter_that_adds_nothing_is_the_layer_that_was_there(settings):
    host, x = attlas.mixer("softmax", DIM, HEADS, **settings).double(), tokens()
    adapter = PAdapter.from_layer(host)
    context = [torch.randn(2, 20, 24, dtype=torch.float64)] if "context_dim" in settings else []
    assert not torch.allclose(adapter(x, *context), host(x, *context), atol=1e-3)
    with torch.no_grad():
        adapter.up.weight.zero_()
        adapter.up.bias.zero_()
    assert torch.allclose(adapter(x, *context), host(x, *context), rtol=0, atol=1e-14)


def test_only_the_adapter_learns():
    host = attlas.mixer("softmax", 768, 12)
    adapter = PAdapter.from_layer(host)
    learned = sum(p.numel() for p in adapter.parameters() if p.requires_grad)
    assert learned == 2 * (768 * 96 + 96) + 96 * 768 + 768 + 2 == 222_146
    assert adapter.q_proj is host.q_proj
    assert not any(p.requires_grad for p in host.parameters())


def test_a_small_p_keeps_clusters_apart_that_noisy_edges_mix():
    cluster = torch.arange(40) % 2
    centre = torch.tensor([[1.0, 0, 0, 0], [-1.0, 0, 0, 0]], dtype=torch.float64)
    queries, keys = (centre[cluster] + 0.2 * torch.randn(40, 4, dtype=torch.float64) for _ in range(2))
    edges = torch.rand(40, 40, dtype=torch.float64).softmax(-1)  # which know nothing of the clusters

    def gap(p):
        graph = calibrate(edges, queries, keys, p)
        kept = 2 * 0.02 / p
        f = (graph @ keys + kept * queries) / (graph.sum(-1, keepdim=True) + kept)
        return float((f[cluster == 0].mean(0) - f[cluster == 1].mean(0)).norm())

    assert gap(1.25) > 1.2 * gap(2.0)


def test_the_formula_of_the_edges():
    edges, f, g = torch.rand(3, 4).double(), torch.randn(3, 5).double(), torch.randn(4, 5).double()
    got = calibrate(edges, f, g, 1.5)
    for i in range(3):
        for j in range(4):
            length = (edges[i, j].sqrt() * (f[i] - g[j])).norm()
            assert got[i, j] == pytest.approx(float(edges[i, j] * length**-0.5), rel=1e-6)
    assert torch.allclose(calibrate(edges, f, g, 2.0), edges)


def test_decoding_equals_the_full_pass_behind_padding():
    layer = attlas.mixer("p_adapter", DIM, HEADS, causal=True).double()
    x, keep = tokens(), torch.arange(TOKENS).expand(2, -1) >= torch.tensor([[0], [3]])
    with torch.no_grad():
        y, state = layer.extend(x[:, :5], layer.initial_state(2), keep=keep[:, :5])
        parts = [y]
        for t in range(5, TOKENS):
            y, state = layer.extend(x[:, t : t + 1], state)
            parts.append(y)
        assert torch.allclose(torch.cat(parts, 1)[keep], layer(x, mask=keep)[keep], rtol=0, atol=1e-11)


def test_no_overflow_at_half_precision():
    layer = attlas.mixer("p_adapter", DIM, HEADS, released=True).half()
    x = tokens().half()
    assert torch.isfinite(layer(x)).all()
    assert F.mse_loss(layer(x).double(), layer.double()(x.double())) < 1e-5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reduction": 5}, "reduction times heads must divide dim"),
        ({"reduction": 32}, "reduction times heads must divide dim"),
        ({"p": 1.0}, "p is above 1"),
        ({"mu": 0.0}, "mu above 0"),
        ({"pooled_keys": 0}, "pooled_keys counts keys"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(BadInput, match=message):
        attlas.mixer("p_adapter", DIM, HEADS, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"kv_heads": 1},
        {"qk_norm": "rms"},
        {"gate": "silu"},
        {"scale": 1.0},
        {"position": attlas.positions.Rotary(DIM // HEADS)},
    ],
)
def test_a_layer_of_another_form_is_refused(settings):
    with pytest.raises(BadInput, match="goes around a softmax"):
        PAdapter.from_layer(attlas.mixer("softmax", DIM, HEADS, **settings))


def test_a_context_of_another_size_is_refused():
    with pytest.raises(BadInput, match="build with context_dim=5"):
        build()(tokens(), torch.randn(2, 4, 5).double())


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_padding_that_is_no_number_never_matters(poison):
    layer, x = build(), tokens()
    keep = torch.arange(TOKENS).expand(2, -1) >= torch.tensor([[0], [3]])
    outputs = []
    for value in (0.5, poison):
        x[~keep] = value
        outputs.append(layer(x, mask=keep)[keep])
    assert torch.equal(*outputs)
