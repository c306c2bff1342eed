"""The identities and counts of `minimal`."""

import pytest
import torch

import attlas
from attlas.core.errors import BadInput
from attlas.core.state import state_bytes

DIM, TOKENS = 12, 9


def build(similarity="symmetric", values="none", **settings):
    layer = attlas.mixer("minimal", DIM, similarity=similarity, values=values, **settings)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer.double()


def tokens(batch=2, length=TOKENS):
    return torch.randn(batch, length, DIM, dtype=torch.float64)


@pytest.mark.parametrize("causal", [True, False])
def test_collapsed_matrices_are_one_head_of_ordinary_attention(causal):
    ours = build("collapsed", "collapsed", causal=causal)
    theirs = attlas.mixer("softmax", DIM, 1, causal=causal, bias=False, out_bias=False).double()
    with torch.no_grad():
        ours.weight.copy_(theirs.q_proj.weight.T @ theirs.k_proj.weight)
        ours.value.weight.copy_(theirs.out_proj.weight @ theirs.v_proj.weight)
    x = tokens()
    assert torch.allclose(ours(x), theirs(x), rtol=0, atol=1e-12)


def test_several_heads_have_no_single_collapsed_matrix():
    theirs = attlas.mixer("softmax", DIM, 3, bias=False).double()
    products = [q.T @ k for q, k in zip(theirs.q_proj.weight.split(4), theirs.k_proj.weight.split(4), strict=True)]
    assert [int(torch.linalg.matrix_rank(product)) for product in products] == [4, 4, 4]
    one, three = (attlas.mixer("minimal", DIM, heads).state_dict() for heads in (1, 3))
    assert {name: value.shape for name, value in one.items()} == {name: value.shape for name, value in three.items()}


@pytest.mark.parametrize("similarity", ["symmetric", "definite"])
def test_scores_are_symmetric_and_their_softmax_is_not(similarity):
    w, x = build(similarity).matrix().detach(), tokens(1)[0]
    scores = x @ w @ x.T
    assert torch.allclose(scores, scores.T, rtol=0, atol=1e-12)
    weights = (scores / DIM**0.5).softmax(-1)
    assert not torch.allclose(weights, weights.T, atol=1e-3)


def test_under_a_definite_matrix_no_token_is_dissimilar_to_itself():
    x = tokens(1, 200)[0]
    own = {s: torch.einsum("nc,cd,nd->n", x, build(s).matrix(), x) for s in ("definite", "symmetric")}
    assert (own["definite"] >= 0).all()
    assert (own["symmetric"] < 0).any()
    assert (torch.linalg.eigvalsh(build("definite").matrix()) > -1e-12).all()


def test_outputs_without_a_value_matrix_are_convex_combinations():
    layer, x = build(), tokens(1, 5)
    y = layer(x)[0]
    weights = torch.linalg.lstsq(x[0].T, y.T).solution.T  # 5 tokens in 12 dimensions: unique
    assert torch.allclose(weights @ x[0], y, rtol=0, atol=1e-12)
    assert (weights > -1e-12).all()
    assert torch.allclose(weights.sum(-1), torch.ones(5).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("similarity", "values", "count"),
    [
        ("symmetric", "none", 64 * 65 // 2),
        ("definite", "none", 64 * 65 // 2),
        ("collapsed", "none", 64 * 64),
        ("symmetric", "collapsed", 64 * 65 // 2 + 64 * 64),
        ("collapsed", "collapsed", 2 * 64 * 64),
    ],
)
def test_parameters(similarity, values, count):
    layer = attlas.mixer("minimal", 64, similarity=similarity, values=values)
    assert sum(p.numel() for p in layer.parameters()) == count


def test_the_minimum_layer_is_a_twentyfourth_of_an_encoder_layer():
    dim = 512
    minimum = sum(p.numel() for p in attlas.mixer("minimal", dim).parameters())
    attention = sum(p.numel() for p in attlas.mixer("softmax", dim, 8, bias=False, out_bias=False).parameters())
    assert (attention, minimum) == (4 * dim * dim, dim * (dim + 1) // 2)
    assert minimum / (attention + 8 * dim * dim) == pytest.approx(0.042, abs=5e-4)


def test_the_state_is_the_tokens_once():
    layer, x = build(causal=True), tokens(1)
    with torch.no_grad():
        _, state = layer.extend(x, layer.initial_state(1, like=x))
    assert state_bytes(state) == TOKENS * DIM * 8


@pytest.mark.parametrize("cross", [False, True])
def test_padding_may_hold_anything(cross):
    layer, x = build(values="collapsed"), tokens()
    keep = torch.arange(TOKENS).expand(2, -1) < 6
    dirty = x.masked_fill(~keep.unsqueeze(-1), torch.nan)
    inputs = (x, dirty) if cross else (dirty,)
    clean = (x, x[:, :6]) if cross else (x[:, :6],)
    expected = layer(*clean)
    assert torch.allclose(layer(*inputs, mask=keep)[:, : expected.shape[1]], expected, rtol=0, atol=1e-12)


def test_what_does_not_fit_is_refused():
    with pytest.raises(BadInput, match="similarity is one of 'collapsed', 'symmetric', 'definite', got 'full'"):
        build("full")
    with pytest.raises(BadInput, match="values is one of 'collapsed', 'none', got 'off'"):
        build(values="off")
    with pytest.raises(BadInput, match=r"context is \(batch, tokens, 12 channels\), got \(2, 9, 5\)"):
        build()(tokens(), tokens()[..., :5])
