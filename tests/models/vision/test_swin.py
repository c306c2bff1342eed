"""What Swin is beside what every network promises."""

import re

import pytest
import torch
from torch import Tensor

from attlas import models
from attlas.blocks.embed import Downsample, PatchMerging, filled
from attlas.core.errors import BadInput
from attlas.core.grid import Grid


def official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our weights under the names and in the layout of microsoft/Swin-Transformer."""
    renamed = {}
    for key, value in state.items():
        key = key.replace("stages.", "layers.").replace("mixer.out_proj", "attn.proj")
        key = key.replace("downsamples.0.conv", "patch_embed.proj").replace("downsamples.0.after", "patch_embed.norm")
        key = re.sub(r"^downsamples\.(\d)", lambda found: f"layers.{int(found[1]) - 1}.downsample", key)
        key = key.replace("head.before", "norm").replace("head.classifier", "head")
        if key.endswith("relative_bias"):
            key = key.replace("mixer.attend.relative_bias", "attn.relative_position_bias_table")
            value = value.flip(1, 2).flatten(1).T  # (offsets query - key, heads)
        renamed[key] = value
    for block in {key.partition("mixer.q_proj")[0] for key in renamed if "mixer.q_proj" in key}:
        for kind in ("weight", "bias"):
            parts = [renamed.pop(f"{block}mixer.{name}_proj.{kind}") for name in "qkv"]
            renamed[f"{block}attn.qkv.{kind}"] = torch.cat(parts)
        renamed[f"{block}attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.long)
        renamed[f"{block}attn_mask"] = torch.zeros(4, 16, 16)
    return renamed


def test_official_names():
    net = models.create("swin_micro").eval()
    state = official(net.state_dict())
    assert "layers.0.downsample.reduction.weight" in state
    assert state["layers.0.blocks.1.attn.relative_position_bias_table"].shape == (49, 2)
    again = models.create("swin_micro", weights=state, source="official").eval()
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(again(image), net(image))


def test_windows_lie_half_a_window_further_in_every_second_block():
    net = models.create("swin_micro", img_size=64)
    shifts = [[block.mixer.attend.shift for block in stage.blocks] for stage in net.stages]
    assert shifts == [[(0, 0), (2, 2)]] * 2


def touched(net, image_size: int) -> Tensor:
    """Which places of the input of stage 0 reach the first place of its output, as (H, W)."""
    net = net.double().eval()
    x = torch.randn(1, 32, image_size, image_size, dtype=torch.float64, requires_grad=True)
    net.stages[0](x)[0, :, 0, 0].sum().backward()
    return x.grad.abs().sum((0, 1)) > 0


def test_shifted_windows_connect_neighbouring_windows():
    fixed = touched(models.create("swin_micro", mixer_settings={"shift": 0}), 8)
    assert fixed[:4, :4].all()
    assert fixed.sum() == 16
    shifted = touched(models.create("swin_micro"), 8)
    assert torch.equal(shifted, fixed)  # the first place lies in a corner that no shifted window leaves
    net = models.create("swin_micro").double().eval()
    x = torch.randn(1, 32, 8, 8, dtype=torch.float64, requires_grad=True)
    net.stages[0](x)[0, :, 3, 3].sum().backward()
    assert (x.grad.abs().sum((0, 1)) > 0).all()


def test_merging_goes_down_before_it_goes_right():
    merging = PatchMerging(1, 4).double()
    merging.norm = torch.nn.Identity()
    merging.reduction.weight.data.copy_(torch.eye(4))
    x = torch.arange(12.0, dtype=torch.float64).view(1, 1, 3, 4)
    y = merging(x)
    assert y[0, :, 0, 0].tolist() == [0, 4, 1, 5]
    assert y[0, :, 1, 1].tolist() == [10, 0, 11, 0]


def test_sides_that_do_not_divide_are_filled_with_zeros():
    x = torch.randn(1, 2, 5, 6)
    assert filled(x, 1) is x
    wide = filled(x, 4)
    assert wide.shape == (1, 2, 8, 8)
    assert torch.equal(wide[:, :, :5, :6], x)
    assert not wide[:, :, 5:].any()
    assert not wide[:, :, :, 6:].any()
    down = Downsample(2, 3, 4, 4, fill=True)
    assert torch.equal(down(x), down(wide))
    assert Downsample(2, 3, 4, 4)(x).shape == (1, 3, 1, 1)


def test_any_size_of_picture():
    net = models.create("swin_micro", features_only=True).eval()
    assert [tuple(each.shape[2:]) for each in net(torch.randn(1, 3, 39, 50))] == [(10, 13), (5, 7)]
    image = torch.randn(1, 3, 39, 50)
    torch.testing.assert_close(net(image)[1], net(filled(image, 4))[1])


def test_smaller_pictures_than_it_was_built_for_have_smaller_windows():
    net = models.create("swin_micro", img_size=64, window=7).eval()
    small = models.create("swin_micro", img_size=32, window=7).eval()
    state = {
        key: value[:, 3:10, 3:10] if key.startswith("stages.1") and key.endswith("relative_bias") else value
        for key, value in net.state_dict().items()
    }
    small.load_state_dict(state)
    image = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(net(image), small(image))


def test_other_mechanisms_by_stage():
    net = models.create("swin_micro", mixer=["swin", "davit_channel"]).eval()
    assert [stage.blocks[0].mixer.spec.name for stage in net.stages] == ["swin", "davit_channel"]
    assert net(torch.randn(1, 3, 32, 32)).shape == (1, 1000)


def test_bad_input():
    with pytest.raises(BadInput, match="a place at least"):
        models.create("swin_micro", window=0)
    with pytest.raises(BadInput, match="img_size"):
        models.create("swin_micro", img_size=0)


def test_what_follows_from_the_sizes_is_no_weight_in_either_map():
    net = models.create("swin_micro")
    state = official(net.state_dict())
    timm = {}
    for key, value in state.items():
        key = re.sub(r"^layers\.(\d)\.downsample", lambda found: f"layers.{int(found[1]) + 1}.downsample", key)
        timm[re.sub(r"^head\.", "head.fc.", key)] = value
    assert any(key.endswith("attn_mask") for key in timm)
    again = models.create("swin_micro", weights=timm, source="timm").state_dict()
    assert all(torch.equal(again[key], value) for key, value in net.state_dict().items())


def test_every_stage_starts_with_windows_that_are_not_shifted():
    net = models.create("swin_micro", img_size=64, depths=(1, 2))
    assert [[block.mixer.attend.shift for block in stage.blocks] for stage in net.stages] == [
        [(0, 0)],
        [(0, 0), (2, 2)],
    ]


def test_shifted_windows_on_a_map_that_they_do_not_divide_are_masked_attention():
    torch.manual_seed(0)
    net = models.create("swin_micro", img_size=64).double()
    layer, grid = net.stages[0].blocks[1].mixer, Grid((6, 11))
    x = torch.randn(1, grid.tokens, 32, dtype=torch.float64)
    q, k, v = (f(x).unflatten(2, (2, 16)).transpose(1, 2) for f in (layer.q_proj, layer.k_proj, layer.v_proj))
    places = grid.places()
    offsets = places - places[:, None] + 3
    window = (places + 2) // 4  # of 4 places, the first border at 2
    same = (window == window[:, None]).all(-1)
    bias = layer.attend.relative_bias[:, offsets[..., 0].clamp(0, 6), offsets[..., 1].clamp(0, 6)]
    o = (q @ k.mT / 4 + bias).masked_fill(~same, -torch.inf).softmax(-1) @ v
    torch.testing.assert_close(layer(x, grid=grid), layer.out_proj(o.transpose(1, 2).flatten(2)))
