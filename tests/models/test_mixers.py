"""Which mechanism stands where, on which grid, with which settings."""

import pytest
import torch
from torch import nn

from attlas import models
from attlas.blocks.embed import Downsample
from attlas.core.errors import BadInput
from attlas.models.mixers import per_stage, picture_size, settings_per_stage, sizes_after, stage_mixers


@pytest.mark.parametrize("size", [65, 60, (62, 94)])
@pytest.mark.parametrize(
    "name", ["metaformer_micro", "focalnet_micro", "mambaout_micro", "ffnet_micro", "shvit_micro", "volo_micro"]
)
def test_mechanisms_are_built_for_the_maps_that_come(name, size):
    net = models.create(name, img_size=size).eval()
    height, width = picture_size(size)
    with torch.no_grad():
        maps = net.feature_maps(torch.randn(1, 3, height, width))
    for stage, found in zip(net.stages, maps, strict=True):
        grid = stage.blocks[0].mixer.site.grid if stage.blocks[0].mixer is not None else None
        assert grid is None or grid.shape == tuple(found.shape[2:])


def test_overlapping_patches_of_focalnet():
    net = models.create("focalnet_micro", img_size=65, overlap=True).eval()
    with torch.no_grad():
        maps = net.feature_maps(torch.randn(1, 3, 65, 65))
    assert [stage.blocks[0].mixer.site.grid.shape for stage in net.stages] == [tuple(x.shape[2:]) for x in maps]


def test_sizes_behind_convolutions():
    convolutions = [(7, 4, 2), (3, 2, 1), (2, 2, 0)]
    net, x, sizes = [nn.Conv2d(1, 1, *each) for each in convolutions], torch.randn(1, 1, 37, 50), []
    for conv in net:
        x = conv(x)
        sizes.append(tuple(x.shape[2:]))
    assert sizes_after((37, 50), convolutions) == sizes
    with pytest.raises(BadInput, match="too small"):
        sizes_after(4, convolutions)


def test_settings_for_all_stages_or_for_each():
    assert settings_per_stage(None, 2) == ({}, {})
    assert settings_per_stage({"window": 3}, 2) == ({"window": 3}, {"window": 3})
    assert settings_per_stage([None, {"window": 3}], 2) == ({}, {"window": 3})
    for wrong in ([{}], [{}, 3], "window"):
        with pytest.raises(BadInput, match="one for each of the 2 stages"):
            settings_per_stage(wrong, 2)
    with pytest.raises(BadInput, match="one mapping here"):
        stage_mixers("softmax", 1, 8, 2, None, [{"bias": False}])


@pytest.mark.parametrize("name", ["metaformer_micro", "focalnet_micro", "mambaout_micro", "ffnet_micro", "volo_micro"])
def test_a_window_for_each_stage(name):
    settings = [{"window": 3}, {"window": 3}, {}, None]
    net = models.create(name, mixer=["neighborhood", "neighborhood", "softmax", "pool"], mixer_settings=settings)
    assert net(torch.randn(1, 3, 64, 64)).isfinite().all()
    assert net.stages[1].blocks[0].mixer.attend.window == 3
    with pytest.raises(BadInput, match="one for each of the 4 stages"):
        models.create(name, mixer_settings=settings[:3])


@pytest.mark.parametrize(
    ("name", "settings"), [("tnt_micro", [{}, {"qk_norm": "rms"}]), ("crossvit_micro", [None, {}])]
)
def test_settings_of_two_streams(name, settings):
    net = models.create(name, mixer_settings=settings)
    assert net(torch.randn(1, 3, 64, 64)).isfinite().all()
    with pytest.raises(BadInput, match="each of the 2 stages"):
        models.create(name, mixer_settings=[{}] * 3)


@pytest.mark.parametrize("name", ["tnt_micro", "volo_micro"])
def test_settings_go_before_those_of_the_publication_and_leave_the_others(name):
    plain, more = models.create(name), models.create(name, mixer="softmax", mixer_settings={"qk_norm": "rms"})
    assert not any("q_proj.bias" in key for net in (plain, more) for key in net.state_dict())
    biased = models.create(name, mixer="softmax", mixer_settings={"bias": True})
    assert any("q_proj.bias" in key for key in biased.state_dict())


def test_names_for_all_stages_or_for_each():
    assert per_stage("pool", 2) == per_stage(["pool", "pool"], 2) == ("pool", "pool")


ZEROS = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("vit_micro", {"img_size": 64.0}, "whole pixels"),
        ("vit_micro", {"img_size": (64, 64, 64)}, "whole pixels"),
        ("vit_micro", {"img_size": 0}, "whole pixels"),
        pytest.param("vit_micro", {"in_chans": 0}, "in_chans", marks=ZEROS),
        ("vit_micro", {"patch": 0}, "multiple of the patch"),
        ("vit_micro", {"img_size": 70}, "multiple of the patch"),
        ("convit_micro", {"img_size": 70}, "multiple of the patch"),
        ("convit_micro", {"local": -1}, "before one of the 4 blocks"),
        ("crossvit_micro", {"img_size": 70}, "multiple of the patch"),
        ("crossvit_micro", {"patches": (8, 0)}, "at least 1"),
        ("tnt_micro", {"img_size": 70}, "multiple of the patch"),
        ("lookupvit_micro", {"img_size": 70}, "multiple of the patch"),
        ("poolformer_micro", {"depths": (1, 1, 1)}, "each of the 3 stages"),
        ("poolformer_micro", {"depths": (1,) * 5, "dims": (8,) * 5}, "1 to 4 stages"),
        ("mambaout_micro", {"depths": (1, 1, 1)}, "each of the 3 stages"),
        ("ffnet_micro", {"kernels": (3, 3)}, "each of the 4 stages"),
        ("volo_micro", {"depths": (1,)}, "2 to 4 stages"),
        ("volo_micro", {"img_size": 8}, "too small"),
        ("shvit_micro", {"attended": (0, 8)}, "each of the 3 stages"),
        ("ghostnetv2_micro", {"drop": 2.0}, "drop is a share"),
        ("resnet_micro", {"depths": (1, 1, 1)}, "each of the 3 stages"),
        ("resnet_micro", {"mixer": "eca", "kernels": (3,)}, "each of the 4 stages"),
        ("resnet_micro", {"mixer_settings": {"kernel": 3}}, "pass mixer="),
    ],
)
def test_what_cannot_be_built_says_so(name, settings, message):
    with pytest.raises(BadInput, match=message):
        models.create(name, **settings)


@pytest.mark.parametrize("name", ["poolformer_micro", "focalnet_micro", "volo_micro"])
def test_pictures_of_which_nothing_is_left(name):
    with pytest.raises(BadInput, match="too small"):
        models.create(name).eval()(torch.randn(1, 3, 2, 2))
    with pytest.raises(BadInput, match="map of 3 x 9"):
        Downsample(3, 4, 4, 4)(torch.randn(1, 3, 3, 9))
