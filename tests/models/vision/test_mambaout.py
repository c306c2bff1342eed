"""What only MambaOut holds: blocks that are a mixer and nothing else, and a head that is an MLP."""

import torch
from torch import nn

from attlas import models
from tests.models.vision.official_names import assert_loads, picture, renamed, shaken


def test_a_block_is_one_residual_path():
    net = shaken("mambaout_micro")
    block = net.stages[1].blocks[0]
    x = torch.randn(1, 24, 6, 5, dtype=torch.float64)
    tokens = x.flatten(2).mT
    expected = tokens + block.mixer(block.norm1(tokens), grid=(6, 5))
    torch.testing.assert_close(net.stages[1](x), expected.mT.unflatten(2, (6, 5)))
    assert {name for name, _ in block.named_children()} == {"norm1", "mixer", "scale1", "drop_path"}
    assert all(module.eps == 1e-6 for module in net.modules() if isinstance(module, nn.LayerNorm))


def test_the_head_takes_the_mean_first_and_normalises_twice():
    net, x = shaken("mambaout_micro"), picture(64, 64)
    mean = net.forward_features(x).mean((2, 3))
    pooled, widen, gelu, norm, last = net.head
    assert isinstance(gelu, nn.GELU)
    assert isinstance(norm, nn.LayerNorm)
    assert widen.out_features == 4 * widen.in_features == 192
    torch.testing.assert_close(net(x), last(norm(gelu(widen(pooled.after(mean))))))


def test_without_convolutions_only_the_stem_and_the_downsampling_see_neighbours():
    net = shaken("mambaout_micro", mixer_settings={"conv_ratio": 0.0})
    x = torch.randn(1, 16, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(net.stages[0](x.flip(2)), net.stages[0](x).flip(2))


def test_another_mechanism_stands_in_the_block():
    net = models.create("mambaout_micro", mixer=["mambaout", "mambaout", "softmax", "flow"])
    assert [stage.blocks[0].mixer.spec.name for stage in net.stages] == ["mambaout", "mambaout", "softmax", "flow"]
    assert net(torch.randn(1, 3, 64, 64)).isfinite().all()


def test_official_names():
    net = shaken("mambaout_micro")
    official = renamed(
        net.state_dict(),
        (r"^downsamples\.0\.0\.conv", "downsample_layers.0.conv1"),
        (r"^downsamples\.0\.0\.after", "downsample_layers.0.norm1"),
        (r"^downsamples\.0\.2\.conv", "downsample_layers.0.conv2"),
        (r"^downsamples\.0\.2\.after", "downsample_layers.0.norm2"),
        (r"^downsamples\.(\d)\.after", r"downsample_layers.\1.norm"),
        (r"^downsamples\.", "downsample_layers."),
        (r"\.blocks\.(\d)\.norm1", r".\1.norm"),
        (r"\.blocks\.(\d)\.mixer", r".\1"),
        (r"^head\.0\.after", "norm"),
        (r"^head\.1", "head.fc1"),
        (r"^head\.3", "head.norm"),
        (r"^head\.4", "head.fc2"),
    )
    assert {"downsample_layers.0.norm2.bias", "stages.2.0.fc1.weight", "norm.weight", "head.fc2.bias"} <= set(official)
    assert_loads(net, "mambaout_micro", official, picture(48, 80))
