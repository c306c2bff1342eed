"""Nyström attention: landmarks, pseudo-inverse, convolution."""

import pytest
import torch

import attlas
from attlas.core.errors import BadInput
from attlas.mechanisms.linear.nystrom import pseudo_inverse

DOUBLE = {"dtype": torch.float64}


def qkv(tokens, size=8):
    return [torch.randn(2, 3, tokens, size, **DOUBLE) for _ in range(3)]


def plain(landmarks, **settings):
    return attlas.make_attend("nystrom", 3, 8, landmarks=landmarks, kernel=0, **settings)


def test_iterations_end_at_the_pseudo_inverse():
    a = torch.randn(4, 6, 6, **DOUBLE).softmax(-1)
    error = [float((pseudo_inverse(a, n) - torch.linalg.pinv(a)).abs().max()) for n in (3, 6, 30)]
    assert error[0] > error[1] > error[2]
    assert error[2] < 1e-9


def test_an_iteration_cubes_the_residue():
    a = torch.randn(5, 5, **DOUBLE).softmax(-1) + torch.eye(5, **DOUBLE)
    a = a / a.sum(-1, keepdim=True)
    identity = torch.eye(5, **DOUBLE)
    before, after = (identity - a @ pseudo_inverse(a, n) for n in (1, 2))
    assert torch.allclose(after, before @ before @ before @ (3 * identity + before) / 4, atol=1e-12)


@pytest.mark.parametrize("tokens", [5, 8])
def test_with_no_more_tokens_than_landmarks_it_is_softmax_attention(tokens):
    q, k, v = qkv(tokens)
    assert torch.allclose(plain(8)(q, k, v), attlas.attend(q, k, v, "softmax"), atol=1e-12)


def test_the_formula_is_exact_where_tokens_come_in_equal_runs():
    q, k, v = qkv(5)
    often = [x.repeat_interleave(3, 2) for x in (q, k, v)]
    exact = attlas.attend(*often, "softmax")
    assert torch.allclose(plain(5, iterations=40)(*often), exact, atol=1e-8)
    assert not torch.allclose(plain(5, iterations=1)(*often), exact, atol=1e-2)


def test_the_paper_iterates_six_times():
    inputs = qkv(20)
    assert torch.equal(plain(6)(*inputs), plain(6, iterations=6)(*inputs))
    assert not torch.allclose(plain(6)(*inputs), plain(6, iterations=5)(*inputs))


def test_more_landmarks_come_closer():
    torch.manual_seed(0)
    walk = torch.randn(2, 3, 128, 8, **DOUBLE).cumsum(2) * 0.2  # neighbours are alike, as in text and pictures
    exact = attlas.attend(walk, walk, walk, "softmax")
    errors = [float((plain(m, iterations=12)(walk, walk, walk) - exact).abs().mean()) for m in (4, 16, 64)]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("tokens", [12, 13, 17])
def test_runs_differ_by_one_token_and_the_shorter_come_first(tokens):
    layer = plain(4)
    run, count = layer._runs(torch.zeros(1, 3, tokens, 8), None)
    expected = [tokens // 4 + (i >= 4 - tokens % 4) for i in range(4)]
    assert count.tolist() == [expected]
    assert run[0].tolist() == [i for i, size in enumerate(expected) for _ in range(size)]


@pytest.mark.parametrize("real", [list(range(11)), [0, 3, 4, 7, 8, 9, 12], [2, 5, 11], [13]])
def test_padding_is_as_if_it_were_not_there(real):
    q, k, v = qkv(14)
    keep = torch.zeros(2, 14, dtype=torch.bool)
    keep[:, real] = True
    padded = plain(5)(*(x.masked_fill(~keep[:, None, :, None], torch.nan) for x in (q, k, v)), mask=keep)
    alone = plain(5)(*(x[:, :, real] for x in (q, k, v)))
    assert torch.allclose(padded[:, :, real], alone, atol=1e-12)


def test_the_convolution_has_one_filter_per_head_along_the_tokens():
    layer = attlas.make_attend("nystrom", 3, 8, landmarks=4, kernel=3).double()
    q, k, v = qkv(10)
    taps = layer.convolution.weight[:, 0, :, 0]
    around = torch.nn.functional.pad(v, (0, 0, 1, 1)).unfold(2, 3, 1)
    local = torch.einsum("bhndt,ht->bhnd", around, taps)
    assert torch.allclose(layer(q, k, v) - plain(4)(q, k, v), local, atol=1e-12)


def test_sequences_of_a_batch_do_not_share_a_norm():
    q, k, v = qkv(20)
    loud = [torch.cat([x[:1], 9 * x[1:]]) for x in (q, k, v)]
    assert torch.allclose(plain(6)(*loud)[:1], plain(6)(q, k, v)[:1], atol=1e-12)


def test_cost_is_linear_in_tokens():
    cost = [plain(16).cost(1, tokens).flops for tokens in (1000, 2000, 3000)]
    assert cost[2] - cost[1] == cost[1] - cost[0] == 3 * 8 * 16 * 1000 * 8


def test_what_does_not_fit_is_refused():
    q, k, v = qkv(9)
    with pytest.raises(BadInput, match="5 queries and 9 keys"):
        plain(4)(q[:, :, :5], k, v)
    for settings, match in (({"landmarks": 0}, "landmarks"), ({"iterations": -1}, "-1"), ({"kernel": 4}, "odd")):
        with pytest.raises(BadInput, match=match):
            attlas.make_attend("nystrom", 3, 8, **settings)
