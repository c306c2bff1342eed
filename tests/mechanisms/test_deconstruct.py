"""The controlled variants of attention: equal sizes, the recurrences, what may and may not reach a token."""

import copy

import pytest
import torch
from torch import nn

import attlas
from attlas.blocks.probe import Probed
from attlas.core.errors import BadInput
from attlas.core.mask import Mask
from attlas.ops.softmax import softmax_attention

DOUBLE = {"dtype": torch.float64}
STORED = ("deconstruct_random_qk", "deconstruct_fixed_qk")
PROBED = (*STORED, "deconstruct_static_qk")


def layer(name, dim=16, heads=2, length=12, **settings):
    if name == "deconstruct_fixed_qk":
        generator = torch.Generator().manual_seed(7)
        settings["probe"] = torch.randn(length, dim, generator=generator)
    return attlas.mixer(name, dim, heads, causal=True, length=length, **settings).double().eval()


def numbers(module):
    return sum(p.numel() for p in module.parameters())


def variants():
    return attlas.mechanisms("deconstruct_*")


def test_all_six_are_there():
    ends = ("approximate", "fixed_qk", "mlp", "non_approximate", "random_qk", "static_qk")
    assert sorted(variants()) == [f"deconstruct_{end}" for end in ends]


@pytest.mark.parametrize("name", variants())
@pytest.mark.parametrize("dim", [12, 16, 20, 64, 512, 768, 896, 2048])
@pytest.mark.parametrize("biases", [(True, True), (True, False), (False, False)])
def test_as_many_parameters_as_attention(name, dim, biases):
    settings = dict(zip(("bias", "out_bias"), biases, strict=True))
    with torch.device("meta"):
        attention = attlas.mixer("softmax", dim, 4, causal=True, **settings)
    own = {"probe": torch.randn(4, dim)} if name == "deconstruct_fixed_qk" else {}
    with torch.device("meta") if name not in STORED else torch.device("cpu"):
        variant = attlas.mixer(name, dim, 4, causal=True, length=4, **settings, **own)
    assert numbers(variant) == numbers(attention)


def test_the_mlp_is_four_thirds_wide():
    mlp = attlas.mixer("deconstruct_mlp", 768, 12, bias=False, out_bias=False)
    assert mlp.up_proj.weight.shape == mlp.gate_proj.weight.shape == (1024, 768)
    assert mlp.out_proj.bias is None


def test_the_mlp_sees_no_other_token():
    mlp, x = layer("deconstruct_mlp"), torch.randn(1, 9, 16, **DOUBLE)
    jacobian = torch.autograd.functional.jacobian(mlp, x)[0, :, :, 0].abs().sum((1, 3))  # (N, N)
    assert torch.equal(jacobian > 0, torch.eye(9, dtype=torch.bool))


@pytest.mark.parametrize("normalisation", ["joint", "order"])
def test_the_taylor_recurrence_is_the_quadratic_form(normalisation):
    q, k, v = (torch.randn(2, 3, 17, 4, **DOUBLE) for _ in "qkv")
    attend = attlas.make_attend("deconstruct_approximate", 3, 4, causal=True, normalisation=normalisation)
    s = torch.einsum("bhnd,bhmd->bhnm", q, k) / 2
    orders = [order.tril() for order in (torch.ones_like(s), s, s**2 / 2)]
    if normalisation == "joint":
        orders = [sum(orders)]
    literal = sum((w / w.sum(-1, keepdim=True)) @ v for w in orders)
    assert torch.allclose(attend(q, k, v), literal, rtol=0, atol=1e-8 * float(literal.abs().max()))
    state, parts = attend.initial_state(2, q), []
    for segment in zip(*(t.split(4, 2) for t in (q, k, v)), strict=True):
        o, state = attend.extend(*segment, state)
        parts.append(o)
    assert torch.allclose(torch.cat(parts, 2), literal, rtol=0, atol=1e-8 * float(literal.abs().max()))
    oracle = attlas.make_attend(
        "deconstruct_approximate", 3, 4, causal=True, normalisation=normalisation, backend="oracle"
    )
    assert torch.allclose(oracle(q, k, v), literal, rtol=0, atol=1e-8 * float(literal.abs().max()))


