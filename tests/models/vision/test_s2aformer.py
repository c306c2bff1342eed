"""What S2AFormer is beside what every network promises."""

import torch

from attlas import models
from attlas.core.grid import Grid
from attlas.models.vision.s2aformer import LocalInteraction


def test_keys_are_coarser_in_early_stages() -> None:
    net = models.create("s2aformer_micro")
    assert [stage.blocks[0].mix.mixer.reduction for stage in net.stages] == [8, 4, 2, 1]
    assert all(block.mix.mixer.width == 1 for stage in net.stages for block in stage.blocks)


def test_odd_pictures() -> None:
    net = models.create("s2aformer_micro", features_only=True).eval()
    maps = net(torch.randn(1, 3, 75, 101))
    assert [tuple(each.shape[2:]) for each in maps] == [(19, 26), (10, 13), (5, 7), (3, 4)]


def test_the_local_interaction_reaches_two_places() -> None:
    torch.manual_seed(0)
    local, x = LocalInteraction(3).eval(), torch.randn(1, 49, 3, requires_grad=True)
    local(x, Grid((7, 7)))[0, 24].sum().backward()
    seen = (x.grad[0].abs().sum(-1) > 0).view(7, 7)
    assert seen[1:6, 1:6].all()
    assert seen.sum() == 25


def test_other_sizes_are_settings() -> None:
    net = models.create("s2aformer_micro", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), heads=(1, 1, 2, 2))
    assert net.channels == (8, 8, 16, 16)
