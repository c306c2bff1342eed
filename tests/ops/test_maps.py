import pytest
import torch
from torch import nn

from attlas.core.grid import Grid
from attlas.ops.maps import to_map, to_tokens


def test_there_and_back():
    x = torch.randn(2, 5, 3, 4)
    tokens, grid = to_tokens(x)
    assert grid == Grid((3, 4))
    assert torch.equal(tokens[:, 7], x[:, :, 1, 3])
    assert torch.equal(to_map(tokens, grid), x)
    innermost = x.to(memory_format=torch.channels_last)
    assert to_tokens(innermost)[0].data_ptr() == innermost.data_ptr()


@pytest.mark.parametrize("batch", [1, 2])
def test_batch_norm_before_tokens_and_behind_a_map_has_its_gradient(batch):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8).double().eval()
    norm.running_var.uniform_(0.5, 2)
    slope = (norm.running_var + norm.eps).rsqrt()
    x = torch.randn(batch, 8, 8, 7, dtype=torch.float64, requires_grad=True)
    seed = torch.randn(batch, 56, 8, dtype=torch.float64)
    (found,) = torch.autograd.grad(to_tokens(norm(x))[0], x, seed)
    torch.testing.assert_close(found, to_map(seed * slope, Grid((8, 7))))
    tokens = torch.randn(batch, 56, 8, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(norm(to_map(tokens, Grid((8, 7)))), tokens, to_map(seed, Grid((8, 7))))
    torch.testing.assert_close(found, seed * slope)
