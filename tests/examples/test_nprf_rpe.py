from examples.nprf_rpe import WAYS, draw, run


def test_transforms_round_as_all_pairs_do_and_unit_norms_need_fewer_features(tmp_path):
    result = run(lengths=(64, 128), features=8, size=8, counts=(32, 128, 512), norms=(1.0, 4.0), draws=2)
    assert all(seconds > 0 for way in WAYS for seconds in result.seconds[way].values())
    for way in (*WAYS[1:], "kernel, transforms, causal"):
        assert all(0 < error < 1e-6 for error in result.rounding[way].values())
    few, some, many = result.estimate[1.0].values()
    assert many < 0.65 * some < 0.5 * few
    assert min(result.estimate[4.0].values()) > 1
    draw(result, tmp_path / "nprf_rpe.png")
    assert (tmp_path / "nprf_rpe.png").stat().st_size > 10_000
