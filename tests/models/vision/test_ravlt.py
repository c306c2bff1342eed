"""RAVLT and NaLaFormer beyond what all backbones promise."""

import pytest
import torch

from attlas import models
from attlas.blocks.local_enhancement import LocallyEnhanced
from tests.models.vision.official_names import assert_loads, fused, picture, renamed, shaken

QKVG = ("q_proj", "k_proj", "v_proj", "gate_proj")
NAMES = {"ravlt_micro": "rala", "nalaformer_micro": "nalaformer"}


@pytest.mark.parametrize("name", NAMES)
def test_official_names(name: str) -> None:
    net, nala = shaken(name), name.startswith("nala")
    official = renamed(
        fused(net.state_dict(), QKVG, "fused"),
        *((rf"^downsamples\.0\.convs\.{i}\.", f"patch_embed.proj.{3 * i}.") for i in range(4)),
        *((rf"^downsamples\.0\.norms\.{i}\.", f"patch_embed.proj.{3 * i + 1}.") for i in range(4)),
        *((rf"^downsamples\.{i + 1}\.conv\.", f"layers.{i}.downsample.reduction.") for i in range(3)),
        *((rf"^downsamples\.{i + 1}\.after\.", f"layers.{i}.downsample.norm.") for i in range(3)),
        (r"^stages\.", "layers."),
        (r"\.position1\.conv\.", ".cpe1." if nala else ".pos."),
        (r"\.position2\.conv\.", ".cpe2."),
        (r"\.norm([12])\.", r".norm\1.norm."),
        (r"\.scale([12])\.weight", r".gamma_\1"),
        (r"\.mixer\.fused\.", ".attn.qkvg." if nala else ".attn.qkvo."),
        (r"\.mixer\.out_proj\.", ".attn.out_proj." if nala else ".attn.proj."),
        (r"\.mixer\.output_norm\.", ".attn.ln."),
        (r"\.mixer\.(attend\.lepe|conv)\.", ".attn.lepe."),
        (r"\.mlp\.conv\.", ".ffn.dwconv."),
        (r"\.mlp\.", ".ffn."),
        (r"^head\.before\.0\.", "proj."),
        (r"^head\.before\.1\.", "norm."),
        (r"^head\.classifier\.", "head."),
    )
    official["layers.0.RoPE.angle"] = torch.ones(8)
    for key, value in official.items():
        if ".gamma_" in key:
            official[key] = value[None, :, None, None]
        elif key == "proj.weight":
            official[key] = value.flatten(1) if nala else value
        elif key == "head.weight" or (not nala and key.endswith(("qkvo.weight", "attn.proj.weight", "fc1.weight"))):
            official[key] = value[..., None, None]
    assert_loads(net, name, official, picture(64, 96))


@pytest.mark.parametrize(("name", "linear"), NAMES.items())
def test_which_stages_are_linear(name: str, linear: str) -> None:
    net = models.create(name)
    mixers = [stage.blocks[0].mixer for stage in net.stages]
    assert [each.spec.name for each in mixers] == [linear, linear, "softmax", "softmax"]
    gate = type(mixers[0].gate_activation)
    for each in mixers[2:]:
        assert isinstance(each, LocallyEnhanced)
        assert each.turned
        assert type(each.gate_activation) is gate
    every = models.create(name, mixer=linear)
    assert {stage.blocks[0].mixer.spec.name for stage in every.stages} == {linear}
    # A stage of either kind has the same weights under other names.
    assert sum(p.numel() for p in every.parameters()) == sum(p.numel() for p in net.parameters())


def test_the_classifier_reads_more_channels_than_the_last_map_has() -> None:
    net = models.create("ravlt_micro", num_classes=0)
    assert (net.num_features, net.channels[-1]) == (128, 64)
    assert net(torch.randn(1, 3, 64, 64)).shape == (1, 128)


def test_starts_of_the_layer_scales() -> None:
    with torch.device("cpu"):
        net = models.create("nalaformer_micro", scales=(1.0, 1.0, 1e-6, 1e-6))
    assert [stage.blocks[0].scale1.weight[0].item() for stage in net.stages] == pytest.approx([1, 1, 1e-6, 1e-6])


def test_linear_attention_grows_with_the_picture_as_the_rest_does() -> None:
    from attlas.bench.macs import macs

    for mixer, least, most in (("rala", 3.9, 4.01), ("softmax", 5.0, 16.0)):
        with torch.device("meta"):
            net = models.create("ravlt_tiny", mixer=mixer)
        small, large = (macs(net, torch.empty(1, 3, side, side, device="meta")) for side in (448, 896))
        assert least < large / small < most
