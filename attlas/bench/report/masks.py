"""Which tokens each output depends on, asked of the mechanism itself.

N tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attlas.blocks.factory import mixer, resolve
from attlas.core.grid import Grid
from attlas.core.spec import Example, Pattern

ROUNDING = 1e-14
"""Gradients below this share of a row's largest are rounding (of a Fourier transform, say), not dependence."""


def visible_pairs(
    name: str,
    causal: bool,
    grid: Sequence[int],
    *,
    params: Mapping[str, Any] | None = None,
    draws: int = 3,
) -> Tensor:
    """The share of random draws in which output n depends on token m, (N, N) in [0, 1].

    A small layer with random weights reads random tokens in float64; output n depends on token m where
    |d y_n / d x_m| > 0. What depends on content, such as clusters, shows as a share between 0 and 1.

    Args:
        name: of the mechanism, with a variant behind a colon where it has any.
        causal: which self-attention pattern; of a mechanism that has none, which cross pattern.
        grid: the shape of the positions.
        params: settings of the mechanism; by default those of its declared example with this rank.
        draws: how many random layers and inputs.

    Raises:
        UnknownName, BadInput, Unsupported: the mechanism cannot be built or run this way.
    """
    spec = resolve(name)[0].spec
    place = Grid(tuple(grid), prefix=int(spec.class_token))
    cross = Pattern.of(causal, cross=False) not in spec.patterns
    example = _example(spec.examples, Pattern.of(causal, cross), place.rank)
    settings = dict(example.params if params is None else params)
    share_NN = torch.zeros(place.tokens, place.tokens, dtype=torch.float64)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        for draw in range(draws):
            torch.manual_seed(draw)
            layer = mixer(
                name,
                example.dim,
                example.heads,
                kv_heads=example.kv_heads,
                causal=causal,
                grid=place,
                length=place.tokens,
                **settings,
            )
            for parameter in layer.parameters():  # zero-initialised ones would hide what they lead to
                parameter.data.add_(torch.randn_like(parameter) * 0.2)
            share_NN += _depends(layer.double().eval(), place, example.dim, cross)
    return share_NN / draws


def _depends(layer: torch.nn.Module, grid: Grid, dim: int, cross: bool) -> Tensor:
    """(N, N), whether output n depends on token m: N copies of a sequence, copy n asked for output n."""
    tokens = grid.tokens
    x_NNC = torch.randn(1, tokens, dim, dtype=torch.float64).repeat(tokens, 1, 1).requires_grad_()
    y_NNC = layer(torch.randn_like(x_NNC[:1]).expand_as(x_NNC), x_NNC, grid=grid) if cross else layer(x_NNC, grid=grid)
    own_NC = y_NNC.diagonal(dim1=0, dim2=1).transpose(0, 1)
    (grad_NNC,) = torch.autograd.grad((own_NC * torch.randn_like(own_NC)).sum(), x_NNC)
    size_NN = grad_NNC.abs().amax(-1)
    return size_NN > ROUNDING * size_NN.amax(-1, keepdim=True)


def _example(examples: Sequence[Example], pattern: Pattern, axes: int) -> Example:
    """The declared example that comes closest to this pattern and number of axes."""

    def distance(example: Example) -> tuple[bool, bool]:
        return example.patterns is not None and pattern not in example.patterns, len(example.grid) != axes

    return min(examples, key=distance)
