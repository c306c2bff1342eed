"""ViG: both directions, the convolution, the gate between them."""

import pytest
import torch
import torch.nn.functional as F

import attlas
from attlas.core.errors import BadInput
from attlas.core.grid import Grid

DOUBLE = {"dtype": torch.float64}


def layer_of(dim=16, heads=2, **settings):
    """A layer whose outputs are far above what the norms add against a division by 0."""
    layer = attlas.mixer("vig", dim, heads, **settings).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


@pytest.mark.parametrize(
    ("dim", "heads", "hidden", "published"),
    [(192, 3, 512, 5_834_536), (384, 6, 1024, 22_615_144), (768, 12, 2048, 89_022_184)],
)
def test_twelve_of_them_make_the_published_networks(dim, heads, hidden, published):
    with torch.device("meta"):
        mixer = sum(p.numel() for p in attlas.mixer("vig", dim, heads).parameters())
    block = mixer + 2 * dim + 3 * dim * hidden
    patches = 3 * 81 * dim // 2 + 3 * dim // 2 + 9 * dim // 2 * dim + 3 * dim
    assert 12 * block + patches + 196 * dim + dim + 1000 * (dim + 1) == published


def test_pairs_and_chunks_agree():
    layer, x, outputs, gradients = layer_of(divisor=1.0), torch.randn(1, 80, 16, **DOUBLE), [], []
    for backend in ("torch", "oracle"):
        layer.backend = backend
        leaf = x.clone().requires_grad_()
        outputs.append(layer(leaf, grid=(8, 10)))
        gradients.append(torch.autograd.grad(outputs[-1].square().sum(), [leaf, *layer.parameters()]))
    assert torch.allclose(*outputs, atol=1e-9)
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*gradients, strict=True))


def test_with_open_gates_every_token_sees_all_and_itself_twice():
    layer, x = layer_of(), torch.randn(2, 90, 16, **DOUBLE)
    with torch.no_grad():
        layer.decay_proj[1].weight.zero_()
        layer.decay_proj[1].bias.fill_(100.0)
    u = layer.convolution(x.unflatten(1, (9, 10)).permute(0, 3, 1, 2)).flatten(2).mT
    q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in layer.qkv_proj(u).split([8, 8, 16], -1))
    o = (q @ (k.mT @ v) + (q * k).sum(-1, keepdim=True) * v) / 4  # over 2 sqrt(4)
    o, local = (F.rms_norm(t, (8,), eps=1e-6) for t in (o, u.unflatten(-1, (2, -1)).transpose(1, 2)))
    o, local = (
        (t * norm.weight).transpose(1, 2).flatten(2) for t, norm in ((o, layer.norm), (local, layer.local_norm))
    )
    gate = layer.gate_proj(u).sigmoid()
    assert torch.allclose(layer(x, grid=(9, 10)), layer.out_proj(gate * o + (1 - gate) * local), atol=1e-9)


def test_the_image_turned_round_with_the_directions_exchanged():
    layer, x = layer_of(), torch.randn(2, 20, 16, **DOUBLE)
    first = layer(x, grid=(4, 5))
    with torch.no_grad():
        layer.convolution.weight.copy_(layer.convolution.weight.flip(2, 3))
        for parameter in (layer.decay_proj[1].weight, layer.decay_proj[1].bias):
            parameter.copy_(parameter.roll(8, 0))  # 8 channels of gates in each direction
    assert torch.allclose(layer(x.flip(1), grid=(4, 5)), first.flip(1), atol=1e-10)


def test_the_directions_have_their_own_gates():
    """Forward gates shut: only what comes later is seen."""
    layer, x = layer_of(), torch.randn(1, 12, 16, **DOUBLE)
    with torch.no_grad():
        layer.decay_proj[1].weight.zero_()
        layer.decay_proj[1].bias.copy_(torch.tensor([-1e6, 100.0]).repeat_interleave(8))
        layer.convolution.weight.mul_(F.pad(torch.ones(1, 1), (1, 1, 1, 1)))
    seen = torch.autograd.functional.jacobian(lambda t: layer(t, grid=(3, 4)).sum(-1), x)[0, :, 0].abs().sum(-1)
    assert torch.equal(seen > 1e-12, torch.ones(12, 12, dtype=torch.bool).triu())


