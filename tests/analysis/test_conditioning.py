"""Associative memories: what they hold, how errors add up, and the phenomena of conditioning."""

import doctest
import math
from pathlib import Path

import pytest
import torch

import attlas
from attlas.analysis import conditioning
from attlas.core.errors import BadInput

SIZE = 8


def rule(name, **params):
    return attlas.make_attend(name, 1, SIZE, causal=True, **params)


@pytest.fixture
def hebb():
    return rule("pavlovian_hebb")


@pytest.fixture
def delta():
    return rule("pavlovian_delta", rate=0.3)


@pytest.mark.parametrize("size", [16, 64, 256])
def test_signal_to_interference_is_size_over_the_other_pairs(size):
    for found in conditioning.capacity_curve([size], [size // 2, 2 * size], memories=32):
        assert found.snr * (found.pairs - 1) / size == pytest.approx(1, rel=0.1)


def test_retrieval_falls_with_pairs_and_one_pair_is_exact():
    curve = conditioning.capacity_curve([32], [1, 32, 128, 512])
    assert curve[0] == (32, 1, math.inf, 1.0, 0.0)
    assert [found.retrieved for found in curve] == sorted((found.retrieved for found in curve), reverse=True)
    assert curve[-1].retrieved < 0.5


def test_pairs_that_no_values_can_spoil_grow_as_the_root_of_the_size():
    sizes = [32, 64, 128, 256, 512]
    pairs = [conditioning.guaranteed_pairs(size, memories=32) for size in sizes]
    assert conditioning.exponent(sizes, pairs) == pytest.approx(0.5, abs=0.08)


def test_values_of_the_worst_signs_spoil_one_pair_more_than_is_guaranteed():
    generator = torch.Generator().manual_seed(0)
    k = conditioning.random_keys(100, 64, generator)
    worst = [float(conditioning.overlaps(k[:m]).sum(-1).max()) for m in range(1, 101)]
    most = sum(w < 1 for w in worst)
    for pairs, fails in ((most, False), (most + 1, True)):
        found = []
        for i in range(pairs):
            signs = -(k[:pairs] @ k[i]).sign()
            signs[i] = 1
            found.append(bool((k[:pairs] @ k[i]) @ signs <= 0))
        assert any(found) == fails


def test_bit_errors_are_those_of_gaussian_interference():
    generator = torch.Generator().manual_seed(0)
    size, pairs, wrong = 64, 100, []
    for _ in range(40):
        k = conditioning.random_keys(pairs, size, generator)
        v = torch.randint(2, (pairs, 50), generator=generator).double() * 2 - 1
        wrong.append(((k @ (k.T @ v)).sign() != v).double().mean())
    assert float(torch.stack(wrong).mean()) == pytest.approx(conditioning.bit_error(size, pairs), rel=0.03)
    assert conditioning.bit_error(64, 1) == 0


def test_a_chain_of_layers_fails_as_independent_layers_do():
    size, pairs, layers, chains = 32, 64, 8, 2000
    generator = torch.Generator().manual_seed(1)
    asked = torch.zeros(20_000, dtype=torch.long)
    error = float((conditioning.recall(asked, size, pairs, generator) != asked).double().mean())
    assert 0.01 < error < 0.2
    expected = conditioning.chain(error, layers)
    sigma = math.sqrt(expected * (1 - expected) / chains)
    assert abs(conditioning.run_chain(layers, size, pairs, chains=chains) - expected) < 3 * sigma


def test_heads_that_vote_fail_where_more_than_half_of_them_do():
    assert conditioning.vote(0.2, 3) == pytest.approx(3 * 0.2**2 * 0.8 + 0.2**3)
    assert conditioning.vote(0.2, 1) == pytest.approx(0.2)
    assert [conditioning.vote(error, 3) for error in (0, 1)] == [0, 1]
    assert 0.9 < conditioning.vote(0.999999, 1001) <= 1
    assert conditioning.vote(0.5, 10_001) == pytest.approx(0.5)
    generator = torch.Generator().manual_seed(1)
    asked = torch.zeros(5 * 4000, dtype=torch.long)
    wrong = (conditioning.recall(asked, 16, 32, generator) != asked).reshape(4000, 5)
    expected = conditioning.vote(float(wrong.double().mean()), 5)
    sigma = math.sqrt(expected * (1 - expected) / 4000)
    assert abs(float((wrong.sum(1) > 2).double().mean()) - expected) < 3 * sigma
    # Three heads fail exactly where two of them are wrong.
    error = float((conditioning.recall(asked, 32, 64, generator) != asked).double().mean())
    expected = conditioning.chain(conditioning.vote(error, 3), 4)
    sigma = math.sqrt(expected * (1 - expected) / 1000)
    assert abs(conditioning.run_chain(4, 32, 64, heads=3) - expected) < 3 * sigma


def test_a_fixed_number_of_parameters_buys_width_depth_or_votes():
    designs = conditioning.trade_off(65_536, pairs=16, layers=[1, 4], heads=[1, 3, 1001], dim=64)
    assert {(d.layers, d.heads) for d in designs} == {(1, 1), (1, 3), (4, 1), (4, 3)}
    by = {(d.layers, d.heads): d for d in designs}
    assert by[1, 1].size == 256
    assert by[4, 3].size == 21
    assert by[1, 1].reliability > by[1, 3].reliability > by[4, 3].reliability


def test_acquisition_saturates_under_the_delta_rule_alone(hebb, delta):
    assert torch.allclose(conditioning.acquisition(hebb, 5), torch.arange(1.0, 6, dtype=torch.float64))
    expected = 1 - 0.7 ** torch.arange(1.0, 31, dtype=torch.float64)
    assert torch.allclose(conditioning.acquisition(delta), expected, atol=1e-12)
    fading = conditioning.acquisition(rule("pavlovian_oja", rate=0.5, decay=0.4), 60)
    assert float(fading[-1]) == pytest.approx(1 / 0.4, rel=1e-4)


def test_extinction(hebb, delta):
    learned = conditioning.extinction(hebb)
    assert float(learned[-1]) == float(learned[29]) == 30
    learned = conditioning.extinction(delta)
    assert float(learned[29]) > 0.99
    assert abs(float(learned[-1])) < 0.01


def test_blocking(hebb, delta):
    assert conditioning.blocking(hebb) == 0
    assert conditioning.blocking(delta) > 0.9


def test_generalisation_is_the_cosine(hebb, delta):
    degrees = [0, 30, 60, 90, 180]
    expected = torch.tensor(degrees, dtype=torch.float64).deg2rad().cos()
    for learner in (hebb, delta):
        assert torch.allclose(conditioning.generalisation(learner, degrees), expected, atol=1e-12)


def test_what_has_no_meaning_is_refused(delta):
    with pytest.raises(BadInput, match="odd number of heads"):
        conditioning.vote(0.1, 4)
    with pytest.raises(BadInput, match="error is a probability"):
        conditioning.chain(1.5, 2)
    with pytest.raises(BadInput, match="pairs is at least 1"):
        conditioning.capacity_curve([4], [0])
    for x in ([1], [2, 2]):
        with pytest.raises(BadInput, match="two pairs of positive numbers, of different x"):
            conditioning.exponent(x, [3, 4][: len(x)])
    for name in ("layers", "heads"):
        with pytest.raises(BadInput, match=f"{name} is at least 1, got 0"):
            conditioning.trade_off(65_536, 16, **{"layers": [1], "heads": [1]} | {name: [1, 0]})
    with pytest.raises(BadInput, match="trials is at least 1, got 0"):
        conditioning.blocking(delta, 0)
    with pytest.raises(BadInput, match="one after the other by one head"):
        conditioning.acquisition(attlas.make_attend("pavlovian_hebb", 1, SIZE))
    with pytest.raises(BadInput, match="at least 2 features"):
        conditioning.blocking(attlas.make_attend("pavlovian_hebb", 1, 1, causal=True))


def test_the_page_about_it_runs():
    page = Path(__file__).parents[2] / "docs" / "pages" / "analysis-linear.md"
    failed, tried = doctest.testfile(str(page), module_relative=False)
    assert tried > 8
    assert failed == 0