def test_the_two_normalisations_differ_but_for_one_key():
    q, k, v = (torch.randn(1, 1, 5, 4, **DOUBLE) for _ in "qkv")
    joint, order = (
        attlas.attend(q, k, v, "deconstruct_approximate", causal=True, normalisation=n) for n in ("joint", "order")
    )
    assert torch.allclose(joint[:, :, 0], v[:, :, 0])
    assert torch.allclose(order[:, :, 0], 3 * v[:, :, 0])
    assert not torch.allclose(joint, order)


def test_small_scores_make_taylor_softmax():
    q, k, v = (torch.randn(1, 2, 9, 4, **DOUBLE) for _ in "qkv")
    errors = [
        float((attlas.attend(q * e, k, v, "deconstruct_approximate") - softmax_attention(q * e, k, v)).abs().max())
        for e in (0.02, 0.01)
    ]
    assert errors[0] < 1e-4
    assert errors[0] / errors[1] == pytest.approx(8, rel=0.25)  # what is cut off is of third order


def test_the_taylor_state_has_three_accumulators():
    attend = attlas.make_attend("deconstruct_approximate", 3, 4, causal=True)
    sizes = {part.shape[1:] for part in attend.initial_state(2, torch.empty(0))}
    assert sizes == {(3, 1, 5), (3, 4, 5), (3, 16, 5)}


def test_an_order_of_zeros_gives_nothing():
    q, v = torch.zeros(1, 1, 3, 4, **DOUBLE, requires_grad=True), torch.randn(1, 1, 3, 4, **DOUBLE)
    o = attlas.attend(q, q, v, "deconstruct_approximate", normalisation="order")
    assert torch.allclose(o, v.mean(2, keepdim=True).expand_as(v))
    (grad,) = torch.autograd.grad(o.sum(), q)
    assert torch.isfinite(grad).all()


def test_padding_may_hold_nan():
    q, k, v = (torch.randn(1, 1, 4, 4, **DOUBLE) for _ in "qkv")
    keep = torch.tensor([[True, True, False, True]])
    for t in (k, v):
        t[:, :, 2] = torch.nan
    o = attlas.attend(q, k, v, "deconstruct_approximate", mask=keep)
    assert torch.isfinite(o).all()


@pytest.mark.parametrize("largest", [1.0, 100.0])
def test_non_approximate_is_a_masked_softmax_over_key_scores(largest):
    q, k, v = (torch.randn(2, 3, 17, 4, **DOUBLE) * size for size in (largest, largest, 1))
    attend = attlas.make_attend("deconstruct_non_approximate", 3, 4, causal=True)
    scores = (nn.functional.silu(q) * k).sum(-1) / 2
    seen = torch.ones(17, 17, dtype=torch.bool).tril()
    literal = scores.unsqueeze(2).expand(-1, -1, 17, -1).masked_fill(~seen, -torch.inf).softmax(-1) @ v
    assert torch.allclose(attend(q, k, v), literal, rtol=0, atol=1e-8)
    oracle = attlas.make_attend("deconstruct_non_approximate", 3, 4, causal=True, backend="oracle")
    assert torch.allclose(oracle(q, k, v), literal, rtol=0, atol=1e-8)
    o, state = attend.extend(q[:, :, :5], k[:, :, :5], v[:, :, :5], attend.initial_state(2, q))
    rest, state = attend.extend(q[:, :, 5:], k[:, :, 5:], v[:, :, 5:], state)
    assert torch.allclose(torch.cat([o, rest], 2), literal, rtol=0, atol=1e-8)
    assert attlas.state_bytes(state) == 8 * 2 * 3 * (4 + 2)


@pytest.mark.parametrize("name", PROBED)
def test_only_maps_of_embeddings_follow_the_input(name):
    mix = layer(name)
    first, second = (mix.map(torch.randn(2, 9, 16, **DOUBLE)) for _ in range(2))
    assert torch.equal(first, second) == (name in STORED)
    assert first.shape[0] == (1 if name in STORED else 2)


