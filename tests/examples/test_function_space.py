import torch

from examples.function_space import SCREENING, WAVES, Waves, draw, problems, run


def test_solutions_obey_the_equation():
    (f, u), points = problems(2, seed=3), 32
    reach = 2 * WAVES
    k = torch.arange(-reach, reach + 1, dtype=torch.float64)
    laplacian = Waves(u.coefficients * -4 * torch.pi**2 * (k[:, None] ** 2 + k**2))
    residual = u.on(points) - SCREENING * laplacian.on(points) - f.on(points) ** 2
    assert residual.abs().max() < 1e-4 * f.on(points).square().max()


def test_conversion_keeps_a_network_on_finer_grids_where_plain_it_breaks(tmp_path):
    result = run(grids=(32, 64), train=40, test=6, steps=80, width=8)
    plain, converted = result.errors["convolutions, as they are"], result.errors["convolutions, converted"]
    spectral = result.errors["Fourier operator, as it is"]
    assert plain[32] == converted[32]
    assert plain[64] - plain[32] > 2 * (converted[64] - converted[32])
    assert abs(spectral[64] - spectral[32]) < 0.1 * spectral[32]
    assert "AvgPool2d" in result.report
    draw(result, tmp_path / "function_space.png")
    assert (tmp_path / "function_space.png").stat().st_size > 20_000
