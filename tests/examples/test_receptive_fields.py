"""The example of receptive fields at a small size."""

import pytest
import torch

from examples.receptive_fields import CHOSEN, FIXED, draw, run


def test_windows_are_near_lattices_far_and_what_is_chosen_is_alike(tmp_path, capsys):
    result = run(grid=(28, 28), query=(13, 11), dim=16, queries=5)
    fields = result.fields
    assert list(fields) == [*FIXED, *CHOSEN]
    assert "china.jpg in 28 x 28 patches, means over 6 queries" in capsys.readouterr().out
    assert fields["softmax"].keys == 28 * 28
    assert fields["neighborhood"].keys == 49
    assert int(fields["criss-cross, one pass"].seen.sum()) == 28 + 28 - 1
    assert all(field.cost < 1 for label, field in fields.items() if label != "softmax")
    assert fields["neighborhood"].far < 0.5 * fields["crossformer, long"].far
    lattice = fields["crossformer, long"]
    for label in CHOSEN:  # as far away as the lattice, or nearly, and more like the query
        assert fields[label].unlike < 0.9 * lattice.unlike
        assert fields[label].far > 2 * fields["neighborhood"].far
    assert fields["softmax"].unlike == pytest.approx(1)
    again = run(grid=(28, 28), query=(13, 11), dim=16, queries=5).fields  # wherever the random state stands
    assert all(torch.equal(field.seen, again[label].seen) for label, field in fields.items())
    assert [field.far for field in fields.values()] == [field.far for field in again.values()]
    draw(result, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 50_000
