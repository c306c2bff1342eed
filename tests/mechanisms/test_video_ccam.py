"""The identities of `video_ccam`."""

from itertools import pairwise

import pytest
import torch

import attlas
from attlas import Mask
from attlas.core.errors import BadInput, Unsupported


def build(patches=2, **settings):
    return attlas.make_attend("video_ccam", 2, 4, patches=patches, **settings)


def inputs(queries, frames, patches=2, batch=2):
    q = torch.randn(batch, 2, queries, 4, dtype=torch.float64)
    k, v = (torch.randn(batch, 2, frames * patches, 4, dtype=torch.float64) for _ in "kv")
    return q, k, v


def seen_frames(queries, frames, rounding):
    return build(1, rounding=rounding).staircase(queries, frames)[0, 0].sum(1).tolist()


def test_an_image_is_seen_by_all():
    q, k, v = inputs(5, 1, 6)
    assert torch.allclose(build(6)(q, k, v, cross=True), attlas.attend(q, k, v), rtol=0, atol=1e-12)


def test_the_staircase():
    assert seen_frames(8, 4, "floor") == seen_frames(8, 4, "ceil") == [1, 1, 2, 2, 3, 3, 4, 4]
    assert seen_frames(4, 6, "floor") == [1, 2, 4, 5]
    assert seen_frames(4, 6, "ceil") == [2, 3, 5, 6]
    assert seen_frames(5, 2, "floor") == [1, 1, 1, 2, 2]
    assert seen_frames(5, 2, "ceil") == [1, 1, 2, 2, 2]


@pytest.mark.parametrize("frames", [3, 8, 13])
def test_a_frame_changes_only_queries_that_are_not_before_it(frames):
    q, k, v = inputs(8, frames)
    attend = build()
    before = attend(q, k, v, cross=True)
    for t in range(frames):
        other = v.clone()
        other[:, :, 2 * t : 2 * t + 2] += 1
        changed = (attend(q, k, other, cross=True) != before).flatten(3).any(-1).all(0).all(0)
        assert changed.tolist() == [i * frames >= t * 8 for i in range(8)]


def test_frames_shown_twice_change_nothing_for_queries_past_the_half_of_their_frame():
    q, k, v = inputs(12, 5)
    twice_k, twice_v = (t.unflatten(2, (5, 2)).repeat_interleave(2, 2).flatten(2, 3) for t in (k, v))
    once, twice = build()(q, k, v, cross=True), build()(q, twice_k, twice_v, cross=True)
    same = torch.isclose(once, twice, rtol=0, atol=1e-12).all(-1).all(0).all(0)
    assert same.tolist() == [(i * 5 / 12) % 1 >= 0.5 or i * 5 < 12 for i in range(12)]  # frame 0 is all of it


def test_denser_sampling_of_one_signal_converges():
    q, key, value = torch.randn(1, 2, 8, 4), torch.randn(2, 3, 4), torch.randn(2, 3, 4)

    def watch(frames):
        time = torch.linspace(0, 6.28, frames + 1)[:-1, None]
        waves = torch.cat([time.sin(), time.cos(), (2 * time).sin()], 1)
        return build(1)(q, (waves @ key)[None], (waves @ value)[None], cross=True)

    videos = [watch(16 * 4**power) for power in range(5)]
    steps = [float((b - a).norm()) for a, b in pairwise(videos)]
    assert all(after < before / 3 for before, after in pairwise(steps))


def test_the_order_of_frames_matters_only_under_the_mask():
    q, k, v = inputs(6, 4)
    back_k, back_v = (t.unflatten(2, (4, 2)).flip(2).flatten(2, 3) for t in (k, v))
    assert torch.allclose(attlas.attend(q, k, v), attlas.attend(q, back_k, back_v), rtol=0, atol=1e-12)
    assert not torch.allclose(build()(q, k, v, cross=True), build()(q, back_k, back_v, cross=True))


@pytest.mark.parametrize("rounding", ["floor", "ceil"])
def test_a_padded_batch_is_each_video_alone(rounding):
    q, k, v = inputs(6, 5, batch=3)
    lengths, attend = (5, 3, 1), build(rounding=rounding)
    keep = torch.arange(10) < 2 * torch.tensor(lengths)[:, None]
    together = attend(q, k, v, cross=True, mask=keep)
    for b, frames in enumerate(lengths):
        alone = attend(q[b : b + 1], k[b : b + 1, :, : 2 * frames], v[b : b + 1, :, : 2 * frames], cross=True)
        assert torch.allclose(together[b : b + 1], alone, rtol=0, atol=1e-12)


def test_missing_frames_and_patches_take_no_weight():
    q, k, v = inputs(4, 4, batch=1)
    keep = torch.tensor([[True, False, False, False, True, True, True, True]])  # half of frame 0, none of frame 1
    got = build()(q, k, v, cross=True, mask=keep)
    left = torch.tensor([0, 0, 4, 5, 6, 7])
    pairs = Mask.pairs_(torch.tensor([True, False, True, True, True, True]).expand(4, -1))
    expected = build()(q, k[:, :, left], v[:, :, left], cross=True, mask=pairs)
    assert torch.allclose(got, expected, rtol=0, atol=1e-12)


def test_learns_which_of_two_events_came_first_where_no_mask_cannot():
    def accuracy(name, **settings):
        torch.manual_seed(0)
        layer = attlas.mixer(name, 16, 2, causal=False, **settings)
        queries = torch.nn.Parameter(torch.randn(1, 4, 16))
        head, events = torch.nn.Linear(64, 2), torch.randn(2, 16)
        parameters = [queries, *layer.parameters(), *head.parameters()]
        optimizer = torch.optim.Adam(parameters, 3e-3)

        def batch(size):
            first, place = torch.randint(2, (size,)), torch.rand(size, 8).argsort(1)[:, :2].sort(1).values
            video, rows = 0.3 * torch.randn(size, 8, 16), torch.arange(size)
            video[rows, place[:, 0]] += events[first]
            video[rows, place[:, 1]] += events[1 - first]
            return head(layer(queries.expand(size, -1, -1), video).flatten(1)), first

        for _ in range(300):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(*batch(64)).backward()
            optimizer.step()
        with torch.no_grad():
            logits, first = batch(1000)
        return float((logits.argmax(1) == first).double().mean())

    assert accuracy("video_ccam", patches=1) > 0.8
    assert accuracy("softmax") < 0.6


def test_pairs_are_those_of_the_staircase():
    cost = build(729).cost(1, 1024, 16 * 729)
    assert cost.pairs == 2 * 729 * 64 * sum(range(1, 17))
    assert cost.flops / cost.executed == 17 / 32


def test_what_does_not_fit_is_refused():
    q, k, v = inputs(4, 5, 1)
    with pytest.raises(BadInput, match="whole frames of 2 tokens, got 5 keys"):
        build()(q, k, v, cross=True)
    with pytest.raises(BadInput, match="'floor' or 'ceil', got 'round'"):
        build(rounding="round")
    with pytest.raises(BadInput, match="at least 1, got 0"):
        build(0)
    with pytest.raises(Unsupported, match="noncausal self"):
        build()(*inputs(4, 2))
