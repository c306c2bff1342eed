"""The identities and counts of `cca`."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attlas
from attlas.core.errors import BadInput, Unsupported
from attlas.core.state import state_bytes
from attlas.ops.rotary import rotate

DIM, HEADS, TOKENS = 64, 8, 11


def build(dtype=torch.float64, **settings):
    layer = attlas.mixer("cca", DIM, HEADS, causal=True, **settings)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.4)
    return layer.to(dtype)


def tokens(batch=2):
    return torch.randn(batch, TOKENS, DIM, dtype=torch.float64)


def latents(layer, x):
    """What the layer's attention is called with: q, k, v."""
    q, k, v, *_ = layer._latents(x, None, *layer._nothing(x.shape[0], x), 0)
    return q, k, v


def test_parameters_of_zaya1():
    with torch.device("meta"):
        layer = attlas.mixer("cca", 2048, 16, causal=True)
    assert (layer.heads, layer.kv_heads, layer.size) == (8, 2, 128)
    width, convolved = 128, 10 * 128
    by_hand = 2048 * (8 + 2 * 2) * width + 8 * width * 2048 + convolved * 3 + convolved * (2 * width + 1) + 2
    assert sum(p.numel() for p in layer.parameters()) == by_hand == 5_575_682


def test_token_by_token_is_the_full_pass_over_a_long_sequence():
    layer, x = build(), torch.randn(2, 40, DIM, dtype=torch.float64)
    whole, state, parts = layer(x), layer.initial_state(2, like=x), []
    for t in range(40):
        y, state = layer.extend(x[:, t : t + 1], state)
        parts.append(y)
    assert torch.allclose(torch.cat(parts, 1), whole, rtol=0, atol=1e-12)
    assert state.u.shape == (2, 2, (4 + 1) * 8)
    assert torch.equal(state.delayed[:, 0], layer.delayed_proj(x[:, -1]))


def test_a_token_reaches_what_comes_after_and_nothing_before():
    layer, x = build(), tokens()
    changed = x.clone()
    changed[:, 5] += 1
    moved = (layer(changed) - layer(x)).abs().amax((0, 2)) > 0
    assert moved.tolist() == [t >= 5 for t in range(TOKENS)]


def test_without_convolutions_queries_and_keys_are_the_means_before_them():
    layer, x = build(rotary=0.0, kv_compression=4), tokens()
    with torch.no_grad():
        for parameter in (*layer.channel_conv.parameters(), *layer.head_conv.parameters()):
            parameter.zero_()
        layer.delayed_proj.weight.zero_()
    q = layer.q_proj(x).unflatten(-1, (4, 8)).transpose(1, 2)
    k = layer.k_proj(x).unflatten(-1, (2, 8)).transpose(1, 2).repeat_interleave(2, 1)
    q = (q + k) / 2
    k = q.unflatten(1, (2, 2)).mean(2)
    q, k = (8**0.5 * F.normalize(t, dim=-1) for t in (q, k))
    k = (k * layer.temperature[:, None, None]).repeat_interleave(2, 1)
    v = torch.cat([layer.v_proj(x), torch.zeros(2, TOKENS, 8).double()], -1).unflatten(-1, (2, 8)).transpose(1, 2)
    o = F.scaled_dot_product_attention(q, k, v.repeat_interleave(2, 1), is_causal=True)
    assert torch.allclose(layer(x), layer.out_proj(o.transpose(1, 2).flatten(2)), rtol=0, atol=1e-12)


def test_a_fresh_layer_is_the_running_mean_of_its_values_and_learns_its_temperature_first():
    layer, x = attlas.mixer("cca", DIM, HEADS, causal=True).double(), tokens()
    _, _, v = latents(layer, x)
    mean = v.cumsum(2) / torch.arange(1, TOKENS + 1)[:, None]
    expected = layer.out_proj(mean.repeat_interleave(4, 1).transpose(1, 2).flatten(2))
    y = layer(x)
    assert torch.allclose(y, expected, rtol=0, atol=1e-12)
    y.square().sum().backward()
    assert layer.temperature.grad.all()
    assert not layer.q_proj.weight.grad.any()


def test_queries_and_keys_lie_on_their_spheres():
    layer = build(kv_compression=4)
    q, k, _ = latents(layer, tokens())
    root = torch.full(q.shape[:3], 8**0.5, dtype=torch.float64)
    assert torch.allclose(q.norm(dim=-1), root, rtol=0, atol=1e-12)
    lengths = k.norm(dim=-1) / layer.temperature.abs()[:, None]
    assert torch.allclose(lengths, root[:, :2], rtol=0, atol=1e-12)


def test_first_value_heads_are_current_and_last_ones_delayed():
    layer, x = build(kv_compression=4), tokens()
    _, _, v = latents(layer, x)
    assert torch.equal(v[:, 0], layer.v_proj(x))
    assert torch.equal(v[:, 1, 1:], layer.delayed_proj(x)[:, :-1])
    assert not v[:, 1, 0].any()


