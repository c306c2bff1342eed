"""What only FocalNet holds: which focal modulation stands in which network, and where norms and scales stand."""

import pytest
import torch
from torch import nn

from attlas import Grid, models
from attlas.core.errors import BadInput
from tests.models.vision.official_names import assert_loads, picture, renamed, shaken

LARGE = {"scale": 1e-4, "post_norm": True, "overlap": True}


def built_on_meta(name):
    with torch.device("meta"):
        return models.create(name)


@pytest.mark.parametrize(
    ("name", "kernels", "normalized", "inner"),
    [
        ("focalnet_tiny_srf", [3, 5], False, False),
        ("focalnet_base_lrf", [3, 5, 7], False, False),
        ("focalnet_large_fl3", [5, 7, 9], False, False),
        ("focalnet_large_fl4", [3, 5, 7, 9], True, False),
        ("focalnet_xlarge_fl4", [3, 5, 7, 9], False, False),
        ("focalnet_huge_fl3", [3, 5, 7], False, True),
        ("focalnet_small_iso", [3, 5, 7], False, False),
    ],
)
def test_the_modulation_of_each_network(name, kernels, normalized, inner):
    net = built_on_meta(name)
    for stage in net.stages:
        for block in stage.blocks:
            assert block.mixer.kernels == kernels
            assert block.mixer.normalize is normalized
            assert isinstance(block.mixer.norm, nn.LayerNorm) is inner
    large = any(size in name for size in ("large", "huge"))
    assert net.stages[0].blocks[0].post_norm is large
    assert net.downsamples[0].conv.kernel_size == ((7, 7) if large else (16, 16) if "iso" in name else (4, 4))


def test_a_large_block_normalises_behind_its_branches():
    block, x = shaken("focalnet_micro", **LARGE).stages[0].blocks[0], torch.randn(1, 12, 16, dtype=torch.float64)
    grid = Grid((3, 4))
    y = x + block.scale1.weight * block.norm1(block.mixer(x, grid=grid))
    expected = y + block.scale2.weight * block.norm2(block.mlp(y))
    torch.testing.assert_close(block(x, grid), expected)


def test_isotropic_networks_are_one_stage_on_large_patches():
    net = built_on_meta("focalnet_tiny_iso")
    assert (net.channels, net.strides, len(net.stages[0].blocks)) == ((192,), (16,), 12)
    assert not any("places" in name for name, _ in net.named_parameters())


def test_another_mechanism_takes_no_settings_of_focal_modulation():
    net = models.create("focalnet_micro", mixer=["focalnet", "focalnet", "softmax", "pool"])
    assert [stage.blocks[0].mixer.spec.name for stage in net.stages] == ["focalnet", "focalnet", "softmax", "pool"]
    assert models.create("focalnet_micro", mixer_settings={"levels": 1}).stages[0].blocks[0].mixer.kernels == [3]


OFFICIAL = (
    (r"^downsamples\.0\.conv", "patch_embed.proj"),
    (r"^downsamples\.0\.after", "patch_embed.norm"),
    *((rf"^downsamples\.{i}\.conv", f"layers.{i - 1}.downsample.proj") for i in (1, 2, 3)),
    *((rf"^downsamples\.{i}\.after", f"layers.{i - 1}.downsample.norm") for i in (1, 2, 3)),
    (r"^stages\.", "layers."),
    (r"\.scale([12])\.weight", r".gamma_\1"),
    (r"\.mixer\.convs\.(\d)$", r".modulation.focal_layers.\1.0.weight"),
    (r"\.mixer\.in_proj", ".modulation.f"),
    (r"\.mixer\.context_proj", ".modulation.h"),
    (r"\.mixer\.out_proj", ".modulation.proj"),
    (r"\.mixer\.norm", ".modulation.ln"),
    (r"^head\.before", "norm"),
    (r"^head\.classifier", "head"),
)


@pytest.mark.parametrize(
    "settings", [{}, {**LARGE, "focal": {"levels": 2, "norm": True}}, {**LARGE, "focal": {"normalize": True}}]
)
def test_official_names(settings):
    net = shaken("focalnet_micro", **settings)
    official = renamed(net.state_dict(), *OFFICIAL)
    official = {key: v[..., None, None] if key.endswith("modulation.h.weight") else v for key, v in official.items()}
    assert {"patch_embed.norm.bias", "layers.0.downsample.proj.weight", "head.bias"} <= set(official)
    assert_loads(net, "focalnet_micro", official, picture(64, 96), **settings)


def test_weights_that_are_ours_already_stay_what_they_are():
    focal = {"levels": 2, "normalize": True}
    net = shaken("focalnet_micro", focal=focal)
    again = models.create("focalnet_micro", num_classes=5, focal=focal, weights=net.state_dict(), source="timm")
    assert all(
        torch.equal(again.state_dict()[key], value.to(again.state_dict()[key]))
        for key, value in net.state_dict().items()
    )
    with pytest.raises(BadInput, match="missing"):
        models.create("focalnet_micro", focal=focal, weights={}, source="timm")


def test_timms_modulator_is_not_divided():
    """A checkpoint of timm's, in which nothing divides the modulator, is loaded so that nothing does here."""
    net = shaken("focalnet_micro", focal={"levels": 2})
    timm = {
        key: value[..., None, None] if value.ndim == 2 and "head" not in key else value
        for key, value in renamed(
            net.state_dict(),
            (r"^downsamples\.0\.conv", "stem.proj"),
            (r"^downsamples\.0\.after", "stem.norm"),
            (r"^downsamples\.(\d)\.conv", r"layers.\1.downsample.proj"),
            (r"^downsamples\.(\d)\.after", r"layers.\1.downsample.norm"),
            *OFFICIAL[8:-1],
            (r"^stages\.", "layers."),
            (r"^head\.classifier", "head.fc"),
        ).items()
    }
    divided = models.create(
        "focalnet_micro", num_classes=5, focal={"levels": 2, "normalize": True}, weights=timm, source="timm"
    )
    with torch.no_grad():
        torch.testing.assert_close(divided.double().eval()(picture(64, 64)), net(picture(64, 64)), rtol=1e-5, atol=1e-6)
