import pytest
import torch

from examples.axial import all_images, draw, run, share_of_bars


def test_all_images_of_bars_are_there_once():
    images, chance = all_images(3)
    assert len(images.unique(dim=0)) == len(images) == 14
    assert float(chance.sum()) == pytest.approx(1)
    assert share_of_bars(images) == 1
    assert share_of_bars(torch.eye(3).unsqueeze(0)) == 0


def test_bars_are_learned_and_drawn_and_a_pixel_knows_what_comes_before_it(tmp_path):
    result = run(side=4, dim=16, heads=2, outer=2, inner=1, steps=120, batch=32, samples=6)
    assert result.entropy < result.learned < 0.6 < result.curve[0]
    assert result.costs["row by row"][0] == 4
    assert result.costs["pixel by pixel"][0] == 16
    before = torch.arange(16).view(4, 4) < 10
    known = {name: moved > 0 for name, moved in result.known.items()}
    assert torch.equal(known["the whole model"], before)
    assert torch.equal(known["outer blocks, moved down"], before & (torch.arange(4) < 2).unsqueeze(1))
    assert not known["masked rows, then masked columns"][:, 3].any()
    draw(result, tmp_path / "axial.png")
    assert (tmp_path / "axial.png").stat().st_size > 20_000
