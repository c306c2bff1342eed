import pytest
import torch

from examples.titans import Model, draw, run, sequences


@pytest.mark.parametrize("distance", [None, 1, 9, 19])
def test_the_question_has_one_answer(distance):
    keys, values, answers = sequences(64, 20, 3, 5, distance)
    same = keys[:, :-1] == keys[:, -1:]
    assert (same.sum(1) == 1).all()
    assert torch.equal(values[:, :-1][same], answers)
    assert (keys < 5).sum(1).max() <= 4  # three pairs and the question
    if distance is not None:
        assert same[:, 19 - distance].all()


def test_only_the_memories_see_behind_the_window():
    keys, values, _ = sequences(2, 20, 3, 5, 15)
    other = values.clone()
    other[:, 4] = (values[:, 4] + 1) % 5
    for mixer, settings in (("softmax", {}), ("titans", {"chunk": 6}), ("titans_mag", {"window": 6})):
        model = Model(mixer, settings, window=6, symbols=5, dim=8, layers=2).double()
        moved = (model(keys, values) - model(keys, other)).abs().max()
        assert (moved > 1e-9) == (mixer != "softmax"), mixer


def test_it_runs_and_draws(tmp_path):
    result = run(window=4, tokens=8, furthest=8, pairs=1, symbols=2, dim=16, steps=60, count=256)
    assert all(list(by_distance) == [2, 4, 8] for by_distance in result.accuracy.values())
    window, memory = result.accuracy["window of 4"], result.accuracy["memory of two layers"]
    assert min(memory[2], memory[8]) > 0.8
    assert max(window[4], window[8]) < 0.65
    draw(result, tmp_path / "titans.png")
    assert (tmp_path / "titans.png").stat().st_size > 10_000
