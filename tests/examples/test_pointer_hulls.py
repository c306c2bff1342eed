"""The hull example at a small size, and its geometry against that of others."""

import pytest
import torch
from scipy.spatial import ConvexHull

from attlas.models.pointer import Decoded
from examples.pointer_hulls import area, before_end, draw, hulls, measure, run


@pytest.mark.parametrize("count", [3, 5, 8, 12])
def test_answers_are_hulls_counter_clockwise_from_the_first(count):
    points = torch.rand(40, count, 2, dtype=torch.float64)
    for where, answer in zip(points, hulls(points).tolist(), strict=True):
        found = before_end(answer, count)
        expected = ConvexHull(where.numpy())
        turn = expected.vertices.tolist().index(min(expected.vertices))
        assert found == [*expected.vertices[turn:], *expected.vertices[:turn]]
        assert area(where[found].tolist()) == pytest.approx(expected.volume)
        assert set(answer[len(found) :]) == {count}


def test_areas_of_polygons_that_cross_themselves_are_nothing():
    corners = [[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]
    assert area(corners) == area(corners[::-1]) == 1
    assert area([corners[i] for i in (0, 2, 1, 3)]) == 0
    assert area([*corners[:3], corners[0], corners[3]]) == 0
    assert area(corners[:2]) == 0
    assert area([*corners[:3], [0.9, 0.5]]) == pytest.approx(0.3)


class Answers(torch.nn.Module):
    """In place of a network: hulls, after `change`."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def decode(self, points, beam):
        return Decoded(self.change(hulls(points)), points.new_zeros(len(points)))


def test_the_measure_is_one_for_right_answers_and_tells_turned_ones_from_short_ones():
    right, _ = measure(Answers(lambda slots: slots), 6, 50, 1)
    assert right == pytest.approx((6, 1, 1, 1))
    turned, _ = measure(Answers(lambda slots: torch.cat([slots[:, 1:3], slots[:, :1], slots[:, 3:]], 1)), 3, 50, 1)
    assert turned == pytest.approx((3, 0, 1, 1))
    short, _ = measure(Answers(lambda slots: slots.where(torch.arange(7) < 3, 6)), 6, 50, 1)
    assert short.simple == 1
    assert short.exact < 0.5
    assert 0 < short.area < 0.9


def test_the_example_runs_and_draws(tmp_path):
    result = run((3, 4), (3, 4), dim=16, steps=20, batch=16, tests=20, shown=4)
    assert [score.points for score in result.scores] == [3, 4]
    assert all(score.exact <= score.simple for score in result.scores)
    assert all(score.area <= score.simple for score in result.scores)
    draw(result, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
