"""Attention tied by a tree is as close to softmax as the tree is true, and a flat tree is softmax.

Queries and keys are made by a tree of four children to a node: every node adds a random vector to all leaves below
it, each level below the first weaker than the one above by a factor, the detail. Softmax is compared with the tied
attention of that tree, of one flat family, and of a tree of the same shape whose leaves are shuffled; and with
attention in windows of sixteen neighbours, which takes more multiplications than the tree. The distance is the mean
of KL(Q_i ‖ softmax_i) in nats.

Where leaves of a block are equal the true tree is softmax. The more detail, the more it blurs, and a tree of the
wrong leaves blurs more. Where every level outweighs the one above it, windows come closer than either.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import attlas
from examples.shared import main

BRANCHES = 4
WINDOW = 16


def run(
    levels: int = 3,
    size: int = 16,
    details: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2),
    seeds: int = 20,
    lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192),
) -> dict[str, Any]:
    """Distances from softmax by detail, the matrices of one seed at the middle detail, and FLOPs by length."""
    tokens = BRANCHES**levels
    gaps: dict[str, list[float]] = {name: [] for name in ("flat", "true tree", "shuffled tree", "windows")}
    pictures: dict[str, Tensor] = {}
    for detail in details:
        found: dict[str, list[Tensor]] = {name: [] for name in gaps}
        for seed in range(seeds):
            torch.manual_seed(seed)
            q, k = (_grown(levels, size, detail) for _ in "qk")
            shuffled = torch.randperm(tokens)
            trees: dict[str, dict[str, Any]] = {
                "flat": {"tree": list(range(tokens))},
                "true tree": {"blocks": BRANCHES},
                "shuffled tree": {"tree": _nested(shuffled.tolist())},
            }
            softmax = _weights(q, k, "softmax")
            ours = {name: _weights(q, k, "hsa", **tree) for name, tree in trees.items()}
            ours["windows"] = _weights(q, k, "softmax", mask=attlas.Mask.block(WINDOW))
            for name, weights in ours.items():
                found[name].append(_divergence(weights, softmax))
            if detail == details[len(details) // 2] and seed == 0:
                pictures = {"softmax": softmax, **ours}
        for name, each in found.items():
            gaps[name].append(float(torch.stack(each).mean()))
    attends = {
        "softmax": attlas.make_attend("softmax", 1, size),
        "tree of 4": attlas.make_attend("hsa", 1, size, blocks=4),
        "tree of 16": attlas.make_attend("hsa", 1, size, blocks=16),
    }
    costs = {name: [attend.cost(1, length).flops for length in lengths] for name, attend in attends.items()}
    print(f"mean KL from softmax in nats, {tokens} tokens, {seeds} seeds")
    print("detail          " + "".join(f"{detail:8.2f}" for detail in details))
    for name, values in gaps.items():
        print(f"{name:16}" + "".join(f"{max(value, 0):8.3f}" for value in values))
    print("million FLOPs at" + "".join(f"{length:8}" for length in lengths))
    for name, counts in costs.items():
        print(f"{name:16}" + "".join(f"{count / 1e6:8.1f}" for count in counts))
    return {"details": details, "gaps": gaps, "pictures": pictures, "lengths": lengths, "costs": costs}


def _grown(levels: int, size: int, detail: float) -> Tensor:
    """(1, 1, tokens, size): the sum of a random vector of every ancestor and its own, weaker from level to level."""
    x_ND = torch.zeros(1, size, dtype=torch.float64)
    for level in range(levels):
        x_ND = x_ND.repeat_interleave(BRANCHES, 0)
        x_ND = x_ND + detail**level * torch.randn_like(x_ND)
    return x_ND[None, None]


def _nested(leaves: list[int]) -> list[Any]:
    """A tree over so many leaves, in this order."""
    if len(leaves) <= BRANCHES:
        return leaves
    step = len(leaves) // BRANCHES
    return [_nested(leaves[first : first + step]) for first in range(0, len(leaves), step)]


def _weights(q: Tensor, k: Tensor, name: str, **settings: Any) -> Tensor:
    """The attention matrix (N, N): what comes out where every value is a unit vector of its own."""
    return attlas.attend(q, k, torch.eye(q.shape[2], dtype=q.dtype)[None, None], name, **settings)[0, 0]


def _divergence(weights_NN: Tensor, softmax_NN: Tensor) -> Tensor:
    terms = torch.special.xlogy(weights_NN, weights_NN) - torch.special.xlogy(weights_NN, softmax_NN)
    return terms.sum(-1).mean()


def draw(result: dict[str, Any], path: Path) -> None:
    """Three matrices, the distance by detail, and FLOPs by length."""
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(12, 7), layout="constrained")
    places = figure.subplot_mosaic([["softmax", "true tree", "shuffled tree"], ["gaps", "gaps", "costs"]])
    for name in ("softmax", "true tree", "shuffled tree"):
        places[name].imshow(result["pictures"][name].log10().clamp(min=-5).numpy(), cmap="magma", vmin=-5, vmax=0)
        places[name].set_title(name if name == "softmax" else f"tied by the {name}")
        places[name].set_xlabel("key")
        places[name].set_ylabel("query")
    for name, values in result["gaps"].items():
        places["gaps"].plot(result["details"], values, "o-", label=name)
    places["gaps"].set_xlabel("detail: strength of a level against the one above")
    places["gaps"].set_ylabel("mean KL from softmax, nats")
    places["gaps"].legend()
    for name, counts in result["costs"].items():
        places["costs"].loglog(result["lengths"], counts, "o-", label=name)
    places["costs"].set_xticks(result["lengths"], result["lengths"])
    places["costs"].minorticks_off()
    places["costs"].set_xlabel("tokens")
    places["costs"].set_ylabel("FLOPs of a head")
    places["costs"].legend()
    figure.suptitle(
        "Hierarchical self-attention: the closest tied attention to softmax (colours: log10 of the weights)"
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main(__file__, run, draw)
