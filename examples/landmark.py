"""Finding what was said long ago: landmarks, a sliding window of the same cost, and full attention.

Texts are noise in which a few tokens are facts, each a key with its value, and end with keys that are asked for. Two
small models learn on short texts to say the values: one with landmark attention, a landmark behind every four tokens,
one with softmax attention. Then texts are eight times as long. The landmark model reads them in chunks of two blocks
and goes back to two blocks for each query and head; the softmax model sees everything, or a window of as many keys as
the landmark model touches for one query: all landmarks, two blocks and its chunk.

All know every fact of a short text. Of the long ones landmarks find 96 %, at any distance, with a third of the keys;
the window knows what lies in it, and full attention, at distances that it was not trained on, little more than half.

The picture shows the share of the questions that are answered rightly, over the distance to the fact, and for one text
how much the landmark of each block drew its questions, with the blocks that held the facts.

Mohtashami and Jaggi, 2023 (arXiv:2305.16300).
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attlas
from attlas.adapt.retrieval import applied
from attlas.ops.landmarks import drop_landmarks, insert_landmarks
from examples.shared import main

KEYS, VALUES, NOISE = 8, 8, 16
FACTS = KEYS * VALUES
LANDMARK = FACTS + KEYS + NOISE
"""Tokens are facts, keys that are asked for, noise, and the landmark."""
EVERY, QUERIES, TOP_K = 4, 4, 2
CHUNK = 2 * (EVERY + 1)


class Texts(NamedTuple):
    """Tokens (B, N), the last of which ask; where the fact of each question stands, and its value, (B, Q)."""

    tokens: Tensor
    places: Tensor
    answers: Tensor

    @property
    def distances(self) -> Tensor:
        """From a question back to its fact, (B, Q)."""
        return self.tokens.shape[1] - torch.arange(QUERIES, 0, -1) - self.places


class Result(NamedTuple):
    """Accuracy by model over `distances`, and the shares (Q, S) of a text's blocks with the block of each fact."""

    distances: list[float]
    accuracy: dict[str, list[float]]
    overall: dict[str, float]
    keys: dict[str, int]
    shares: Tensor
    facts: Tensor
    bytes_read: int


def texts(batch: int, length: int) -> Texts:
    """Noise with as many facts in it as questions behind it."""
    tokens = FACTS + KEYS + torch.randint(NOISE, (batch, length))
    keys = torch.rand(batch, KEYS).argsort(1)[:, :QUERIES]
    answers = torch.randint(VALUES, (batch, QUERIES))
    places = torch.rand(batch, length - QUERIES).argsort(1)[:, :QUERIES]
    tokens.scatter_(1, places, keys * VALUES + answers)
    tokens[:, -QUERIES:] = FACTS + keys
    return Texts(tokens, places, answers)


class Layer(nn.Module):
    """A mixer and an MLP, each behind a norm and added to the stream."""

    def __init__(self, name: str, dim: int, heads: int, **settings: Any) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        rotary = attlas.positions.Rotary(dim // heads)
        self.mixer = attlas.mixer(name, dim, heads, causal=True, position=rotary, **settings)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x_BNC: Tensor) -> Tensor:
        """The stream behind the layer."""
        x_BNC = x_BNC + self.mixer(self.norms[0](x_BNC))
        return x_BNC + self.mlp(self.norms[1](x_BNC))


def model(name: str, dim: int, heads: int, **settings: Any) -> nn.Sequential:
    """Tokens (B, N) to logits (B, N, values)."""
    layers = [Layer(name, dim, heads, **settings) for _ in range(2)]
    return nn.Sequential(nn.Embedding(LANDMARK + 1, dim), *layers, nn.LayerNorm(dim), nn.Linear(dim, VALUES))