def test_a_static_layer_on_its_own_is_attention():
    static, softmax = layer("deconstruct_static_qk"), attlas.mixer("softmax", 16, 2, causal=True).double()
    softmax.load_state_dict(static.state_dict())
    x = torch.randn(2, 9, 16, **DOUBLE)
    assert torch.allclose(static(x), softmax(x), rtol=0, atol=1e-12)


def test_a_stored_layer_is_attention_of_its_probe():
    mix = layer("deconstruct_random_qk", position=attlas.positions.Rotary(8))
    softmax = attlas.mixer("softmax", 16, 2, causal=True, position=attlas.positions.Rotary(8)).double()
    softmax.load_state_dict({k: v for k, v in mix.state_dict().items() if k != "probe"})
    assert torch.allclose(mix(mix.probe), softmax(mix.probe), rtol=0, atol=1e-12)


class Block(nn.Module):
    def __init__(self, mix):
        super().__init__()
        self.mix, self.norm, self.mlp = mix, nn.RMSNorm(16), nn.Linear(16, 16)

    def forward(self, x):
        x = x + self.mix(self.norm(x))
        return x + self.mlp(x).tanh()


def stack(*names):
    return nn.Sequential(*(Block(layer(name)) for name in names)).double().eval()


def two_streams(blocks, x, probe):
    """The probe and the input through the same layers side by side."""
    p, h = probe.expand(len(x), -1, -1), x
    seen = Mask(causal=True)
    for block in blocks:
        mix = block.mix
        if not hasattr(mix, "level"):
            p, h = block(p), block(h)
            continue
        source = x if mix.spec.name.endswith("static_qk") else block.norm(p)[:, : x.shape[1]]
        outputs = []
        for stream, made_of in ((p, block.norm(p)), (h, source)):
            q, k, v = (
                proj(t).unflatten(-1, (2, 8)).transpose(1, 2)
                for proj, t in ((mix.q_proj, made_of), (mix.k_proj, made_of), (mix.v_proj, block.norm(stream)))
            )
            mixed = stream + mix.out_proj(softmax_attention(q, k, v, seen).transpose(1, 2).flatten(2))
            outputs.append(mixed + block.mlp(mixed).tanh())
        p, h = outputs
    return h


STACKS = [*((name,) * 3 for name in PROBED), (PROBED[0], "softmax", PROBED[0]), ("softmax", PROBED[1], PROBED[1])]


@pytest.mark.parametrize("names", STACKS, ids=str)
@pytest.mark.parametrize("tokens", [12, 7])
def test_a_stack_is_two_streams_through_the_same_layers(names, tokens):
    blocks, x = stack(*names), torch.randn(3, tokens, 16, **DOUBLE)
    model = Probed(blocks)
    probe = torch.zeros(1, 12, 16, **DOUBLE) if model.probe is None else model.probe
    leaf = x.clone().requires_grad_()
    got, expected = model(leaf), two_streams(blocks, leaf, probe)
    assert torch.allclose(got, expected, rtol=0, atol=1e-10)
    wanted = [leaf, *blocks.parameters()]
    seed = torch.randn_like(got)
    for a, b in zip(torch.autograd.grad(got, wanted, seed), torch.autograd.grad(expected, wanted, seed), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-9)
    with torch.no_grad():
        assert torch.allclose(model(x), expected, rtol=0, atol=1e-10)


def test_the_probe_runs_once_at_inference_and_always_in_training():
    blocks = stack(*[PROBED[0]] * 2)
    model, runs = Probed(blocks), []
    blocks.register_forward_hook(lambda module, args, output: runs.append(len(args[0])))
    x = torch.randn(3, 9, 16, **DOUBLE)
    with torch.no_grad():
        first = model(x)
        assert torch.equal(model(x), first)
        assert runs == [1, 3, 3]
        blocks[0].mlp.weight.add_(1)
        changed = model(x)
        assert not torch.equal(changed, first)
        assert torch.equal(copy.deepcopy(model)(x), changed)
    runs.clear()
    for _ in range(2):
        model(x).sum().backward()
    assert runs == [1, 3, 1, 3]
    assert all(block.mix.level is None for block in blocks)


