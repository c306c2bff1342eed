"""Teach swapped layers what the old ones did, on the user's own data.

    report = attlas.swap(model, "agent")
    distil(model, report, loader, layer_steps=300, whole_steps=100)

Layer by layer first: the model runs with its old attention f, and each new one g learns to answer the inputs X that the
old one met there, all layers at once and each for itself:

    minimise |g(X) - f(X)|² / |f(X) - mean f(X)|²

A layer that answers the mean has an error of 1. Then the whole: the swapped layers together learn the outputs of the
old model in the same measure, so that what their errors add up to goes too. Labels are not needed, nor read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

from attlas.adapt.swap.report import Report, Verdict
from attlas.core.errors import BadInput

Run = Callable[[nn.Module, Any], Any]
"""Calls the model on one batch of the loader and gives what it gives."""

WARM_UP = 0.1
"""Share of the steps in which the learning rate rises."""

SHOWN = 20
"""Steps at each end that a printed error is the mean of."""


@dataclass
class Distilled:
    """How it went: the error at every step.

    Attributes:
        layers: name of a swapped module -> its errors, relative to the variance of the old one's output.
        whole: the same of the model's output.
    """

    layers: dict[str, list[float]] = field(default_factory=dict)
    whole: list[float] = field(default_factory=list)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for heading, justify in (("relative error of", "left"), ("first", "right"), ("last", "right")):
            table.add_column(heading, justify=justify)  # type: ignore[arg-type]
        for name, errors in [*self.layers.items(), ("the whole model", self.whole)]:
            if errors:
                table.add_row(name, *(f"{sum(some) / len(some):.4f}" for some in (errors[:SHOWN], errors[-SHOWN:])))
        yield table


def distil(
    model: nn.Module,
    report: Report,
    loader: Iterable[Any],
    *,
    layer_steps: int = 300,
    whole_steps: int = 100,
    learning_rate: float = 1e-3,
    run: Run | None = None,
    checkpoint: str | Path | None = None,
    every: int = 50,
    console: Console | None = None,
) -> Distilled:
    """Distil the old attention of a swapped model into the new one; only swapped modules that are not exact change.

    The model runs in evaluation mode throughout, and is afterwards in the mode it was in.

    Args:
        model: that was swapped.
        report: of that swap, which holds the old modules.
        loader: batches of the user's data, gone through again and again.
        layer_steps: batches for the layers, each for itself.
        whole_steps: batches for all together.
        learning_rate: the highest of a warm-up and a cosine, in both parts.
        run: how to call the model on a batch. By default a mapping becomes keyword arguments without "labels", of a
            sequence the first entry is the input, and a tensor is the input.
        checkpoint: a file for the state of the work, from which the same call goes on.
        every: steps between two states; one is also kept when the work is interrupted.
        console: where progress and the errors are printed.

    Raises:
        BadInput: nothing was swapped, nothing to learn from, or a checkpoint of another work.
    """
    if not report.old:
        raise BadInput("the report holds no old modules: it was undone, or a dry run; swap again and distil then")
    if min(layer_steps, whole_steps) < 0 or layer_steps + whole_steps < 1 or every < 1:
        raise BadInput(f"steps count batches, got layer_steps={layer_steps}, whole_steps={whole_steps}, every={every}")
    inexact = [row.name for row in report.rows if row.name in report.old and row.verdict is not Verdict.EXACT]
    if not inexact:
        raise BadInput(f"{report.mechanism} is exact everywhere it was swapped in: there is nothing to distil")
    news = {name: model.get_submodule(name) for name in inexact}
    olds = {name: report.old[name] for name in inexact}
    work = _Work(model, news, olds, run or _run, Distilled({name: [] for name in news}))
    path = None if checkpoint is None else Path(checkpoint)
    console = console or Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    modes = {each: each.training for whole in (model, *report.old.values()) for each in whole.modules()}
    for each in modes:
        each.training = False
    try:
        with Progress(*columns, console=console, transient=True) as bars:
            parts = {"layers": (layer_steps, work.layer_errors), "whole": (whole_steps, work.whole_error)}
            saved = _load(path, work, {part: steps for part, (steps, _) in parts.items()})
            for part, (steps, errors) in parts.items():
                _descend(work, part, steps, errors, loader, learning_rate, path, every, saved, bars)
    finally:
        for each, training in modes.items():
            each.training = training
    console.print(work.done)
    return work.done


@dataclass
class _Work:
    """The model with both kinds of attention, and what was reached."""

    model: nn.Module
    news: dict[str, nn.Module]
    olds: dict[str, nn.Module]
    run: Run
    done: Distilled
    steps: dict[str, int] = field(default_factory=lambda: {"layers": 0, "whole": 0})

    @property
    def learning(self) -> list[nn.Parameter]:
        """The parameters of the swapped modules, each once."""
        found = {id(each): each for new in self.news.values() for each in new.parameters() if each.requires_grad}
        return list(found.values())

    @contextmanager
    def old(self, heard: dict[str, tuple[tuple[Any, ...], dict[str, Any], Tensor]] | None = None) -> Iterator[None]:
        """The old modules answer inside the block; what each was asked and said goes to `heard`."""

        def answering(name: str) -> Callable[..., Any]:
            def answer(*args: Any, **kwargs: Any) -> Any:
                said = self.olds[name](*args, **kwargs)
                if heard is not None:
                    heard[name] = (args, kwargs, _tensor(said))
                return said

            return answer

        for name, new in self.news.items():
            new.forward = answering(name)
        try:
            yield
        finally:
            for new in self.news.values():
                del new.forward

    def layer_errors(self, batch: Any) -> dict[str, Tensor]:
        """The error of each layer on what the old model's layers meet."""
        heard: dict[str, tuple[tuple[Any, ...], dict[str, Any], Tensor]] = {}
        with torch.no_grad(), self.old(heard):
            self.run(self.model, batch)
        if not heard:
            raise BadInput("the model ran without calling a swapped module: nothing to learn from this batch")
        return {
            name: _error(_tensor(self.news[name](*args, **kwargs)), said)
            for name, (args, kwargs, said) in heard.items()
        }

    def whole_error(self, batch: Any) -> dict[str, Tensor]:
        """The error of the model's output."""
        with torch.no_grad(), self.old():
            wanted = _tensor(self.run(self.model, batch))
        return {"": _error(_tensor(self.run(self.model, batch)), wanted)}


