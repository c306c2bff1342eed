import pytest
import torch
import torch.nn.functional as F

from attlas.blocks.spark_ffn import SparkFFN
from attlas.core.errors import BadInput


def test_gathering_the_active_neurons_changes_nothing():
    layer = SparkFFN(36, 300, active=24).double()
    x = torch.randn(2, 5, 36, dtype=torch.float64)
    assert torch.allclose(layer.gathered(x), layer(x), rtol=0, atol=1e-12)


def test_the_formula():
    layer = SparkFFN(9, 50, active=10, predictor=4).double()
    x = torch.randn(7, 9, dtype=torch.float64)
    s = x[:, :4] @ layer.predict.weight.T
    quantile = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(0.8, dtype=torch.float64))
    theta = s.mean(-1, keepdim=True) + s.std(-1, correction=0, keepdim=True) * quantile
    hidden = F.gelu((s - theta).relu(), approximate="tanh") * (x[:, 4:] @ layer.gate.weight.T)
    assert torch.allclose(layer(x), hidden @ layer.values, rtol=0, atol=1e-12)


def test_with_every_neuron_active_there_is_no_threshold():
    layer = SparkFFN(9, 50, active=50, predictor=4).double()
    x = torch.randn(7, 9, dtype=torch.float64)
    hidden = F.gelu(layer.predict(x[:, :4]), approximate="tanh") * layer.gate(x[:, 4:])
    assert torch.allclose(layer(x), hidden @ layer.values, rtol=0, atol=1e-12)


def test_it_has_the_parameters_of_a_gated_layer_two_thirds_as_wide():
    dim, width = 2304, 13824  # Gemma-2 2B, whose gated layer has 9216 neurons
    with torch.device("meta"):
        layer = SparkFFN(dim, width)
    assert sum(p.numel() for p in layer.parameters()) == 3 * dim * 9216 == 63_700_992
    assert (layer.active, layer.parts) == (1106, (1024, 1280))


def test_about_as_many_neurons_fire_as_are_meant_to():
    layer = SparkFFN(64, 13824)
    with torch.no_grad():
        layer.predict.weight.normal_()
        fired = (layer._active(torch.randn(100, layer.parts[0]))[0] != 0).sum(-1).float()
    assert fired.mean() == pytest.approx(1106, rel=0.03)


@pytest.mark.parametrize("active", [0, 51])
def test_an_impossible_count_is_refused(active):
    with pytest.raises(BadInput, match="active is 1 to 50"):
        SparkFFN(9, 50, active=active)


def test_a_predictor_that_takes_every_channel_is_refused():
    with pytest.raises(BadInput, match="predictor is 1 to 8"):
        SparkFFN(9, 50, predictor=9)
