import doctest
import importlib.util
from itertools import pairwise
from math import ceil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attlas.core.errors import BadInput
from attlas.core.mask import Mask
from attlas.ops.flash import partial_softmax, tiles
from attlas.ops.lean import Span, _execute, fixed_split, lean_attention, one_worker_per_output, schedule
from attlas.ops.scan import RunningSoftmax, merge
from attlas.ops.softmax import softmax_attention

COUNTS = st.lists(st.integers(0, 12), max_size=9)
WORKERS = st.integers(1, 20)
LENGTHS = [0, 1, 23, 40, 9]


def qkv(queries=1, keys=40, heads=6, groups=2, dtype=torch.float32):
    shapes = (5, heads, queries, 4), (5, groups, keys, 4), (5, groups, keys, 3)
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def dense(q, k, v, lengths, causal=True):
    """Each sequence by itself, on the keys that it has."""
    rows = []
    for b, length in enumerate(lengths):
        one = slice(b, b + 1)
        rows.append(
            softmax_attention(q[one], k[one, :, :length], v[one, :, :length], Mask(causal=causal), backend="oracle")
        )
    return torch.cat(rows)


def test_autocast_does_not_round_the_sums():
    tensors = qkv()
    plain = lean_attention(*tensors, workers=3, tile=8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lean_attention(*tensors, workers=3, tile=8), plain)


@given(COUNTS, WORKERS)
@settings(max_examples=200, deadline=None)
def test_ranges_partition_all_tiles_evenly(counts, workers):
    plan = schedule(counts, workers)
    assert len(plan.workers) == workers
    in_order = [
        (span.output, tile) for spans in plan.workers for span in spans for tile in range(span.start, span.stop)
    ]
    assert in_order == [(output, tile) for output, tiles in enumerate(counts) for tile in range(tiles)]
    assert max(plan.loads) - min(plan.loads) <= 1
    most = ceil(sum(counts) / workers)
    assert plan.makespan == most
    if most:
        high = sum(counts) - (most - 1) * workers
        assert plan.loads == [most] * high + [most - 1] * (workers - high)


@given(COUNTS, WORKERS)
@settings(max_examples=200, deadline=None)
def test_each_output_has_one_host_and_each_worker_one_partial_of_another_host(counts, workers):
    plan = schedule(counts, workers)
    spans = [span for spans in plan.workers for span in spans]
    used = [output for output, tiles in enumerate(counts) if tiles]
    assert [span.output for span in spans if span.hosts] == used
    assert [span.output for span in spans if span.finishes] == used
    for own in plan.workers:
        assert all(span.hosts for span in own[1:])
    least = sum(counts) // workers
    for output in used:
        parts = [span for span in spans if span.output == output]
        assert all(a.stop == b.start for a, b in pairwise(parts))
        if least:  # parts but the first and the last are whole ranges
            assert len(parts) <= 1 + ceil((counts[output] - 1) / least)


def test_the_published_example():
    plan = schedule([10] * 56, 108)
    assert set(plan.loads) == {5, 6}
    assert plan.loads.count(6) == 560 - 5 * 108
    assert plan.makespan == 6
    assert one_worker_per_output([10] * 56, 108).makespan == 10
    assert plan.occupancy == 560 / (108 * 6)
    assert one_worker_per_output([10] * 56, 108).occupancy == 560 / (108 * 10)


def test_a_range_over_several_outputs():
    plan = schedule([2, 0, 3, 1], 2)
    assert plan.workers == ((Span(0, 0, 2, 2), Span(2, 0, 1, 3)), (Span(2, 1, 3, 3), Span(3, 0, 1, 1)))
    host, other = plan.workers[0][1], plan.workers[1][0]
    assert (host.hosts, host.finishes, other.hosts, other.finishes) == (True, False, False, True)