def _descend(
    work: _Work,
    part: str,
    steps: int,
    errors: Callable[[Any], dict[str, Tensor]],
    loader: Iterable[Any],
    learning_rate: float,
    path: Path | None,
    every: int,
    saved: dict[str, Any],
    bars: Progress,
) -> None:
    """One part of the work, from where it stands."""
    learning = work.learning
    optimizer = torch.optim.AdamW(learning, learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    first = work.steps[part]
    if saved.get("part") == part:
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
    bar = bars.add_task(part, total=steps, completed=first)
    try:
        for batch in _batches(loader, steps - first, learning[0].device):
            found = errors(batch)
            optimizer.zero_grad()
            torch.stack(list(found.values())).sum().backward()
            nn.utils.clip_grad_norm_(learning, 1.0)
            optimizer.step()
            schedule.step()
            work.steps[part] += 1
            for name, error in found.items():
                (work.done.layers[name] if name else work.done.whole).append(error.item())
            mean = sum(error.item() for error in found.values()) / len(found)
            bars.update(bar, completed=work.steps[part], description=f"{part}, error {mean:.4f}")
            if path is not None and work.steps[part] % every == 0:
                _save(path, work, part, steps, optimizer, schedule)
    finally:
        if path is not None and work.steps[part] > first:
            _save(path, work, part, steps, optimizer, schedule)


def _rate(step: int, steps: int) -> float:
    """The learning rate of a step (from 0) as a share of its highest."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2


def _error(found: Tensor, wanted: Tensor) -> Tensor:
    """Squared error relative to the variance of what is wanted, over all but the last axis."""
    wanted = wanted.float()
    spread = (wanted - wanted.flatten(0, -2).mean(0)).square().mean()
    return (found.float() - wanted).square().mean() / spread.clamp_min(torch.finfo(torch.float32).tiny)


def _tensor(said: Any) -> Tensor:
    """The tensor that counts in an output: it, its logits, or its first entry."""
    if isinstance(said, Tensor):
        return said
    for name in ("logits", "last_hidden_state"):
        if isinstance(found := getattr(said, name, None), Tensor):
            return found
    if isinstance(said, Sequence) and said:
        return _tensor(said[0])
    raise BadInput(f"no tensor to learn from in an output of type {type(said).__name__}; pass run= that gives one")


def _run(model: nn.Module, batch: Any) -> Any:
    """The default `run`."""
    if isinstance(batch, Mapping):
        return model(**{key: value for key, value in batch.items() if key != "labels"})
    return model(batch[0] if isinstance(batch, Sequence) else batch)


def _batches(loader: Iterable[Any], count: int, device: torch.device) -> Iterator[Any]:
    """So many batches, from the start again whenever the loader ends, on the device of the model."""
    given = 0
    while given < count:
        before = given
        for batch in loader:
            if given == count:
                return
            given += 1
            yield _moved(batch, device)
        if given == before:
            raise BadInput("the loader gave no batch; an iterator that has ended cannot be gone through again")


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return [_moved(value, device) for value in batch]
    return batch


def _save(path: Path, work: _Work, part: str, steps: int, optimizer: torch.optim.Optimizer, schedule: Any) -> None:
    """Write the state beside the file, then put it in its place."""
    state = {
        "part": part,
        "steps": work.steps,
        "wanted": steps,
        "modules": {name: new.state_dict() for name, new in work.news.items()},
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "layers": work.done.layers,
        "whole": work.done.whole,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    torch.save(state, beside)
    beside.replace(path)


def _load(path: Path | None, work: _Work, steps: dict[str, int]) -> dict[str, Any]:
    """What an earlier call reached, its weights put in place; empty where there is none."""
    if path is None or not path.exists():
        return {}
    state = torch.load(path, map_location=work.learning[0].device, weights_only=True)
    if state.get("modules", {}).keys() != work.news.keys():
        raise BadInput(f"{path} is of a work on other modules; give another checkpoint= or remove it")
    if state["wanted"] != steps[state["part"]]:
        raise BadInput(f"{path} is of a work of other steps, {state['wanted']} for {state['part']}; remove it")
    for name, new in work.news.items():
        new.load_state_dict(state["modules"][name])
    work.done.layers, work.done.whole, work.steps = state["layers"], state["whole"], state["steps"]
    return state
