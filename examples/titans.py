"""How far back does it remember? Titans' memories against plain sliding windows, far beyond the training length.

Sequences of filler in which a few tokens carry a key and a value; the last token asks for the value of one of the
keys. Three small models learn the task at one length: a window of softmax attention and two of Titans' memories, a
matrix and a network of two layers. Then the pair that is asked for is moved further and further away. Windows and
chunks are equally long, and no model sees positions.

The window knows what lies in it and nothing else. The memories answer as well at twice the training length as within
it, and forget further back: their rates were learned where nothing lay there. The memory as a context, as a gate and
as a layer are not shown: trained like this for as many steps, they did not reliably learn to use it.

Behrouz, Zhong, Mirrokni, 2024 (arXiv:2501.00663).
"""

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attlas
from examples.shared import main

FILLERS = 8


class Result(NamedTuple):
    """Accuracy of each model at each distance, the length of training, the reach of the windows, and chance."""

    accuracy: dict[str, dict[int, float]]
    trained: int
    reach: int
    chance: float


class Model(nn.Module):
    """Keys and values (B, N) to logits of the value that the last token asks for."""

    def __init__(self, mixer: str, settings: dict[str, int], window: int, symbols: int, dim: int, layers: int) -> None:
        super().__init__()
        self.keys, self.values = (nn.Embedding(symbols + FILLERS, dim) for _ in range(2))
        self.mixers = nn.ModuleList(attlas.mixer(mixer, dim, 2, causal=True, **settings) for _ in range(layers))
        self.norms = nn.ModuleList(nn.RMSNorm(dim) for _ in range(2 * layers))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)) for _ in range(layers)
        )
        self.head = nn.Sequential(nn.RMSNorm(dim), nn.Linear(dim, symbols))
        self.mask = attlas.Mask.window(window - 1, 0) if mixer == "softmax" else None

    def forward(self, keys_BN: Tensor, values_BN: Tensor) -> Tensor:
        """Logits (B, symbols)."""
        x_BNC = self.keys(keys_BN) + self.values(values_BN)
        for layer, (mixer, mlp) in enumerate(zip(self.mixers, self.mlps, strict=True)):
            x_BNC = x_BNC + mixer(self.norms[2 * layer](x_BNC), mask=self.mask)
            x_BNC = x_BNC + mlp(self.norms[2 * layer + 1](x_BNC))
        return self.head(x_BNC[:, -1])


def sequences(batch: int, tokens: int, pairs: int, symbols: int, distance: int | None = None) -> tuple[Tensor, ...]:
    """Keys, values and the answer; the pair that is asked for lies `distance` tokens back, anywhere if None."""
    keys, values = (torch.randint(symbols, symbols + FILLERS, (batch, tokens)) for _ in range(2))
    places = torch.rand(batch, tokens - 1).argsort(1)[:, :pairs]
    if distance is not None:
        target = tokens - 1 - distance
        places = torch.where(places == target, places[:, :1], places)
        places[:, 0] = target
    of_pairs = torch.rand(batch, symbols).argsort(1)[:, :pairs]
    answers = torch.randint(symbols, (batch, pairs))
    # The pair that is asked for is written last: another one may have drawn its place.
    rows = torch.arange(batch)
    for pair in reversed(range(pairs)):
        keys[rows, places[:, pair]], values[rows, places[:, pair]] = of_pairs[:, pair], answers[:, pair]
    keys[:, -1] = of_pairs[:, 0]
    return keys, values, answers[:, 0]


def learn(
    mixer: str,
    settings: dict[str, int],
    *,
    window: int,
    tokens: int,
    pairs: int,
    symbols: int,
    dim: int,
    layers: int,
    steps: int,
) -> Model:
    """A model trained at one length."""
    torch.manual_seed(0)
    model = Model(mixer, settings, window, symbols, dim, layers)
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        keys, values, answers = sequences(32, tokens, pairs, symbols)
        loss = F.cross_entropy(model(keys, values), answers)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: Model, distance: int, tokens: int, pairs: int, symbols: int, count: int) -> float:
    """Share of right answers where the pair lies `distance` back."""
    torch.manual_seed(distance)
    keys, values, answers = sequences(count, max(tokens, distance + 8), pairs, symbols, distance)
    return (model(keys, values).argmax(-1) == answers).float().mean().item()


def run(
    window: int = 8,
    tokens: int = 32,
    furthest: int = 512,
    pairs: int = 3,
    symbols: int = 8,
    dim: int = 32,
    layers: int = 1,
    steps: int = 500,
    count: int = 128,
) -> Result:
    """Train the three models, print the table."""
    models: dict[str, tuple[str, dict[str, int]]] = {
        f"window of {window}": ("softmax", {}),
        "matrix memory": ("titans", {"chunk": window, "depth": 1}),
        "memory of two layers": ("titans", {"chunk": window, "depth": 2}),
    }
    distances = [window // 2]
    while distances[-1] < furthest:
        distances.append(2 * distances[-1])
    results: dict[str, dict[int, float]] = {}
    print(f"{'accuracy at a distance of':>26}" + "".join(f"{distance:7}" for distance in distances))
    for name, (mixer, settings) in models.items():
        model = learn(
            mixer,
            settings,
            window=window,
            tokens=tokens,
            pairs=pairs,
            symbols=symbols,
            dim=dim,
            layers=layers,
            steps=steps,
        )
        results[name] = {d: accuracy(model, d, tokens, pairs, symbols, count) for d in distances}
        print(f"{name:>26}" + "".join(f"{share:7.1%}" for share in results[name].values()))
    return Result(results, tokens, layers * (window - 1), 1 / symbols)


def draw(result: Result, path: Path) -> None:
    """Accuracy against distance."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, by_distance in result.accuracy.items():
        axis.plot(list(by_distance), list(by_distance.values()), marker="o", label=name)
    for place, text in ((result.reach, " a window reaches\n up to here"), (result.trained, " trained\n up to here")):
        axis.axvline(place, color="black", linewidth=0.8, linestyle="--")
        axis.text(place, 1.03, text, fontsize=8)
    axis.axhline(result.chance, color="black", linewidth=0.8, linestyle=":")
    axis.set_xscale("log", base=2)
    axis.set(
        xlabel="tokens between the pair and the question", ylabel="right answers (dotted: guessed)", ylim=(0, 1.15)
    )
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main(__file__, run, draw)
