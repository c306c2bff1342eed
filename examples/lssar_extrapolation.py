"""Longer than trained: softmax, softplus attention and its re-weighting from 1 to 16 times the training length.

Three small causal models of the bytes of Python's standard library, alike but for the attention, with rotary
positions. All are trained on short sequences and then read held-out stretches of 16 times that length. What is
drawn is the loss of the bytes just before each multiple of the training length: whether the longer past helps,
does nothing or hurts. `lssar*` is the model trained with `lssa`, read with the second stage put on afterwards.

Every one of them gets worse with length, and the model that was trained with both stages least: behind softmax at the
training length, level at twice, ahead from four times on. The first stage alone falls behind softmax, and the second
stage does not help where it is put on afterwards. The published loss, of models a thousand times as large, stays flat
to sixteen times.

Gao et al., 2025 (arXiv:2501.13428), reconstructed.
"""

import itertools
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attlas
from attlas.bench.tasks.corpus import even_windows, random_windows
from examples.shared import main

LENGTHS = (1, 2, 4, 8, 16)


class Result(NamedTuple):
    """Bits per byte by mechanism at each of `LENGTHS`, in multiples of `length`."""

    bits: dict[str, list[float]]
    length: int


class Model(nn.Module):
    """Bytes (B, N) to logits (B, N, 256): pre-norm layers of attention and an MLP."""

    def __init__(self, mechanism: str, dim: int, layers: int, length: int) -> None:
        super().__init__()
        heads = dim // 32
        self.values = nn.Embedding(256, dim)
        nn.init.normal_(self.values.weight, std=0.5)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2 * layers))
        position = attlas.positions.Rotary(32)
        self.mixers = nn.ModuleList(
            attlas.mixer(mechanism, dim, heads, causal=True, length=length, position=position) for _ in range(layers)
        )
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)) for _ in range(layers)
        )
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 256))

    def forward(self, tokens_BN: Tensor) -> Tensor:
        """Logits."""
        x_BNC = self.values(tokens_BN)
        for layer, (mixer, mlp) in enumerate(zip(self.mixers, self.mlps, strict=True)):
            x_BNC = x_BNC + mixer(self.norms[2 * layer](x_BNC))
            x_BNC = x_BNC + mlp(self.norms[2 * layer + 1](x_BNC))
        return self.head(x_BNC)


def learn(mechanism: str, *, dim: int, layers: int, length: int, steps: int, batch: int) -> Model:
    """A model trained on stretches of `length` bytes."""
    torch.manual_seed(0)
    model = Model(mechanism, dim, layers, length)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for text in itertools.islice(random_windows(0, batch, length + 1), steps):
        loss = F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def measure(model: Model, length: int, stretches: int) -> list[float]:
    """Bits per byte of the last half training length before each multiple of it."""
    sums = torch.zeros(len(LENGTHS))
    for text in even_windows(stretches, LENGTHS[-1] * length + 1).split(1):  # one at a time: the rows are long
        loss_N = F.cross_entropy(model(text[:, :-1])[0], text[0, 1:], reduction="none")
        sums += torch.stack([loss_N[m * length - length // 2 : m * length].mean() for m in LENGTHS])
    return (sums / stretches / torch.tensor(2.0).log()).tolist()


def run(
    dim: int = 64, layers: int = 2, length: int = 64, steps: int = 300, batch: int = 16, stretches: int = 48
) -> Result:
    """Train the three models, print the table."""
    sizes = {"dim": dim, "layers": layers, "length": length, "steps": steps, "batch": batch}
    bits = {}
    for mechanism in ("softmax", "lssa", "lssar"):
        model = learn(mechanism, **sizes)
        bits[mechanism] = measure(model, length, stretches)
        if mechanism == "lssa":
            second = Model("lssar", dim, layers, length).eval()
            second.load_state_dict(model.state_dict())
            bits["lssar*"] = measure(second, length, stretches)
    print(f"{'bits per byte at':20}" + "".join(f"{m * length:>9}" for m in LENGTHS))
    for name, row in bits.items():
        print(f"{name:20}" + "".join(f"{value:9.3f}" for value in row))
    return Result(bits, length)


def draw(result: Result, path: Path) -> None:
    """Bits per byte against the length read."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.5, 4))
    for name, row in result.bits.items():
        label = "lssar on the model trained with lssa" if name == "lssar*" else name
        axis.plot(LENGTHS, row, "o--" if name == "lssar*" else "o-", label=label)
    axis.set_xscale("log", base=2)
    axis.set_xticks(LENGTHS, [f"{m}×" for m in LENGTHS])
    axis.set(xlabel=f"bytes read, in training lengths of {result.length}", ylabel="bits per byte, held out")
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    main(__file__, run, draw)
