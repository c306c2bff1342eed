"""BiFormer beyond what all backbones promise."""

import pytest
import torch

from attlas import models
from attlas.core.errors import BadInput
from tests.models.vision.official_names import assert_loads, fused, picture, renamed, shaken

QKV = ("q_proj", "k_proj", "v_proj")


@pytest.mark.parametrize("layout", ["conv", "swin"])
def test_official_names(layout: str) -> None:
    net = shaken("biformer_micro", layout=layout)
    downsamples = (
        (r"^downsamples\.0\.convs\.0\.", "downsample_layers.0.0."),
        (r"^downsamples\.0\.norms\.0\.", "downsample_layers.0.1."),
        (r"^downsamples\.0\.convs\.1\.", "downsample_layers.0.3."),
        (r"^downsamples\.0\.norms\.1\.", "downsample_layers.0.4."),
        (r"^downsamples\.(\d)\.conv\.", r"downsample_layers.\1.0."),
        (r"^downsamples\.(\d)\.after\.", r"downsample_layers.\1.1."),
    )
    if layout == "swin":
        downsamples = (
            (r"^downsamples\.0\.conv\.", "downsample_layers.0.0."),
            (r"^downsamples\.0\.after\.", "downsample_layers.0.1."),
            (r"^downsamples\.(\d)\.before\.", r"downsample_layers.\1.0."),
            (r"^downsamples\.(\d)\.conv\.", r"downsample_layers.\1.1."),
        )
    official = renamed(
        fused(net.state_dict(), QKV, "qkv"),
        *downsamples,
        (r"^stages\.(\d)\.blocks\.", r"stages.\1." if layout == "conv" else r"stages.\1.blocks."),
        (r"\.position1\.conv\.", ".pos_embed."),
        (r"^(stages\.[012].*)\.mixer\.qkv\.", r"\1.attn.qkv.qkv."),
        (r"^(stages\.[012].*)\.mixer\.out_proj\.", r"\1.attn.wo."),
        (r"\.mixer\.attend\.convolution\.", ".attn.lepe."),
        (r"\.mixer\.conv\.", ".attn.lepe."),
        (r"\.mixer\.out_proj\.", ".attn.proj."),
        (r"\.mixer\.", ".attn."),
        (r"\.mlp\.fc1\.", ".mlp.0."),
        (r"\.mlp\.fc2\.", ".mlp.3." if layout == "conv" else ".mlp.2."),
        (r"^head\.before\.", "norm."),
        (r"^head\.classifier\.", "head."),
    )
    assert_loads(net, "biformer_micro", official, picture(64, 64), layout=layout)


def test_all_regions_are_full_attention() -> None:
    every = shaken("biformer_micro", regions=2, tops=(4, 4, 4, 4))
    one = models.create("biformer_micro", num_classes=5, regions=1, tops=(1, 1, 1, 1)).double().eval()
    one.load_state_dict(every.state_dict())
    few = models.create("biformer_micro", num_classes=5, regions=2, tops=(1, 1, 1, 1)).double().eval()
    few.load_state_dict(every.state_dict())
    image = picture(64, 64)
    with torch.no_grad():
        torch.testing.assert_close(every(image), one(image))
        assert not torch.allclose(every(image), few(image), rtol=1e-3)


def test_the_last_stage() -> None:
    with torch.device("meta"):
        for name, width in (("biformer_tiny", 512), ("biformer_base", 768)):
            mixer = models.create(name).stages[3].blocks[0].mixer
            assert (mixer.site.heads, mixer.site.head_dim, mixer.of) == (8, width // 8, "tokens")
            assert mixer.q_proj.bias is None
            assert mixer.out_proj.bias is not None
            assert mixer.attend.scale is None  # that of a head, not of all channels


def test_regions_that_do_not_divide_the_map() -> None:
    net = shaken("biformer_micro", regions=3, img_size=128, tops=(2, 4, 9, 9))
    with torch.no_grad():
        assert net(picture(100, 140)).isfinite().all()


def test_maps_smaller_than_their_regions() -> None:
    with torch.device("meta"):
        net = models.create("biformer_tiny", img_size=64)
    attends = [stage.blocks[0].mixer.attend for stage in list(net.stages)[:3]]
    assert [(each.regions, each.top) for each in attends] == [(7, 1), (7, 4), (4, 16)]


def test_bad_input() -> None:
    with torch.device("meta"), pytest.raises(BadInput, match="cannot be cut"):
        models.create("biformer_tiny")(torch.empty(1, 3, 64, 64))
    with pytest.raises(BadInput, match="layout is"):
        models.create("biformer_micro", layout="pvt")
