"""The local concentration module of L2ViT."""

import pytest
import torch

from attlas.blocks.local_concentration import LocalConcentration
from attlas.core.errors import BadInput
from attlas.core.grid import Grid


def make(dim=6, **settings):
    block = LocalConcentration(dim, **settings).double()
    with torch.no_grad():
        block.norm.running_mean.normal_()
        block.norm.running_var.uniform_(0.5, 2.0)
        for parameter in block.norm.parameters():
            parameter.normal_()
    return block


@pytest.mark.parametrize("training", [True, False])
def test_it_is_two_convolutions_with_gelu_and_batch_norm_between(training):
    block = make().train(training)
    x = torch.randn(2, 20, 6, dtype=torch.float64)
    norm = torch.nn.BatchNorm2d(6).double().train(training)
    norm.load_state_dict(block.norm.state_dict(), strict=False)
    expected = block.conv2(norm(torch.nn.functional.gelu(block.conv1(x.mT.unflatten(-1, (4, 5))))))
    assert torch.allclose(block(x, (4, 5)), expected.flatten(2).mT, atol=1e-12)
    assert sum(p.numel() for p in block.parameters()) == 2 * 6 * 50 + 2 * 6


@pytest.mark.parametrize("training", [True, False])
def test_prefix_and_padding_give_nothing_and_get_nothing(training):
    grid = Grid((4, 5), prefix=2)
    x, keep = torch.randn(2, 22, 6, dtype=torch.float64), torch.rand(2, 22) > 0.3
    block = make().train(training)
    start = {name: t.clone() for name, t in block.state_dict().items()}
    y = block(x, grid, keep)
    assert not y[:, :2].any()
    assert not y[~keep].any()
    block.load_state_dict(start)
    assert torch.equal(block(x.masked_fill(~keep.unsqueeze(-1), torch.nan), grid, keep), y)
    block.load_state_dict(start)
    assert not torch.allclose(block(x, grid)[:, 2:], y[:, 2:])


def test_padding_enters_no_statistics():
    block, x = make().train(), torch.randn(2, 20, 6, dtype=torch.float64)
    keep = torch.rand(2, 20) > 0.3
    before = block.norm.running_mean.clone()
    block(x, (4, 5), keep)
    seen = torch.nn.functional.gelu(block.conv1((x * keep.unsqueeze(-1)).mT.unflatten(-1, (4, 5)))).flatten(2).mT
    assert torch.allclose(block.norm.running_mean, 0.9 * before + 0.1 * seen[keep].mean(0), atol=1e-12)


def test_it_reaches_six_positions_in_every_direction():
    block, grid = make(2).eval(), (15, 16)
    x = torch.randn(1, 240, 2, dtype=torch.float64, requires_grad=True)
    y = block(x, grid).unflatten(1, grid)
    (grad,) = torch.autograd.grad(y[0, 7, 8].sum(), x)
    seen = grad[0].any(-1).unflatten(0, grid)
    assert seen[1:14, 2:15].all()
    assert seen.sum() == 13 * 13


def test_other_axes():
    for grid in ((9,), (2, 3, 4)):
        tokens = Grid(grid).tokens
        assert LocalConcentration(4, 3, axes=len(grid))(torch.randn(2, tokens, 4), grid).shape == (2, tokens, 4)


def test_what_has_no_meaning_is_refused():
    x = torch.randn(1, 20, 6)
    with pytest.raises(BadInput, match="axes=4"):
        LocalConcentration(6, axes=4)
    with pytest.raises(BadInput, match="odd, got 6"):
        LocalConcentration(6, 6)
    block = LocalConcentration(6)
    with pytest.raises(BadInput, match="6 channels"):
        block(x[..., :5], (4, 5))
    with pytest.raises(BadInput, match="grid 4x4 has 16 tokens"):
        block(x, (4, 4))
    with pytest.raises(BadInput, match="built for 2 axes"):
        block(x, (20,))
    with pytest.raises(BadInput, match="keep marks the real tokens"):
        block(x, (4, 5), torch.ones(1, 19, dtype=torch.bool))
