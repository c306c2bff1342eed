"""Implied matrices, their ranks and entropies, and the capacity of heads."""

import math
import sys

import pytest
import torch

import attlas
from attlas.analysis.capacity import CLASSES, hebbian_pairs, largest, retrieved, stored_pairs
from attlas.analysis.conditioning import exponent
from attlas.analysis.curves import Panel, draw_curves
from attlas.analysis.entropy import entropy_by_norm, row_entropy
from attlas.analysis.implied import implied_matrix, listen
from attlas.analysis.rank import effective_rank, numerical_rank, ranks
from attlas.bench.inputs import in_trained_model, on_random_tokens
from attlas.core.errors import AttlasError, BadInput, Unsupported


def layer_and_tokens(name, tokens=20, dim=16, heads=2, **settings):
    torch.manual_seed(0)
    layer = attlas.mixer(name, dim, heads, length=tokens, **settings).double().eval()
    return layer, torch.randn(2, tokens, dim, dtype=torch.float64)


@pytest.mark.parametrize("tokens", [5, 8, 20])
def test_the_implied_matrix_of_softmax_is_its_map(tokens):
    layer, x = layer_and_tokens("softmax", tokens)
    heard = listen(layer, x)
    expected = (heard.q @ heard.k.mT / math.sqrt(8)).softmax(-1)
    assert torch.allclose(implied_matrix(heard), expected, atol=1e-12)


def test_the_implied_matrix_of_grouped_heads_and_causal_layers():
    layer, x = layer_and_tokens("softmax", heads=4, kv_heads=2, causal=True)
    heard = listen(layer, x)
    scores = heard.q @ heard.k.repeat_interleave(2, 1).mT / math.sqrt(4)
    expected = scores.masked_fill(torch.ones(20, 20).triu(1).bool(), -torch.inf).softmax(-1)
    assert torch.allclose(implied_matrix(heard), expected, atol=1e-12)


def test_the_implied_matrix_of_a_recurrence_is_the_product_of_its_steps():
    layer, x = layer_and_tokens("pavlovian_delta", 12, causal=True, rate=0.5)
    heard = listen(layer, x)
    weights = implied_matrix(heard)
    assert torch.allclose(weights.triu(1), torch.zeros(()).double(), atol=1e-14)
    k = heard.k[0, 0]
    beta = 0.5 / k.square().sum(-1).clamp(min=1)
    n, m = 9, 4
    row = heard.q[0, 0, n]
    for t in range(n, m, -1):
        row = row - beta[t] * (row @ k[t]) * k[t]
    assert float(weights[0, 0, n, m]) == pytest.approx(float(beta[m] * (row @ k[m])), abs=1e-12)


def test_what_has_no_implied_matrix_says_so():
    with pytest.raises(Unsupported, match="pool mixes tokens by itself"):
        listen(*layer_and_tokens("pool"))
    layer, x = layer_and_tokens("agent", agents=4, grid=(4, 5))  # it convolves the values, each feature by itself
    with pytest.raises(Unsupported, match="agent has no implied matrix: its output differs"):
        implied_matrix(listen(layer, x))
    assert implied_matrix(listen(*layer_and_tokens("agent", agents=4, table=0, kernel=0))).shape == (2, 2, 20, 20)


def test_ranks_of_matrices_whose_singular_values_are_known():
    u = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    x = u @ torch.diag(torch.tensor([3.0, 3.0, 3.0, 1e-9, 0, 0]).double()) @ u.T
    assert int(numerical_rank(x)) == 3
    assert int(numerical_rank(x, tolerance=1e-12)) == 4
    assert float(effective_rank(x)) == pytest.approx(3, abs=1e-6)
    p = torch.tensor([0.5, 0.25, 0.25])
    assert float(effective_rank(torch.diag(4 * p))) == pytest.approx(2**1.5)
    assert int(numerical_rank(torch.zeros(3, 4))) == float(effective_rank(torch.zeros(3, 4))) == 0
    assert effective_rank(torch.stack([torch.zeros(2, 2), torch.eye(2)])).tolist() == pytest.approx([0, 2])


def test_linear_attention_has_the_rank_of_its_head_and_softmax_all():
    found = {name: ranks(*layer_and_tokens(name, 48)) for name in ("linear", "softmax")}
    assert found["linear"].numerical == 8
    assert found["softmax"].numerical > 24
    assert found["softmax"].effective > found["linear"].effective
    assert found["linear"].output_effective < found["softmax"].output_effective <= 16
    alone = ranks(*layer_and_tokens("pool"))
    assert alone.numerical is None
    assert "mixes tokens by itself" in alone.refusal
    assert alone.output_numerical == 16


def test_row_entropy_is_0_for_one_key_and_1_for_all():
    assert row_entropy(torch.eye(5)[None, None]).tolist() == [[0.0]]
    assert float(row_entropy(-torch.ones(1, 1, 5, 5))) == pytest.approx(1)
    assert float(row_entropy(torch.ones(1, 1, 5, 5).tril(), causal=True)) == pytest.approx(1)
    half = torch.tensor([[0.5, 0.5, 0, 0]]).expand(1, 1, 4, 4)
    assert float(row_entropy(half)) == pytest.approx(0.5)
    assert float(row_entropy(torch.zeros(1, 1, 2, 3))) == 1
    for causal in (False, True):
        assert row_entropy(torch.ones(2, 3, 1, 1), causal=causal).tolist() == [[1.0] * 3] * 2


