"""The comparison at a small size: positional weights extrapolate in scale, and test values are new."""

import torch

from examples.positional_ood import draw, draw_numbers, run


def test_positional_attention_extrapolates_where_softmax_does_not(tmp_path):
    result = run(length=4, samples=1000, steps=150, batch=64, scales=(1, 5), tasks=("prefix sum",), tests=500)
    positional, softmax = (result.errors["prefix sum"][name] for name in ("positional", "softmax"))
    assert positional[1] < 3 * positional[0]
    assert softmax[1] > 3 * positional[1]
    draw(result, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_numbers_of_a_larger_scale_are_never_all_from_the_training_interval():
    torch.manual_seed(0)
    x = draw_numbers(2000, 200, 5)
    assert x.abs().max() <= 10
    assert not (x.abs().amax((1, 2)) < 1.9).any()
    assert draw_numbers(2000, 200, 1).abs().max() <= 2
