"""The example of the controlled variants at a tiny size."""

from examples.deconstruct import VARIANTS, draw, run


def test_deconstruct(tmp_path):
    result = run(layers=2, dim=8, heads=2, length=16, batch=4, steps=25)
    bits = result["bits"]
    assert set(bits) == {("softmax", "uniform"), *((name, plan) for name in VARIANTS for plan in ("uniform", "hybrid"))}
    assert len(result["sizes"]) == 1  # all as large as attention
    assert len(set(bits.values())) == len(bits)  # no two are the same model
    assert all(value < 8 for value in bits.values())  # better than guessing bytes
    draw(result, tmp_path / "deconstruct.png")
    assert (tmp_path / "deconstruct.png").stat().st_size > 10_000
