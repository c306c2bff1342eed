"""The identities of NiNformer's gated mixer."""

import pytest
import torch

import attlas
from attlas.core.errors import BadInput


def layer(**settings: object) -> attlas.Mixer:
    torch.manual_seed(0)
    return attlas.mixer("ninformer", 8, grid=(3, 4), **settings).double().eval()


def test_without_the_projection_it_is_an_mlp_mixer_block() -> None:
    mixer, x = layer(), torch.randn(2, 12, 8, dtype=torch.float64)
    with torch.no_grad():
        mixer.proj.weight.zero_()
        mixer.proj.bias.fill_(1)
    z = x + mixer.token_mlp(mixer.token_norm(x).mT).mT
    assert torch.allclose(mixer(x), z + mixer.channel_mlp(mixer.channel_norm(z)))


def test_the_gate_is_not_squashed() -> None:
    mixer, x = layer(), torch.randn(2, 12, 8, dtype=torch.float64)
    gate = mixer.gate(x)
    assert gate.min() < 0
    assert gate.max() > 1
    assert torch.allclose(mixer(x), mixer.proj(x) * gate)


def test_places_matter_and_all_tokens_meet() -> None:
    mixer, x = layer(), torch.randn(1, 12, 8, dtype=torch.float64, requires_grad=True)
    order = torch.randperm(12)
    assert not torch.allclose(mixer(x[:, order]), mixer(x)[:, order])
    (grad,) = torch.autograd.grad(mixer(x)[0, 0].sum(), x)
    assert grad.abs().sum(-1).all()


def test_weights_belong_to_a_number_of_tokens() -> None:
    with pytest.raises(BadInput, match="has weights for 12 tokens, got 6"):
        layer()(torch.randn(1, 6, 8, dtype=torch.float64), grid=(2, 3))
    with pytest.raises(BadInput, match="pass grid="):
        attlas.mixer("ninformer", 8)
    with pytest.raises(BadInput, match="at least 1, got 0"):
        layer(hidden=0)
