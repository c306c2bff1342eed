"""The identities of `mgno`: linearity, classical multigrid as one setting of the weights, shifts, sizes."""

import pytest
import torch
from torch import nn

import attlas
from attlas import Grid
from attlas.core.errors import BadInput
from attlas.mechanisms.conv.mgno import VCycle
from examples.mgno import classical


def smooth(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def residual_factor(interior, residual, cycles=8):
    """What a V-cycle multiplies the residual by, on average."""
    norms = classical(interior, residual, cycles)
    return (norms[-1] / norms[0]) ** (1 / cycles)


@pytest.mark.parametrize("interior", [31, 63, 127])
def test_as_classical_multigrid_it_solves_poisson_at_one_rate_on_all_grids(interior):
    assert 0.13 < residual_factor(interior, residual=True) < 0.17


def test_restricting_what_is_given_instead_of_the_residual_corrects_twice():
    """What smoothing has solved already is solved again below: slower, and the more so the finer the grid."""
    coarse, fine = (residual_factor(interior, residual=False) for interior in (31, 127))
    assert 0.18 < coarse < fine


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("boundary", ["dirichlet", "periodic", "reflect"])
def test_without_biases_it_is_linear(boundary, residual):
    layer = attlas.mixer("mgno", 8, grid=(13, 18), steps=((1, 1), (2, 1), (2, 0)), boundary=boundary, residual=residual)
    layer.double()
    first, second = smooth(2, 234, 8), smooth(2, 234, 8)
    assert torch.allclose(layer(2 * first - 3 * second), 2 * layer(first) - 3 * layer(second), rtol=0, atol=1e-12)


def test_a_periodic_cycle_commutes_with_shifts_by_the_coarsest_spacing():
    cycle = VCycle(2, 5, steps=((1, 0), (1, 1), (2, 0)), boundary="periodic").double()
    f = smooth(1, 2, 16, 24)
    u = cycle(f)
    for shift in ((4, 0), (0, 8), (-4, 12)):
        assert torch.allclose(cycle(f.roll(shift, (2, 3))), u.roll(shift, (2, 3)), rtol=0, atol=1e-12)
    assert not torch.allclose(cycle(f.roll(2, 2)), u.roll(2, 2), rtol=0, atol=1e-3)
    walled = VCycle(2, 5, steps=((1, 0), (1, 1), (2, 0))).double()
    walled.load_state_dict(cycle.state_dict())
    assert not torch.allclose(walled(f.roll(4, 2)), walled(f).roll(4, 2), rtol=0, atol=1e-3)


def test_a_reflecting_cycle_keeps_mirror_symmetry():
    """On 2ⁿ + 1 points the middle one is on every grid; with symmetric kernels a symmetric f gives a symmetric u."""
    cycle = VCycle(1, 3, steps=((1, 1), (1, 0)), boundary="reflect", shape=(9, 9)).double()
    with torch.no_grad():
        for parameter in cycle.parameters():
            parameter.copy_((parameter + parameter.flip(2)) / 2)
    f = smooth(1, 1, 9, 9)
    u = cycle(f + f.flip(2))
    assert torch.allclose(u, u.flip(2), rtol=0, atol=1e-12)


def test_padding_at_the_end_of_both_axes_equals_a_smaller_grid():
    """Behind a Dirichlet border there is nothing, as there is in padding."""
    layer = attlas.mixer("mgno", 8, grid=(12, 9), steps=((1, 1), (2, 0), (1, 0)), residual=True).double()
    x = smooth(2, 108, 8)
    keep = torch.zeros(12, 9, dtype=torch.bool)
    keep[:7, :6] = True
    small = x.unflatten(1, (12, 9))[:, :7, :6].flatten(1, 2)
    y = layer(x, mask=keep.flatten().expand(2, -1))
    assert torch.allclose(y.unflatten(1, (12, 9))[:, :7, :6].flatten(1, 2), layer(small, grid=(7, 6)), atol=1e-12)
    assert not y.unflatten(1, (12, 9))[:, 7:].any()


def test_kernels_of_the_prolongation_follow_the_grid():
    cycle = VCycle(1, 4, shape=(211, 212))
    taps = [level.prolong.kernel_size for level in cycle.levels[:-1]]
    assert [rows for rows, _ in taps] == [3, 4, 3, 3, 4]  # of 211, 106, 53, 27, 14
    assert [columns for _, columns in taps] == [4, 4, 3, 3, 4]  # of 212, 106, 53, 27, 14


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (8, 8), (7, 12), (33, 5)])
def test_any_size_goes_in_and_out(shape):
    built_for = VCycle(2, 3, shape=(8, 8))
    assert built_for(torch.randn(1, 2, *shape)).shape == (1, 3, *shape)


