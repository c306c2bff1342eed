"""What one patch of a photograph sees under eight ways of seeing less than everything.

The photograph is cut into 28 x 42 patches, every patch is a token, and each layer is asked by gradients which keys the
outputs depend on (`attlas.analysis.visible`). Windows, lines and lattices are the same on every photograph; BiFormer's
regions and the clusters of routing attention are chosen for this one. Nothing is trained: queries and keys share one
random projection, so that what attracts is likeness, and strong contrast where products are compared, as BiFormer does.

The table says how many keys a query sees, what the layer costs beside softmax, how far away the keys are in patches and
how unlike the query they look, where 1 is a random pair of patches.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import attlas
from attlas.analysis.visible import token_at, tokens_of_image, visible_pairs
from examples.shared import main

FIXED: dict[str, tuple[str, dict[str, Any]]] = {
    "softmax": ("softmax", {}),
    "neighborhood": ("neighborhood", {"window": 7}),
    "neighborhood, dilated": ("neighborhood", {"window": 7, "dilation": 4}),
    "swin, shifted": ("swin", {"window": 7, "shift": 3}),
    "halonet": ("halonet", {"block": 7, "halo": 3}),
    "criss-cross, one pass": ("criss_cross", {"recurrence": 1}),
    "crossformer, long": ("crossformer", {"interval": 7, "distance": "long"}),
}
CHOSEN: dict[str, tuple[str, dict[str, Any]]] = {
    "biformer": ("biformer", {"regions": 14, "top": 8, "kernel": 0}),
    "routing": ("routing", {"clusters": 14}),
}
LAYERS = FIXED | CHOSEN


@dataclass
class Field:
    """One layer: what the query of the picture sees, (M,), and means over many queries."""

    seen: Tensor
    keys: float
    cost: float
    far: float
    unlike: float


@dataclass
class Result:
    """The photograph (height, width, 3), how it is cut, who is asked, and what each layer shows."""

    photo: Tensor
    grid: tuple[int, int]
    query: tuple[int, int]
    fields: dict[str, Field]


def run(
    *,
    photo: str = "china.jpg",
    grid: tuple[int, int] = (28, 42),
    query: tuple[int, int] = (13, 16),
    dim: int = 64,
    queries: int = 20,
) -> Result:
    """Ask every layer about `query` and about `queries` others, and print how they compare."""
    from sklearn.datasets import load_sample_image

    torch.manual_seed(0)
    image = torch.from_numpy(load_sample_image(photo).copy())
    place = attlas.Grid(grid)
    x = tokens_of_image(image, grid, dim)
    looks = tokens_of_image(image, grid, 512)[0].double()  # a projection that keeps distances
    looks = (looks - looks.mean(0)) / looks.std()
    middle = token_at(place, query)
    asked = [middle, *torch.randperm(place.tokens)[:queries].tolist()]
    unlike_QN = torch.cdist(looks[asked], looks)
    far_QN = torch.cdist(place.places()[asked].double(), place.places().double())
    dense = attlas.mixer("softmax", dim, grid=place).cost(1, place.tokens, grid=place).flops
    fields = {}
    print(f"{photo} in {grid[0]} x {grid[1]} patches, means over {len(asked)} queries")
    print(f"{'':<24}{'keys':>8}{'FLOPs':>8}{'far':>8}{'unlike':>8}")
    for label, (name, settings) in LAYERS.items():
        layer = _layer(name, place, dim, settings)
        seen_QN = visible_pairs(layer, x, grid=place, queries=asked)[0].any(0)
        fields[label] = field = Field(
            seen_QN[0],
            float(seen_QN.sum(1).double().mean()),
            layer.cost(1, place.tokens, grid=place).flops / dense,
            float(far_QN[seen_QN].mean()),
            float(unlike_QN[seen_QN].mean() / unlike_QN.mean()),
        )
        print(f"{label:<24}{field.keys:>8.0f}{field.cost:>8.0%}{field.far:>8.1f}{field.unlike:>8.2f}")
    return Result(image, grid, query, fields)


def _layer(name: str, grid: attlas.Grid, dim: int, settings: dict[str, Any]) -> attlas.Mixer:
    """A layer of one head, whose queries and keys are one projection of the tokens."""
    layer: Any = attlas.mixer(name, dim, 1, grid=grid, **settings)
    with torch.no_grad():
        if isinstance(layer, attlas.Attention):
            layer.k_proj.load_state_dict(layer.q_proj.state_dict())
        if name == "criss_cross":
            layer.gamma.fill_(1.0)  # it starts at 0, where nothing is seen yet
    return layer


def draw(result: Result, path: Path) -> None:
    """The photograph once per layer, dark where the marked patch does not see."""
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle

    photo = result.photo.double() / 255
    height, width = photo.shape[0] / result.grid[0], photo.shape[1] / result.grid[1]
    rows = (torch.arange(photo.shape[0]) / height).long().clamp(max=result.grid[0] - 1)
    columns = (torch.arange(photo.shape[1]) / width).long().clamp(max=result.grid[1] - 1)
    figure, axes = plt.subplots(3, 3, figsize=(10, 7.4), layout="constrained")
    for (label, field), ax in zip(result.fields.items(), axes.flat, strict=True):
        seen = field.seen.view(result.grid)[rows][:, columns].unsqueeze(-1).double()
        grey = photo.mean(-1, keepdim=True) * 0.3
        ax.imshow((photo * seen + grey * (1 - seen)).numpy())
        corner = (result.query[1] * width, result.query[0] * height)
        ax.add_patch(Rectangle(corner, width, height, fill=False, edgecolor="red", linewidth=2))
        ax.set(xticks=[], yticks=[])
        chosen = ", chosen by content" if label in CHOSEN else ""
        ax.set_title(f"{label}{chosen}: {int(field.seen.sum())} keys", fontsize=10)
    figure.suptitle("What the patch in the red square sees")
    figure.savefig(path, dpi=72)
    plt.close(figure)


if __name__ == "__main__":
    main(__file__, run, draw)
