"""What only the single-head attention of SHViT holds: a part of the channels attends, the rest waits for the end."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import attlas
from attlas.core.errors import BadInput

DIM, PART, KEY = 14, 3, 16


def build(dtype=torch.float64, **settings):
    torch.manual_seed(0)
    layer = attlas.mixer("shvit", DIM, **settings).to(dtype)
    with torch.no_grad():
        for name, value in [*layer.named_parameters(), *layer.named_buffers()]:
            if value.is_floating_point():
                value.uniform_(0.5, 1.5) if "running_var" in name else value.normal_(std=0.5)
    return layer.eval()


def tokens(count=12, batch=2):
    torch.manual_seed(1)
    return torch.randn(batch, count, DIM, dtype=torch.float64)


def on_maps(layer, x_BNC, height, width):
    """The same weights in convolutions and norms on maps."""
    p, d = layer.attended, layer.key_dim
    z = x_BNC.mT.unflatten(2, (height, width))
    z1, z2 = z.split([p, z.shape[1] - p], 1)
    z1 = F.group_norm(z1, 1, layer.norm.weight, layer.norm.bias)
    norm = lambda y, bn: F.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias)  # noqa: E731
    qkv = norm(F.conv2d(z1, layer.qkv_proj.weight[..., None, None]), layer.qkv_norm).flatten(2)
    q, k, v = qkv.split([d, d, p], 1)
    weights = (q.mT @ k / d**0.5).softmax(-1)
    o = (v @ weights.mT).unflatten(2, (height, width))
    y = F.conv2d(F.relu(torch.cat([o, z2], 1)), layer.out_proj.weight[..., None, None])
    return norm(y, layer.out_norm).flatten(2).mT


@pytest.mark.parametrize("settings", [{}, {"attended": 7, "key_dim": 4}, {"attended": DIM}])
def test_dense_attention_on_a_part_of_a_map(settings):
    layer, x = build(**settings), tokens()
    torch.testing.assert_close(layer(x), on_maps(layer, x, 3, 4), rtol=0, atol=1e-12)


def test_the_rest_passes_through_but_for_the_last_product():
    layer, x = build(), tokens()
    assert (layer.attended, layer.key_dim) == (PART, KEY)
    changed = x.clone()
    changed[:, 5, PART:] += 1
    moved = (layer(changed) - layer(x)).abs().sum(-1)
    assert (moved[:, 5] > 0).all()
    assert not moved[:, torch.arange(12) != 5].any()
    changed = x.clone()
    changed[:, 5, 0] += 1
    assert ((layer(changed) - layer(x)).abs().sum(-1) > 0).all()


def test_permuting_tokens_permutes_the_output():
    layer, x = build(), tokens()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order], rtol=0, atol=1e-12)


def test_padding_enters_no_statistics_of_a_training_step():
    alone, padded, x = build().train(), build().train(), tokens()
    fill = torch.full((2, 3, DIM), torch.nan, dtype=torch.float64)
    keep = torch.arange(15).expand(2, -1) < 12
    expected = alone(x)
    got = padded(torch.cat([x, fill], 1), mask=keep)
    torch.testing.assert_close(got[:, :12], expected, rtol=0, atol=1e-11)
    for name, value in alone.named_buffers():
        torch.testing.assert_close(padded.get_buffer(name), value, rtol=0, atol=1e-12)


def test_training_uses_the_batch_normalisation_of_torch():
    layer, x = build().train(), tokens()
    reference = nn.BatchNorm1d(DIM).double()
    captured = []
    layer.out_norm.register_forward_hook(lambda module, args, output: captured.append((args[0], output)))
    reference.weight.data, reference.bias.data = layer.out_norm.weight.data, layer.out_norm.bias.data
    layer(x)
    before, after = captured[0]
    torch.testing.assert_close(after, reference(before.flatten(0, 1)).view_as(after), rtol=0, atol=1e-12)


def test_a_share_of_the_channels_attends_by_default():
    assert [attlas.mixer("shvit", dim).attended for dim in (224, 448, 2)] == [48, 96, 1]


@pytest.mark.parametrize("settings", [{"attended": 0}, {"attended": DIM + 1}, {"key_dim": 0}])
def test_settings_that_mean_nothing(settings):
    with pytest.raises(BadInput, match="attended counts channels of 14"):
        build(**settings)
