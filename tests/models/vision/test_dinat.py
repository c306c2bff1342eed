"""What NAT and DiNAT are beside what every network promises."""

import re

import pytest
import torch
from torch import Tensor

from attlas import models
from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.models.isotropic import Isotropic


def dilations(net) -> list[list[int]]:
    return [[block.mixer.attend.dilation for block in stage.blocks] for stage in net.stages]


def on_meta(name: str, **settings):
    with torch.device("meta"):
        return models.create(name, **settings)


@pytest.mark.parametrize(("size", "wide"), [(224, (8, 4, 2, 1)), (384, (13, 6, 3, 1))])
def test_every_second_window_spans_the_map(size, wide):
    net = on_meta("dinat_mini", img_size=size)
    depths = (3, 4, 6, 5)
    assert dilations(net) == [([1, far] * 3)[:depth] for depth, far in zip(depths, wide, strict=True)]
    assert {block.mixer.attend.window for stage in net.stages for block in stage.blocks} == {7}


def test_eleven_neighbours_as_published_for_384_pixels():
    net = on_meta("dinat_large", img_size=384, window=11)
    assert [each[1] for each in dilations(net)] == [8, 4, 2, 1]
    tables = {tuple(stage.blocks[0].mixer.attend.relative_bias.shape[1:]) for stage in net.stages}
    assert tables == {(21, 21)}


def test_nat_and_the_isotropic_networks():
    assert {each for stage in dilations(on_meta("nat_mini")) for each in stage} == {1}
    assert dilations(on_meta("dinat_isotropic_small")) == [[1, 2, 1], [2, 1, 2]] * 2
    assert dilations(on_meta("nat_isotropic_small")) == [[1, 1, 1]] * 4
    assert dilations(on_meta("dinat_s_tiny")) == [[1, 8], [1, 4], [1, 2] * 3, [1, 1]]


def test_only_some_sizes_have_layer_scales():
    scaled = {
        name: any("scale1.weight" in key for key in on_meta(name).state_dict())
        for name in ("nat_small", "nat_base", "dinat_small", "dinat_base", "dinat_large", "dinat_s_tiny")
    }
    assert [name for name, has in scaled.items() if has] == ["nat_small", "nat_base", "dinat_base"]


def test_windows_fit_small_maps_and_smaller_pictures_are_refused():
    net = models.create("dinat_micro", window=7, img_size=32)
    assert [stage.blocks[0].mixer.attend.window for stage in net.stages] == [7, 3]
    assert dilations(net) == [[1], [1, 1]]
    assert net.eval()(torch.randn(1, 3, 45, 60)).shape == (1, 1000)
    with pytest.raises(BadInput, match="window 7 with dilation 1 spans 7 positions, the axis has 4"):
        net(torch.randn(1, 3, 16, 16))


def test_a_window_of_the_whole_map_is_full_attention():
    torch.manual_seed(0)
    net = models.create("dinat_micro", window=7, img_size=28).double()
    layer, grid = net.stages[0].blocks[0].mixer, Grid((7, 7))
    x = torch.randn(1, 49, 32, dtype=torch.float64)
    q, k, v = (f(x).unflatten(2, (2, 16)).transpose(1, 2) for f in (layer.q_proj, layer.k_proj, layer.v_proj))
    offsets = grid.places() - grid.places()[:, None] + 6
    bias = layer.attend.relative_bias[:, offsets[..., 0], offsets[..., 1]]
    o = (q @ k.mT / 4 + bias).softmax(-1) @ v
    torch.testing.assert_close(layer(x, grid=grid), layer.out_proj(o.transpose(1, 2).flatten(2)))


def official(state: dict[str, Tensor], stages: str) -> dict[str, Tensor]:
    """Our weights under the names of SHI-Labs/Neighborhood-Attention-Transformer."""
    renamed = {}
    for key, value in state.items():
        key = re.sub(r"^downsamples\.0\.(\d)\.conv", r"patch_embed.proj.\1", key)
        key = re.sub(r"^(downsamples\.0|embed)\.conv", "patch_embed.proj", key)
        key = re.sub(r"^(downsamples\.0\.1|downsamples\.0|embed)\.after", "patch_embed.norm", key)
        key = re.sub(r"^downsamples\.(\d)", lambda found: f"{stages}.{int(found[1]) - 1}.downsample", key)
        key = key.replace("downsample.conv", "downsample.reduction").replace("downsample.after", "downsample.norm")
        key = key.replace("mixer.attend.relative_bias", "attn.rpb").replace("mixer.out_proj", "attn.proj")
        key = re.sub(r"scale([12])\.weight", r"gamma\1", key).replace("stages", stages)
        key = key.replace("head.before", "norm").replace("head.classifier", "head")
        renamed[key] = value
    for block in {key.partition("mixer.q_proj")[0] for key in renamed if "mixer.q_proj" in key}:
        for kind in ("weight", "bias"):
            parts = [renamed.pop(f"{block}mixer.{name}_proj.{kind}") for name in "qkv"]
            renamed[f"{block}attn.qkv.{kind}"] = torch.cat(parts)
    return renamed


@pytest.mark.parametrize("settings", [{"scale": 0.5}, {"overlapping": False}])
def test_official_names(settings):
    net = models.create("dinat_micro", **settings).eval()
    state = official(net.state_dict(), "levels" if "scale" in settings else "layers")
    assert ("levels.0.blocks.0.gamma1" in state) == ("scale" in settings)
    again = models.create("dinat_micro", **settings, weights=state, source="official").eval()
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(again(image), net(image))


def test_official_names_of_an_isotropic_network():
    net = models.create("dinat_isotropic_micro").eval()
    assert isinstance(net, Isotropic)
    assert net.depths == [1, 1, 1, 1]
    assert dilations(net) == [[1], [2]] * 2
    state = {
        re.sub(r"^layers\.(\d)\.blocks\.0", r"layers.\1", key): value
        for key, value in official(net.state_dict(), "layers").items()
    }
    assert "layers.3.attn.rpb" in state
    again = models.create("dinat_isotropic_micro", weights=state, source="official").eval()
    image = torch.randn(1, 3, 112, 112)
    assert torch.equal(again(image), net(image))
    assert models.create("nat_isotropic_micro", mixer="flow").eval()(image).shape == (1, 1000)
