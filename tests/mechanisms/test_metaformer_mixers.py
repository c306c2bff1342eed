"""The mixers that MetaFormer's claim rests on, beside pooling."""

import pytest
import torch

import attlas
from attlas import models
from attlas.core.errors import BadInput


def test_identity_mixes_nothing():
    x = torch.randn(2, 6, 8)
    assert torch.equal(attlas.mixer("identity", 8)(x), x)


def test_random_weights_are_drawn_once_and_never_learned():
    x = torch.randn(2, 6, 8)
    layer = attlas.mixer("random_mixing", 8, length=6)
    weight = layer.weight.clone()
    assert weight.sum(1) == pytest.approx(torch.ones(6))
    assert not torch.equal(weight, attlas.mixer("random_mixing", 8, length=6).weight)
    torch.testing.assert_close(layer(x), torch.einsum("nm,bmc->bnc", weight, x))
    assert not list(layer.parameters())
    again = attlas.mixer("random_mixing", 8, length=6)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x))
    with pytest.raises(BadInput, match="6 tokens, got 5"):
        layer(x[:, :5])
    with pytest.raises(BadInput, match="pass grid="):
        attlas.mixer("random_mixing", 8)


@pytest.mark.parametrize("mixer", ["identity", "pool", "random_mixing", "softmax", "ninformer"])
def test_metaformer_takes_them_all(mixer):
    torch.manual_seed(0)
    net = models.create("metaformer_micro", mixer=mixer, num_classes=3)
    net(torch.randn(2, 3, 64, 64)).square().mean().backward()
    assert all(value.grad is not None for value in net.parameters())
