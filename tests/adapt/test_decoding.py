"""Linear layers that take few rows by the kernel."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attlas
from attlas.adapt import decoding
from attlas.bench import machine
from attlas.kernels.cpu import build, rows

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True, scope="module")
def _compiled():
    usable, reason = build.status("rows")
    assert usable, reason


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (7, 5), (64, 33), (512, 300), (90, 1000)])
def test_few_rows_are_the_product(inputs, outputs, dtype, threads):
    weight, bias = torch.randn(outputs, inputs).to(dtype), torch.randn(outputs).to(dtype)
    for count in range(1, rows.FEW + 1):
        x = torch.randn(count, inputs).to(dtype)
        with machine.threads(threads):
            got, bare = rows.few_rows(x, weight, bias), rows.few_rows(x.T.contiguous().T, weight)
        for y, b in ((got, bias.double()), (bare, None)):
            expected = F.linear(x.double(), weight.double(), b)
            assert y.dtype == dtype
            assert (y.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()


def test_what_it_does_not_serve():
    x, weight, bias = torch.randn(2, 8), torch.randn(4, 8), torch.randn(4)
    assert "no gradient" in str(rows.refuses(x, weight, bias))
    with torch.no_grad():
        assert rows.refuses(x, weight, bias) is None
        assert "1 to 8 rows" in str(rows.refuses(torch.randn(9, 8), weight))
        assert "float32 or bfloat16" in str(rows.refuses(x.double(), weight.double()))
        assert "float32 or bfloat16" in str(rows.refuses(x, weight.bfloat16()))
        assert "contiguous" in str(rows.refuses(x, torch.randn(8, 4).T))
        with torch.autocast("cpu", torch.bfloat16):
            assert "autocast" in str(rows.refuses(x, weight))


def test_a_model_decodes_the_same_and_is_put_back():
    """Layers are lent another forward and get their own back, even if what happens inside fails."""

    class Own(nn.Linear):
        """Somebody's own layer."""

    torch.manual_seed(0)
    model = nn.ModuleList([attlas.mixer("gla", 32, heads=2, causal=True), Own(4, 4), nn.Linear(4, 4)])
    layer, x = model[0], torch.randn(1, 6, 32)
    with torch.no_grad():
        expected = layer(x)
        with decoding.applied(model) as count:
            assert count == sum(type(m) is decoding.FewRows for m in model.modules()) == 8
            assert type(model[1]) is Own
            state, parts = layer.initial_state(1), []
            for token in x.split(1, 1):
                y, state = layer.extend(token, state)
                parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-4, atol=1e-5)
    with decoding.applied(model):
        layer(x).square().sum().backward()  # gradients go the layer's own way
    assert layer.q_proj.weight.grad.any()
    with pytest.raises(ZeroDivisionError), decoding.applied(model):
        1 / 0  # noqa: B018
    assert not any(isinstance(m, decoding.FewRows) for m in model.modules())
