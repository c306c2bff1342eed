"""A transformer trained on random parts of its sources is an ensemble of its own selves.

Sequences hold one of three letters more often than the others: which one? Few training sequences are there. One
model is trained with all sources, one with a random quarter of them in every layer and dense in the last tenth of
its steps. The second then answers as a dense model, and as an average over passes that each see other sources.

Training on parts generalises a little better here. The average rises with the passes towards the dense reading of
the same model, but does not pass it on this task, where the paper has ensembles ahead.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attlas
from attlas.mechanisms.softmax.ssa import self_ensemble
from examples.shared import main

PASSES = (1, 2, 5, 10, 20)
LETTERS = 3


class Classifier(nn.Module):
    """Letters to the one that is most frequent, asked of a first token."""

    def __init__(self, length: int, dim: int, share: float) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(LETTERS + 1, dim), nn.Parameter(0.5 * torch.randn(length + 1, dim))
        self.mixers = nn.ModuleList(attlas.mixer("ssa", dim, 4, share=share) for _ in range(2))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
            for _ in range(2)
        )
        self.norms, self.head = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2)), nn.Linear(dim, LETTERS)

    def forward(self, letters_BN: Tensor) -> Tensor:
        """(B, N) to (B, 3)."""
        x = self.embed(F.pad(letters_BN, (1, 0), value=LETTERS)) + self.places
        for norm, mix, mlp in zip(self.norms, self.mixers, self.mlps, strict=True):
            x = x + mix(norm(x))
            x = x + mlp(x)
        return self.head(x[:, 0])


def run(
    length: int = 32, dim: int = 32, share: float = 0.25, examples: int = 200, steps: int = 300, seeds: int = 5
) -> dict[str, Any]:
    """Accuracies on new sequences: dense training, subsampled training read densely, and its ensembles."""
    dense, consolidated = [], []
    ensembles: dict[int, list[float]] = {passes: [] for passes in PASSES}
    for seed in range(seeds):
        torch.manual_seed(seed)
        train, test = _data(examples, length), _data(2000, length)
        dense.append(_accuracy(_trained(length, dim, 1.0, train, steps), test))
        model = _trained(length, dim, share, train, steps)
        consolidated.append(_accuracy(model, test))
        for passes in PASSES:
            average = self_ensemble(model, passes, lambda logits: logits.softmax(-1))
            ensembles[passes].append(_accuracy(average, test))
    result = {"dense": dense, "consolidated": consolidated, "ensembles": ensembles}
    print(f"accuracy in %, mean of {seeds} seeds; {share:.0%} of the sources in training")
    print(f"dense training            {_mean(dense):.1f}")
    print(f"subsampled, read densely  {_mean(consolidated):.1f}")
    for passes, values in ensembles.items():
        print(f"subsampled, {passes:2} passes     {_mean(values):.1f}")
    return result


def _mean(shares: list[float]) -> float:
    return 100 * sum(shares) / len(shares)


def _data(count: int, length: int) -> tuple[Tensor, Tensor]:
    """Sequences in which a letter has a share of a half and the others a quarter each, and that letter."""
    answer_B1 = torch.randint(LETTERS, (count, 1))
    letters_BN = torch.randint(LETTERS, (count, length))
    return torch.where(torch.rand(count, length) < 0.25, answer_B1, letters_BN), answer_B1[:, 0]


def _trained(length: int, dim: int, share: float, data: tuple[Tensor, Tensor], steps: int) -> nn.Module:
    model = Classifier(length, dim, share)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
    letters, answers = data
    for step in range(steps):
        if step == round(0.9 * steps):
            model.eval()  # the last tenth is dense
        rows = torch.randint(len(answers), (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(letters[rows]), answers[rows]).backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def _accuracy(predict: Any, data: tuple[Tensor, Tensor]) -> float:
    letters, answers = data
    return float((predict(letters).argmax(-1) == answers).float().mean())


def draw(result: dict[str, Any], path: Path) -> None:
    """Accuracy against passes, with lines for the two dense readings."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    passes = list(result["ensembles"])
    axes.plot(passes, [_mean(result["ensembles"][p]) for p in passes], "o-", label="subsampled, average of passes")
    for name, style, label in (
        ("dense", "--", "dense training"),
        ("consolidated", ":", "subsampled training, read densely"),
    ):
        axes.axhline(_mean(result[name]), linestyle=style, color="black", label=label)
    axes.set_xscale("log")
    axes.set_xticks(passes, passes)
    axes.set_xlabel("passes that are averaged")
    axes.set_ylabel("accuracy on new sequences, %")
    axes.set_title("Subsampled self-attention as an ensemble of selves")
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main(__file__, run, draw)
