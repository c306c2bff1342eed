"""The shell: positions, norms, gates."""

import pytest
import torch

import attlas
from attlas import Grid, positions
from attlas.core.errors import BadInput, Unsupported

DIM, HEADS, TOKENS = 16, 4, 10


def test_rotary_scores_depend_on_the_distance_alone():
    rotary = positions.Rotary(8)
    q, k = torch.randn(1, 1, 1, 8).double(), torch.randn(1, 1, 1, 8).double()
    score = [(rotary.rotate(q, n) * rotary.rotate(k, n + 5)).sum() for n in (0, 7, 100_000)]
    assert torch.allclose(torch.stack(score), score[0], rtol=1e-9)
    assert rotary.rotate(q, 3).norm() == pytest.approx(float(q.norm()))
    assert torch.equal(rotary.rotate(q, 0), q)


def test_rotary_keeps_its_angles_in_half_precision():
    layer = attlas.mixer("softmax", DIM, HEADS, position=positions.Rotary(4)).bfloat16()
    x = torch.randn(1, 1, 1, 4)
    turned = layer.position.rotate(x, 90_001)
    assert torch.equal(turned, positions.Rotary(4).rotate(x, 90_001))
    assert not torch.allclose(turned, layer.position.rotate(x, 90_000), atol=1e-2)


@pytest.mark.parametrize("position", [positions.Rotary(4), positions.Learned(DIM, TOKENS)], ids=["rotary", "learned"])
def test_positions_stream(position):
    layer = attlas.mixer("softmax", DIM, HEADS, causal=True, position=position).double().eval()
    x = torch.randn(2, TOKENS, DIM).double()
    with torch.no_grad():
        state, parts = layer.initial_state(2), []
        for piece in x.split([3, 1, 6], 1):
            y, state = layer.extend(piece, state)
            parts.append(y)
        assert torch.allclose(torch.cat(parts, 1), layer(x), atol=1e-12)
        shuffled = x[:, torch.randperm(TOKENS)]
        assert not torch.allclose(layer(shuffled)[:, -1], layer(x)[:, -1], atol=1e-3)


def test_alibi_slopes_are_the_published_ones():
    slopes = positions.ALiBi(8).slopes
    assert slopes.tolist() == [2.0**-n for n in range(1, 9)]
    twelve = positions.ALiBi(12).slopes
    assert torch.allclose(twelve[8:], torch.tensor([2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]))


def test_alibi_equals_a_bias_given_by_hand():
    alibi = positions.ALiBi(HEADS)
    layer = attlas.mixer("softmax", DIM, HEADS, position=alibi)
    plain = attlas.mixer("softmax", DIM, HEADS)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, TOKENS, DIM)
    place = torch.arange(TOKENS)
    bias = -alibi.slopes[:, None, None] * (place[:, None] - place).abs()
    assert torch.allclose(layer(x), plain(x, mask=bias), atol=1e-6)


def test_relative_bias_depends_on_the_offset():
    bias = positions.RelativeBias(HEADS, (3, 4))
    table = bias.bias(Grid((3, 4), prefix=1))
    assert table.shape == (HEADS, 13, 13)
    assert not table[:, 0].any()
    assert not table[:, :, 0].any()
    grid = table[:, 1:, 1:].reshape(HEADS, 3, 4, 3, 4)
    assert torch.equal(grid[:, 0, 0, 1, 2], grid[:, 1, 1, 2, 3])
    assert torch.equal(grid[:, 1, 2, 0, 0], bias.table[:, -1 + 2, -2 + 3])
    far = bias.bias(Grid((9, 9))).reshape(HEADS, 9, 9, 9, 9)
    assert torch.equal(far[:, 0, 0, 8, 8], bias.table[:, -1, -1])


def test_every_position_reaches_its_parameters():
    for position in (positions.RelativeBias(HEADS, (2, 5)), positions.Learned(DIM, TOKENS)):
        layer = attlas.mixer("softmax", DIM, HEADS, position=position)
        layer(torch.randn(1, TOKENS, DIM), grid=(2, 5)).square().sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in position.parameters())


def test_norms_and_gates_do_what_they_say():
    layer = attlas.mixer(
        "softmax", DIM, HEADS, qk_norm="rms", qk_activation="silu", output_norm="simple_rms", gate="sigmoid"
    )
    x = torch.randn(2, TOKENS, DIM)
    q, k, v = (getattr(layer, f"{name}_proj")(x).view(2, TOKENS, HEADS, -1).transpose(1, 2) for name in "qkv")
    q, k = (t * torch.rsqrt(t.square().mean(-1, keepdim=True) + 1e-6) for t in map(torch.nn.functional.silu, (q, k)))
    o = ((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).reshape(2, TOKENS, DIM)
    o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + 1e-6) * layer.gate_proj(x).sigmoid()
    assert torch.allclose(layer(x), layer.out_proj(o), atol=1e-5)


def test_cross_attention_takes_another_width():
    layer = attlas.mixer("softmax", DIM, HEADS, context_dim=6)
    assert layer(torch.randn(2, 3, DIM), torch.randn(2, 5, 6)).shape == (2, 3, DIM)
    with pytest.raises(BadInput, match="context has 7 channels; build with context_dim=7"):
        layer(torch.randn(2, 3, DIM), torch.randn(2, 5, 7))


def test_what_does_not_fit_is_refused():
    with pytest.raises(BadInput, match="gate is None"):
        attlas.mixer("softmax", DIM, HEADS, gate="tanhh")
    with pytest.raises(BadInput, match="a norm is one of"):
        attlas.mixer("softmax", DIM, HEADS, qk_norm="batch")
    with pytest.raises(BadInput, match="qk_activation is one of"):
        attlas.mixer("softmax", DIM, HEADS, qk_activation="swish")
    with pytest.raises(BadInput, match="head size 3 is odd"):
        positions.Rotary(3)
    with pytest.raises(Unsupported, match="linear does not serve ALiBi positions, a bias"):
        attlas.mixer("linear", DIM, HEADS, position=positions.ALiBi(HEADS))
    with pytest.raises(BadInput, match="learned up to 4, the sequence reaches 10"):
        attlas.mixer("softmax", DIM, HEADS, position=positions.Learned(DIM, 4))(torch.randn(1, TOKENS, DIM))
    layer = attlas.mixer("softmax", DIM, HEADS, causal=True, position=positions.ALiBi(HEADS))
    with pytest.raises(BadInput, match="do not stream"):
        layer.extend(torch.randn(1, 2, DIM), layer.initial_state(1))


def test_the_bare_function():
    q, k, v = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert torch.allclose(attlas.attend(q, k, v, "softmax", causal=True), expected, atol=1e-6)
    last = attlas.attend(q[:, :, -2:], k, v, causal=True)
    assert torch.allclose(last, expected[:, :, -2:], atol=1e-6)
    assert torch.allclose(attlas.attend(q, k, v, causal=True, backend="oracle"), expected, atol=1e-6)
    with pytest.raises(Unsupported, match=r"use attlas.mixer\('pool', dim="):
        attlas.attend(q, k, v, "pool")
