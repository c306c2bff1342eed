"""The identities of mixture-of-head attention on pictures: `moh_cosine` and `moh_aggregated`."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import attlas
from attlas.core.errors import BadInput
from attlas.ops.head_gates import DistanceBias, HeadGates

NAMES = ("moh_cosine", "moh_aggregated")


def tokens() -> Tensor:
    return torch.randn(2, 24, 16, generator=torch.Generator().manual_seed(1))


def layer(name: str, **settings: object) -> attlas.Mixer:
    torch.manual_seed(0)
    return attlas.mixer(name, 16, 4, grid=(4, 6), **settings).eval()


@pytest.mark.parametrize("name", NAMES)
def test_routers_of_zeros_with_all_heads_picked_change_nothing(name: str) -> None:
    x, routed, plain = tokens(), layer(name, shared_heads=2, active_heads=2), layer(name, shared_heads=1)
    weights = {key: value for key, value in routed.state_dict().items() if not key.startswith("router")}
    plain.load_state_dict(weights, strict=False)
    plain.router = HeadGates(16, 4, 4)
    with torch.no_grad():
        for module in (*routed.router.children(), *plain.router.children()):
            module.weight.zero_()
    assert torch.allclose(routed(x), plain(x), atol=1e-6)


def test_gates_keep_so_many_heads_and_their_sums() -> None:
    torch.manual_seed(0)
    gates, x = HeadGates(16, 8, 2, 3), tokens()
    g = gates(x)
    w = 2 * gates.split(x).softmax(-1)
    assert ((g != 0).sum(-1) == 5).all()
    assert torch.allclose(g[..., :2].sum(-1), 2 * w[..., 0], atol=1e-5)
    assert torch.allclose(g[..., 2:].sum(-1), 3 * w[..., 1], atol=1e-5)


def test_the_balance_loss_of_even_and_of_uneven_routing() -> None:
    gates, x = HeadGates(16, 4, 0, 1, coefficient=1.0).train(), tokens().abs()
    with torch.no_grad():
        gates.pick.weight.zero_()
        gates(x)
        assert gates.auxiliary.item() == pytest.approx(1)
        gates.pick.weight[2] = 50
        gates(x)
    assert gates.auxiliary.item() == pytest.approx(4, rel=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_the_balance_loss_reaches_the_network(name: str) -> None:
    mixer = layer(name).train()
    mixer(tokens())
    loss = attlas.auxiliary_loss(mixer)
    assert loss > 0
    loss.backward()
    assert mixer.router.pick.weight.grad.any()


def test_cosine_attention_by_hand() -> None:
    mixer, x = layer("moh_cosine", shared_heads=4), tokens()
    with torch.no_grad():
        mixer.query.zero_()
        mixer.router.weigh.weight.zero_()
        mixer.bias.fc2.weight.zero_()
        mixer.bias.fc2.bias.zero_()
    q, k, v = (part.unflatten(-1, (4, 4)).transpose(1, 2) for part in mixer.qkv_proj(x).chunk(3, -1))
    o = F.scaled_dot_product_attention(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, scale=math.log(24) / 0.24)
    assert torch.allclose(mixer(x), mixer.out_proj(o.transpose(1, 2).flatten(2)), atol=1e-5)


def test_the_ruler_is_that_of_training() -> None:
    torch.manual_seed(0)
    bias = DistanceBias(3, (7, 7))
    small, large = bias((4, 4), (4, 4)), bias((7, 7), (7, 7))
    corner = [y * 7 + x for y in range(4) for x in range(4)]
    assert torch.allclose(large[:, corner][:, :, corner], small, atol=1e-6)
    coarse = bias((8, 8), (2, 2))
    assert coarse.shape == (3, 64, 4)


def test_pictures_of_another_size() -> None:
    for name in NAMES:
        assert layer(name)(torch.randn(1, 35, 16), grid=(5, 7)).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_bad_input(name: str) -> None:
    with pytest.raises(BadInput, match="shared_heads is 0 to 4"):
        layer(name, shared_heads=5)
    with pytest.raises(BadInput, match="active_heads is 1 to 3"):
        layer(name, shared_heads=1, active_heads=4)
    with pytest.raises(BadInput, match="pass grid="):
        attlas.mixer(name, 16, 4)
    with pytest.raises(BadInput, match="heads must divide dim"):
        attlas.mixer(name, 16, 3, grid=(4, 6))


def test_bad_windows() -> None:
    with pytest.raises(BadInput, match="odd; got 4"):
        layer("moh_aggregated", window=4)
    with pytest.raises(BadInput, match="at least 1, got 0"):
        layer("moh_aggregated", reduction=0)