def learn(name: str, *, dim: int, heads: int, length: int, steps: int, batch: int) -> nn.Sequential:
    """A model trained on short texts."""
    torch.manual_seed(0)
    marked = name == "landmark"
    net = model(name, dim, heads, **({"mem_freq": EVERY} if marked else {}))
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        text = texts(batch, length)
        logits = net(insert_landmarks(text.tokens, EVERY, LANDMARK) if marked else text.tokens)
        logits = drop_landmarks(logits, EVERY) if marked else logits
        loss = F.cross_entropy(logits[:, -QUERIES:].flatten(0, 1), text.answers.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return net.eval()


@torch.no_grad()
def run(
    dim: int = 64,
    heads: int = 4,
    length: int = 32,
    times: int = 8,
    steps: int = 400,
    batch: int = 64,
    tests: int = 512,
) -> Result:
    """Train both, read long texts, print the table."""
    with torch.enable_grad():
        nets = {
            name: learn(name, dim=dim, heads=heads, length=length, steps=steps, batch=batch)
            for name in ("landmark", "softmax")
        }
    torch.manual_seed(1)
    text = texts(tests, times * length)
    blocks = times * length // EVERY
    keys = {"landmark": blocks + TOP_K * (EVERY + 1) + CHUNK, "softmax": times * length}
    keys["window"] = keys["landmark"]
    window = model("neighborhood", dim, heads, window=keys["window"])
    window.load_state_dict(nets["softmax"].state_dict())
    said = {"softmax": nets["softmax"](text.tokens), "window": window(text.tokens)}
    with applied(nets["landmark"], top_k=TOP_K, blocks=blocks) as readers:
        parts = [nets["landmark"](chunk) for chunk in insert_landmarks(text.tokens, EVERY, LANDMARK).split(CHUNK, 1)]
    said["landmark"] = drop_landmarks(torch.cat(parts, 1), EVERY)
    right = {name: logits[:, -QUERIES:].argmax(-1) == text.answers for name, logits in said.items()}

    edges = torch.linspace(0, times * length, 2 * times + 1)
    where = torch.bucketize(text.distances, edges)
    bins = [k for k in range(1, len(edges)) if (where == k).any()]
    accuracy = {name: [hit[where == k].float().mean().item() for k in bins] for name, hit in right.items()}
    overall = {name: hit.float().mean().item() for name, hit in right.items()}
    short = texts(tests, length)
    trained = {
        "softmax": nets["softmax"](short.tokens),
        "landmark": drop_landmarks(nets["landmark"](insert_landmarks(short.tokens, EVERY, LANDMARK)), EVERY),
    }
    trained["window"] = trained["softmax"]
    print(f"{'':10}{'keys a query':>14}{f'{length} tokens':>14}{f'{times * length} tokens':>14}{'farthest half':>16}")
    for name in ("landmark", "window", "softmax"):
        known = (trained[name][:, -QUERIES:].argmax(-1) == short.answers).float().mean().item()
        far = right[name][text.distances > times * length // 2].float().mean().item()
        print(f"{name:10}{keys[name]:14}{known:14.1%}{overall[name]:14.1%}{far:16.1%}")
    shares = readers[-1].shares
    assert shares is not None
    return Result(
        [(edges[k - 1] + edges[k]).item() / 2 for k in bins],
        accuracy,
        overall,
        keys,
        shares[0, :, -QUERIES - 1 : -1].amax(0),  # behind the questions stands a landmark
        text.places[0] // EVERY,
        sum(reader.bytes_read for reader in readers),
    )


def draw(result: Result, path: Path) -> None:
    """Accuracy over distance, and the blocks that drew the queries of one text."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", width_ratios=(1, 1.4))
    for name, values in result.accuracy.items():
        left.plot(result.distances, values, marker=".", label=f"{name}, {result.keys[name]} keys")
    left.axhline(1 / VALUES, color="grey", linewidth=0.8, linestyle=":")
    left.set(xlabel="tokens between question and fact", ylabel="answered rightly", ylim=(-0.03, 1.13))
    left.legend(fontsize="x-small", loc="upper center", ncols=3)
    image = right.imshow(result.shares.numpy(), aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
    right.scatter(result.facts, range(QUERIES), marker="o", s=60, facecolors="none", edgecolors="red")
    right.set(
        xlabel="block, from the oldest",
        yticks=range(QUERIES),
        yticklabels=[f"question {n + 1}" for n in range(QUERIES)],
        title="share of each landmark, largest over heads; red: the fact",
    )
    figure.colorbar(image, ax=right)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main(__file__, run, draw)
