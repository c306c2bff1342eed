"""What only FFNet holds: no norms in front of anything, parts that become one, kernels by stage."""

import copy

import pytest
import torch
from torch import nn

from attlas import models
from attlas.blocks.conv_norm import ConvNorm, TwoKernels, fuse
from tests.models.vision.official_names import assert_loads, picture, renamed, shaken


@pytest.mark.parametrize(
    ("name", "millions"), [("ffnet_1", 13.660), ("ffnet_2", 26.908), ("ffnet_3", 48.331), ("ffnet_4", 79.200)]
)
def test_fused_it_has_the_published_parameters(name, millions):
    with torch.device("meta"):
        net = fuse(models.create(name).eval())
        count = sum(value.numel() for value in net.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=6e-4)


@pytest.mark.parametrize("settings", [{}, {"mlp_kernel": 3, "scale": 0.5}])
def test_fused_it_gives_the_same(settings):
    net, x = shaken("ffnet_micro", **settings), picture(64, 96)
    one = fuse(copy.deepcopy(net))
    assert not any(isinstance(module, ConvNorm | TwoKernels) for module in one.modules())
    assert [name for name, module in one.named_modules() if isinstance(module, nn.BatchNorm2d)] == ["head.before"]
    with torch.no_grad():
        torch.testing.assert_close(one(x), net(x), rtol=1e-9, atol=1e-9)


def test_kernels_by_stage():
    with torch.device("meta"):
        nets = [models.create(name) for name in ("ffnet_1", "ffnet_2")]
    for net in nets:
        assert [stage.blocks[0].mixer.keys.kernels for stage in net.stages] == [(3,), (3,), (7, 3), (7, 3)]
    assert [isinstance(net.stages[0].blocks[0].mlp.conv, TwoKernels) for net in nets] == [False, True]


def test_nothing_is_normalised_in_front_of_a_branch():
    net = shaken("ffnet_micro", scale=0.5)
    block, x = net.stages[0].blocks[0], torch.randn(1, 8, 6, 5, dtype=torch.float64)
    grid, tokens = (6, 5), x.flatten(2).mT
    y = tokens + block.scale1.weight * block.mixer(tokens, grid=grid)
    convolved = block.mlp.conv(y.mT.unflatten(2, grid)).flatten(2).mT
    z = y + block.scale2.weight * block.mlp.fc2(nn.functional.gelu(block.mlp.fc1(convolved)))
    torch.testing.assert_close(net.stages[0](x), z.mT.unflatten(2, grid))


@pytest.mark.parametrize("mixer", ["ffnet", "softmax", "pool"])
def test_any_mechanism_takes_the_place_of_the_mlp_over_space(mixer):
    net = models.create("ffnet_micro", mixer=mixer)
    assert {stage.blocks[0].mixer.spec.name for stage in net.stages} == {mixer}
    assert net(torch.randn(1, 3, 64, 64)).isfinite().all()


@pytest.mark.parametrize("settings", [{}, {"mlp_kernel": 3, "scale": 0.5}])
def test_official_names(settings):
    net = shaken("ffnet_micro", **settings)
    official = renamed(
        net.state_dict(),
        (r"\.conv\.conv\.weight", ".conv.c.weight"),
        (r"^downsamples\.0\.([02])\.conv", r"patch_embed.\1.c"),
        (r"^downsamples\.0\.([02])\.norm", r"patch_embed.\1.bn"),
        (r"\.(large|small)\.conv", r".\1.c"),
        (r"\.(large|small)\.norm", r".\1.bn"),
        (r"^downsamples\.([123])\.0\.large", r"stages.\1.0.proj.0.conv"),
        (r"^downsamples\.([123])\.0\.small", r"stages.\1.0.proj.0.conv1"),
        (r"^downsamples\.([123])\.1\.conv", r"stages.\1.0.proj.1.conv.c"),
        (r"^downsamples\.([123])\.1\.norm", r"stages.\1.0.proj.1.conv.bn"),
        (r"^stages\.0\.blocks\.0", "stages.0.0"),
        (r"^stages\.([123])\.blocks\.0", r"stages.\1.1"),
        (r"\.scale1\.weight", ".token_mixer.0.layer_scale"),
        (r"\.scale2\.weight", ".channel_mixer.layer_scale"),
        (r"\.mixer\.query\.proj", ".token_mixer.0.main.fc.c"),
        (r"\.mixer\.query\.norm", ".token_mixer.0.main.fc.bn"),
        (r"\.mixer\.keys\.", ".token_mixer.0.main.conv1."),
        (r"\.mixer\.values\.", ".token_mixer.0.main.conv2."),
        (r"(main\.conv[12])\.conv\.(weight|bias)", r"\1.\2"),
        (r"(main\.conv[12])\.weights\.0", r"\1.conv.c.weight"),
        (r"(main\.conv[12])\.weights\.1", r"\1.conv1.c.weight"),
        (r"(main\.conv[12])\.norms\.0", r"\1.conv.bn"),
        (r"(main\.conv[12])\.norms\.1", r"\1.conv1.bn"),
        (r"\.mlp\.conv\.large", ".channel_mixer.main.conv.conv"),
        (r"\.mlp\.conv\.small", ".channel_mixer.main.conv.conv1"),
        (r"\.mlp\.conv\.norm", ".channel_mixer.main.conv.bn"),
        (r"\.mlp\.", ".channel_mixer.main."),
        (r"^head\.before", "norm"),
        (r"^head\.classifier", "head"),
    )
    for key, value in official.items():
        if value.ndim == 2 and not key.startswith("head"):
            official[key] = value[..., None, None]
        if key.endswith("layer_scale"):
            official[key] = value[:, None, None]
    assert {
        "patch_embed.2.bn.bias",
        "stages.1.0.proj.0.conv1.c.weight",
        "stages.2.1.token_mixer.0.main.fc.bn.bias",
    } <= set(official)
    assert_loads(net, "ffnet_micro", official, picture(64, 96), **settings)
