"""What NiNformer is beside what every network promises."""

import pytest
import torch
from torch import Tensor

from attlas import models
from attlas.core.errors import BadInput
from tests.models.vision.official_names import State, assert_loads, picture, renamed, shaken


def official(state: State) -> State:
    """Our weights under the names of Abdullah-88/NiNformer; micro has one block per stage."""
    state = {key: value for key, value in state.items() if ".norm2." not in key}
    return renamed(
        state,
        (r"^stages\.(\d)\.blocks\.0\.", r"model.\1."),
        (r"\.norm1\.", ".norm."),
        (r"\.mixer\.proj\.", ".mgu.proj."),
        (r"\.mixer\.(\w+)_norm\.", r".mgu.Mixer.\1_mix.0."),
        (r"\.mixer\.token_mlp\.", ".mgu.Mixer.token_mix.2.net."),
        (r"\.mixer\.channel_mlp\.", ".mgu.Mixer.channel_mix.1.net."),
        (r"\.mlp\.", ".ffn.net."),
        (r"\.fc1\.", ".0."),
        (r"\.fc2\.", ".3."),
        (r"^embed\.conv\.", "patcher."),
        (r"^head\.", "classifier."),
    )


def test_official_names() -> None:
    net = shaken("ninformer_micro")
    state = official(net.state_dict())
    assert "model.3.mgu.Mixer.token_mix.2.net.0.weight" in state
    assert_loads(net, "ninformer_micro", state, picture(64, 64))


def test_both_norms_of_a_block_are_one() -> None:
    net = models.create("ninformer_micro")
    block = net.stages[0].blocks[0]
    assert block.norm1 is block.norm2
    assert sum(p.numel() for p in models.create("ninformer_cifar").parameters()) == 2_654_218 - 4 * 2 * 256


def shuffled(image: Tensor, patch: int) -> Tensor:
    patches = image.unfold(2, patch, patch).unfold(3, patch, patch).flatten(2, 3)
    order = torch.randperm(patches.shape[2], generator=torch.Generator().manual_seed(0))
    side = image.shape[2] // patch
    return patches[:, :, order].unflatten(2, (side, side)).transpose(3, 4).flatten(4, 5).flatten(2, 3)


def test_shuffled_patches_are_another_picture() -> None:
    net, image = shaken("ninformer_micro"), picture(64, 64)
    assert not torch.allclose(net(shuffled(image, 8)), net(image), rtol=1e-3)


def test_one_size_of_picture() -> None:
    with pytest.raises(BadInput, match="weights for 64 tokens, got 16"):
        models.create("ninformer_micro")(torch.randn(1, 3, 32, 32))


def test_another_mechanism_leaves_its_settings_behind() -> None:
    net = models.create("ninformer_micro", mixer="pool", mixer_settings={"size": 5})
    assert net(torch.randn(1, 3, 96, 96)).shape == (1, 1000)
