"""The locality example at a small size."""

import torch

from examples.convit_locality import draw, run


def test_a_local_start_looks_near_and_the_picture_is_drawn(tmp_path):
    result = run(images=80, tests=60, seeds=1, dim=18, layers=2, steps=24, batch=20)
    local, random = result.starts["local"], result.starts["random"]
    assert local.distances[0].mean() < 0.8 * random.distances[0].mean()
    # Head K a + b looks a − 1 columns to the right and b − 1 rows down from the middle.
    rows, columns = (local.before[0].sum(axis) @ torch.arange(8.0) for axis in (2, 1))
    assert torch.allclose(rows, torch.tensor([3.0, 4.0, 5.0]).repeat(3), atol=0.1)
    assert torch.allclose(columns, torch.tensor([3.0, 4.0, 5.0]).repeat_interleave(3), atol=0.1)
    assert not torch.allclose(local.before, local.after)
    assert len(result.steps) == len(local.accuracy[0]) == 8
    draw(result, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
