"""elu + 1."""

import torch
import torch.nn.functional as F

from attlas.ops.elu import elu_plus_one


def test_it_is_elu_plus_one_but_never_rounds_to_zero():
    x = torch.linspace(-60, 60, 101)
    assert torch.allclose(elu_plus_one(x.double()), F.elu(x.double()) + 1, rtol=1e-9, atol=1e-15)
    assert (elu_plus_one(x) > 0).all()
    assert (F.elu(x) + 1 == 0).any()  # what it avoids
    assert elu_plus_one(x.bfloat16()).dtype == torch.float32
