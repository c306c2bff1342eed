"""Landmark attention over a past that lies elsewhere: of all blocks, only those whose landmarks score highest are read.

    with attlas.adapt.retrieval.applied(model, top_k=4, blocks=10_000, path=folder) as readers:
        for chunk in tokens.split(512, 1):        # landmarks inserted, see `attlas.ops.landmarks`
            logits = model(chunk)
    sum(reader.bytes_read for reader in readers)

A `Reader` takes the place of a layer around `landmark`. It caches whole blocks of keys, not yet rotated, and values,
in a ring of `blocks` blocks: the store, on any device or in a file. A chunk of queries scores the landmarks of all
cached blocks, which stay near, picks `top_k` of them, reads these, and attends to

    [ chosen blocks in order of time | block that is not full yet | chunk ]

with the softmax of landmark attention. Positions are given anew and stay in the range of training: the chosen blocks
stand one behind the other, from place 0, or one block later where they are among the last `top_k`; the chunk begins
`top_k + 1` blocks in. In scoring, the landmarks of the last `top_k` blocks stand at blocks 1 to `top_k`, those of all
older ones at block 0. While no more than `top_k` blocks are cached all are read, at their true distances, and the
result is that of the layer itself.

B batch, N queries of the chunk, C channels, H query heads, G key/value heads, R = H / G, D head size, E value size,
P places of a block, K chosen blocks, S cached blocks, T groups of queries that share their choice, Q queries of a
group.

Source: Mohtashami and Jaggi, 2023 (arXiv:2305.16300), official code epfml/landmark-attention. It wants `top_k` blocks
before it reads any, and lets chunk and last block overlap when there are just as many.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor, nn

from attlas.blocks.attention import Attention
from attlas.blocks.positions import PartRotary, Position, Rotary
from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.core.mask import Mask
from attlas.mechanisms.local_sparse.landmark import Landmark
from attlas.ops.landmarks import grouped_softmax, scaled_scores

SELECTIONS = ("per_token_and_head", "max_over_heads", "max_over_tokens")


class Reader(nn.Module):
    """A landmark layer for inference that keeps its past in a store and reads of it what it chooses.

    Feed a text chunk by chunk; any chunk may be of any length. `clear` before another text. What is read takes room for
    the `top_k` blocks of every query and head of a chunk, or of every head under `max_over_tokens`.

    Args:
        layer: of `attlas.mixer("landmark", ..., causal=True)`, with rotary positions or none.
        top_k: blocks that are read for a query.
        blocks: capacity of the store; the oldest block makes room.
        selection: `per_token_and_head` chooses for every query and head; `max_over_heads` by the largest share over
            heads, for every query; `max_over_tokens` by the largest share over the queries of a chunk, for every head,
            so that inside a chunk later tokens have a say in what earlier ones read: it is causal from chunk to chunk.
        device: of the store; that of the layer by default.
        path: a new file for the store instead, read through the page cache of the operating system.

    Attributes:
        bytes_read: bytes of the blocks read so far. A block that several queries of a chunk choose is read once.
        chosen: which blocks the last chunk read, by their number in the text, (B, H, T, K) in order of time: T is
            the chunk's length, or 1 where its queries share a choice. None before the first.
        shares: how the softmax over the landmarks of all cached blocks, from the oldest, led to that choice,
            (B, H, T, S).
        store: (B, G, blocks, P, D + E), keys and values side by side. None before the first chunk.
    """

    def __init__(
        self,
        layer: Attention,
        *,
        top_k: int = 4,
        blocks: int = 1024,
        selection: str = "per_token_and_head",
        device: torch.device | str | None = None,
        path: Path | str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(layer, Attention) or not isinstance(layer.attend, Landmark):
            raise BadInput(f"a Reader is made of a landmark layer (attlas.mixer('landmark', ...)), got {layer}")
        if type(layer.position) not in (Position, Rotary, PartRotary):
            raise BadInput(
                f"blocks that are read stand at new positions, which {type(layer.position).__name__} cannot give to "
                "keys: build the layer with rotary positions or none"
            )
        if selection not in SELECTIONS:
            raise BadInput(f"selection is one of {', '.join(SELECTIONS)}, got {selection!r}")
        if not 1 <= top_k <= blocks:
            raise BadInput(f"top_k is at least 1 and at most the {blocks} blocks of the store, got {top_k}")
        if path is not None and device is not None:
            raise BadInput(f"the store lies on a device or in a file, got both: {device} and {path}")
        self.layer, self.top_k, self.blocks, self.selection = layer, top_k, blocks, selection
        self.device, self.path = device, path
        self.period = layer.attend.mem_freq + 1
        self.clear()
        if path is not None:
            _new_file(Path(path))

    def clear(self) -> None:
        """Forget the text."""
        self.store: Tensor | None = None
        self.chosen: Tensor | None = None
        self.shares: Tensor | None = None
        self.bytes_read = 0
        self.written = 0

    @torch.no_grad()
    def forward(
        self,
        x_BNC: Tensor,
        context_BMC: Tensor | None = None,
        *,
        mask: Mask | Tensor | None = None,
        grid: Grid | Sequence[int] | None = None,
    ) -> Tensor:
        """The outputs (B, N, C) of the next tokens of the text, landmarks in their places; as a layer, without mask."""
        layer = self.layer
        layer._check_tokens("x", x_BNC, layer.site.dim)
        if context_BMC is not None or mask is not None:
            raise BadInput("a Reader takes the tokens of one text, all of them real: pass neither a context nor a mask")
        batch, tokens, _ = x_BNC.shape
        if not tokens:
            return x_BNC
        layer._check(batch, tokens, tokens, False, None, grid)
        # Tokens as their own context are projected and not rotated.
        q_BHND, k_BGND, v_BGNE = layer._project(x_BNC, x_BNC, 0)
        if self.store is None:
            self._open(k_BGND, v_BGNE)
        elif batch != self.store.shape[0]:
            raise BadInput(f"the text so far has {self.store.shape[0]} sequences, got {batch}; clear() begins another")
        k_BGND, v_BGNE = torch.cat([self.last_k, k_BGND], 2), torch.cat([self.last_v, v_BGNE], 2)
        cached = min(self.written, self.blocks)
        begin = (min(cached, self.top_k) + 1) * self.period
        rotated_BHND = layer.position.rotate(q_BHND, begin + self.last_k.shape[2])
        o_BHNE = self._attend(rotated_BHND, layer.position.rotate(k_BGND, begin), v_BGNE, cached)
        self._write(k_BGND, v_BGNE)
        return layer._merge(o_BHNE, x_BNC)

    def _attend(self, q_BHND: Tensor, k_BGMD: Tensor, v_BGME: Tensor, cached: int) -> Tensor:
        """The grouped softmax over what is read, then what is at hand."""
        size, groups = q_BHND.shape[3], k_BGMD.shape[1]
        q_BGRND = q_BHND.unflatten(1, (groups, -1))
        scores_BHNM = scaled_scores(q_BGRND, k_BGMD.unsqueeze(2)).flatten(1, 2)
        if not cached:
            weights_BHNM = grouped_softmax(scores_BHNM, self.period - 1).to(v_BGME.dtype)
            return (weights_BHNM.unflatten(1, (groups, -1)) @ v_BGME.unsqueeze(2)).flatten(1, 2)
        order_BHTK = self._choose(q_BGRND, cached)
        k_BHTXD, v_BHTXE = self._read(order_BHTK, cached, size)
        q_BHTQD = q_BHND.unflatten(2, (order_BHTK.shape[2], -1))
        far_BHNX = scaled_scores(q_BHTQD, k_BHTXD).flatten(2, 3)
        weights = grouped_softmax(torch.cat([far_BHNX, scores_BHNM], 3), self.period - 1).to(v_BGME.dtype)
        far, near = weights.split([far_BHNX.shape[3], scores_BHNM.shape[3]], 3)
        o_BHNE = (near.unflatten(1, (groups, -1)) @ v_BGME.unsqueeze(2)).flatten(1, 2)
        return o_BHNE + (far.unflatten(2, (order_BHTK.shape[2], -1)) @ v_BHTXE).flatten(2, 3)

    def _choose(self, q_BGRND: Tensor, cached: int) -> Tensor:
        """Which of the cached blocks, counted from the oldest, (B, H, T, K) in order of time."""
        top_k = min(self.top_k, cached)
        position = self.layer.position
        ring_S = torch.arange(self.written - cached, self.written, device=self.marks.device) % self.blocks
        marks_BGSD = self.marks[:, :, ring_S]
        old, recent = marks_BGSD.split([cached - top_k, top_k], 2)
        # One place for all old landmarks: each is rotated as a sequence of one token.
        standing = position.rotate(old.transpose(1, 2).flatten(0, 1).unsqueeze(2), self.period - 1)
        spread = [position.rotate(recent[:, :, t : t + 1], (t + 2) * self.period - 1) for t in range(recent.shape[2])]
        old = standing.squeeze(2).unflatten(0, (-1, cached - top_k)).transpose(1, 2) if cached > top_k else old
        marks_BGSD = torch.cat([old, *spread], 2)
        shares = scaled_scores(q_BGRND, marks_BGSD.unsqueeze(2)).flatten(1, 2).softmax(-1)
        if self.selection == "max_over_heads":
            shares = shares.amax(1, keepdim=True).expand_as(shares)
        elif self.selection == "max_over_tokens":
            shares = shares.amax(2, keepdim=True)
        self.shares = shares
        return shares.topk(top_k, -1).indices.sort(-1).values

    def _read(self, order_BHTK: Tensor, cached: int, size: int) -> tuple[Tensor, Tensor]:
        """Keys at their new places and values of the chosen blocks, (B, H, T, X = K P, features)."""
        assert self.store is not None
        batch, heads = order_BHTK.shape[:2]
        groups = self.store.shape[1]
        self.chosen = order_BHTK + (self.written - cached)
        slot_BHTK = self.chosen % self.blocks
        row_B, row_H = (torch.arange(n, device=slot_BHTK.device) for n in (batch, heads))
        head_BH11 = (row_B[:, None] * groups + row_H // (heads // groups))[..., None, None]
        wanted, where = (head_BH11 * self.blocks + slot_BHTK).unique(return_inverse=True)
        blocks_UPF = self.store.flatten(0, 2)[wanted.to(self.store.device)]
        self.bytes_read += blocks_UPF.nbytes
        rows_BHTXF = blocks_UPF.to(slot_BHTK.device)[where].flatten(3, 4)
        k_BHTXD, v_BHTXE = rows_BHTXF.split([size, rows_BHTXF.shape[-1] - size], -1)
        k_BHTXD = k_BHTXD.flatten(0, 1)
        early, late = (
            self.layer.position.rotate(k_BHTXD, start).view(*v_BHTXE.shape[:-1], size) for start in (0, self.period)
        )
        is_late = (order_BHTK >= cached - self.top_k).repeat_interleave(self.period, -1)
        return late.where(is_late.unsqueeze(-1), early), v_BHTXE

    def _open(self, k_BGND: Tensor, v_BGNE: Tensor) -> None:
        """Make room before the first chunk."""
        batch, groups = k_BGND.shape[:2]
        shape = (batch, groups, self.blocks, self.period, k_BGND.shape[3] + v_BGNE.shape[3])
        if self.path is None:
            self.store = k_BGND.new_empty(shape, device=self.device)
        else:
            flat = torch.from_file(str(self.path), shared=True, size=prod(shape), dtype=k_BGND.dtype)
            self.store = flat.view(shape)
        self.marks = k_BGND.new_empty(batch, groups, self.blocks, k_BGND.shape[3])
        self.last_k, self.last_v = k_BGND[:, :, :0], v_BGNE[:, :, :0]

    def _write(self, k_BGMD: Tensor, v_BGME: Tensor) -> None:
        """Whole blocks into the ring, the rest at hand."""
        assert self.store is not None
        whole = k_BGMD.shape[2] // self.period
        rows_BGMF = torch.cat([k_BGMD, v_BGME], 3)[:, :, : whole * self.period]
        fresh_BGSPF = rows_BGMF.unflatten(2, (whole, self.period))[:, :, -self.blocks :]
        self.written += whole
        slot_S = torch.arange(self.written - fresh_BGSPF.shape[2], self.written, device=k_BGMD.device) % self.blocks
        self.store[:, :, slot_S.to(self.store.device)] = fresh_BGSPF.to(self.store.device)
        self.marks[:, :, slot_S] = fresh_BGSPF[:, :, :, -1, : k_BGMD.shape[3]]
        # Views would keep the whole chunk alive.
        self.last_k, self.last_v = (x[:, :, whole * self.period :].clone() for x in (k_BGMD, v_BGME))


def _new_file(path: Path) -> None:
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        raise BadInput(
            f"{path} is there already, and the store would overwrite it: delete it, or name another place"
        ) from None
    except OSError as error:
        raise BadInput(
            f"no store can be made at {path} ({error.strerror}): name a new file in a folder that exists"
        ) from None


@contextmanager
def applied(
    model: nn.Module,
    *,
    top_k: int = 4,
    blocks: int = 1024,
    selection: str = "per_token_and_head",
    device: torch.device | str | None = None,
    path: Path | str | None = None,
) -> Iterator[list[Reader]]:
    """Inside, a `Reader` stands for every landmark layer in `model`; yields them in the order of the model.

    Args:
        model: holds layers of `attlas.mixer("landmark", ...)`.
        top_k, blocks, selection, device: as in `Reader`.
        path: a folder, made where there is none, in which every reader keeps its store as a new file of its own.
    """
    if _is_landmark(model):
        raise BadInput("the model is a landmark layer, with no place to put a Reader: call Reader(layer) itself")
    if any(isinstance(module, Reader) for module in model.modules()):
        raise BadInput("there are Readers in the model already: leave the other `applied` first")
    # A layer that stands at two places reads two texts.
    places = [
        (parent, name, layer)
        for _, parent in model.named_modules(remove_duplicate=False)
        for name, layer in parent._modules.items()
        if _is_landmark(layer)
    ]
    if not places:
        raise BadInput("the model holds no landmark layer: build them with attlas.mixer('landmark', ..., causal=True)")
    if len({(parent, name) for parent, name, _ in places}) < len(places):
        raise BadInput(
            "a module around a landmark layer is used at two places, which would read one text: put a "
            "copy.deepcopy of it at one of them"
        )
    if path is not None:
        Path(path).mkdir(parents=True, exist_ok=True)
    readers = []
    try:
        for number, (parent, name, layer) in enumerate(places):
            file = None if path is None else Path(path) / f"layer{number}.bin"
            reader = Reader(layer, top_k=top_k, blocks=blocks, selection=selection, device=device, path=file)
            setattr(parent, name, reader)
            readers.append(reader)
        yield readers
    finally:
        for parent, name, layer in places:
            setattr(parent, name, layer)


def _is_landmark(module: nn.Module | None) -> TypeGuard[Attention]:
    return isinstance(module, Attention) and isinstance(module.attend, Landmark)
