"""Attention rollout."""

import pytest
import torch

from attlas.analysis.rollout import rollout
from attlas.core.errors import BadInput


def maps(layers, tokens=5):
    return [torch.randn(2, 3, tokens, tokens, dtype=torch.float64).softmax(-1) for _ in range(layers)]


def test_rows_sum_to_one():
    flow = rollout(maps(4))
    assert torch.allclose(flow.sum(-1), torch.ones_like(flow[..., 0]), rtol=0, atol=1e-12)


def test_layers_that_look_at_themselves_change_nothing():
    identity = torch.eye(5, dtype=torch.float64).expand(2, 3, -1, -1)
    assert torch.equal(rollout([identity] * 3)[0], identity[0, 0])
    first = maps(1)
    assert torch.allclose(rollout([*first, identity]), rollout(first), rtol=0, atol=1e-15)


def test_is_the_jacobian_of_a_linear_network_of_residual_layers():
    weights = maps(3)
    x = torch.randn(5, dtype=torch.float64)

    def network(x):
        for layer in weights:
            x = (layer[0].mean(0) @ x + x) / 2
        return x

    jacobian = torch.autograd.functional.jacobian(network, x)
    assert torch.allclose(rollout(weights)[0], jacobian, rtol=0, atol=1e-12)


def test_heads_may_be_averaged_before():
    weights = maps(3)
    assert torch.equal(rollout(weights), rollout([layer.mean(1) for layer in weights]))
    assert torch.equal(rollout(weights[:1], residual=0.0), weights[0].mean(1))


def test_what_does_not_fit_is_refused():
    with pytest.raises(BadInput, match="at least one layer"):
        rollout([])
    with pytest.raises(BadInput, match="0 to 1, got 2"):
        rollout(maps(1), residual=2)
    with pytest.raises(BadInput, match=r"layer 0 has \(2, 3, 4, 5\)"):
        rollout([torch.rand(2, 3, 4, 5)])
    with pytest.raises(BadInput, match=r"one number of tokens, layer 1 has \(2, 3, 4, 4\)"):
        rollout([*maps(1), *maps(1, 4)])
