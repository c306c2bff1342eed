import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attlas import Mask
from attlas.core.errors import BadInput

SIZES = st.integers(1, 9)


def dense(mask, queries, keys):
    seen = mask.pairs(queries, keys)
    return torch.ones(1, 1, queries, keys, dtype=torch.bool) if seen is None else seen


def brute(rule, queries, keys):
    rows = [[rule(n + keys - queries, m) for m in range(keys)] for n in range(queries)]
    return torch.tensor(rows)[None, None]


@given(SIZES, SIZES, st.integers(0, 4), st.integers(0, 4), st.integers(1, 4))
def test_constructors_say_what_they_mean(queries, keys, left, right, size):
    for mask, rule in [
        (Mask(), lambda n, m: True),
        (Mask.causal_(), lambda n, m: m <= n),
        (Mask.window(left, right), lambda n, m: n - left <= m <= n + right),
        (Mask.prefix(size), lambda n, m: m < size),
        (Mask.block(size), lambda n, m: n // size == m // size),
        (Mask.global_(size), lambda n, m: n < size or m < size),
        (Mask.causal_() & Mask.window(left), lambda n, m: n - left <= m <= n),
        (Mask.causal_() | Mask.prefix(size), lambda n, m: m <= n or m < size),
        ((Mask.causal_() | Mask.block(size)) & Mask.window(left, right),
         lambda n, m: (m <= n or m // size == n // size) and n - left <= m <= n + right),
    ]:  # fmt: skip
        expected = brute(rule, queries, keys)
        assert torch.equal(dense(mask, queries, keys), expected), str(mask)
        assert mask.area(queries, keys) == int(expected.sum())


@given(SIZES, st.integers(0, 2**16))
def test_area_counts_the_batch_and_the_heads(keys, bits):
    keep = torch.tensor([[bool(bits >> (i + j) & 1) for i in range(keys)] for j in range(3)])
    mask = Mask.causal_() & Mask.padding(keep)
    expected = sum(int(keep[b, : n + 1].sum()) for b in range(3) for n in range(keys))
    assert mask.area(keys, keys, batch=3, heads=2) == 2 * expected


@given(SIZES, SIZES)
def test_causal_area_has_a_closed_form(queries, keys):
    assert Mask.causal_().area(queries, keys) == int(dense(Mask.causal_(), queries, keys).sum())


def test_area_is_exact_where_the_mask_is_too_large_to_hold():
    n, left = 12_000, 100
    assert Mask.causal_().area(n, n) == n * (n + 1) // 2
    assert (Mask.causal_() & Mask.window(left)).area(n, n) == (left + 1) * n - left * (left + 1) // 2


def test_documents_per_sequence():
    ids = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
    seen = dense(Mask.causal_() & Mask.document(ids), 4, 4)
    assert seen.shape == (2, 1, 4, 4)
    assert seen[0, 0].tolist() == [
        [True, False, False, False],
        [True, True, False, False],
        [False, False, True, False],
        [False, False, True, True],
    ]
    assert seen[1, 0, 3].tolist() == [False, True, True, True]


def test_everything_combines():
    keep = torch.tensor([[True, True, False, True]])
    bias = torch.randn(4, 4)
    mask = Mask.causal_() & Mask.padding(keep) & Mask.pairs_(torch.eye(4) > 0) & Mask.biased(bias)
    assert mask.causal
    assert dense(mask, 4, 4)[0, 0].tolist() == torch.diag(keep[0]).tolist()
    assert torch.equal((mask & Mask.biased(bias)).bias[0, 0], 2 * bias)
    assert "causal & padding (1, 4) & pairs((4, 4)) & bias" in str(mask)


def test_tensors_are_read_by_dtype():
    keep = torch.ones(2, 5, dtype=torch.bool)
    assert Mask.of(keep).keys is keep
    assert Mask.of(torch.ones(2, 1, 5, 5, dtype=torch.bool)).rule is not None
    assert Mask.of(torch.zeros(5, 5)).bias.shape == (1, 1, 5, 5)
    assert str(Mask.of(None)) == "everything visible"


def test_drawing_shows_pairs():
    assert Mask.causal_().draw(4).splitlines() == ["█▄··", "███▄"]
    assert Mask.window(0).draw(4).splitlines() == ["▀▄··", "··▀▄"]
    wide = Mask.causal_().draw(640, width=32).splitlines()
    assert len(wide) == 16
    assert all(len(line) == 32 for line in wide)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mask.padding(torch.ones(2, 5)), "padding mask is a"),
        (lambda: Mask.pairs_(torch.ones(5, 5)), "pair mask is a bool tensor"),
        (lambda: Mask.biased(torch.ones(5, 5, dtype=torch.long)), "bias is a float tensor"),
        (lambda: Mask.window(-1), "window reaches"),
        (lambda: Mask.block(0), "at least one position"),
        (lambda: Mask.document(torch.zeros(3)), "document ids are integers"),
        (lambda: Mask.document(torch.zeros(3, dtype=torch.long)).area(4, 4), "cover 3 positions"),
        (lambda: Mask.biased(torch.zeros(2, 2)) | Mask(), "union of masks with a bias"),
        (lambda: Mask.pairs_(torch.ones(3, 3, dtype=torch.bool)).area(4, 4), "covers 3 keys"),
    ],
)
def test_bad_masks_are_named(make, message):
    with pytest.raises(BadInput, match=message):
        make()