def test_zeros_stand_before_the_first_convolution_alone():
    layer, x = build(rotary=0.0), tokens()
    u = torch.cat([layer.q_proj(x), layer.k_proj(x)], -1).transpose(1, 2)
    right = layer.head_conv(layer.channel_conv(F.pad(u, (2, 0))))
    wrong = layer.head_conv(F.pad(layer.channel_conv(F.pad(u, (1, 0))), (1, 0)))
    mean = ((layer.q_proj(x).unflatten(-1, (4, 8)) + layer.k_proj(x).unsqueeze(2)) / 2).flatten(2).transpose(1, 2)
    q, _, _ = latents(layer, x)
    first = {
        name: 8**0.5 * F.normalize((conv[:, :32] + mean)[:, :, 0].unflatten(1, (4, 8)), dim=-1)
        for name, conv in (("right", right), ("wrong", wrong))
    }
    assert torch.allclose(q[:, :, 0], first["right"], rtol=0, atol=1e-12)
    assert not torch.allclose(q[:, :, 0], first["wrong"], rtol=0, atol=1e-3)


def test_left_padding_is_a_later_start():
    layer, x = build(rotary=0.0), tokens()
    keep = torch.arange(TOKENS).expand(2, -1) >= 4
    padded = x.masked_fill(~keep.unsqueeze(-1), torch.nan)
    assert torch.allclose(layer(padded, mask=keep)[:, 4:], layer(x[:, 4:]), rtol=0, atol=1e-12)


def test_the_cache_is_an_eighth_of_multi_head_attention():
    sizes = {}
    for name in ("cca", "softmax"):
        layer = attlas.mixer(name, 256, 16, causal=True).eval()
        with torch.no_grad():
            _, short = layer.extend(torch.randn(1, 4, 256), layer.initial_state(1))
            _, long = layer.extend(torch.randn(1, 1, 256), short)
        sizes[name] = state_bytes(long) - state_bytes(short)
    assert sizes == {"cca": 4 * 2 * 2 * 16, "softmax": 4 * 2 * 16 * 16}


def test_angles_are_those_of_rotary_positions_on_the_first_features_alone():
    x = torch.randn(2, 3, 7, 8, dtype=torch.float64)
    y = rotate(x, 5, features=4, base=100.0)
    assert torch.equal(y[..., :4], attlas.positions.Rotary(4, 100.0).rotate(x[..., :4], 5))
    assert torch.equal(y[..., 4:], x[..., 4:])


class Recall(nn.Module):
    """One attention over keys each followed by its value, to answer a key that comes again."""

    def __init__(self, mechanism, symbols, **settings):
        super().__init__()
        self.embed = nn.Embedding(symbols, DIM)
        self.mixers = nn.ModuleList(attlas.mixer(mechanism, DIM, HEADS, causal=True, **settings) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(3))
        self.head = nn.Linear(DIM, symbols)

    def forward(self, ids):
        x = self.embed(ids)
        for mixer, norm in zip(self.mixers, self.norms[:2], strict=True):
            x = x + mixer(norm(x))
        return self.head(self.norms[2](x[:, -1]))


def recalled(mechanism, steps=150, pairs=4, symbols=16, **settings):
    torch.manual_seed(0)
    model = Recall(mechanism, 2 * symbols, **settings)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)

    def batch(size):
        keys = torch.rand(size, symbols).argsort(1)[:, :pairs]
        values = torch.randint(symbols, (size, pairs)) + symbols
        asked = torch.randint(pairs, (size, 1))
        ids = torch.cat([torch.stack([keys, values], 2).flatten(1), keys.gather(1, asked)], 1)
        return ids, values.gather(1, asked)[:, 0]

    for _ in range(steps):
        ids, answer = batch(64)
        optimizer.zero_grad()
        F.cross_entropy(model(ids), answer).backward()
        optimizer.step()
    ids, answer = batch(1000)
    return (model(ids).argmax(1) == answer).double().mean().item()


def test_an_eighth_of_the_cache_recalls_no_worse_than_multi_head_attention():
    ours = recalled("cca")
    theirs = recalled("softmax", position=attlas.positions.Rotary(DIM // HEADS))
    assert ours > 0.95
    assert ours > theirs - 0.02


def test_what_does_not_fit_is_refused():
    with pytest.raises(BadInput, match="heads must divide dim: 64 channels do not split into 7"):
        attlas.mixer("cca", 64, 7, causal=True)
    with pytest.raises(BadInput, match="kv_compression divides the 4 nominal heads, got 8"):
        attlas.mixer("cca", 64, 4, causal=True, kv_compression=8)
    with pytest.raises(BadInput, match=r"kv_compression is a multiple of query_compression.*got 2 and 4"):
        attlas.mixer("cca", 64, 8, causal=True, query_compression=4, kv_compression=2)
    with pytest.raises(BadInput, match=r"kernels are the sizes of two convolutions.*got \(2, 0\)"):
        build(kernels=(2, 0))
    with pytest.raises(BadInput, match=r"0\.4 makes 3\.2; take an even number in 0 to 8"):
        build(rotary=0.4)
    with pytest.raises(BadInput, match="half of the value channels is delayed: 3 of them"):
        attlas.mixer("cca", 24, 8, causal=True, rotary=0.0)
    with pytest.raises(Unsupported, match="noncausal"):
        attlas.mixer("cca", 64, 8)
    with pytest.raises(Unsupported, match="a mask with pairs"):
        build()(tokens(), mask=attlas.Mask.document(torch.zeros(TOKENS, dtype=torch.long)))
