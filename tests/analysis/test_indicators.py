"""The indicators of hand-made maps hit their closed forms."""

import math

import pytest
import torch

from attlas.analysis.indicators import concentration, entropy, head_diversity, local_focus, sink
from attlas.core.errors import BadInput

N = 5
IDENTITY = torch.eye(N, dtype=torch.float64)
UNIFORM = torch.ones(N, N, dtype=torch.float64).tril() / torch.arange(1, N + 1).unsqueeze(1)
FIRST = torch.zeros(N, N, dtype=torch.float64).index_fill(1, torch.tensor(0), 1)
HARMONIC = sum(1 / n for n in range(1, N + 1))


def maps(*heads):
    return torch.stack(heads).unsqueeze(0)


@pytest.mark.parametrize(
    ("map_NN", "values"),
    [
        (IDENTITY, (0, math.sqrt(N), 1 / N, 1, 0)),
        (FIRST, (0, math.sqrt(N), 1, 1 / N, 1 / (N - 1))),
        (
            UNIFORM,
            (
                math.log(math.factorial(N)) / N,
                math.sqrt(HARMONIC),
                HARMONIC / N,
                HARMONIC / N,
                (HARMONIC - 1) / (N - 1),
            ),
        ),
    ],
    ids=["identity", "first column", "uniform"],
)
def test_closed_forms(map_NN, values):
    weights = maps(map_NN, map_NN)
    got = entropy(weights), concentration(weights), sink(weights), local_focus(weights, 0), local_focus(weights, 1)
    for number, expected in zip(got, values, strict=True):
        assert number.tolist() == [[pytest.approx(expected, abs=1e-12)] * 2]
    assert head_diversity(weights).tolist() == [0]


def test_heads_that_differ():
    # The heads disagree, by 1 against 0 with a deviation of 1/2, at the diagonal and the first column but one place.
    got = head_diversity(maps(IDENTITY, FIRST))
    assert got.tolist() == [pytest.approx(2 * (N - 1) / 2 / (N * (N + 1) / 2))]


def test_local_focus_reaches_back():
    shifted = torch.zeros(N, N, dtype=torch.float64)
    shifted[torch.arange(3, N), torch.arange(N - 3)] = 0.25
    assert [float(local_focus(maps(shifted), back)) for back in range(N)] == [0, 0, 0, 0.25, 0]


def test_bad_input():
    with pytest.raises(BadInput, match=r"\(batch, heads, tokens, tokens\), got \(5, 5\)"):
        sink(IDENTITY)
    with pytest.raises(BadInput, match="0 to 4 on 5 tokens, got 5"):
        local_focus(maps(IDENTITY), 5)
