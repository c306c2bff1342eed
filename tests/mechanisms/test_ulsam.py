"""The identities of subspace attention."""

import pytest
import torch
from torch import Tensor

import attlas
from attlas.core.errors import BadInput
from attlas.core.grid import Grid

GRID = Grid((5, 6))


def layer(dim: int = 8, **settings: object) -> attlas.Mixer:
    torch.manual_seed(0)
    mixer = attlas.mixer("ulsam", dim, **settings).eval()
    with torch.no_grad():
        for value in mixer.parameters():
            value.add_(0.3 * torch.randn_like(value))
    return mixer


def picture(batch: int = 2, dim: int = 8) -> Tensor:
    return torch.randn(batch, 30, dim, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("dim", "groups"), [(64, 4), (64, 1), (16, 16)])
def test_five_numbers_per_channel_and_three_per_group(dim: int, groups: int) -> None:
    mixer = attlas.mixer("ulsam", dim, groups=groups)
    assert sum(p.numel() for p in mixer.parameters()) == 5 * dim + 3 * groups


def test_every_map_sums_to_one() -> None:
    weights = layer().attention(picture(), GRID)
    assert weights.shape == (2, 30, 4)
    assert torch.allclose(weights.sum(1), torch.ones(2, 4))


def test_groups_do_not_meet() -> None:
    mixer, x = layer(), picture()
    other = x.clone()
    other[..., :2] += 1
    first, second = mixer(x, grid=GRID), mixer(other, grid=GRID)
    assert torch.equal(first[..., 2:], second[..., 2:])
    assert not torch.allclose(first[..., :2], second[..., :2])


def test_a_constant_picture_is_amplified_evenly() -> None:
    x = torch.randn(8).expand(1, 30, 8)
    assert torch.allclose(layer()(x, grid=GRID), x * (1 + 1 / 30), atol=1e-6)


def test_an_impulse_raises_the_places_around_it() -> None:
    mixer = attlas.mixer("ulsam", 1, groups=1).eval()
    with torch.no_grad():
        mixer.scale.fill_(1)
        mixer.point.fill_(1)
    x = torch.zeros(1, 30, 1)
    x[0, 14] = 3
    weights = mixer.attention(x, GRID)[0, :, 0].view(5, 6)
    high = weights > weights.min() + 1e-4
    assert high[1:4, 1:4].all()
    assert high.sum() == 9


def test_a_separable_layer_in_its_place_would_cost_more() -> None:
    mixer = attlas.mixer("ulsam", 512)
    separable = 14 * 14 * 512 * (9 + 512)
    assert mixer.cost(1, 196, grid=(14, 14)).flops / 2 < separable / 100


def test_groups_divide_the_channels() -> None:
    with pytest.raises(BadInput, match="got 3 for 8 channels"):
        attlas.mixer("ulsam", 8, groups=3)