@given(COUNTS, WORKERS, st.integers(1, 6))
@settings(max_examples=200, deadline=None)
def test_no_other_schedule_is_shorter(counts, workers, parts):
    plan = schedule(counts, workers)
    for other in (one_worker_per_output(counts, workers), fixed_split(counts, workers, parts)):
        assert other.makespan >= plan.makespan
        done = sorted((s.output, tile) for spans in other.workers for s in spans for tile in range(s.start, s.stop))
        assert done == [(output, tile) for output, tiles in enumerate(counts) for tile in range(tiles)]
    assert all(
        span.hosts and span.finishes for spans in one_worker_per_output(counts, workers).workers for span in spans
    )


def test_scratch():
    assert schedule([10] * 56, 108).scratch_bytes(rows=4, value=128) == 108 * (4 * 128 + 2 * 4) * 4
    assert one_worker_per_output([10] * 56, 108).scratch_bytes(4, 128) == 0
    # Every part of every head waits for the second launch, and an undivided output does not.
    assert fixed_split([10] * 56 + [1], 108, 3).slots == 56 * 3
    assert schedule([], 3).occupancy == 1


def test_prefill_is_scheduled_by_the_tiles_below_the_diagonal():
    height, width, tokens = 16, 64, 200
    counts = [len(columns) for _, columns in tiles(tokens, tokens, (height, width), causal=True)]
    assert counts == [ceil(min((i + 1) * height, tokens) / width) for i in range(ceil(tokens / height))]
    assert schedule(counts, 6).makespan == ceil(sum(counts) / 6)


@pytest.mark.parametrize("workers", [1, 2, 3, 7, 16, 200])
@pytest.mark.parametrize("tile", [1, 7, 16, 64])
def test_result_is_dense_attention(tile, workers):
    q, k, v = qkv()
    o = lean_attention(q, k, v, torch.tensor(LENGTHS), workers=workers, tile=tile)
    torch.testing.assert_close(o, dense(q, k, v, LENGTHS), rtol=0, atol=1e-5)
    assert (o[0] == 0).all()
    full = lean_attention(q, k, v, workers=workers, tile=tile)
    torch.testing.assert_close(full, dense(q, k, v, [40] * 5), rtol=0, atol=1e-5)


@given(st.lists(st.integers(0, 40), min_size=5, max_size=5), WORKERS, st.integers(1, 50), st.randoms())
@settings(max_examples=60, deadline=None)
def test_any_order_of_workers_gives_the_same_bits(lengths, workers, tile, random):
    q, k, v = qkv(dtype=torch.float64)
    order = list(range(workers))
    random.shuffle(order)
    ragged = torch.tensor(lengths)
    shuffled = _execute(q, k, v, ragged, workers, tile, True, None, order)
    assert torch.equal(shuffled, lean_attention(q, k, v, ragged, workers=workers, tile=tile))
    torch.testing.assert_close(shuffled, dense(q, k, v, lengths), rtol=0, atol=1e-10)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_few_queries_are_the_last_positions(groups, causal):
    q, k, v = qkv(queries=4, groups=groups, dtype=torch.float64)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    exact = dense(q, k, v, LENGTHS, causal)
    expected = torch.autograd.grad(exact.sin().sum(), (q, k, v))
    for backend in ("torch", "oracle"):
        o = lean_attention(q, k, v, torch.tensor(LENGTHS), workers=3, tile=8, causal=causal, backend=backend)
        torch.testing.assert_close(o, exact, rtol=0, atol=1e-10)
        gradients = torch.autograd.grad(o.sin().sum(), (q, k, v))
        for mine, theirs in zip(gradients, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)


def test_what_lies_behind_a_sequence_is_not_read():
    q, k, v = qkv()
    behind = torch.arange(40)[None, None, :, None] >= torch.tensor(LENGTHS)[:, None, None, None]
    lengths = torch.tensor(LENGTHS)
    clean = lean_attention(q, k, v, lengths, workers=4, tile=8)
    k, v = (x.masked_fill(behind, torch.nan) for x in (k, v))
    assert torch.equal(lean_attention(q, k, v, lengths, workers=4, tile=8), clean)


