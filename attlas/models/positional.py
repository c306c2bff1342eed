"""The positional Transformer, which computes instead of recalling.

    x ← MLP(concat(x, attend(x)))            layer after layer, on x = W_in values

with neither residual nor normalisation: the concatenation keeps what a token held, and nothing divides by the
scale of the values. In the positional network weights depend on where tokens stand alone, and the values enter
without codes; with any other mechanism the same layers read values and one-hot codes side by side, which is the
baseline that the paper compares with. `scratch` tokens of 0 behind the sequence are places to rest a weight on.

B batch, N tokens, I values of a token, O outputs of a token, C channels, S scratch tokens.

Source: Back de Luca et al., "Positional Attention: Expressivity and Learnability of Algorithmic Computation",
2024 (arXiv:2410.01686), official code opallab/positional_attention.
"""

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.blocks.factory import mixer
from attlas.core.errors import BadInput
from attlas.core.mechanism import Mixer


class ConcatLayer(nn.Module):
    """y = MLP(concat(x, attend(x))), the MLP with `depth` linear maps and ReLU between them."""

    def __init__(self, attend: Mixer, hidden: int, depth: int = 2) -> None:
        super().__init__()
        dim = attend.site.dim
        self.attend = attend
        widths = [2 * dim, *[hidden] * (depth - 1), dim]
        self.maps = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x_BNC: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        x = torch.cat([x_BNC, self.attend(x_BNC)], -1)
        for index, linear in enumerate(self.maps):
            x = linear(F.relu(x) if index else x)
        return x


class PositionalTransformer(nn.Module):
    """A Transformer for algorithmic tasks on a sequence of fixed length.

    Args:
        length: N, tokens of a sequence.
        inputs, outputs: values of a token, and what is computed for each.
        dim, heads, hidden: channels, heads, and channels inside the MLP.
        layers: log2(length) + 1 by default, the stages of a parallel algorithm and one.
        depth: linear maps of the MLP.
        scratch: S, tokens of 0 behind the sequence.
        mechanism: of the attention; any but `positional` sees one-hot codes beside the values.
        **settings: of the mechanism's layer (see `attlas.mixer`).
    """

    codes: Tensor

    def __init__(
        self,
        length: int,
        inputs: int = 1,
        outputs: int = 1,
        *,
        dim: int = 64,
        heads: int = 2,
        hidden: int = 64,
        layers: int | None = None,
        depth: int = 2,
        scratch: int = 1,
        mechanism: str = "positional",
        **settings: Any,
    ) -> None:
        super().__init__()
        if length < 1 or scratch < 0:
            raise BadInput(f"length is at least 1 and scratch at least 0, got {length} and {scratch}")
        if depth < 1:
            raise BadInput(f"depth counts the linear maps of the MLP and is at least 1, got {depth}")
        self.length, self.inputs, self.scratch = length, inputs, scratch
        tokens = length + scratch
        layers = int(math.log2(length)) + 1 if layers is None else layers
        codes = torch.zeros(tokens, 0) if mechanism == "positional" else torch.eye(tokens)
        self.register_buffer("codes", codes, persistent=False)
        self.encode = nn.Linear(inputs + codes.shape[1], dim)
        self.layers = nn.ModuleList(
            ConcatLayer(
                mixer(mechanism, dim, heads, length=tokens, layer=layer, layers=layers, **settings), hidden, depth
            )
            for layer in range(layers)
        )
        self.decode = nn.Linear(dim, outputs)

    def forward(self, values_BNI: Tensor) -> Tensor:
        """What is computed for each token, (B, N, O)."""
        if values_BNI.ndim != 3 or values_BNI.shape[1:] != (self.length, self.inputs):
            raise BadInput(
                f"values are (batch, {self.length} tokens, {self.inputs} values), got {tuple(values_BNI.shape)}"
            )
        x = F.pad(values_BNI, (0, 0, 0, self.scratch))
        x = self.encode(torch.cat([x, self.codes.to(x).expand(x.shape[0], -1, -1)], -1))
        for layer in self.layers:
            x = layer(x)
        return self.decode(x[:, : self.length])