def test_the_residual_is_restricted_only_where_asked():
    plain, paper = (VCycle(3, 3, steps=((1, 0), (1, 0)), residual=residual).double() for residual in (False, True))
    assert plain.levels[0].operator is None
    with torch.no_grad():
        for parameter in paper.levels[0].operator.parameters():
            parameter.zero_()
    paper.load_state_dict(plain.state_dict(), strict=False)
    f = smooth(1, 3, 8, 8)
    assert torch.equal(plain(f), paper(f))  # A = 0: the residual is f
    nn.init.ones_(paper.levels[0].operator.weight)
    assert not torch.allclose(plain(f), paper(f))


def test_prefix_tokens_give_zero_and_change_nothing():
    layer = attlas.mixer("mgno", 8, grid=(4, 4), steps=((1, 0), (1, 0))).double()
    x = smooth(2, 18, 8)
    y = layer(x, grid=Grid((4, 4), prefix=2))
    assert not y[:, :2].any()
    assert torch.equal(y[:, 2:], layer(x[:, 2:]))


def test_a_layer_norm_follows_each_prolongation():
    cycle = VCycle(1, 4, steps=((1, 0), (1, 0)), shape=(8, 6), normed=True).double()
    assert sum(p.numel() for p in cycle.levels[0].norm.parameters()) == 2 * 4 * 8 * 6
    u = cycle(smooth(3, 1, 8, 6))
    assert torch.allclose(u.mean((1, 2, 3)), torch.zeros(3).double(), atol=1e-12)
    assert torch.allclose(u.var((1, 2, 3), unbiased=False), torch.ones(3).double(), atol=1e-2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": ()}, "begins with a step before"),
        ({"steps": ((0, 1), (1, 0))}, "begins with a step before"),
        ({"steps": ((1, 0), (1, 1))}, "coarsest level"),
        ({"steps": ((1, 0), (-1, 0))}, "none negative"),
        ({"boundary": "neumann"}, "boundary is one of 'dirichlet'"),
    ],
)
def test_what_is_no_cycle_is_refused(settings, message):
    with pytest.raises(BadInput, match=message):
        attlas.mixer("mgno", 8, grid=(8, 8), **settings)


def test_a_single_point_has_no_mirror_image():
    layer = attlas.mixer("mgno", 8, grid=(4, 4), steps=((1, 0), (1, 0), (1, 0)), boundary="reflect")
    with pytest.raises(BadInput, match="1 x 1 points on level 2"):
        layer(torch.randn(1, 16, 8))


def test_layer_norms_need_the_grid():
    with pytest.raises(BadInput, match="pass shape"):
        VCycle(1, 4, normed=True)


@pytest.mark.parametrize("name", ["forward", "oracle"])
def test_layer_norms_and_holes_are_refused_together(name):
    cycle = VCycle(1, 2, steps=((1, 0), (1, 0)), shape=(8, 8), normed=True)
    with pytest.raises(BadInput, match="no meaning with holes"):
        getattr(cycle, name)(torch.randn(1, 1, 8, 8), torch.ones(1, 1, 8, 8, dtype=torch.bool))


def test_a_sequence_is_refused():
    with pytest.raises(BadInput, match="needs to know how tokens lie"):
        attlas.mixer("mgno", 8)(torch.randn(1, 16, 8))
