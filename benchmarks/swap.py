"""What a swap does to the speed of a model: `python benchmarks/swap.py [--threads 2] [--rounds 7]`.

A ViT of timm over 56 x 56 tokens (pictures of 224 pixels, patches of 4, width 192, 3 heads, 12 blocks), as timm built
it and with other mechanisms swapped in, forward and forward with backward, one picture. All take turns in rounds
within one run, and a ratio is the median of the rounds' ratios. Nothing is reported unless the swap of softmax gives
timm's logits, and every other mechanism in its place what its oracle gives. The result goes to benchmarks/results/.
"""

import argparse
import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

import attlas
from attlas.bench import machine
from attlas.bench.networks import with_oracles
from attlas.bench.rounds import in_rounds, quartiles

SWAPS = {
    "softmax": {},
    "agent": {"agents": 49},
    "neighborhood": {"window": 7},
    "linear": {},
    "sigmoid": {},
}
ALLOWED = 1e-4


def vit(side: int, depth: int) -> nn.Module:
    """timm's, with patches of 4."""
    torch.manual_seed(0)
    return timm.models.VisionTransformer(
        img_size=side, patch_size=4, embed_dim=192, depth=depth, num_heads=3, class_token=False, global_pool="avg"
    ).eval()


def contestants(side: int, depth: int) -> dict[str, nn.Module]:
    """timm's own, and one for each mechanism."""
    theirs = vit(side, depth)
    models = {"timm": theirs}
    for name, settings in SWAPS.items():
        models[name] = copy.deepcopy(theirs)
        attlas.swap(models[name], name, where="blocks.*.attn", **settings)
    return models


def check() -> None:
    """Hold every contestant against its oracle, and softmax against timm, over 14 x 14 tokens."""
    image = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        for name, model in contestants(56, 2).items():
            reference = vit(56, 2) if name in ("timm", "softmax") else with_oracles(model)
            wanted = reference(image)
            error = float((model(image) - wanted).norm() / wanted.norm())
            if not error <= ALLOWED:
                sys.exit(f"the oracle check is red, nothing is measured: {name} is off by {error:.1e}")


def forward(model: nn.Module, image: Tensor) -> Callable[[], object]:
    """Without a graph."""

    def call() -> None:
        with torch.no_grad():
            model(image)

    return call


def training(model: nn.Module, image: Tensor) -> Callable[[], object]:
    """Forward and backward."""

    def call() -> None:
        model(image).sum().backward()

    return call


def main() -> None:
    """Check, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    check()
    image = torch.randn(1, 3, 224, 224)
    models = contestants(224, 12)
    results: dict[str, object] = {}
    for what, make in (("forward", forward), ("forward and backward", training)):
        times = in_rounds({name: make(model, image) for name, model in models.items()}, options.rounds, what)
        ratios = {name: quartiles(x / y for x, y in zip(times["timm"], times[name], strict=True)) for name in SWAPS}
        results[what] = {"times as fast as timm": ratios, "seconds": times}
        for name, (lower, median, upper) in ratios.items():
            print(f"{what:22s} {name:14s} {median:6.2f} times as fast as timm  ({lower:.2f} to {upper:.2f})")
    path = (
        Path(__file__).parent / "results" / f"swap-threads{options.threads}-torch{torch.__version__.split('+')[0]}.json"
    )
    said = {"command": " ".join(sys.argv), "machine": machine.describe(), "rounds": options.rounds} | results
    path.write_text(json.dumps(said, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
