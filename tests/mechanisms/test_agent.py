"""The identities and counts of `agent`."""

import pytest
import torch
import torch.nn.functional as F

import attlas
from attlas import Grid
from attlas.core.errors import BadInput, Unsupported

PLAIN = {"table": 0, "kernel": 0}


def qkv(tokens, heads=2, size=4, keys=None, values=None):
    shape = (1, heads, keys or tokens)
    q = torch.randn(1, heads, tokens, size, dtype=torch.float64)
    k = torch.randn(*shape, size, dtype=torch.float64)
    return q, k, torch.randn(*shape, values or size, dtype=torch.float64)


def randomised(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module.double()


def test_is_one_matrix_of_rank_n_whose_rows_sum_to_one():
    attend = randomised(attlas.make_attend("agent", 2, 4, grid=(4, 5), agents=4, kernel=0))
    q, k, _ = qkv(20)
    matrix = attend(q, k, torch.eye(20, dtype=torch.float64).expand(1, 2, -1, -1), grid=(4, 5))
    assert torch.allclose(matrix.sum(-1), torch.ones_like(matrix[..., 0]), rtol=0, atol=1e-12)
    assert torch.linalg.matrix_rank(matrix).tolist() == [[4, 4]]


def test_as_many_agents_as_queries_are_the_queries():
    q, k, v = qkv(9)
    o = attlas.attend(q, k, v, "agent", grid=(3, 3), agents=9, **PLAIN)
    scale = q.shape[-1] ** -0.5
    read, gather = (q @ q.mT * scale).softmax(-1), (q @ k.mT * scale).softmax(-1)
    assert torch.allclose(o, read @ gather @ v, rtol=0, atol=1e-12)


def deit_parameters(dim, heads, side):
    grid = Grid((side, side), prefix=1)
    mixer = attlas.mixer("agent", dim, heads, grid=grid)
    block = sum(p.numel() for p in mixer.parameters()) + 2 * 2 * dim + (8 * dim * dim + 5 * dim)
    embedding = 3 * 16 * 16 * dim + dim + dim + grid.tokens * dim
    return 12 * block + embedding + 2 * dim + 1000 * (dim + 1)


@pytest.mark.parametrize(
    ("dim", "heads", "side", "millions"),
    [(192, 3, 14, 6.0156), (384, 6, 14, 22.6471), (384, 6, 28, 23.0705)],
    ids=["agent_deit_t", "agent_deit_s", "agent_deit_s_448"],
)
def test_parameters_of_agent_deit(dim, heads, side, millions):
    assert round(deit_parameters(dim, heads, side) / 1e6, 4) == millions


def deit_s_macs(mechanism, side, **settings):
    dim, grid = 384, Grid((side, side), prefix=1)
    mixer = attlas.mixer(mechanism, dim, 6, grid=grid, **settings)
    block = mixer.cost(1, grid.tokens).flops // 2 + 8 * dim * dim * grid.tokens
    return 12 * block + 3 * 16 * 16 * dim * grid.positions + 1000 * dim


def test_deit_s_costs_what_was_published_and_four_times_that_at_twice_the_resolution():
    small, large = deit_s_macs("agent", 14), deit_s_macs("agent", 28)
    assert small == pytest.approx(4.4e9, rel=0.01)
    assert large == pytest.approx(17.7e9, rel=0.01)
    assert large / small < 4
    assert deit_s_macs("softmax", 28) / deit_s_macs("softmax", 14) > 4.8


def test_cost_is_linear_in_tokens():
    attend = attlas.make_attend("agent", 6, 64, **PLAIN)
    assert attend.cost(1, 6272, grid=(56, 112)).flops == 2 * attend.cost(1, 3136, grid=(56, 56)).flops


def test_only_taps_on_the_grid_are_useful():
    local, plain = (attlas.make_attend("agent", 2, 4, grid=(4, 5), agents=4, kernel=k) for k in (3, 0))
    useful, made = (
        getattr(local.cost(1, 20), kind) - getattr(plain.cost(1, 20), kind) for kind in ("flops", "executed")
    )
    taps = F.conv2d(torch.ones(1, 1, 4, 5), torch.ones(1, 1, 3, 3), padding=1).sum()
    assert (useful, made) == (2 * 8 * taps, 2 * 8 * 20 * 9)


def test_biases_are_the_resized_table_plus_a_vector_for_each_axis():
    grid = Grid((4, 5), prefix=1)
    places = randomised(attlas.make_attend("agent", 2, 4, grid=grid, agents=4)).key_places
    bias = places(grid)

    def resized(position, length):  # two places of the 7 and the share of the second
        source = min(max((position + 0.5) * 7 / length - 0.5, 0), 6)
        return int(source), min(int(source) + 1, 6), source - int(source)

    for y in range(4):
        for x in range(5):
            above, below, down = resized(y, 4)
            left, right, across = resized(x, 5)
            top = (1 - across) * places.table[..., above, left] + across * places.table[..., above, right]
            bottom = (1 - across) * places.table[..., below, left] + across * places.table[..., below, right]
            expected = (1 - down) * top + down * bottom + places.axes[0][..., y] + places.axes[1][..., x]
            assert torch.allclose(bias[..., 1 + 5 * y + x], expected, rtol=0, atol=1e-12)
    assert torch.equal(bias[..., 0], places.prefix[..., 0])


def test_a_trained_layer_runs_on_another_grid_with_its_vectors_stretched():
    small = randomised(attlas.make_attend("agent", 2, 4, grid=(4, 5), agents=4))
    large = attlas.make_attend("agent", 2, 4, grid=(8, 6), agents=4).double()
    stretched = {
        name: F.interpolate(value, 8 if name.endswith("0") else 6, mode="linear") if "axes" in name else value
        for name, value in small.state_dict().items()
    }
    large.load_state_dict(stretched)
    q, k, v = qkv(48)
    assert torch.allclose(small(q, k, v, grid=(8, 6)), large(q, k, v, grid=(8, 6)), rtol=0, atol=1e-12)


def test_the_class_token_is_no_agent_but_a_key_and_a_query():
    grid = Grid((3, 4), prefix=1)
    attend = randomised(attlas.make_attend("agent", 2, 4, grid=grid, agents=4))
    q, k, v = qkv(13)
    o = attend(q, k, v, grid=grid)
    for which in range(3):
        changed = [q, k, v]
        changed[which] = changed[which].clone()
        changed[which][:, :, 0] += 1
        other = attend(*changed, grid=grid)
        assert not torch.allclose(other[:, :, 0], o[:, :, 0])
        assert torch.equal(other[:, :, 1:], o[:, :, 1:]) == (which == 0)


def test_an_agent_of_padding_alone_is_seen_by_nobody():
    q, k, v = qkv(6)
    keep = torch.tensor([[True] * 4 + [False] * 2])
    padded = attlas.attend(q, k, v, "agent", agents=3, mask=keep, **PLAIN)  # cells 01, 23 and 45
    alone = attlas.attend(q[:, :, :4], k[:, :, :4], v[:, :, :4], "agent", agents=2, **PLAIN)
    assert torch.allclose(padded[:, :, :4], alone, rtol=0, atol=1e-12)


def test_padding_gives_zero_where_the_convolution_has_a_bias():
    attend = randomised(attlas.make_attend("agent", 2, 4, grid=(3, 4), agents=4))
    assert not attend(*qkv(12), grid=(3, 4), mask=torch.zeros(1, 12, dtype=torch.bool)).any()


def test_weights_are_dropped_in_training_alone():
    attend = attlas.make_attend("agent", 2, 4, agents=4, weight_dropout=0.5, **PLAIN).double()
    inputs = qkv(16)
    whole = attlas.attend(*inputs, "agent", agents=4, grid=(4, 4), **PLAIN)
    assert not torch.allclose(attend(*inputs, grid=(4, 4)), whole)
    assert torch.allclose(attend.eval()(*inputs, grid=(4, 4)), whole)


def test_cross_attention_keeps_the_bias_of_the_queries_alone():
    attend = randomised(attlas.make_attend("agent", 2, 4, grid=(3, 4), agents=4))
    attend(*qkv(12, keys=7), grid=(3, 4), cross=True).sum().backward()
    used = {name for name, parameter in attend.named_parameters() if parameter.grad is not None}
    assert used == {"query_places.table", "query_places.axes.0", "query_places.axes.1"}


def test_what_does_not_fit_is_refused():
    with pytest.raises(BadInput, match=r"40 is no such number: take 36 or 49"):
        attlas.mixer("agent", 8, 2, grid=(4, 4), agents=40)
    with pytest.raises(BadInput, match=r"take 27 or 64"):
        attlas.mixer("agent", 8, 2, grid=(4, 4, 4), agents=63)
    with pytest.raises(BadInput, match=r"pass grid=\(height, width\)"):
        attlas.mixer("agent", 8, 2)
    with pytest.raises(BadInput, match="kernel is odd"):
        attlas.mixer("agent", 8, 2, grid=(4, 4), kernel=4)
    layer = attlas.mixer("agent", 8, 2, grid=(4, 4), agents=4)
    with pytest.raises(BadInput, match="built for a grid 4x4 and called on a grid 4x4 after 1 prefix"):
        layer(torch.randn(1, 17, 8), grid=Grid((4, 4), prefix=1))
    with pytest.raises(BadInput, match="6 queries and 9 keys"):
        attlas.make_attend("agent", 2, 4, agents=3, **PLAIN)(*(t.float() for t in qkv(6, keys=9)))
    with pytest.raises(BadInput, match="values of 4 features, got 3"):
        randomised(attlas.make_attend("agent", 2, 4, grid=(2, 2), agents=4))(*qkv(4, values=3), grid=(2, 2))
    with pytest.raises(Unsupported, match="causal"):
        attlas.mixer("agent", 8, 2, causal=True, grid=(4, 4))
