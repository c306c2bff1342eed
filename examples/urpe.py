"""Where am I? Relative positions inside the softmax cannot tell; with a factor behind it they can.

Two tasks of random tokens that ask for absolute positions: *identification*, to name the position of every
token, and *even tokens*, to write every second token of the sequence into its first half. Four small models
that differ in their positions alone learn both: learned absolute vectors, ALiBi, a learned relative bias, and
URPE, which has the same bias and a factor of each offset behind the softmax. The tables of the bias and of URPE
serve all layers and start from N(0, 1), as officially. Accuracy is measured on tokens drawn as in training, and
identification once more on sequences of one repeated token, where nothing but the positions is left to tell.

URPE names every position, where the bias alone guesses as soon as tokens are equal. Even tokens, which also have
to be found, it has not learned after so few steps: a fifth of them, no more than the bias alone.

Luo et al., 2022 (arXiv:2205.13401).
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attlas
from examples.shared import main

POSITIONS = ("absolute", "ALiBi", "relative bias", "URPE")
TASKS = ("identification", "identification, equal tokens", "even tokens")


class Result(NamedTuple):
    """Accuracies by task and positions, and the factors (H, N, N) that URPE learned for identification."""

    accuracy: dict[str, dict[str, float]]
    factors: Tensor
    tokens: int


class Model(nn.Module):
    """Tokens (B, N) to logits (B, N, answers): pre-norm layers of attention and an MLP."""

    def __init__(self, positions: str, vocabulary: int, answers: int, tokens: int, dim: int, layers: int) -> None:
        super().__init__()
        heads = 2
        self.values = nn.Embedding(vocabulary, dim)
        self.absolute = (
            attlas.positions.Learned(dim, tokens) if positions == "absolute" else attlas.positions.Position()
        )
        settings: dict[str, Any] = {}
        if positions == "ALiBi":
            settings["position"] = attlas.positions.ALiBi(heads)
        self.mixers = nn.ModuleList()
        for _ in range(layers):
            relative = positions in ("relative bias", "URPE")
            mixer = attlas.mixer("urpe" if relative else "softmax", dim, heads, **settings)
            if relative:
                settings["tables"] = mixer.attend.tables
            self.mixers.append(mixer)
        if "tables" in settings:
            nn.init.normal_(settings["tables"].bias)
            nn.init.normal_(settings["tables"].factor)
        if positions == "relative bias":
            nn.init.ones_(settings["tables"].factor).requires_grad_(False)
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
            for _ in range(layers)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(layers))
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, answers))

    def forward(self, tokens_BN: Tensor) -> Tensor:
        """Logits."""
        x_BNC = self.absolute.embed(self.values(tokens_BN), 0)
        for norm, mixer, mlp in zip(self.norms, self.mixers, self.mlps, strict=True):
            x_BNC = x_BNC + mixer(norm(x_BNC))
            x_BNC = x_BNC + mlp(x_BNC)
        return self.head(x_BNC)


def answers(task: str, tokens_BN: Tensor, vocabulary: int) -> Tensor:
    """What is asked for at every position."""
    batch, tokens = tokens_BN.shape
    if task == "identification":
        return torch.arange(tokens).expand(batch, -1)
    filler = torch.full_like(tokens_BN[:, tokens // 2 :], vocabulary)
    return torch.cat([tokens_BN[:, 1::2], filler], 1)


def learn(
    task: str, positions: str, *, tokens: int, vocabulary: int, dim: int, layers: int, steps: int, batch: int
) -> Model:
    """A model trained on random sequences."""
    torch.manual_seed(0)
    model = Model(positions, vocabulary, max(tokens, vocabulary + 1), tokens, dim, layers)
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, 3e-3, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        sequences = torch.randint(vocabulary, (batch, tokens))
        loss = F.cross_entropy(model(sequences).flatten(0, 1), answers(task, sequences, vocabulary).flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: Model, task: str, sequences: Tensor, vocabulary: int) -> float:
    """Share of right answers; of even tokens only the half that is not filler counts."""
    right = model(sequences).argmax(-1) == answers(task, sequences, vocabulary)
    return right[:, : right.shape[1] // 2 if task == "even tokens" else None].float().mean().item()


def run(
    tokens: int = 20, vocabulary: int = 10, dim: int = 64, layers: int = 2, steps: int = 400, batch: int = 32
) -> Result:
    """Train the eight models, print the table."""
    results: dict[str, dict[str, float]] = {task: {} for task in TASKS}
    factors = torch.empty(0)
    for positions in POSITIONS:
        for task in ("identification", "even tokens"):
            sizes = {"tokens": tokens, "vocabulary": vocabulary, "dim": dim, "layers": layers}
            model = learn(task, positions, **sizes, steps=steps, batch=batch)
            torch.manual_seed(1)
            random = torch.randint(vocabulary, (200, tokens))
            results[task][positions] = accuracy(model, task, random, vocabulary)
            if task == "identification":
                equal = torch.arange(vocabulary)[:, None].expand(-1, tokens)
                results[TASKS[1]][positions] = accuracy(model, task, equal, vocabulary)
                if positions == "URPE":
                    factors = model.mixers[0].attend.tables(tokens, tokens)[1].detach()
    print(f"{'accuracy':30}" + "".join(f"{name:>15}" for name in POSITIONS))
    for task, by_positions in results.items():
        print(f"{task:30}" + "".join(f"{by_positions[name]:15.1%}" for name in POSITIONS))
    return Result(results, factors, tokens)


def draw(result: Result, path: Path) -> None:
    """Bars of the accuracies, and the learned factors of each head."""
    import matplotlib.pyplot as plt

    heads = result.factors.shape[0]
    figure, axes = plt.subplots(
        1, 1 + heads, figsize=(5.5 + 3.4 * heads, 3.8), width_ratios=[1.7] + [1] * heads, layout="constrained"
    )
    width = 0.8 / len(POSITIONS)
    for index, name in enumerate(POSITIONS):
        heights = [by_positions[name] for by_positions in result.accuracy.values()]
        axes[0].bar([i + (index - 1.5) * width for i in range(len(TASKS))], heights, width, label=name)
    axes[0].axhline(1 / result.tokens, color="black", linewidth=0.8, linestyle=":")
    axes[0].set_xticks(range(len(TASKS)), [task.replace(", ", ",\n") for task in TASKS])
    axes[0].set(title="accuracy (dotted: a guessed position)", ylim=(0, 1.05))
    axes[0].legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    reach = result.factors.abs().max()
    for head, axis in enumerate(axes[1:]):
        image = axis.imshow(result.factors[head].numpy(), cmap="RdBu_r", vmin=-reach, vmax=reach)
        axis.set(title=f"learned C, head {head}", xlabel="key", ylabel="query")
    figure.colorbar(image, ax=axes[1:].tolist(), shrink=0.8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main(__file__, run, draw)
