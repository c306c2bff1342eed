"""Where landmarks stand, and the softmax in which they speak for their blocks."""

import pytest
import torch

from attlas.core.errors import BadInput
from attlas.ops.landmarks import drop_landmarks, grouped_softmax, insert_landmarks, scaled_scores


def literal(scores, every):
    """The groups of each row one by one."""
    weights = torch.zeros_like(scores)
    period = every + 1
    for i, row in enumerate(scores):
        c = i // period
        own = [j for j in range(c * period, i + 1) if j % period < every]
        marks = [b * period + every for b in range(c)]
        local = row[own + marks].softmax(0)
        weights[i, own] = local[: len(own)]
        for share, mark in zip(local[len(own) :], marks, strict=True):
            weights[i, mark - every : mark] = share * row[mark - every : mark].softmax(0)
    return weights


def test_weights_are_those_of_the_groups():
    scores = 3 * torch.randn(2, 23, 23, dtype=torch.float64)
    weights = grouped_softmax(scores, 4)
    torch.testing.assert_close(weights, torch.stack([literal(s, 4) for s in scores]), rtol=0, atol=1e-14)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 23, dtype=torch.float64), rtol=0, atol=1e-14)
    assert not weights[..., 4::5].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_half_precision_scores_are_not_rounded(dtype):
    scores = (3 * torch.randn(23, 23)).to(dtype)
    weights = grouped_softmax(scores, 4)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.double(), literal(scores.double(), 4), rtol=0, atol=1e-6)
    assert grouped_softmax(scores.double(), 4).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_of_half_precision_neither_overflow_nor_round(dtype):
    q, k = (60 * torch.randn(2, 9, 64, dtype=torch.float64)).to(dtype)
    scores = scaled_scores(q, k)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), q.double() @ k.double().mT / 8, rtol=1e-5, atol=1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(scaled_scores(q, k), scores)


def test_the_landmark_decides_how_much_and_tokens_where():
    scores = torch.randn(1, 15, dtype=torch.float64)
    weights = grouped_softmax(scores, 4)[0]
    scores[0, 4] += 1.5  # of the first block
    more = grouped_softmax(scores, 4)[0]
    blocks, raised = weights.view(3, 5).sum(1), more.view(3, 5).sum(1)
    torch.testing.assert_close(raised[0] / raised[1], torch.e**1.5 * blocks[0] / blocks[1], rtol=1e-12, atol=0)
    torch.testing.assert_close(more[:4] / raised[0], weights[:4] / blocks[0], rtol=1e-12, atol=0)


def test_scores_of_any_size_stay_finite():
    for size in (1e4, -1e4, 0):
        scores = torch.full((17, 17), float(size)).requires_grad_()
        weights = grouped_softmax(scores, 3)
        torch.testing.assert_close(weights.sum(-1), torch.ones(17))
        (gradient,) = torch.autograd.grad((weights * torch.randn(17)).sum(), scores)
        assert torch.isfinite(gradient).all()


def test_padding_puts_blocks_out_of_reach():
    scores = torch.randn(12, 12)
    for hidden in ([3], [0, 1, 2]):  # the landmark, or all that it stands for
        keep = torch.ones(12, dtype=torch.bool)
        keep[hidden] = False
        weights = grouped_softmax(scores, 3, keep)
        assert not weights[4:, :4].any()
        torch.testing.assert_close(weights[4:].sum(-1), torch.ones(8))
    assert not grouped_softmax(scores, 3, torch.zeros(12, dtype=torch.bool)).any()


def test_insertion_and_removal():
    tokens = torch.arange(7).expand(2, 7)
    marked = insert_landmarks(tokens, 3, 99)
    assert marked[1].tolist() == [0, 1, 2, 99, 3, 4, 5, 99, 6]
    assert torch.equal(drop_landmarks(marked, 3), tokens)
    vectors, mark = torch.randn(2, 7, 5), torch.randn(5)
    marked = insert_landmarks(vectors, 3, mark)
    assert torch.equal(marked[:, 3::4], mark.expand(2, 2, 5))
    assert torch.equal(drop_landmarks(marked, 3), vectors)
    assert insert_landmarks(tokens[:, :2], 3, 99).shape == (2, 2)


def test_insertion_compiles():
    tokens = torch.arange(14).view(2, 7)
    compiled = torch.compile(insert_landmarks, fullgraph=True, backend="eager")
    assert torch.equal(compiled(tokens, 3, 99), insert_landmarks(tokens, 3, 99))


def test_bad_counts():
    for call in (lambda: insert_landmarks(torch.zeros(1, 4), 0, 1), lambda: grouped_softmax(torch.zeros(2, 2), 0)):
        with pytest.raises(BadInput, match="at least 1, got 0"):
            call()


def test_bad_landmarks():
    for tokens, mark in (
        (torch.zeros(1, 4, 3), torch.zeros(2)),
        (torch.zeros(1, 4, dtype=int), torch.zeros(1, dtype=int)),
    ):
        with pytest.raises(BadInput, match="a landmark is one more token"):
            insert_landmarks(tokens, 2, mark)
    with pytest.raises(BadInput, match="a landmark is one more token"):
        insert_landmarks(torch.zeros(4), 2, 1)
    for mark in (300, -1, 10**30, torch.tensor(256), torch.tensor(1.5)):
        with pytest.raises(BadInput, match=r"torch.uint8 cannot hold the landmark"):
            insert_landmarks(torch.zeros(1, 4, dtype=torch.uint8), 2, mark)
