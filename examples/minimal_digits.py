"""How little of a Transformer reads digits: accuracy against parameters, as its layers lose one part after another.

A small vision Transformer on the 8 x 8 digits of scikit-learn, 2 x 2 pixels a token, in six forms: the full encoder
layer, the same without its MLP, and then attention with collapsed matrices (`minimal`) down to the paper's minimum,
a symmetric similarity and nothing else. Embedding, positions, norms and classifier are the same throughout. At this
width and length of training the MLP can go for nothing, collapsed matrices cost two points, and the minimum ten:
nine tenths of the parameters are not free here, as they were found to be on larger images.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attlas
from attlas.bench.tasks.digits import split
from examples.shared import main

HEADS = 4
FORMS: dict[str, dict[str, Any]] = {
    "full layer": {"mechanism": "softmax", "mlp": True},
    "no MLP": {"mechanism": "softmax"},
    "W and U": {"mechanism": "minimal", "similarity": "collapsed", "values": "collapsed"},
    "W": {"mechanism": "minimal", "similarity": "collapsed"},
    "W = TTᵀ": {"mechanism": "minimal", "similarity": "definite"},
    "W = Wᵀ": {"mechanism": "minimal"},
}


class Row(NamedTuple):
    """One form: parameters of its layers and of the whole model, and the held-out accuracy of each seed."""

    form: str
    layers: int
    model: int
    accuracies: list[float]

    @property
    def mean(self) -> float:
        """The mean accuracy."""
        return sum(self.accuracies) / len(self.accuracies)


class Reader(nn.Module):
    """Patches, pre-norm layers of one form, the mean over tokens, a linear classifier."""

    def __init__(self, dim: int, depth: int, mechanism: str, mlp: bool = False, **settings: Any) -> None:
        super().__init__()
        if mechanism == "softmax":
            settings = {"bias": False, "out_bias": False} | settings
        self.embed = nn.Linear(4, dim)
        self.places = nn.Parameter(torch.randn(16, dim) * 0.5)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2 * depth + 1 if mlp else depth + 1))
        self.mixers = nn.ModuleList(attlas.mixer(mechanism, dim, HEADS, **settings) for _ in range(depth))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, 4 * dim, bias=False), nn.GELU(), nn.Linear(4 * dim, dim, bias=False))
            for _ in range(depth if mlp else 0)
        )
        self.head = nn.Linear(dim, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        """Scores of the digits (B, 10) for pixels (B, 64)."""
        patches = pixels.view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4)
        x = self.embed(patches) + self.places
        parts: list[nn.Module] = [*self.mixers]
        if self.mlps:
            parts = [part for pair in zip(self.mixers, self.mlps, strict=True) for part in pair]
        for norm, part in zip(self.norms[:-1], parts, strict=True):
            x = x + part(norm(x))
        return self.head(self.norms[-1](x).mean(1))

    def sizes(self) -> tuple[int, int]:
        """Weights of the mixers and MLPs, and of everything."""
        layers = [*self.mixers.parameters(), *self.mlps.parameters()]
        return sum(p.numel() for p in layers), sum(p.numel() for p in self.parameters())


def run(
    *, dim: int = 48, depth: int = 3, steps: int = 800, batch: int = 32, seeds: int = 2, rate: float = 3e-3
) -> list[Row]:
    """Train every form with each seed in the same way; print and return what they reach.

    Args:
        dim: width.
        depth: layers.
        steps: of training, the rate falling to 0 along a cosine.
        batch: images a step.
        seeds: runs per form.
        rate: the highest learning rate.
    """
    rows = []
    print(f"{'form':<12}{'in layers':>12}{'in all':>10}   held-out accuracy")
    for form, settings in FORMS.items():
        accuracies = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            model = Reader(dim, depth, **settings)
            accuracies.append(_train(model, steps, batch, rate))
        rows.append(Row(form, *model.sizes(), accuracies))
        each = " ".join(f"{100 * accuracy:.1f}" for accuracy in accuracies)
        print(f"{form:<12}{rows[-1].layers:>12,}{rows[-1].model:>10,}   {100 * rows[-1].mean:.1f} %  ({each})")
    return rows


def _train(model: Reader, steps: int, batch: int, rate: float) -> float:
    (images, digits), (unseen, answers) = ((data.inputs.flatten(1), data.targets) for data in split())
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        chosen = torch.randint(len(images), (batch,))
        optimizer.zero_grad()
        F.cross_entropy(model(images[chosen]), digits[chosen]).backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        return (model(unseen).argmax(1) == answers).double().mean().item()


def draw(rows: list[Row], path: Path) -> None:
    """Accuracy over the parameters of the layers, every seed a dot."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for index, row in enumerate(rows):
        colour = f"C{index}"
        axes.scatter([row.layers] * len(row.accuracies), [100 * a for a in row.accuracies], s=18, c=colour, alpha=0.5)
        axes.scatter(row.layers, 100 * row.mean, s=90, marker="_", c=colour, linewidths=3, label=row.form)
    axes.set_xscale("log")
    axes.set_xlabel("parameters in the layers")
    axes.set_ylabel("held-out accuracy, %")
    axes.set_title("A Transformer that loses its parts, on 8 x 8 digits")
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main(__file__, run, draw)
