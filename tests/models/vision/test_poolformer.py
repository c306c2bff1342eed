"""What only PoolFormer holds: norms of whole pictures, and a head that norms before it takes the mean."""

import torch
from torch import nn

from attlas import models
from attlas.blocks.norms import TokenGroupNorm
from tests.models.vision.official_names import picture, shaken


def test_the_head_norms_the_map_and_then_takes_its_mean():
    net = shaken("poolformer_micro")
    last = net.forward_features(picture(64, 96))
    norm, linear = net.head.before, net.head.classifier
    mean, variance = last.mean((1, 2, 3), keepdim=True), last.var((1, 2, 3), keepdim=True, correction=0)
    whole = (last - mean) / (variance + norm.eps).sqrt()
    pooled = whole.mean((2, 3)) * norm.weight + norm.bias
    torch.testing.assert_close(net(picture(64, 96)), pooled @ linear.weight.T + linear.bias)
    other = linear(norm(last.mean((2, 3), keepdim=True)).flatten(1))
    assert not torch.allclose(net(picture(64, 96)), other, rtol=1e-3)


def test_no_norm_stands_between_the_stages():
    net = models.create("poolformer_micro")
    assert isinstance(net.stages[0].blocks[0].norm1, TokenGroupNorm)
    assert all(isinstance(each.before, nn.Identity) and isinstance(each.after, nn.Identity) for each in net.downsamples)
