"""Terminator: pixels all the way, other sizes of pictures, the loss between kernels."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attlas
from attlas import models
from attlas.core.errors import BadInput
from attlas.mechanisms.conv.hyperzzw import HyperZZW, slow_neural_loss
from attlas.models.vision.hyperzzw import GroupStandardisation


def built(**settings) -> nn.Module:
    torch.manual_seed(0)
    return models.create("terminator_micro", **settings)


def test_the_published_network_is_five_blocks_of_ever_more_channels() -> None:
    with torch.device("meta"):
        net = models.create("terminator_cifar10")
    assert net.channels == (12, 36, 72, 144, 288)
    assert [stage.blocks[0].mixer.site.dim for stage in net.stages] == [3, 12, 36, 72, 144]
    assert [len(stage.blocks[0].mixer.slow_global.linears) for stage in net.stages] == [3, 2, 2, 2, 2]


def test_a_picture_of_another_size_is_resampled_and_its_maps_back() -> None:
    net, image = built().eval(), torch.randn(1, 3, 48, 40)
    with torch.no_grad():
        smaller = F.interpolate(image, (32, 32), mode="bilinear", antialias=True)
        torch.testing.assert_close(net(image), net(smaller))
        assert [tuple(each.shape[1:]) for each in net.feature_maps(image)] == [(12, 48, 40), (24, 48, 40)]


def test_kernels_of_layers_are_compared() -> None:
    net = built()
    kernels = [each.global_kernel() for each in net.modules() if isinstance(each, HyperZZW)]
    assert [tuple(each.shape) for each in kernels] == [(3, 32, 32), (12, 32, 32)]
    loss = slow_neural_loss(kernels)
    loss.backward()
    assert loss > 0
    assert slow_neural_loss([kernels[0], kernels[0].repeat(4, 1, 1)]) == 0


def test_group_standardisation_mixes_pictures_and_batches() -> None:
    norm, x = GroupStandardisation(24), 3 + 2 * torch.randn(4, 50, 24)
    with torch.no_grad():
        norm.share[0], norm.share[1] = 30.0, -30.0
    y = norm(x)
    torch.testing.assert_close(y[..., :2].mean(1), torch.zeros(4, 2), atol=1e-5, rtol=0)  # of each picture
    assert y[..., 2:4].mean(1).abs().max() > 1e-3
    torch.testing.assert_close(y[..., 2:4].mean((0, 1)), torch.zeros(2), atol=1e-5, rtol=0)  # of the batch


def test_any_mechanism_stands_in_it() -> None:
    net = built(mixer=["pool", "flow"], img_size=16)
    assert isinstance(net.stages[1].blocks[0].mixer, attlas.Mixer)
    assert net(torch.randn(2, 3, 16, 16)).shape == (2, 10)
    mixed = built(mixer=["hyperzzw", "pool"], img_size=16)
    assert [each.spec.name for each in (stage.blocks[0].mixer for stage in mixed.stages)] == ["hyperzzw", "pool"]


def test_blocks_give_channels() -> None:
    for factors in ((), (4, 0)):
        with pytest.raises(BadInput, match="factors name the channels"):
            built(factors=factors)
