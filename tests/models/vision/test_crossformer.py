"""What CrossFormer is beside what every network promises."""

import re

import pytest
import torch
from torch import Tensor

from attlas import models
from attlas.blocks.crossformer import Cooling, CrossScale
from attlas.core.errors import BadInput
from attlas.core.grid import Grid


def official(state: dict[str, Tensor], layout: list[list[bool]]) -> dict[str, Tensor]:
    """Our weights under the names of cheerss/CrossFormer; `layout` says which modules of a stage cool."""

    def home(found: re.Match[str]) -> str:
        stage, place = int(found[1]), int(found[2])
        earlier = sum(layout[stage][:place])
        cools = layout[stage][place]
        rest = found[3].replace("conv", "ex_conv").replace("norm", "ex_ln") if cools else found[3]
        return f"layers.{stage}.blocks.{place - earlier - cools}.{rest}"

    def bias(found: re.Match[str]) -> str:
        index = int(found[1])
        return f"attn.pos.pos{(index + 2) // 3}.{(index - 1) % 3}" if index else "attn.pos.pos_proj"

    renamed = {}
    for key, value in state.items():
        key = re.sub(r"^stages\.(\d)\.blocks\.(\d+)\.(.*)", home, key)
        key = re.sub(r"mixer\.attend\.position_bias\.(\d+)", bias, key)
        key = re.sub(r"^downsamples\.0\.convs", "patch_embed.projs", key)
        key = re.sub(r"^downsamples\.0\.after", "patch_embed.norm", key)
        key = re.sub(r"^downsamples\.(\d)", lambda found: f"layers.{int(found[1]) - 1}.downsample", key)
        key = key.replace("downsample.convs", "downsample.reductions").replace("downsample.before", "downsample.norm")
        key = key.replace("head.before", "norm").replace("head.classifier", "head")
        renamed[key.replace("mixer.out_proj", "attn.proj")] = value
    for block in {key.partition("mixer.q_proj")[0] for key in renamed if "mixer.q_proj" in key}:
        for kind in ("weight", "bias"):
            parts = [renamed.pop(f"{block}mixer.{name}_proj.{kind}") for name in "qkv"]
            renamed[f"{block}attn.qkv.{kind}"] = torch.cat(parts)
    return renamed


@pytest.mark.parametrize("cooling", [False, True])
def test_official_names(cooling):
    net = models.create("crossformer_micro", cooling=cooling).eval()
    layout = [[isinstance(block, Cooling) for block in stage.blocks] for stage in net.stages]
    assert layout == [[False] * 3 + [True] * cooling + [False], [False] * 2]
    state = official(net.state_dict(), layout)
    assert ("layers.0.blocks.2.ex_conv.weight" in state) == cooling
    assert "layers.0.blocks.3.attn.pos.pos3.2.weight" in state
    assert "layers.0.downsample.reductions.1.weight" in state
    again = models.create("crossformer_micro", cooling=cooling, weights=state, source="official").eval()
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(again(image), net(image))


def test_every_stage_starts_with_windows():
    with torch.device("meta"):
        net = models.create("crossformer_tiny")
    kinds = [[block.mixer.attend.distance for block in stage.blocks] for stage in net.stages]
    assert kinds == [(["short", "long"] * 4)[:depth] for depth in (1, 1, 8, 6)]
    fits = [stage.blocks[0].mixer.attend for stage in net.stages]
    fits = [attend.groups(Grid((side, side))) for attend, side in zip(fits, (56, 28, 14, 7), strict=True)]
    assert [group for group, _ in fits] == [7] * 4
    with torch.device("meta"):
        plus = models.create("crossformer_pp_small")
    settings = [(stage.blocks[1].mixer.attend.group, stage.blocks[1].mixer.attend.interval) for stage in plus.stages]
    assert settings == [(4, 4), (4, 2), (14, 1), (7, 1)]
    assert [sum(isinstance(each, Cooling) for each in stage.blocks) for stage in plus.stages] == [0, 0, 5, 0]


def test_near_and_far_together_connect_all_places():
    net = models.create("crossformer_micro", img_size=64, cooling=False).double()
    grid = Grid((16, 16))
    near, far = net.stages[0].blocks[:2]
    x = torch.randn(1, 256, 32, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(far(x, grid)[0, 0].square().sum(), x)
    alone = (gradient[0].abs().sum(1) > 0).view(16, 16)
    assert alone.sum() == 16
    assert alone[::4, ::4].all()
    (gradient,) = torch.autograd.grad(far(near(x, grid), grid)[0, 0].square().sum(), x)
    assert (gradient[0].abs().sum(1) > 0).all()


def test_scales_lie_side_by_side_and_are_centred():
    scales = CrossScale(1, 8, (2, 4, 6), 2).double()
    assert [tuple(conv.weight.shape) for conv in scales.convs] == [(4, 1, 2, 2), (2, 1, 4, 4), (2, 1, 6, 6)]
    x = torch.randn(1, 1, 6, 8, dtype=torch.float64)
    y = scales(x)
    assert y.shape == (1, 8, 3, 4)
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2))
    expected = (scales.convs[2].weight[1, 0] * padded[0, 0, 2:8, 4:10]).sum() + scales.convs[2].bias[1]
    torch.testing.assert_close(y[0, 7, 1, 2], expected)
    torch.testing.assert_close(
        scales(x[:, :, :5])[:, :, 2, 0], scales(x.index_fill(2, torch.tensor([5]), 0))[:, :, 2, 0]
    )


def test_cooling_forgets_how_large_activations_are():
    cooling, x = Cooling(8), torch.randn(2, 12, 8)
    with torch.no_grad():
        cooling.conv.bias.zero_()
    torch.testing.assert_close(cooling(1e3 * x, Grid((3, 4))), cooling(x, Grid((3, 4))), rtol=1e-3, atol=1e-3)


def test_bad_input():
    with pytest.raises(BadInput, match="centred on patches of 4 places"):
        CrossScale(3, 8, (4, 7), 4)
    for kernels, stride in (((), 4), ((4, 8), 0)):
        with pytest.raises(BadInput, match="a kernel at least and a stride"):
            CrossScale(3, 8, kernels, stride)
    with pytest.raises(BadInput, match="halve the channels 3 times, got 12"):
        CrossScale(3, 12, (4, 8, 16, 32), 4)
    with pytest.raises(BadInput, match="one for each of the 2 stages"):
        models.create("crossformer_micro", mixer=["crossformer"] * 3)
