import copy

import pytest
import torch
from torch import nn

import attlas
from attlas.adapt.rescale import applied, softmax_layers
from attlas.core.errors import BadInput, UnknownName, Unsupported

DIM, HEADS, TOKENS = 32, 4, 12


class Model(nn.Module):
    """Three residual layers of softmax attention and one of something else."""

    def __init__(self, **settings):
        super().__init__()
        self.layers = nn.ModuleList(attlas.mixer("softmax", DIM, HEADS, causal=True, **settings) for _ in range(3))
        self.other = attlas.mixer("linear", DIM, HEADS, causal=True)

    def forward(self, x, mask=None):
        for layer in [*self.layers, self.other]:
            x = x + layer(x, mask=mask)
        return x


def build(**settings):
    return Model(**settings).double().eval(), torch.randn(2, TOKENS, DIM, dtype=torch.float64)


def test_inside_the_block_the_layers_are_those_of_the_mechanism():
    model, x = build(kv_heads=2)
    tuned = copy.deepcopy(model)
    for index in range(3):
        built = attlas.mixer("zerotuning", DIM, HEADS, kv_heads=2, causal=True, gamma=1.5)
        built.load_state_dict(model.layers[index].state_dict())
        tuned.layers[index] = built.double()
    with applied(model, "zerotuning", gamma=1.5) as changed:
        assert changed == list(model.layers)
        assert torch.equal(model(x), tuned.eval()(x))


def test_behind_the_block_the_model_is_what_it_was():
    model, x = build()
    before, attends = model(x), [layer.attend for layer in model.layers]
    weights = {name: (p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    with applied(model, "zerotuning", gamma=3.0):
        assert not torch.allclose(model(x), before, atol=1e-3)
        assert set(dict(model.named_parameters())) == set(weights)
    assert torch.equal(model(x), before)
    assert all(layer.attend is attend for layer, attend in zip(model.layers, attends, strict=True))
    assert {layer.spec.name for layer in model.layers} == {"softmax"}
    for name, p in model.named_parameters():
        assert p.data_ptr() == weights[name][0]
        assert torch.equal(p, weights[name][1])


def test_an_exception_puts_the_layers_back():
    model, x = build()
    before = model(x)
    with pytest.raises(RuntimeError, match="in the middle"), applied(model, "zerotuning", gamma=3.0):
        raise RuntimeError("in the middle")
    assert torch.equal(model(x), before)


def test_only_the_chosen_layers_change():
    model, x = build()
    with applied(model, "zerotuning", layers=[2, 0], gamma=3.0) as changed:
        assert [layer.spec.name for layer in model.layers] == ["zerotuning", "softmax", "zerotuning"]
        assert changed == [model.layers[0], model.layers[2]]
        first = model(x)
    with applied(model, "zerotuning", layers=[0], gamma=3.0), applied(model, "zerotuning", layers=[1], gamma=3.0):
        assert torch.equal(model(x), first)  # the inner block counts the softmax layers that are left
    assert [layer.spec.name for layer in model.layers] == ["softmax"] * 3


def test_identities_of_both_rescalings():
    model, x = build()
    expected = model(x)
    with applied(model, "zerotuning", gamma=1.0):
        assert torch.allclose(model(x), expected, rtol=0, atol=1e-12)
    with applied(model, "attention_sink", image=(1, 5), dims=[3], tau=0.5, p=1.0):
        assert torch.allclose(model(x), expected, rtol=0, atol=1e-12)
    with applied(model, "attention_sink", image=(1, 5), dims=[3], tau=0.5, rho=1.0, summ=0.0, p=0.2):
        assert not torch.allclose(model(x), expected, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("zerotuning", {"gamma": 0.5}), ("attention_sink", {"image": (1, 4), "dims": [3], "tau": 1.0, "rho": 1.0})],
)
def test_streaming_inside_the_block(name, settings):
    model, x = build()
    layer = model.layers[0]
    with applied(layer, name, **settings), torch.no_grad():
        whole = layer(x)
        first, state = layer.extend(x[:, :7], layer.initial_state(2))
        second, _ = layer.extend(x[:, 7:], state)
    assert torch.allclose(torch.cat([first, second], 1), whole, rtol=0, atol=1e-12)


def test_any_attend_without_parameters_can_be_applied():
    model, x = build(scale=0.3)
    expected = model(x)
    with applied(model, "softmax"):
        assert torch.equal(model(x), expected)
    with applied(model, "zerotuning"):
        assert model.layers[1].attend.scale == 0.3
    model, x = build(kv_heads=2)
    with applied(model, "linear"):  # which has no shared heads of its own
        assert torch.isfinite(model(x)).all()


def test_the_mode_of_the_layers_is_kept():
    model, _ = build(weight_dropout=0.5)
    model.train()
    with applied(model, "zerotuning"):
        assert model.layers[0].attend.training
        assert model.layers[0].attend.weight_dropout == 0.5
    model.eval()
    with applied(model, "zerotuning"):
        assert not model.layers[0].attend.training


def test_a_model_without_softmax_layers_is_refused():
    with pytest.raises(BadInput, match="no softmax layer"), applied(nn.Linear(3, 3), "zerotuning"):
        pass
    assert softmax_layers(attlas.mixer("linear", DIM, HEADS)) == []


@pytest.mark.parametrize("number", [3, -1])
def test_a_layer_that_is_not_there_is_refused(number):
    model, x = build()
    before = model(x)
    with pytest.raises(BadInput, match="numbers from 0 to 2"), applied(model, "zerotuning", layers=[0, number]):
        pass
    assert torch.equal(model(x), before)


def test_what_cannot_be_applied_is_refused():
    model, _ = build(position=attlas.positions.ALiBi(HEADS))
    refused = {
        ("moh", BadInput, "has parameters to learn"),
        ("pool", Unsupported, "a layer of its own"),
        ("linear", Unsupported, "takes no bias"),
        ("zerotunin", UnknownName, "zerotuning"),
    }
    for name, error, message in refused:
        with pytest.raises(error, match=message), applied(model, name):
            pass
    with pytest.raises(BadInput, match="no setting 'gama'"), applied(model, "zerotuning", gama=2.0):
        pass
    model, _ = build(scale=0.3)
    with pytest.raises(BadInput, match=r"sets scale=0\.3"), applied(model, "sigmoid"):
        pass
    assert {layer.spec.name for layer in model.layers} == {"softmax"}
