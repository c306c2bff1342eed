"""The example of the self-ensemble at a tiny size."""

from examples.ssa_ensemble import PASSES, draw, run


def test_ssa_ensemble(tmp_path):
    result = run(length=9, dim=16, share=0.4, examples=100, steps=60, seeds=1)
    assert list(result["ensembles"]) == list(PASSES)
    assert result["consolidated"][0] > 0.45  # a third is chance
    assert result["ensembles"][20][0] > result["ensembles"][1][0]
    draw(result, tmp_path / "ensemble.png")
    assert (tmp_path / "ensemble.png").stat().st_size > 10_000
