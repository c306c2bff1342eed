"""What of attention does a language model need?

Each variant takes one thing away from attention: similarity beyond its second order, similarity altogether,
maps that know the context, maps that know the input, maps at all. All have as many parameters as attention. A
model of bytes is trained with the variant in every layer (uniform) and in every second one, attention in the
others (hybrid). Without any map the model is left with single bytes; beside attention every variant comes close
to it. In so short a training maps of a fixed text or of noise even pass attention; the paper, with 24 layers and
15 billion tokens, has attention ahead of them.
"""

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attlas
from attlas.bench.tasks.corpus import even_windows, random_windows, unigram_bits
from attlas.blocks.probe import Probed
from attlas.ops.probed import ProbedMixer
from examples.shared import main

VARIANTS = ("approximate", "non_approximate", "fixed_qk", "random_qk", "static_qk", "mlp")


class Layer(nn.Module):
    """A pre-norm mixer and a gated MLP, as in Qwen 2.5."""

    def __init__(self, mix: attlas.Mixer, dim: int) -> None:
        super().__init__()
        self.mix, self.mix_norm, self.mlp_norm = mix, nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.up, self.gate, self.down = nn.Linear(dim, 2 * dim), nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x_BNC: Tensor) -> Tensor:
        """Residual mixing, residual MLP."""
        x_BNC = x_BNC + self.mix(self.mix_norm(x_BNC))
        h = self.mlp_norm(x_BNC)
        return x_BNC + self.down(F.silu(self.gate(h)) * self.up(h))


class Model(nn.Module):
    """Bytes to logits of the next byte; `names` are the mixers of the layers, the first layer's first."""

    def __init__(self, names: list[str], text: Tensor, dim: int, heads: int) -> None:
        super().__init__()
        self.register_buffer("text", text)  # that fixed maps are made of
        self.embed = nn.Embedding(256, dim)
        layers = []
        for name in names:
            settings: dict[str, Any] = {"length": len(text)}
            if name != "deconstruct_mlp":
                settings["position"] = attlas.positions.Rotary(dim // heads)
            if name == "deconstruct_fixed_qk":
                settings["probe"] = torch.zeros(len(text), dim)  # the embedded text comes with every call
            layers.append(Layer(attlas.mixer(name, dim, heads, causal=True, **settings), dim))
        stack = nn.Sequential(*layers)
        self.reads_text = "deconstruct_fixed_qk" in names
        probed = any(isinstance(layer.mix, ProbedMixer) for layer in layers)
        self.stack = Probed(stack) if probed else stack
        self.norm, self.head = nn.RMSNorm(dim), nn.Linear(dim, 256)

    def forward(self, bytes_BN: Tensor) -> Tensor:
        """(B, N) to (B, N, 256)."""
        x = self.embed(bytes_BN)
        x = self.stack(x, self.embed(self.text)) if self.reads_text else self.stack(x)
        return self.head(self.norm(x))


def run(
    variants: tuple[str, ...] = VARIANTS,
    layers: int = 4,
    dim: int = 64,
    heads: int = 4,
    length: int = 64,
    batch: int = 8,
    steps: int = 300,
) -> dict[str, Any]:
    """Bits per byte on held-out files, and the parameters, for each variant, uniform and hybrid."""
    bits: dict[tuple[str, str], float] = {}
    sizes = set()
    plans = [("softmax", "uniform"), *((name, plan) for name in variants for plan in ("uniform", "hybrid"))]
    print(f"{'variant':16} uniform  hybrid   bits per byte; byte frequencies alone give {unigram_bits():.2f}")
    for name, plan in plans:
        mixer = name if name == "softmax" else f"deconstruct_{name}"
        names = [mixer if plan == "uniform" or layer % 2 == 0 else "softmax" for layer in range(layers)]
        torch.manual_seed(0)
        model = Model(names, next(random_windows(1, 1, length))[0], dim, heads)
        sizes.add(sum(p.numel() for p in model.parameters()))
        bits[name, plan] = _train(model, length, batch, steps)
        if (name, "uniform") in bits and (plan == "hybrid" or name == "softmax"):
            print(f"{name:16} {bits[name, 'uniform']:7.3f} {bits.get((name, 'hybrid'), math.nan):7.3f}", flush=True)
    print(f"all models have {' or '.join(f'{size:,}' for size in sizes)} parameters")
    return {"bits": bits, "sizes": sizes, "unigram": unigram_bits()}


def _train(model: nn.Module, length: int, batch: int, steps: int) -> float:
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.1)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps, pct_start=0.1)
    for _, text in zip(range(steps), random_windows(0, batch, length + 1), strict=False):
        loss = F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
    model.eval()
    text = even_windows(128, length + 1)
    with torch.no_grad():
        return float(F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())) / math.log(2)


def draw(result: dict[str, Any], path: Path) -> None:
    """Bars of bits per byte, with a line where attention is."""
    import matplotlib.pyplot as plt

    bits = result["bits"]
    names = [name for name, plan in bits if plan == "hybrid"]
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for shift, plan, colour in ((-0.2, "uniform", "tab:blue"), (0.2, "hybrid", "tab:orange")):
        values = [bits[name, plan] for name in names]
        label = f"{plan}: in every {'layer' if plan == 'uniform' else 'second layer'}"
        bars = axes.bar([x + shift for x in range(len(names))], values, 0.38, color=colour, label=label)
        axes.bar_label(bars, fmt="%.2f", fontsize=8)
    axes.axhline(bits["softmax", "uniform"], color="black", linestyle="--", linewidth=1, label="attention")
    axes.set_xticks(range(len(names)), names)
    lowest = min(bits.values())
    axes.set_ylim(lowest - 0.2 * (max(bits.values()) - lowest))
    axes.set_ylabel("bits per byte, held-out files")
    axes.set_title("What of attention a small language model needs")
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main(__file__, run, draw)
