"""What KArAt ViT is beside what every network promises."""

import pytest
import torch

from attlas import models
from attlas.core.errors import BadInput
from attlas.mechanisms.softmax.karat import KArAt

PRINTED = {
    "karat_vit_base_g1b": (10, "87.51"),
    "karat_vit_base_g1u": (10, "85.95"),
    "karat_vit_small_g3b": (1000, "23.58"),
    "karat_vit_small_g3u": (1000, "22.18"),
    "karat_vit_tiny_g3b": (10, "6.29"),
    "karat_vit_tiny_g3u": (10, "5.59"),
}


@pytest.mark.parametrize("name", PRINTED)
def test_printed_counts(name: str) -> None:
    classes, printed = PRINTED[name]
    with torch.device("meta"):
        net = models.create(name, num_classes=classes)
    assert f"{sum(p.numel() for p in net.parameters()) / 1e6:.2f}" == printed


def test_universal_operators_are_one_and_learn_from_all_blocks() -> None:
    torch.manual_seed(0)
    net = models.create("karat_vit_micro", universal=True, num_classes=4)
    apart = models.create("karat_vit_micro", num_classes=4)
    apart.load_state_dict(net.state_dict())
    shared, own = ([each.operator for each in model.modules() if isinstance(each, KArAt)] for model in (net, apart))
    assert all(operator is shared[0] for operator in shared)
    image = torch.randn(1, 3, 64, 64)
    for model in (net, apart):
        model(image).square().sum().backward()
    assert torch.allclose(shared[0].weight.grad, sum(operator.weight.grad for operator in own), rtol=1e-3, atol=1e-5)


def test_one_size_of_picture() -> None:
    with pytest.raises(BadInput, match="functions for 65 keys, got 17"):
        models.create("karat_vit_micro")(torch.randn(1, 3, 32, 32))
