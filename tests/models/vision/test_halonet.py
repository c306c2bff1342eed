"""What HaloNet is beside what every network promises."""

import pytest
import torch
import torch.nn.functional as F

from attlas import models
from attlas.blocks.bottleneck import AttendMap, Bottleneck, MixMap
from attlas.blocks.factory import make_attend
from attlas.blocks.factory import mixer as make_mixer
from attlas.core.errors import BadInput
from attlas.core.grid import Grid


def test_eight_heads_in_every_stage_are_as_many_parameters_as_timm_counts():
    with torch.device("meta"):
        net = models.create("halonet_h1", heads=(8, 8, 8, 8))
    assert sum(each.numel() for each in net.parameters()) == 8_100_056


def attention(stride=1, features=4, **settings):
    torch.manual_seed(0)
    return AttendMap(make_attend("halonet", 2, 4, grid=(8, 8), **settings), 8, features, stride).double()


def test_a_strided_layer_keeps_every_second_row_and_column():
    x = torch.randn(2, 8, 8, 8, dtype=torch.float64)
    full, strided = attention(block=4, halo=1), attention(2, block=4, halo=1)
    torch.testing.assert_close(strided(x), full(x)[:, :, ::2, ::2], rtol=0, atol=0)
    mixer = make_mixer("davit_window", 8, 2, window=4).double()
    torch.testing.assert_close(MixMap(mixer, 2)(x), MixMap(mixer)(x)[:, :, ::2, ::2], rtol=0, atol=0)


@pytest.mark.parametrize("border", ["end", "zeros"])
def test_a_place_sees_its_block_and_the_halo(border):
    x = torch.randn(1, 8, 8, 8, dtype=torch.float64, requires_grad=True)
    attention(block=4, halo=1, border=border)(x)[0, :, 0, 0].sum().backward()
    seen = x.grad[0].abs().sum(0) > 0
    assert seen[:5, :5].all()
    assert seen.sum() == 25


def test_values_of_another_width():
    x = torch.randn(1, 8, 8, 8, dtype=torch.float64)
    assert attention(features=7, border="zeros")(x).shape == (1, 14, 8, 8)


def test_a_bottleneck_is_its_equation():
    x = torch.randn(2, 6, 8, 8)
    for stride, out in ((1, 6), (2, 6), (1, 10)):
        middle = torch.nn.Conv2d(4, 5, 3, stride, 1)
        block = Bottleneck(6, out, middle, 4, 5, stride=stride, activation=torch.nn.SiLU).eval()
        expected = F.silu(block.conv3(middle(F.silu(block.conv1(x)))) + block.shortcut(x))
        torch.testing.assert_close(block(x), expected)
        assert isinstance(block.shortcut, torch.nn.Identity) == ((stride, out) == (1, 6))


def test_layout_says_where_attention_stands():
    net = models.create("halonet50ts", img_size=64, num_classes=0)
    kinds = ["".join("a" if isinstance(each.middle[0], AttendMap) else "c" for each in s.blocks) for s in net.stages]
    assert kinds == ["ccc", "ccca", "cacaca", "cac"]
    with pytest.raises(BadInput, match="a letter per block"):
        models.create("halonet_micro", layout=("cb", "a"))


def test_maps_that_blocks_do_not_divide():
    net = models.create("halonet_micro", features_only=True).eval()
    assert [tuple(each.shape[2:]) for each in net(torch.randn(1, 3, 39, 50))] == [(10, 13), (5, 7)]


@pytest.mark.parametrize("mixer", ["swin", "davit_channel", "flow"])
def test_other_mechanisms_inside(mixer):
    net = models.create("halonet_micro", mixer=mixer, values=1).eval()
    assert net(torch.randn(1, 3, 32, 32)).shape == (1, 1000)


def test_another_mixer_of_tokens_inside():
    net = models.create("halonet_micro", mixer="focalnet", mixer_settings={"levels": 1}).eval()
    assert isinstance(net.stages[0].blocks[1].middle[0], MixMap)
    assert net(torch.randn(1, 3, 32, 32)).shape == (1, 1000)


def test_grids_are_those_that_a_mixer_sees():
    net = models.create("halonet_micro", mixer="swin", values=1)
    sites = [block.middle[0].attend.site.grid for block in (net.stages[0].blocks[1], net.stages[1].blocks[0])]
    assert sites == [Grid((8, 8)), Grid((8, 8))]


def test_attention_with_a_stride_cannot_be_loaded_from_timm():
    with torch.device("meta"):
        net = models.create("halonet_micro")
    with pytest.raises(BadInput, match=r"stages\.1\.blocks\.0\.middle\.0 is attention with a stride"):
        models.load_weights(net, "halonet_micro", {}, "timm")


def test_layers_are_the_attentions_of_a_stage():
    with torch.device("meta"):
        net = models.create("halonet_micro", mixer="swin", layout=("aca", "aa"), values=1, img_size=64)
    sites = [layer.attend.site for layer in net.modules() if isinstance(layer, AttendMap)]
    assert [(site.layer, site.layers) for site in sites] == [(0, 2), (1, 2)] * 2
