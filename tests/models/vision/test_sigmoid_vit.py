"""What SigmoidAttn ViT is beside what every network promises."""

import math

import torch

from attlas import models
from attlas.mechanisms.softmax.sigmoid import Sigmoid


def attends(net: torch.nn.Module) -> list[Sigmoid]:
    return [module for module in net.modules() if isinstance(module, Sigmoid)]


def test_the_shift_is_that_of_training_at_every_size() -> None:
    net = models.create("sigmoid_vit_micro").eval()
    net(torch.randn(1, 3, 96, 96))
    assert {attend.shift for attend in attends(net)} == {-math.log(65)}
    bare = models.create("sigmoid_vit_micro", pool="mean")
    assert {attend.shift for attend in attends(bare)} == {-math.log(64)}


def test_without_the_shift_outputs_grow_with_the_picture() -> None:
    def size(side: int, **settings: object) -> float:
        torch.manual_seed(0)
        net = models.create("sigmoid_vit_micro", img_size=side, **settings).eval()
        block = net.stages[0].blocks[0]
        tokens = torch.randn(1, net.grid.tokens, 64)
        return block.mixer(block.norm1(tokens), grid=net.grid).norm(dim=-1).mean().item()

    with torch.no_grad():
        shifted = size(128) / size(64)
        plain = size(128, mixer_settings={"shift": 0.0}) / size(64, mixer_settings={"shift": 0.0})
    assert plain > 1.8 * shifted


def test_branches_start_small() -> None:
    net = models.create("sigmoid_vit_micro")
    assert all((block.scale1.weight == 1e-4).all() for stage in net.stages for block in stage.blocks)
    assert not any(key.endswith("_proj.bias") for key in net.state_dict())
    hybrid = models.create("sigmoid_vit_micro", mixer_settings={"output_norm": "rms"})
    assert hybrid.stages[0].blocks[0].mixer.output_norm.weight.shape == (64,)
