"""What DaViT is beside what every network promises."""

import re

import pytest
import torch
from torch import Tensor

from attlas import models
from attlas.bench.macs import macs
from attlas.blocks.embed import filled
from attlas.core.errors import BadInput
from attlas.core.grid import Grid


def official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our weights under the names of dingmyu/davit."""
    renamed = {}
    for key, value in state.items():
        key = re.sub(r"^downsamples\.(\d)\.(after|before)", r"patch_embeds.\1.norm", key)
        key = re.sub(r"^downsamples\.(\d)\.conv", r"patch_embeds.\1.proj", key)
        key = re.sub(
            r"^stages\.(\d)\.blocks\.(\d+)",
            lambda found: f"main_blocks.{found[1]}.{int(found[2]) // 2}.{int(found[2]) % 2}",
            key,
        )
        key = re.sub(r"position([12])\.conv", lambda found: f"cpe.{int(found[1]) - 1}.proj", key)
        key = key.replace("head.after", "norms").replace("head.classifier", "head")
        renamed[key.replace("mixer.out_proj", "attn.proj")] = value
    for block in {key.partition("mixer.q_proj")[0] for key in renamed if "mixer.q_proj" in key}:
        for kind in ("weight", "bias"):
            parts = [renamed.pop(f"{block}mixer.{name}_proj.{kind}") for name in "qkv"]
            renamed[f"{block}attn.qkv.{kind}"] = torch.cat(parts)
    return renamed


def test_official_names():
    net = models.create("davit_micro", depths=(1, 2)).eval()
    state = official(net.state_dict())
    assert "main_blocks.1.1.0.attn.qkv.weight" in state
    assert "patch_embeds.1.norm.weight" in state
    again = models.create("davit_micro", depths=(1, 2), weights=state, source="official").eval()
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(again(image), net(image))


def test_a_depth_counts_pairs_of_a_window_and_a_channel_block():
    with torch.device("meta"):
        net = models.create("davit_tiny")
    kinds = [[block.mixer.spec.name for block in stage.blocks] for stage in net.stages]
    assert kinds == [["davit_window", "davit_channel"] * depth for depth in (1, 1, 3, 1)]
    assert {stage.blocks[0].mixer.site.head_dim for stage in net.stages} == {32}


def reach(block, side: int) -> Tensor:
    """Which of side x side places change the first place of a block's output."""
    grid = Grid((side, side))
    x = torch.randn(1, grid.tokens, 32, dtype=torch.float64, requires_grad=True)
    block.double()(x, grid)[0, 0].square().sum().backward()
    return (x.grad[0].abs().sum(1) > 0).view(side, side)


def test_windows_see_their_surroundings_and_channels_the_whole_map():
    net = models.create("davit_micro", img_size=64)
    local, everywhere = net.stages[0].blocks
    near = reach(local, 16)
    # Of the window one convolution further, and of the second convolution the neighbours' windows: none at a corner.
    assert near[:8, :8].all()
    assert near.sum() == 64
    assert reach(everywhere, 16).all()


def test_a_block_is_its_equation():
    torch.manual_seed(0)
    net = models.create("davit_micro").double()
    block, grid = net.stages[0].blocks[1], Grid((4, 6))
    x = torch.randn(2, 24, 32, dtype=torch.float64)

    def placed(conv, x):
        return x + conv(x.mT.unflatten(2, grid.shape)).flatten(2).mT

    y = placed(block.position1.conv, x)
    y = y + block.mixer(block.norm1(y), grid=grid)
    y = placed(block.position2.conv, y)
    torch.testing.assert_close(block(x, grid), y + block.mlp(block.norm2(y)))


def test_odd_sizes_are_filled_with_zeros():
    net = models.create("davit_micro", features_only=True).eval()
    image = torch.randn(1, 3, 33, 46)
    maps = net(image)
    assert [tuple(each.shape[2:]) for each in maps] == [(9, 12), (5, 6)]
    torch.testing.assert_close(net(filled(image, 4))[1], maps[1])


def test_cost_is_linear_in_the_picture():
    with torch.device("meta"):
        net = models.create("davit_tiny", num_classes=0)
    small, large = (macs(net, torch.empty(1, 3, side, side, device="meta")) for side in (224, 448))
    assert large == pytest.approx(4 * small, rel=1e-3)


def test_either_half_can_be_another_mechanism():
    net = models.create("davit_micro", mixer="swin", channel_mixer=["davit_channel", "flow"]).eval()
    kinds = [[block.mixer.spec.name for block in stage.blocks] for stage in net.stages]
    assert kinds == [["swin", "davit_channel"], ["swin", "flow"]]
    assert net(torch.randn(1, 3, 32, 32)).shape == (1, 1000)
    with pytest.raises(BadInput, match="one for each of the 2 stages"):
        models.create("davit_micro", channel_mixer=["flow"] * 3)
