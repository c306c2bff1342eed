"""The training-free form of agent attention: merged tokens as agents."""

import pytest
import torch
import torch.nn.functional as F

import attlas
from attlas import Grid
from attlas.core.errors import BadInput

DOUBLE = {"dtype": torch.float64}


def qkv(tokens, size=4):
    return [torch.randn(2, 3, tokens, size, **DOUBLE) for _ in range(3)]


def build(**settings):
    return attlas.make_attend("agent_sd", 3, 4, **settings)


def merged(layer, x_BHND, grid):
    """Agents, or whatever x is, by a matrix of who is in which slot."""
    metric = x_BHND.transpose(1, 2).flatten(2)
    _, slot = layer._slots(metric, Grid(grid))
    member = F.one_hot(slot).mT.double()
    return (member / member.sum(-1, keepdim=True)).unsqueeze(1)


def test_without_shortcut_and_at_the_plain_scale_it_is_agent_attention():
    q, k, v = qkv(32)
    layer = build(stride=4, ratio=0, k_scale2=1.0, k_shortcut=0.0)
    agents = merged(layer, q, (4, 8)) @ q
    assert agents.shape[2] == 2
    gathered = attlas.attend(agents, k, v, "softmax")
    assert torch.allclose(layer(q, k, v, grid=(4, 8)), attlas.attend(q, agents, gathered, "softmax"), atol=1e-12)


def test_the_published_scales_and_shortcut():
    q, k, v = qkv(32)
    layer = build(ratio=0)
    agents = merged(layer, q, (4, 8)) @ q
    read = (4**-0.15 * q @ agents.mT).softmax(-1)
    expected = read @ attlas.attend(agents, k, v, "softmax") + 0.075 * v
    assert torch.allclose(layer(q, k, v, grid=(4, 8)), expected, atol=1e-12)


def test_with_too_many_agents_it_is_softmax_attention_among_what_remains():
    q, k, v = qkv(24)
    plain = build(stride=2, ratio=0, agent_ratio=0.5)
    assert torch.allclose(plain(q, k, v, grid=(4, 6)), attlas.attend(q, k, v, "softmax"), atol=1e-12)
    slots = build(stride=2, ratio=0.5, agent_ratio=0.5)
    mean = merged(slots, q, (4, 6))
    among = attlas.attend(mean @ q, mean @ k, mean @ v, "softmax")
    expected = (mean > 0).double().mT @ among  # each token takes its slot's output
    assert torch.allclose(slots(q, k, v, grid=(4, 6)), expected, atol=1e-12)


def test_agents_are_what_the_query_projection_makes_of_merged_tokens():
    layer = attlas.mixer("agent_sd", 12, 3, grid=(4, 8)).double()
    x = torch.randn(2, 32, 12, **DOUBLE)
    seen = []
    layer.attend.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    layer(x)
    _, slot = layer.attend._slots(x, Grid((4, 8)))
    member = F.one_hot(slot).mT.double()
    mean = member / member.sum(-1, keepdim=True)
    first = layer.q_proj(mean @ x).unflatten(-1, (3, 4)).transpose(1, 2)
    assert torch.allclose(first, mean.unsqueeze(1) @ seen[0], atol=1e-12)


def test_equal_tokens_merge_and_destinations_stay():
    grid, layer = Grid((4, 4)), build(stride=4, ratio=0.5, agent_ratio=0.9)
    x = torch.randn(1, 16, 12, **DOUBLE)
    x[:, 5] = x[:, 9] = 3 * x[:, 0]  # as alike by their cosine as can be
    slot, agents = layer._slots(x, grid)
    assert slot[0, 0] == slot[0, 5] == slot[0, 9] == 0
    assert slot.max() + 1 == 16 - 8
    assert agents.max() + 1 == 16 - 14


@pytest.mark.parametrize("shape", [(5, 7), (4, 4), (7, 2)])
def test_every_whole_cell_has_one_destination(shape):
    layer = build(stride=2, agent_ratio=0.99)
    destinations, sources = layer._places(Grid(shape), torch.device("cpu"))
    height, width = shape
    expected = [y * width + x for y in range(0, height - 1, 2) for x in range(0, width - 1, 2)]
    assert destinations.tolist() == expected
    assert sorted([*expected, *sources.tolist()]) == list(range(height * width))


def test_a_trained_layer_takes_it_without_training():
    trained = attlas.mixer("softmax", 12, 3, grid=(8, 8))
    layer = attlas.mixer("agent_sd", 12, 3, grid=(8, 8))
    layer.load_state_dict(trained.state_dict())
    assert layer.cost(1, 64).flops < trained.cost(1, 64).flops


def test_cost_of_attention_is_linear_in_tokens_for_a_number_of_agents():
    layer = build(ratio=0)
    small = layer.cost(1, 64 * 64, grid=(64, 64))
    similar = 2 * (4096 - 256) * 256 * 12
    assert small.flops - similar == 8 * 12 * 256 * 4096


def test_what_does_not_fit_is_refused():
    q, k, v = qkv(12)
    with pytest.raises(BadInput, match="stride is at least 2"):
        build(stride=1)
    with pytest.raises(BadInput, match="agent_ratio is a share"):
        build(agent_ratio=1.0)
    with pytest.raises(BadInput, match="take a smaller stride"):
        build()(q, k, v, grid=(3, 4))
    with pytest.raises(BadInput, match=r"pass grid=\(height, width\)"):
        build()(q, k, v)
    with pytest.raises(BadInput, match="12 queries and 5 keys"):
        build(stride=2)(q, k[:, :, :5], v[:, :, :5], grid=(3, 4))