@pytest.mark.parametrize(("bias", "reach"), [(-1e3, 9), (1e3, 20)])
def test_the_gate_chooses_between_surroundings_and_everything(bias, reach):
    layer, x = layer_of(), torch.randn(1, 20, 16, **DOUBLE)
    with torch.no_grad():
        layer.gate_proj.weight.zero_()
        layer.gate_proj.bias.fill_(bias)
    seen = torch.autograd.functional.jacobian(lambda t: layer(t, grid=(4, 5))[:, 6].sum(), x)[0].abs().sum(-1) > 1e-12
    assert seen.sum() == reach
    if reach == 9:
        assert seen.nonzero()[:, 0].tolist() == [0, 1, 2, 5, 6, 7, 10, 11, 12]


@pytest.mark.parametrize("backend", ["auto", "torch", "oracle"])
def test_sums_beyond_float16_are_normed_away(backend):
    layer, x = layer_of(32, backend=backend), 1 + torch.randn(1, 64, 32, **DOUBLE)
    with torch.no_grad():
        layer.qkv_proj.weight.mul_(30)
    expected = layer(x, grid=(8, 8))
    with torch.autocast("cpu", torch.float16):
        mixed = layer.float()(x.float(), grid=(8, 8))
    for y in (mixed, layer.half()(x.half(), grid=(8, 8))):
        assert (y - expected).norm() < 2e-2 * expected.norm()


def test_prefix_tokens_pass_the_convolution_and_nothing_else():
    layer, x = layer_of(local_activation="silu"), torch.randn(2, 1 + 6, 16, **DOUBLE)
    u = layer._local(x, Grid((2, 3), prefix=1))
    assert torch.equal(u[:, :1], x[:, :1])
    assert torch.allclose(u[:, 1:], layer._local(x[:, 1:], Grid((2, 3))))
    other = x.clone()
    other[:, 0] += 1
    first, second = (layer(t, grid=Grid((2, 3), prefix=1)) for t in (x, other))
    assert ((first - second).abs().amax(-1) > 1e-6).all()


def test_activations_of_the_tiny_network():
    plain = layer_of()
    tiny = attlas.mixer("vig", 16, 2, local_activation="silu", output_activation="silu").double()
    tiny.load_state_dict(plain.state_dict())
    x = torch.randn(2, 6, 16, **DOUBLE)
    expected = F.silu(plain._local(x, Grid((2, 3))))
    assert torch.allclose(tiny._local(x, Grid((2, 3))), expected)
    assert not torch.allclose(tiny(x, grid=(2, 3)), plain(x, grid=(2, 3)), atol=1e-3)


def test_training_computes_what_evaluation_does():
    layer, x = layer_of(), torch.randn(2, 12, 16, **DOUBLE)
    assert torch.equal(layer.train()(x, grid=(3, 4)), layer.eval()(x, grid=(3, 4)))


def test_the_cost_is_linear_in_the_image():
    layer = attlas.mixer("vig", 192, 3)
    small, large = (layer.cost(1, side**2, grid=(side, side)).flops for side in (16, 32))
    assert 3.9 < large / small < 4.1


def test_what_has_no_meaning_is_refused():
    for settings, message in (
        ({"expand_k": 0.3}, "expand_k times dim"),
        ({"heads": 3}, "heads must divide dim: 16 channels"),
        ({"rank": 0}, "rank counts"),
        ({"divisor": -1.0}, "divisor is positive"),
        ({"local_activation": "swish"}, "local_activation is one of"),
        ({"output_activation": "tanh"}, "output_activation is one of"),
    ):
        with pytest.raises(BadInput, match=message):
            layer_of(**settings)
    with pytest.raises(BadInput, match="pass grid="):
        layer_of()(torch.randn(1, 6, 16, **DOUBLE))