def test_softmax_sharpens_with_the_length_of_the_query():
    layer, x = layer_and_tokens("softmax")
    shares = entropy_by_norm(layer, 2 * x, [1, 4, 16, 64])
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < 0.5 * shares[0]


def test_a_map_that_factors_pass_through_does_not():
    layer, x = layer_and_tokens("pavlovian_hebb")
    shares = entropy_by_norm(layer, x, [1, 4, 16])
    assert shares == pytest.approx([shares[0]] * 3, abs=1e-12)
    with pytest.raises(BadInput, match="norms of queries are positive"):
        entropy_by_norm(layer, x, [0.0])


def test_hebb_stores_what_theory_says_in_proportion_to_the_size():
    sizes = [16, 32, 64]
    pairs = [stored_pairs("pavlovian_hebb", size) for size in sizes]
    assert pairs == pytest.approx([hebbian_pairs(size) for size in sizes], rel=0.15)
    assert exponent(sizes, pairs) == pytest.approx(1, abs=0.1)


def test_a_causal_head_is_asked_at_the_end_and_keeps_fewer_where_it_fades():
    layers = [attlas.make_attend("pavlovian_hebb", 1, 16, causal=causal) for causal in (False, True)]
    assert retrieved(layers[0], 60) == retrieved(layers[1], 60) < 1
    assert stored_pairs("pavlovian_oja", 16, decay=0.2) < stored_pairs("pavlovian_oja", 16, decay=0.0)


def test_softmax_reaches_the_limit_only_where_its_size_allows():
    assert stored_pairs("softmax", 32, limit=100) == 100
    assert stored_pairs("softmax", 8) == 188


def test_a_rule_that_corrects_itself_stores_no_more_of_pairs_that_are_shown_once():
    assert stored_pairs("pavlovian_delta", 16) < stored_pairs("pavlovian_hebb", 16)


def test_the_generator_of_the_user_stays_as_it_is():
    before = torch.get_rng_state()
    assert stored_pairs("pavlovian_delta", 8, limit=4, seed=3) == 4
    assert torch.equal(torch.get_rng_state(), before)


def test_the_largest_number_that_holds():
    for last in (0, 1, 2, 3, 7, 8, 9, 99, 100):
        assert largest(lambda n, last=last: n <= last, 100) == last
    assert largest(lambda n: True, 100) == 100


def test_capacity_without_a_meaning_is_refused():
    with pytest.raises(BadInput, match=f"one head of at least {CLASSES} features, got 2 of 16"):
        retrieved(attlas.make_attend("softmax", 2, 16), 4)
    with pytest.raises(BadInput, match="level is a share of right answers above guessing"):
        hebbian_pairs(16, 0.1)
    for level in (0.1, 2):
        with pytest.raises(BadInput, match="level is a share of right answers above guessing"):
            stored_pairs("softmax", 16, level=level)
    with pytest.raises(BadInput, match="limit is at least 1, got 0"):
        stored_pairs("softmax", 16, limit=0)
    with pytest.raises(BadInput, match="pairs is at least 1, got 0"):
        retrieved(attlas.make_attend("softmax", 1, 16), 0)
    with pytest.raises(BadInput, match="sets head counts of a layer"):
        stored_pairs("softmax:gqa", 16)


def test_random_tokens_give_all_mechanisms_the_same_queries_keys_and_values():
    heard = [listen(*on_random_tokens(name, dim=32, heads=2, tokens=400)[:2]) for name in ("softmax", "karat")]
    for name in "qkv":
        first, second = (getattr(h, name) for h in heard)
        assert torch.equal(first, second)
        assert float(first.var()) == pytest.approx(1, rel=0.15)
    assert on_random_tokens("convit", dim=16, heads=2, tokens=9).grid.shape == (3, 3)
    assert on_random_tokens("lightning", dim=16, heads=2, tokens=9).layer.site.causal
    with pytest.raises(BadInput, match="convit needs its tokens on a square: such as 9, not 10"):
        on_random_tokens("convit", dim=16, heads=2, tokens=10)


def test_a_trained_model_reads_held_out_data():
    layer, x, grid = in_trained_model("softmax", "digits", dim=16, heads=2, steps=3)
    assert (x.shape, x.dtype, grid.shape) == ((2, 64, 16), torch.float64, (8, 8))
    assert ranks(layer, x, grid=grid).numerical > 1
    again = in_trained_model("softmax", "digits", dim=16, heads=2, steps=3)
    assert torch.equal(x, again.tokens)


def test_curves_are_drawn_and_the_same_each_time(tmp_path):
    panel = Panel("a title", "x", "y", {"one": ([1, 2], [3, 4])}, {"theory": ([1, 2], [1, 2])})
    for name in ("a.svg", "b.svg", "c.png"):
        draw_curves([panel, panel], tmp_path / "new" / name)
    first = (tmp_path / "new" / "a.svg").read_text()
    assert first == (tmp_path / "new" / "b.svg").read_text()
    for text in ("a title", "one", "theory"):
        assert text in first
    with pytest.raises(BadInput, match=r"written as \.svg or \.png, got 'a\.pdf'"):
        draw_curves([panel], tmp_path / "a.pdf")
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="could not be written"):
        draw_curves([panel], tmp_path / "file" / "a.svg")


def test_a_missing_matplotlib_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(AttlasError, match=r"pip install 'attlas\[examples\]'"):
        draw_curves([Panel("", "", "", {})], tmp_path / "a.svg")
