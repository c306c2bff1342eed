"""What only ResNet and ECA-Net hold: eighty weights more, where they stand, and checkpoints of three libraries."""

import pytest
import torch
from torch import nn

from attlas import models
from attlas.ops.maps import to_map, to_tokens
from tests.models.vision.official_names import assert_loads, picture, renamed, shaken


def parameters(name, **settings):
    with torch.device("meta"):
        return sum(value.numel() for value in models.create(name, **settings).parameters())


@pytest.mark.parametrize(("kernels", "more"), [((3, 5, 5, 7), 80), (None, 86)])
def test_eca_adds_a_few_weights_to_a_resnet(kernels, more):
    assert parameters("resnet50", mixer="eca", kernels=kernels) - parameters("resnet50") == more
    assert parameters("eca_resnet50") - parameters("resnet50") == 80


def test_kernels_of_the_checkpoints_and_of_the_rule():
    with torch.device("meta"):
        nets = {name: models.create(name) for name in ("eca_resnet18", "eca_resnet101", "ecaresnet50d")}
    found = {name: [stage.blocks[0].mixer.kernel for stage in net.stages] for name, net in nets.items()}
    assert found == {"eca_resnet18": [3, 5, 7, 7], "eca_resnet101": [3, 3, 5, 7], "ecaresnet50d": [5, 5, 5, 7]}


def test_the_mixer_stands_before_the_sum():
    net = shaken("ecaresnet_micro")
    block, x = net.stages[1].blocks[0], torch.randn(1, 32, 8, 8, dtype=torch.float64)
    y = x
    for index, conv in enumerate(block.convs):
        y = conv(y.relu() if index else y)
    tokens, grid = to_tokens(y)
    y = to_map(block.mixer(tokens, grid=grid), grid) + block.shortcut(x)
    torch.testing.assert_close(block(x), y.relu())
    assert isinstance(block.shortcut[0], nn.AvgPool2d)
    assert block.convs[1].conv.stride == (2, 2)


def test_a_gate_that_is_closed_leaves_half_of_each_branch():
    net = shaken("ecaresnet_micro")
    plain = shaken("resnet_micro", stem=(4, 6), pooled_shortcut=True)
    state = {key: value for key, value in net.state_dict().items() if ".mixer." not in key}
    for key, value in state.items():
        if ".convs.2.norm." in key and key.endswith(("weight", "bias")):
            state[key] = value / 2
    plain.load_state_dict(state)
    with torch.no_grad():
        for key, value in net.named_parameters():
            if ".mixer." in key:
                value.zero_()
    torch.testing.assert_close(net(picture(64, 64)), plain(picture(64, 64)))


def test_any_mechanism_ends_the_blocks():
    net = models.create("resnet_micro", mixer=["eca", "eca", "davit_channel", "softmax"], kernels=(3, 5, 0, 0))
    assert [stage.blocks[0].mixer.spec.name for stage in net.stages[:2]] == ["eca", "eca"]
    assert net(torch.randn(1, 3, 64, 64)).isfinite().all()


OFFICIAL = (
    *((rf"^stages\.{i}\.blocks\.", f"layer{i + 1}.") for i in range(4)),
    (r"\.convs\.0\.conv", ".conv1"),
    (r"\.convs\.1\.conv", ".conv2"),
    (r"\.convs\.2\.conv", ".conv3"),
    (r"\.convs\.0\.norm", ".bn1"),
    (r"\.convs\.1\.norm", ".bn2"),
    (r"\.convs\.2\.norm", ".bn3"),
    (r"\.mixer\.conv", ".eca.conv"),
    (r"^head\.classifier", "fc"),
)


@pytest.mark.parametrize(
    ("name", "settings"), [("resnet_micro", {}), ("resnet_micro", {"mixer": "eca", "expansion": 1})]
)
def test_official_names(name, settings):
    net = shaken(name, **settings)
    official = renamed(
        net.state_dict(),
        *OFFICIAL,
        (r"^downsamples\.0\.0\.conv", "conv1"),
        (r"^downsamples\.0\.0\.norm", "bn1"),
        (r"\.shortcut\.1\.conv", ".downsample.0"),
        (r"\.shortcut\.1\.norm", ".downsample.1"),
    )
    assert {"conv1.weight", "bn1.running_var", "layer2.0.downsample.0.weight", "fc.bias"} <= set(official)
    assert_loads(net, name, official, picture(64, 96), **settings)


def test_timms_names_of_a_deep_stem():
    net = shaken("ecaresnet_micro")
    timm = renamed(
        net.state_dict(),
        *OFFICIAL,
        (r"\.eca\.", ".se."),
        (r"^downsamples\.0\.0\.conv", "conv1.0"),
        (r"^downsamples\.0\.0\.norm", "conv1.1"),
        (r"^downsamples\.0\.2\.conv", "conv1.3"),
        (r"^downsamples\.0\.2\.norm", "conv1.4"),
        (r"^downsamples\.0\.4\.conv", "conv1.6"),
        (r"^downsamples\.0\.4\.norm", "bn1"),
        (r"\.shortcut\.1\.conv", ".downsample.1"),
        (r"\.shortcut\.1\.norm", ".downsample.2"),
    )
    again = models.create("ecaresnet_micro", num_classes=5, weights=timm, source="timm").double().eval()
    with torch.no_grad():
        torch.testing.assert_close(again(picture(64, 64)), net(picture(64, 64)), rtol=1e-5, atol=1e-6)
