import pytest
import torch

from examples.mgno import draw, pressures, run


def test_finite_volumes_solve_what_is_known():
    """In a uniform medium pressure is that of the plain Poisson equation, 0.0737 / a at the middle of the square."""
    u = pressures(torch.full((1, 1, 33, 33), 3.0))
    assert float(u[0, 0, 16, 16]) == pytest.approx(0.07367 / 3, rel=3e-3)
    assert torch.allclose(u, u.flip(2))
    assert torch.allclose(u, u.transpose(2, 3))


def test_learned_cycles_are_closer_than_plain_convolutions_and_need_their_coarsest_grid(tmp_path):
    result = run(points=16, train=40, test=10, epochs=12, channels=6, layers=2, batch=10, interiors=(15, 31))
    (mgno, parameters), (plain, as_many) = result.errors["MgNO"], result.errors["plain convolutions"]
    assert mgno < plain
    assert 0.8 * parameters < as_many <= parameters
    assert result.by_level[-1] == pytest.approx(mgno)
    assert result.by_level[0] > 1.5 * mgno
    assert result.residuals[31, "the residual"][-1] < 0.3 * result.residuals[31, "what is given"][-1]
    draw(result, tmp_path / "mgno.png")
    assert (tmp_path / "mgno.png").stat().st_size > 20_000
