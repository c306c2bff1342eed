"""Stems, placed maps, and the forms of the convolutional MLP."""

import math

import pytest
import torch
from torch import nn

from attlas.blocks.conv_stem import ConvStem
from attlas.blocks.embed import Downsample
from attlas.blocks.mlp import ConvMlp
from attlas.blocks.placed import Placed, place_waves
from attlas.core.errors import BadInput
from attlas.core.grid import Grid


def test_a_stem_has_no_activation_behind_its_last_norm() -> None:
    stem = ConvStem(3, (4, 6), (2, 1), activation=nn.ReLU, after=nn.InstanceNorm2d).eval()
    plain = nn.Sequential(stem.convs[0], stem.norms[0], nn.ReLU(), stem.convs[1], stem.norms[1], stem.after)
    image = torch.randn(2, 3, 8, 10)
    torch.testing.assert_close(stem(image), plain(image))
    assert stem(image).shape == (2, 6, 4, 5)
    with pytest.raises(BadInput, match="each convolution"):
        ConvStem(3, (4, 6), (2,))
    for widths, stride in (((4, 0), 2), ((4, 6), 0)):
        with pytest.raises(BadInput, match="count channels and places"):
            ConvStem(3, widths, (2, stride))


def test_places_are_added_and_resampled() -> None:
    placed = Placed(Downsample(3, 8, 4, 4), 8, Grid((2, 3)))
    image = torch.randn(1, 3, 8, 12)
    found = placed(image) - placed.embed(image)
    torch.testing.assert_close(found[0], placed.places.weight.T.unflatten(1, (2, 3)))
    assert placed(torch.randn(1, 3, 16, 12)).shape == (1, 8, 4, 3)


def test_waves() -> None:
    waves = place_waves(8, Grid((3, 5))).unflatten(0, (3, 5))
    row, column = 2, 4
    expected = [f(place / base) for place in (column, row) for f in (math.sin, math.cos) for base in (1, 100)]
    assert waves[row, column].tolist() == pytest.approx(expected)
    placed = Placed(Downsample(3, 8, 4, 4), 8, Grid((3, 5)), waves=True)
    torch.testing.assert_close(placed.places.weight.data, place_waves(8, Grid((3, 5))).float())
    with pytest.raises(BadInput, match="split in four"):
        place_waves(6, Grid((3, 5)))


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_where_the_convolution_of_an_mlp_stands(residual: bool, late: bool) -> None:
    mlp, x = ConvMlp(4, 6, residual=residual, late=late), torch.randn(2, 12, 4)

    def conv(h: torch.Tensor) -> torch.Tensor:
        return mlp.conv(h.mT.unflatten(2, (3, 4))).flatten(2).mT + (h if residual else 0)

    h = mlp.fc1(x)
    h = conv(nn.functional.gelu(h)) if late else nn.functional.gelu(conv(h))
    torch.testing.assert_close(mlp(x, Grid((3, 4))), mlp.fc2(h))
