"""MgNO, the network: published sizes, sizes by hand, any grid, learning a linear operator."""

import pytest
import torch
import torch.nn.functional as F

from attlas.core.errors import BadInput
from attlas.models.mgno import PUBLISHED, MgNO


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "count"), [("darcy", 572_661), ("darcy smooth", 678_093), ("navier stokes", 2_885_194)]
)
def test_published_networks_have_the_parameters_of_the_official_code(name, count):
    assert parameters(MgNO(**PUBLISHED[name])) == count


def test_the_parameters_of_the_darcy_network_by_hand():
    n, total = 24, 24  # the last convolution
    for sources in (1, n, n, n):
        pairs = 9 * sources * n
        total += pairs + 4 * 2 * pairs + 2 * 2 * pairs  # S; A and S on four grids; twice on the coarsest
        total += 5 * (9 * sources**2 + 9 * n**2 + 16 * n**2)  # R, Pi and P
        total += sources * n + n  # B
    assert parameters(MgNO(**PUBLISHED["darcy"])) == total


@pytest.mark.parametrize("shape", [(32, 32), (33, 48)])
def test_one_network_serves_any_grid(shape):
    model = MgNO(2, 6, 2, steps=((1, 0), (1, 1), (2, 0)))
    assert model(torch.randn(3, 2, *shape)).shape == (3, 1, *shape)


def test_layers_are_the_cycle_and_the_branch_under_gelu():
    model = MgNO(1, 5, 1, steps=((1, 0), (1, 0))).double()
    f = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    u = F.gelu(model.cycles[0](f) + model.branches[0](f))
    assert torch.equal(model(f), model.last(u))


def test_the_navier_stokes_network_predicts_an_increment():
    model = MgNO(**PUBLISHED["navier stokes"])
    torch.nn.init.zeros_(model.last.weight)
    f = torch.randn(1, 1, 64, 64)
    assert torch.equal(model(f), f)
    assert model.branches is None


def test_it_learns_to_solve_the_poisson_equation():
    """Fifty steps on random right-hand sides leave less than a fifth of the error; u = 0 leaves all of it."""
    length, count = 16, 32
    line = 2 * torch.eye(length) - torch.eye(length).roll(1, 0).tril() - torch.eye(length).roll(-1, 0).triu()
    laplacian = torch.kron(line, torch.eye(length)) + torch.kron(torch.eye(length), line)
    f = torch.randn(count, length * length)
    u = torch.linalg.solve(laplacian, f.T).T
    f, u = (x.view(count, 1, length, length) / x.std() for x in (f, u))
    model = MgNO(1, 8, 2, steps=((1, 0), (1, 0), (1, 0), (2, 0)))
    optimizer = torch.optim.Adam(model.parameters(), 4e-3)
    for _ in range(50):
        loss = F.mse_loss(model(f), u)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2**2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": 0}, "at least 1"),
        ({"sources": 2, "increment": True}, "one channel"),
        ({"boundary": "open"}, "boundary is one of"),
    ],
)
def test_what_is_no_network_is_refused(settings, message):
    with pytest.raises(BadInput, match=message):
        MgNO(**settings)


def test_a_function_on_a_line_is_refused():
    with pytest.raises(BadInput, match="1 channels, height, width"):
        MgNO(channels=4)(torch.randn(1, 1, 64))
