"""What iLLaMA is beside what every network promises."""

import pytest
import torch
from torch import Tensor

from attlas.blocks.positions import Rotary
from attlas.core.errors import BadInput
from tests.models.vision.official_names import State, assert_loads, fused, picture, renamed, shaken

STRICT = {"mixer": "softmax", "mixer_settings": {"causal": True}}


def official(state: State) -> State:
    """Our weights under the names of techmonsterwang/iLLaMA; micro has one block per stage and heads of 24."""
    state = dict(state)
    for key, value in state.items():
        if "q_proj" in key or "k_proj" in key:
            state[key] = value.unflatten(0, (-1, 2, 12)).transpose(1, 2).flatten(0, 2)
    state["prefix"] = state["prefix"][None]
    state["places.weight"] = state["places.weight"].roll(-1, 0)[None]
    return renamed(
        fused(state, ("q_proj", "k_proj", "v_proj"), "qkv"),
        (r"^stages\.(\d)\.blocks\.0\.", r"blocks.\1."),
        (r"\.mixer\.qkv\.", ".attn.qkv."),
        (r"\.mixer\.out_proj\.", ".attn.proj."),
        (r"\.mlp\.gate\.", ".mlp.fc1."),
        (r"\.mlp\.out\.", ".mlp.fc2."),
        (r"\.mlp\.value\.", ".mlp.fc3."),
        (r"^embed\.conv\.", "patch_embed.proj."),
        (r"^prefix$", "cls_token"),
        (r"^places\.weight$", "pos_embed"),
    )


def test_official_names() -> None:
    net = shaken("illama_micro")
    assert_loads(net, "illama_micro", official(net.state_dict()), picture(64, 64))


def test_neighbouring_features_turn_as_halves_after_the_map() -> None:
    turned = torch.randn(1, 1, 5, 24)
    halves = turned.unflatten(-1, (12, 2)).transpose(-1, -2).flatten(-2)
    angle = torch.arange(5.0)[:, None] * 10000 ** (-torch.arange(0, 24, 2) / 24)
    pairs = torch.view_as_complex(turned.unflatten(-1, (12, 2)).contiguous()) * torch.polar(torch.ones(5, 12), angle)
    expected = torch.view_as_real(pairs).transpose(-1, -2).flatten(-2)
    assert torch.allclose(Rotary(24).rotate(halves, 0), expected, atol=1e-5)


def grads(net: torch.nn.Module, image: Tensor) -> Tensor:
    """How each patch of the first block's output depends on a change of the last patch."""
    image.requires_grad_()
    tokens = net.forward_features(image)
    (grad,) = torch.autograd.grad(tokens[0, 0].sum(), image)
    return grad


def test_strict_networks_see_no_later_patch() -> None:
    image = picture(64, 64)
    strict = grads(shaken("illama_micro", **STRICT), image)
    assert strict[..., :8, :8].any()
    assert not strict[..., 8:].any()
    assert grads(shaken("illama_micro"), image)[..., 8:].any()  # through the sums of the softmax


def test_the_class_token_stands_last_and_sees_everything() -> None:
    net, image = shaken("illama_micro", **STRICT), picture(64, 64).requires_grad_()
    net(image).sum().backward()
    assert image.grad.abs().sum(1).unfold(1, 8, 8).unfold(2, 8, 8).sum((-1, -2)).all()


def test_the_mask_is_soft_in_training() -> None:
    net, image = shaken("illama_micro"), picture(64, 64)
    hard = net(image)
    net.soften(1.0)
    plain = shaken("illama_micro", mixer="softmax")
    plain.load_state_dict(net.state_dict())
    assert torch.allclose(net(image), plain(image))
    assert not torch.allclose(net(image), hard)
    with pytest.raises(BadInput, match="softness is a share"):
        net.soften(1.5)
    with pytest.raises(BadInput, match="mechanism illama"):
        plain.soften(0.5)
