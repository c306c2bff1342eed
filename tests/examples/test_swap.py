import pytest

from examples.swap import draw, run

pytest.importorskip("timm")


def test_distillation_comes_nearer_to_what_was_swapped_out(tmp_path):
    result = run(steps=60, layer_steps=25, whole_steps=25, dim=32, depth=2)
    assert list(result.accuracy) == ["softmax, trained", "agent, swapped", "agent, distilled"]
    assert list(result.errors.layers) == ["blocks.0.attn", "blocks.1.attn"]
    for errors in (*result.errors.layers.values(), result.errors.whole):
        assert sum(errors[-5:]) < sum(errors[:5])
    draw(result, tmp_path / "swap.png")
    assert (tmp_path / "swap.png").stat().st_size > 10_000
