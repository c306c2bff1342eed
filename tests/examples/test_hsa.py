"""The example of hierarchical self-attention at a tiny size."""

from examples.hsa import draw, run


def test_hsa(tmp_path):
    result = run(levels=3, size=8, details=(0.0, 0.3, 1.0), seeds=3, lengths=(64, 256))
    gaps = result["gaps"]
    assert max(gaps["flat"]) < 1e-12
    assert abs(gaps["true tree"][0]) < 1e-12 < gaps["true tree"][1] < gaps["true tree"][2]
    assert all(right < wrong for right, wrong in zip(gaps["true tree"], gaps["shuffled tree"], strict=True))
    costs = result["costs"]
    assert costs["tree of 4"][1] < 4.2 * costs["tree of 4"][0]
    assert costs["softmax"][1] == 16 * costs["softmax"][0]
    draw(result, tmp_path / "hsa.png")
    assert (tmp_path / "hsa.png").stat().st_size > 10_000
