"""MAXIM: stages and scales, the U, the names of its checkpoints."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas import models
from attlas.core.errors import BadInput
from attlas.models.u_shaped import UShaped


def built(**settings) -> nn.Module:
    torch.manual_seed(0)
    return models.create("maxim_micro", **settings).eval()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("maxim_s1", 6108515), ("maxim_s2", 13353830)],
)
def test_with_one_scale_it_has_the_counts_of_the_code(name, parameters) -> None:
    with torch.device("meta"):
        net = models.create(name, scales=1)
    assert sum(value.numel() for value in net.parameters()) == parameters


def test_every_stage_gives_every_scale_and_all_learn() -> None:
    net = built(stages=2, scales=3, features=4)
    pictures = net.every(torch.rand(1, 3, 16, 32))
    assert [[tuple(each.shape[2:]) for each in stage] for stage in pictures] == [[(16, 32), (8, 16), (4, 8)]] * 2
    sum(each.square().mean() for stage in pictures for each in stage).backward()
    assert all(value.grad is not None for value in net.parameters())
    torch.testing.assert_close(net(torch.ones(1, 3, 16, 16)), net.every(torch.ones(1, 3, 16, 16))[-1][0])


def test_any_size_is_mirrored_on_both_sides() -> None:
    net, image = built(), torch.rand(1, 3, 27, 20)
    with torch.no_grad():
        whole = net(F.pad(image, (6, 6, 2, 3), "reflect"))
        torch.testing.assert_close(net(image), whole[:, :, 2:29, 6:26])


def test_it_learns_to_denoise_one_picture() -> None:
    net = built(features=8).train()
    line = torch.linspace(0, 1, 16)
    clean = torch.stack([line.expand(16, 16), line[:, None].expand(16, 16), (line[:, None] - line).abs()])[None]
    noisy = clean + 0.2 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))

    def psnr() -> float:
        return float(-10 * (net(noisy).detach() - clean).square().mean().log10())

    before, optimiser = psnr(), torch.optim.Adam(net.parameters(), lr=5e-3)
    for _ in range(35):
        optimiser.zero_grad()
        (net(noisy) - clean).square().mean().backward()
        optimiser.step()
    assert psnr() > before + 5


def test_the_u_joins_each_level_with_its_own() -> None:
    class Add(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.value = value

        def forward(self, x: Tensor, *beside: Tensor) -> Tensor:
            return x + self.value + sum(beside)

    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, :1]

    shape = UShaped(
        [Add(1.0), Add(10.0)],
        [nn.AvgPool2d(2), nn.AvgPool2d(2)],
        Add(100.0),
        [nn.Upsample(scale_factor=2), nn.Upsample(scale_factor=2)],
        [Half(), nn.Identity()],
    )
    encoded, decoded = shape(torch.zeros(1, 1, 8, 8), [(torch.ones(1),), ()])
    assert [each.mean().item() for each in encoded] == [2, 12]
    assert [tuple(each.shape) for each in decoded] == [(1, 1, 8, 8), (1, 2, 4, 4)]
    assert decoded[1][0, :, 0, 0].tolist() == [112, 12]  # the bottleneck's, then the skip
    assert decoded[0].mean() == 112


def test_any_mechanism_stands_in_it() -> None:
    net = built(mixer=["maxim", "flow", "softmax", "pool"])
    assert net(torch.rand(1, 3, 32, 32)).shape == (1, 3, 32, 32)
    names = [level.stage.blocks[0].mixer.spec.name for level in net.stages[0].shape.encoders]
    assert names == ["maxim", "flow", "softmax"]


def test_settings_of_the_mechanism_leave_the_published_ones() -> None:
    levels = built(mixer_settings={"cells": 2}).stages[0].shape.encoders
    mixers = [level.stage.blocks[0].mixer for level in levels]
    assert [each.across.mix.counts for each in mixers] == [(2, 2)] * 3
    assert [each.within.mix.counts for each in mixers] == [(4, 4), (4, 4), (2, 2)]


def test_names_of_checkpoints() -> None:
    kernel = torch.arange(2 * 2 * 3 * 5.0).view(2, 2, 3, 5)
    state = {
        "stage_1_decoder_block_2/ConvTranspose_0/kernel": kernel,
        "stage_0_input_conv_0/kernel": kernel,
        "UpSampleRatio_0/Conv_0/bias": torch.ones(1),  # stage 0, from encoder 0 to level 2
        "UpSampleRatio_34/Conv_0/bias": torch.ones(1),  # stage 1, from the second skip (of level 1) to level 0
        "stage_0_encoder_block_0/SplitHeadMultiAxisGmlpLayer_1/GridGmlpLayer/GridGatingUnit/Dense_0/kernel": torch.eye(
            2
        ),
    }
    found = models.model("maxim_micro").key_maps["official"](state, nn.Module())
    assert torch.equal(found["stages.1.shape.ups.2.weight"][1, 4], kernel[:, :, 1, 4].flip(0, 1))
    assert torch.equal(found["stages.0.inputs.0.weight"][4, 1], kernel[:, :, 1, 4])
    assert "stages.0.shape.fuse.encoded.2.convs.0.bias" in found
    assert "stages.1.shape.fuse.skipped.0.convs.1.bias" in found
    assert "stages.0.shape.encoders.0.stage.blocks.1.mixer.across.mix.weight" in found


def test_bad_input() -> None:
    with pytest.raises(BadInput, match="1 to 3 scales"):
        built(scales=4)
    with pytest.raises(BadInput, match="multiples of 16"):
        built().every(torch.rand(1, 3, 20, 16))
    with pytest.raises(BadInput, match="in_chans"):
        built()(torch.rand(1, 1, 32, 32))
