import math

from examples.lssar_extrapolation import LENGTHS, draw, run


def test_losses_are_measured_at_every_length(tmp_path):
    result = run(dim=32, layers=1, length=16, steps=25, batch=8, stretches=4)
    assert list(result.bits) == ["softmax", "lssa", "lssar*", "lssar"]
    for row in result.bits.values():
        assert len(row) == len(LENGTHS)
        assert all(2 < value < 8 for value in row)  # something was learned: a guess takes 8 bits
        assert not math.isclose(row[0], row[-1])
    assert result.bits["lssar*"] != result.bits["lssa"]
    draw(result, tmp_path / "lssar.png")
    assert (tmp_path / "lssar.png").stat().st_size > 10_000
