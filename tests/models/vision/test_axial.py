import pytest
import torch

from attlas import models
from attlas.core.errors import BadInput


def test_the_model_of_pictures_has_logits_of_every_symbol():
    net = models.create("axial_micro", channels=2)
    assert net(torch.zeros(3, 5, 5, 2, dtype=torch.int64)).shape == (3, 5, 5, 2, 4)


def test_it_says_that_it_keeps_its_activations():
    with pytest.raises(BadInput, match="compute activations again"):
        models.create("axial_micro", checkpointing=True)
