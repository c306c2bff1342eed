"""LITv2 beyond what all backbones promise."""

import pytest
import torch

from attlas import models
from attlas.bench.macs import macs
from attlas.core.errors import BadInput
from tests.models.vision.official_names import assert_loads, picture, renamed, shaken


def test_official_names() -> None:
    net = shaken("litv2_micro")
    official = renamed(
        net.state_dict(),
        (r"^downsamples\.0\.conv\.", "patch_embed.proj."),
        (r"^downsamples\.0\.after\.", "patch_embed.norm."),
        *((rf"^downsamples\.{i + 1}\.conv\.", f"layers.{i}.downsample.dconv.") for i in range(3)),
        *((rf"^downsamples\.{i + 1}\.offset\.", f"layers.{i}.downsample.dconv.conv_offset.") for i in range(3)),
        *((rf"^downsamples\.{i + 1}\.norm\.", f"layers.{i}.downsample.norm_layer.") for i in range(3)),
        (r"^stages\.", "layers."),
        (r"\.mixer\.low_out\.", ".attn.l_proj."),
        (r"\.mixer\.high_out\.", ".attn.h_proj."),
        (r"\.mixer\.low_", ".attn.l_"),
        (r"\.mixer\.high_", ".attn.h_"),
        (r"\.mlp\.conv\.", ".mlp.dwconv.dwconv."),
        (r"^head\.before\.", "norm."),
        (r"^head\.classifier\.", "head."),
    )
    assert_loads(net, "litv2_micro", official, picture(64, 96))


@pytest.mark.parametrize(
    ("alpha", "gmacs"), [(0.0, 3.97), (0.2, 3.88), (0.4, 3.82), (0.5, 3.77), (0.7, 3.74), (0.9, 3.73), (1.0, 3.70)]
)
def test_the_published_sweep_of_low_heads(alpha: float, gmacs: float) -> None:
    with torch.device("meta"):
        net = models.create("litv2_small", alpha=alpha)
    assert macs(net, torch.empty(1, 3, 224, 224, device="meta")) / 1e9 == pytest.approx(gmacs, rel=0.01)


def test_which_stages_mix_tokens() -> None:
    with torch.device("meta"):
        net = models.create("litv2_small")
    assert [hasattr(stage.blocks[0], "mixer") for stage in net.stages] == [False, False, True, True]
    third, fourth = (net.stages[i].blocks[0].mixer for i in (2, 3))
    assert (third.low_heads, third.high_heads, third.window) == (10, 2, 2)
    assert (fourth.low_heads, fourth.high_heads, fourth.window) == (24, 0, 1)


def test_maps_that_merging_does_not_divide() -> None:
    net = shaken("litv2_micro")
    assert net(picture(70, 45)).isfinite().all()


def test_bad_input() -> None:
    with pytest.raises(BadInput, match="each of the 2 stages"):
        models.create("litv2_micro", mixer=["hilo"] * 4)
    with pytest.raises(BadInput, match="alpha"):
        models.create("litv2_micro", alpha=1.5)


def test_windows_larger_than_the_map_name_the_cure() -> None:
    with pytest.raises(BadInput, match=r"windows of 2 places .* windows=\(1, 1\)"):
        models.create("litv2_micro", img_size=16)
    net = models.create("litv2_micro", windows=(1, 1), img_size=16).eval()
    assert net(torch.randn(1, 3, 16, 16)).shape == (1, 1000)
    with pytest.raises(BadInput, match="take one of at most 1"):
        models.create("litv2_micro").eval()(torch.randn(1, 3, 16, 48))