def test_half_precision_sums_in_float32():
    q, k, v = (x.bfloat16() for x in qkv())
    o = lean_attention(q, k, v, torch.tensor(LENGTHS), workers=3, tile=8)
    exact = dense(q.double(), k.double(), v.double(), LENGTHS)
    assert o.dtype == torch.bfloat16
    torch.testing.assert_close(o.double(), exact, rtol=2**-8, atol=0)


@pytest.mark.parametrize("batch", [0, 2])
def test_no_sequence_and_empty_sequences(batch):
    q, k, v = torch.randn(batch, 4, 1, 8), torch.randn(batch, 2, 0, 8), torch.randn(batch, 2, 0, 8)
    o = lean_attention(q, k, v, workers=3)
    assert o.shape == (batch, 4, 1, 8)
    assert (o == 0).all()


def test_partials_merge_associatively_and_commutatively_and_nothing_is_the_identity():
    parts = [partial_softmax(9 * torch.randn(4, 16), torch.randn(16, 3)) for _ in range(3)]
    hidden = partial_softmax(torch.full((4, 16), -torch.inf), torch.randn(16, 3))
    first, second, third = parts
    for one, other in (
        (merge(merge(first, second), third), merge(first, merge(second, third))),
        (merge(first, second), merge(second, first)),
    ):
        for x, y in zip(one, other, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)
    nothing = RunningSoftmax(torch.full((4, 1), -1e30), torch.zeros(4, 1), torch.zeros(4, 3))
    for empty in (nothing, hidden):
        for merged in (merge(first, empty), merge(empty, first)):
            assert all(torch.equal(x, y) for x, y in zip(merged, first, strict=True))
    assert (merge(hidden, nothing).average == 0).all()


def test_bad_input_is_named():
    q, k, v = qkv()
    for length, shown in ((41, "41"), (-1, "-1")):
        with pytest.raises(BadInput, match=f"sequence 2 has length {shown}, the cache holds 0 to 40"):
            lean_attention(q, k, v, torch.tensor([0, 40, length, 3, 50]), workers=2)
    with pytest.raises(BadInput, match=r"5 integers, one per sequence, got torch\.int64 \(4,\)"):
        lean_attention(q, k, v, torch.tensor([1, 2, 3, 4]), workers=2)
    with pytest.raises(BadInput, match=r"5 integers, one per sequence, got torch\.float32"):
        lean_attention(q, k, v, torch.ones(5), workers=2)
    with pytest.raises(BadInput, match="at least one worker, got 0"):
        lean_attention(q, k, v, workers=0)
    with pytest.raises(BadInput, match="at least one key, got 0"):
        lean_attention(q, k, v, workers=2, tile=0)
    with pytest.raises(BadInput, match="H a multiple of G"):
        lean_attention(q[:, :5], k, v, workers=2)
    with pytest.raises(BadInput, match="output 1 has -2 tiles"):
        schedule([3, -2], 2)
    with pytest.raises(BadInput, match="at least one part, got 0"):
        fixed_split([3], 2, 0)


def test_the_pages_examples_run():
    page = Path(__file__).parents[2] / "docs" / "pages" / "decoding.md"
    failed, tried = doctest.testfile(str(page), module_relative=False)
    assert (failed, tried > 5) == (0, True)


def test_the_drawing_shows_every_span(tmp_path):
    docs = Path(__file__).parents[2] / "docs"
    spec = importlib.util.spec_from_file_location("lean_figure", docs / "figures" / "lean.py")
    figure = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figure)
    assert [plan.makespan for plan in figure.plans().values()] == [8, 6, 5]
    figure.draw(tmp_path / "lean.svg")
    for text in ((tmp_path / "lean.svg").read_text(), (docs / "pages" / "figures" / "lean.svg").read_text()):
        for title, plan in figure.plans().items():
            assert title in text
            assert f"done after {plan.makespan}" in text
        for colour, spans in zip(figure.COLOURS, range(figure.HEADS), strict=True):
            shown = sum(
                span.output == spans for plan in figure.plans().values() for own in plan.workers for span in own
            )
            assert text.count(f"fill: {colour}") == shown
