"""HAT: its block, its sizes of pictures, its published tables of biases."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attlas import models
from attlas.blocks.metaformer import MetaFormerBlock
from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.mechanisms.local_sparse.swin import Swin
from attlas.models.vision.hat import HybridBlock
from attlas.ops.channel_attention import ChannelAttention, ChannelConvs


def built(**settings) -> nn.Module:
    torch.manual_seed(0)
    return models.create("hat_micro", **settings).eval()


@pytest.mark.parametrize("scale", [2, 3, 4, 8])
def test_pictures_grow_by_the_scale(scale) -> None:
    with torch.no_grad():
        assert built(scale=scale)(torch.rand(1, 3, 16, 24)).shape == (1, 3, 16 * scale, 24 * scale)


def test_pictures_that_windows_do_not_fill_are_mirrored() -> None:
    net, image = built(), torch.rand(1, 3, 13, 22)
    with torch.no_grad():
        whole = net(F.pad(image, (0, 2, 0, 3), "reflect"))
        torch.testing.assert_close(net(image), whole[:, :, :26, :44])
        assert net(torch.rand(1, 3, 3, 1)).shape == (1, 3, 6, 2)  # also more than once


def test_without_convolutions_a_hybrid_block_is_a_metaformer_block() -> None:
    block = built().groups[0].stage.blocks[1]
    assert isinstance(block, HybridBlock)
    nn.init.zeros_(block.convs.conv2.weight)
    nn.init.zeros_(block.convs.conv2.bias)
    plain = MetaFormerBlock(block.mixer, block.mlp)
    plain.norm1, plain.norm2 = block.norm1, block.norm2
    x, grid = torch.randn(2, 24 * 16, 24), Grid((24, 16))
    torch.testing.assert_close(block(x, grid), plain(x, grid))


def test_overlapping_windows_widen_what_a_pixel_depends_on() -> None:
    def support(**settings) -> int:
        net = built(groups=1, depth=1, **settings)
        nn.init.zeros_(net.groups[0].stage.blocks[0].convs.conv2.weight)  # channel attention sees everything
        image = torch.rand(1, 3, 64, 64, requires_grad=True)
        (grad,) = torch.autograd.grad(net(image)[0, :, 64, 64].sum(), image)
        return int((grad.abs().sum(1) > 0).sum())

    assert support() > support(overlapping=None)


def test_the_mean_colour_comes_back() -> None:
    net = built()
    nn.init.zeros_(net.last.weight)
    nn.init.zeros_(net.last.bias)
    torch.testing.assert_close(net(torch.rand(1, 3, 8, 8))[0, :, 5, 3], net.mean.flatten())
    assert not built(in_chans=1).mean.any()


def test_published_biases_are_those_of_offsets() -> None:
    net = built()
    window, halo = 8, 2
    side = 2 * (window + halo) - 1
    table = torch.arange(side * side, dtype=torch.float32)[:, None].expand(-1, 2)
    plain = torch.arange(15 * 15, dtype=torch.float32)[:, None].expand(-1, 2)
    state = {
        "layers.0.residual_group.overlap_attn.relative_position_bias_table": table,
        "layers.1.residual_group.blocks.1.attn.relative_position_bias_table": plain,
        "relative_position_index_SA": torch.zeros(3),
    }
    found = models.model("hat_micro").key_maps["official"](state, net)
    assert sorted(found) == [
        "groups.0.stage.blocks.2.mixer.attend.relative_bias",
        "groups.1.stage.blocks.1.mixer.attend.relative_bias",
    ]
    overlapping, windowed = (found[key] for key in sorted(found))
    assert overlapping.shape == net.groups[0].stage.blocks[2].mixer.attend.relative_bias.shape
    assert overlapping[0].unique().numel() == side * side
    query, key = (3, 7), (0, 11)  # places in the window and in the window of keys, which begins `halo` earlier
    index = (key[0] - query[0] + 1 - 2 * halo) * side + key[1] - query[1] + 1 - 2 * halo
    dy, dx = (k - halo - q + window + halo - 1 for q, k in zip(query, key, strict=True))
    assert overlapping[1, dy, dx] == table[index, 1]  # a negative index counts from the end
    assert windowed[0, 7 + 2, 7 - 1] == (7 - 2) * 15 + 7 + 1  # published offsets are query - key


def test_published_biases_of_other_windows_are_refused() -> None:
    read, net = models.model("hat_micro").key_maps["official"], built()
    key = "layers.0.residual_group.overlap_attn.relative_position_bias_table"
    with pytest.raises(BadInput, match="361 offsets here, 225 in the checkpoint"):
        read({key: torch.zeros(15 * 15, 2)}, net)
    with pytest.raises(BadInput, match="square window, got 14"):
        read({key: torch.zeros(14, 2)}, net)
    assert read({key: torch.zeros(15 * 15, 2)}, built(overlapping=None))  # the list of missing weights names it


def test_channel_attention_multiplies_every_place_alike() -> None:
    attention, x = ChannelAttention(6, 2), torch.randn(2, 5, 6)
    factors = attention(x) / x
    torch.testing.assert_close(factors, factors[:, :1].expand_as(factors))
    assert ((factors > 0) & (factors < 1)).all()
    assert ChannelConvs(6, 3, 2)(torch.randn(2, 12, 6), Grid((3, 4))).shape == (2, 12, 6)


def test_settings_of_the_mechanism_leave_the_published_ones() -> None:
    mixers = [each for each in built(mixer_settings={"bias": False}).modules() if isinstance(each, Swin)]
    assert {each.window for each in mixers} == {(8, 8)}
    mixers = [group.stage.blocks[0].mixer for group in built(mixer_settings=[None, {"bias": False}]).groups]
    assert [each.q_proj.bias is None for each in mixers] == [False, True]


def test_every_group_begins_with_windows_that_are_not_shifted() -> None:
    net = built(depth=3)
    shifts = [[block.mixer.attend.shift for block in group.stage.blocks[:3]] for group in net.groups]
    assert shifts == [[(0, 0), (4, 4), (0, 0)]] * 2


def test_any_mechanism_stands_in_it() -> None:
    image = torch.rand(1, 3, 32, 32)
    net = built(mixer=["flow", "neighborhood"], overlapping="agent", img_size=32)
    assert net(image).shape == (1, 3, 64, 64)
    assert net.groups[1].stage.blocks[0].mixer.spec.name == "neighborhood"


def test_bad_input() -> None:
    with pytest.raises(BadInput, match="scale=6"):
        built(scale=6)
    with pytest.raises(BadInput, match="squeeze it less"):
        built(squeeze=48)
    with pytest.raises(BadInput, match="between the convolutions"):
        built(compress=48)
    with pytest.raises(BadInput, match="in_chans"):
        built()(torch.rand(1, 1, 32, 32))
    with pytest.raises(BadInput, match="no feature maps"):
        models.create("hat_micro", features_only=True)
