"""CCNet: a head on any backbone."""

import pytest
import torch
from torch import nn

from attlas import models
from attlas.core.errors import BadInput


def built(**settings) -> nn.Module:
    torch.manual_seed(0)
    return models.create("ccnet_micro", **settings).eval()


def test_logits_of_every_pixel_from_maps_of_stride_8() -> None:
    net = built()
    assert net.strides == (4, 8, 8, 8)
    with torch.no_grad():
        for size in ((64, 64), (65, 97), (40, 56)):
            image = torch.randn(1, 3, *size)
            assert net(image).shape == (1, 5, *size)
            assert net.forward_head(net.forward_features(image)).shape[2:] == net.feature_maps(image)[1].shape[2:]


def test_the_last_stages_are_dilated_instead_of_strided() -> None:
    found = []
    for stage in built().backbone.stages:
        convs = [layer for layer in stage.modules() if isinstance(layer, nn.Conv2d)]
        strides = max(layer.stride[0] for layer in convs)
        found.append((strides, {layer.dilation[0] for layer in convs if layer.kernel_size == (3, 3)}))
    assert found == [(1, {1}), (2, {1}), (1, {2}), (1, {4})]


def test_twice_it_has_the_weights_of_once_and_reaches_everywhere() -> None:
    once, twice = (built(mixer_settings={"recurrence": count}) for count in (1, 2))
    size = [sum(value.numel() for value in net.parameters()) for net in (once, twice)]
    assert size[0] == size[1]
    seen = []
    for net in (once, twice):
        nn.init.ones_(net.head.mixer.gamma)
        x = torch.randn(1, 35, net.head.mixer.site.dim, requires_grad=True)
        (grad,) = torch.autograd.grad(net.head.mixer(x, grid=(5, 7))[0, 10].sum(), x)
        seen.append(int((grad.abs().sum(-1) > 0).sum()))
    assert seen == [5 + 7 - 1, 35]


def test_any_mechanism_on_any_backbone() -> None:
    net = built(backbone="poolformer_micro", dilations=None, mixer="softmax", in_chans=1)
    assert net(torch.randn(1, 1, 64, 64)).shape == (1, 5, 64, 64)
    pyramid = models.create("ccnet_micro", features_only=True)
    assert len(pyramid(torch.randn(1, 3, 64, 64))) == 4


def test_bad_input() -> None:
    with pytest.raises(BadInput, match="change a ResNet"):
        built(backbone="poolformer_micro")
    for dilations in ((1, 2), (1, 1, 0, 4), (2, 1, 1, 1)):
        with pytest.raises(BadInput, match="dilations are 1 for the first stage"):
            built(dilations=dilations)
    for stem in ((8, 8), (8, 8, 0)):
        with pytest.raises(BadInput, match="each of three convolutions"):
            built(stem=stem)
    with pytest.raises(BadInput, match="num_classes cannot be negative"):
        built(num_classes=-1)
    with pytest.raises(BadInput, match="for restoration"):
        built(backbone="hat_micro")
