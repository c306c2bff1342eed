"""What Activator is beside what every network promises."""

import torch

from attlas import models
from tests.models.vision.official_names import State, assert_loads, picture, renamed, shaken
from tests.models.vision.test_ninformer import shuffled


def official(state: State) -> State:
    """Our weights under the names of Abdullah-88/Activator; micro has one block per stage."""
    return renamed(
        {key: value for key, value in state.items() if ".norm2." not in key},
        (r"^stages\.(\d)\.blocks\.0\.", r"model.\1."),
        (r"\.norm1\.", ".norm."),
        (r"\.mixer\.gate\.", ".actgu.proj_1."),
        (r"\.mixer\.value\.", ".actgu.proj_2."),
        (r"\.mixer\.out\.", ".actgu.proj_3."),
        (r"\.mixer\.norm\.", ".actgu.norm."),
        (r"\.mlp\.fc1\.", ".ffn.net.0."),
        (r"\.mlp\.fc2\.", ".ffn.net.3."),
        (r"^embed\.conv\.", "patcher."),
        (r"^head\.", "classifier."),
    )


def test_official_names() -> None:
    for mlp in (True, False):
        net = shaken("activator_micro", mlp=mlp)
        assert_loads(net, "activator_micro", official(net.state_dict()), picture(64, 64), mlp=mlp)


def test_shuffled_patches_are_the_same_picture() -> None:
    net, image = shaken("activator_micro"), picture(64, 64)
    assert torch.allclose(net(shuffled(image, 8)), net(image))
    mixing = models.create("activator_micro", mixer="pool").double().eval()
    assert not torch.allclose(mixing(shuffled(image, 8)), mixing(image), rtol=1e-3)
