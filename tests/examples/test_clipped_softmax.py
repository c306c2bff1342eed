import torch

from examples.clipped_softmax import draw, run


def test_only_clipped_weights_are_exact_zeros(tmp_path):
    result = run(dim=16, heads=2, layers=1, length=32, steps=30, batch=8)
    for mechanism, (plain, rounded, norm, peak, zeros) in result.measured.items():
        assert 3 < plain < 8  # something was learned: a guess takes 8 bits
        assert abs(rounded - plain) < 1
        assert rounded != plain
        assert norm > 0
        assert peak > 1
        assert (zeros > 0) == (mechanism == "clipped_softmax")
    rows = result.maps["softmax"].sum(-1)
    assert torch.allclose(rows, torch.ones_like(rows), atol=1e-5)
    assert (result.maps["gated_attention"].sum(-1) < 1).all()
    draw(result, tmp_path / "clipped.png")
    assert (tmp_path / "clipped.png").stat().st_size > 10_000
