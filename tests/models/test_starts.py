"""Weights start as they are published: most linear maps normal with 0.02, and biases 0."""

import pytest
import torch
from torch import nn

from attlas import models
from attlas.models.backbone import start_published

SMALL = {
    "vit_micro": ["stages.0.blocks.0.mlp.fc1", "stages.0.blocks.0.mixer.q_proj", "head"],
    "deit_tiny": ["stages.0.blocks.0.mlp.fc1"],
    "convit_micro": [
        "stages.0.blocks.0.mlp.fc2",
        "stages.0.blocks.0.mixer.qk_proj",
        "stages.3.blocks.0.mixer.out_proj",
    ],
    "tnt_micro": ["stages.0.blocks.1.outer.mlp.fc1", "stages.0.blocks.0.bridge.proj"],
    "volo_micro": ["stages.0.blocks.0.mixer.weight_proj", "stages.1.blocks.0.mlp.fc1", "head.place_classifier"],
    "crossvit_micro": ["stages.0.branches.1.blocks.0.mlp.fc1", "stages.0.exchange.visits.0.ask.q_proj"],
    "lookupvit_micro": ["stages.0.blocks.0.heavy.mlp.fc1"],
    "dependency_vit_micro": ["stages.0.blocks.0.mlp.fc1"],
    "poolformer_micro": ["stages.2.blocks.0.mlp.fc1", "head.classifier"],
    "mambaout_micro": ["stages.3.blocks.0.mixer.fc1", "downsamples.3.conv", "head.1"],
    "focalnet_micro": ["stages.3.blocks.0.mixer.context_proj", "downsamples.3.conv", "head.classifier"],
    "ffnet_micro": ["stages.3.blocks.0.mlp.fc1", "stages.3.blocks.0.mixer.query.proj", "head.classifier"],
    "shvit_micro": ["head.classifier"],
    "illama_micro": ["stages.0.blocks.0.mlp.gate", "stages.0.blocks.0.mixer.out_proj"],
    "vig_micro": ["stages.0.blocks.0.mlp.gate", "head"],
    "hat_micro": ["groups.0.stage.blocks.0.mlp.fc1", "groups.0.stage.blocks.0.mixer.q_proj"],
}


@pytest.mark.parametrize("name", SMALL)
def test_linear_maps(name):
    torch.manual_seed(0)
    net = models.create(name)
    for key in SMALL[name]:
        layer = net.get_submodule(key)
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1), key
        assert layer.bias is None or not layer.bias.any(), key


def test_what_has_a_start_of_its_own_keeps_it():
    convit = models.create("convit_micro").stages[0].blocks[0].mixer
    assert torch.equal(convit.v_proj.weight, torch.eye(64))
    assert convit.position_proj.weight[:, 2].tolist() == [-1.0] * 4
    assert not convit.position_proj.bias.any()
    assert not models.create("shvit_micro").stages[1].blocks[0].mlp[2].norm.weight.any()
    assert (models.create("focalnet_micro", scale=1e-4).stages[0].blocks[0].scale1.weight == 1e-4).all()
    assert (models.create("mambaout_micro").stages[0].blocks[0].norm1.weight == 1).all()


def test_another_mechanism_starts_as_its_own_paper_says():
    torch.manual_seed(0)
    plain = models.create("metaformer_micro", mixer="mambaout").stages[3].blocks[0].mixer.fc1.weight
    assert plain.std().item() == pytest.approx((3 * 64) ** -0.5, rel=0.1)


def test_convolutions_of_resnet():
    torch.manual_seed(0)
    conv = models.create("resnet_micro").stages[3].blocks[0].convs[1].conv
    assert conv.weight.std().item() == pytest.approx((2 / (9 * 24)) ** 0.5, rel=0.1)


def test_another_deviation():
    assert start_published(nn.Linear(50, 50), std=0.5).weight.std().item() == pytest.approx(0.5, rel=0.1)
