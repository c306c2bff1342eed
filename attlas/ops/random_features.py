"""Random features of the exponential kernel: exp(x . y) = E_w exp(w . x - |x|²/2) exp(w . y - |y|²/2), w ~ N(0, I).

R features, D size of x.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from attlas.ops.precision import as_written, wide


def orthogonal_gaussian(features: int, size: int, generator: torch.Generator | None = None) -> Tensor:
    """Rows (R, D), each distributed as N(0, I), in blocks of D that are orthogonal to each other.

    Orthogonal rows cover space more evenly than independent ones: the estimate has the same mean and errs less.
    The factor Q of Householder reflections alone would not do: it prefers one side, and the mean with it.
    """
    blocks, default = -(-features // size), torch.get_default_dtype()
    # Half precision has no QR factorisation: a default of that is what the rows are rounded to.
    normal = partial(
        torch.randn,
        generator=generator,
        device=None if generator is None else generator.device,
        dtype=torch.promote_types(default, torch.float32),
    )
    q_KDD, r_KDD = torch.linalg.qr(normal(blocks, size, size))
    directions_KDD = (q_KDD * r_KDD.diagonal(dim1=1, dim2=2).sign().unsqueeze(1)).mT
    lengths_R1 = normal(features, size).norm(dim=1, keepdim=True)
    return (directions_KDD.flatten(0, 1)[:features] * lengths_R1).to(default)


def exponents(x: Tensor, w_RD: Tensor) -> Tensor:
    """w . x - |x|²/2 for every row w, (..., D) -> (..., R), in float32 at least, under autocast too."""
    x = wide(x)
    with as_written(x):  # an error of an exponent is a relative error of its power
        return x @ w_RD.to(x).mT - x.square().sum(-1, keepdim=True) / 2