def test_a_probe_of_learned_embeddings_gets_gradients():
    model, text = Probed(stack(*[PROBED[1]] * 2)), torch.randn(12, 16, **DOUBLE, requires_grad=True)
    y = model(torch.randn(3, 9, 16, **DOUBLE), text)
    (grad,) = torch.autograd.grad(y.square().sum(), text)
    assert grad[:9].any()
    assert not grad[9:].any()


def test_static_layers_of_a_stack_read_embeddings_alone():
    blocks = stack(*[PROBED[2]] * 2)
    x = torch.randn(1, 9, 16, **DOUBLE)
    maps = []
    blocks[1].mix.register_forward_hook(lambda module, args, output: maps.append(module.map(args[0])))
    Probed(blocks)(x)
    with torch.no_grad():
        blocks[0].mlp.weight.add_(1)
    Probed(blocks)(x)
    assert torch.equal(*maps)
    blocks(x)  # nothing is handed over: its own input is all it knows
    assert not torch.equal(maps[0], maps[2])


def test_all_layers_have_the_same_noise_and_seeds_differ():
    first, second = (layer("deconstruct_random_qk", sigma=2.0).probe for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, layer("deconstruct_random_qk", seed=1).probe)
    noise = attlas.mixer("deconstruct_random_qk", 64, causal=True, length=256, sigma=2.0).probe
    assert float(noise.std()) == pytest.approx(2, rel=0.02)


def test_without_a_probe_bytes_of_a_text_have_vectors_of_their_own():
    probe = attlas.mixer("deconstruct_fixed_qk", 8, length=700).probe[0]
    assert 20 < len(probe.unique(dim=0)) < 60  # as many as there are letters
    assert torch.equal(probe, attlas.mixer("deconstruct_fixed_qk", 8, length=700).probe[0])


def test_bad_input():
    with pytest.raises(BadInput, match="pass length="):
        attlas.mixer("deconstruct_random_qk", 16, 2)
    with pytest.raises(BadInput, match=r"sigma .* positive, got 0"):
        attlas.mixer("deconstruct_random_qk", 16, 2, length=4, sigma=0.0)
    with pytest.raises(BadInput, match="needs the fixed sequence, probe=, or a length="):
        attlas.mixer("deconstruct_fixed_qk", 16, 2)
    with pytest.raises(BadInput, match=r"\(tokens, 16\) vectors, got \(4, 8\)"):
        attlas.mixer("deconstruct_fixed_qk", 16, 2, probe=torch.randn(4, 8))
    with pytest.raises(BadInput, match="map of 12 positions, the sequence reaches 13"):
        layer("deconstruct_random_qk")(torch.randn(1, 13, 16, **DOUBLE))
    with pytest.raises(BadInput, match="normalisation is 'joint' or 'order', got 'both'"):
        attlas.mixer("deconstruct_approximate", 16, 2, normalisation="both")
    q, k = torch.randn(1, 1, 2, 4), torch.randn(1, 1, 3, 4)
    with pytest.raises(BadInput, match="as many queries as keys, got 2 and 3"):
        attlas.attend(q, k, k, "deconstruct_non_approximate", causal=True)
    with pytest.raises(BadInput, match="30 channels do not split into 4 heads"):
        attlas.mixer("deconstruct_static_qk", 30, 4)
    with pytest.raises(BadInput, match="run it as it is"):
        Probed(nn.Linear(4, 4))
    with pytest.raises(BadInput, match=r"one sequence of vectors, \(tokens, channels\), got \(1, 12, 16\)"):
        Probed(layer(PROBED[0]), torch.randn(1, 12, 16))
    static = layer("deconstruct_static_qk")
    static.level = torch.randn(1, 5, 16)
    with pytest.raises(BadInput, match="hand over those of the same tokens"):
        static(torch.randn(1, 6, 16, **DOUBLE))
