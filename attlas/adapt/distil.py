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

import copy
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

from attlas.adapt.swap.host import MARK, dtype_and_device
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

    The model runs in evaluation mode and without a cache throughout, and is afterwards as it was. Parameters that are
    frozen, or that the old modules hold too (shared with layers that were left), do not change.

    Args:
        model: that was swapped; it may have been moved since.
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
        BadInput: nothing was swapped, nothing can learn, nothing to learn from, an error that is not finite (before
            it changed or saved anything), or a checkpoint of another work.
    """
    if not report.old:
        raise BadInput("the report holds no old modules: it was undone, or a dry run; swap again and distil then")
    if min(layer_steps, whole_steps) < 0 or layer_steps + whole_steps < 1 or every < 1:
        raise BadInput(f"steps count batches, got layer_steps={layer_steps}, whole_steps={whole_steps}, every={every}")
    inexact = [row.name for row in report.rows if row.name in report.old and row.verdict is not Verdict.EXACT]
    if not inexact:
        raise BadInput(f"{report.mechanism} is exact everywhere it was swapped in: there is nothing to distil")
    news = {name: _swapped(model, name, report.mechanism) for name in inexact}
    olds = {name: report.teachers[name] for name in inexact}
    work = _Work(model, news, olds, run or _run, Distilled({name: [] for name in news}))
    _check_learning(work.learning)
    for name, old in olds.items():
        _follow(old, news[name])
    about = {
        "mechanism": report.mechanism,
        "modules": list(news),
        "parameters": {name: {key: list(x.shape) for key, x in new.state_dict().items()} for name, new in news.items()},
        "steps": {"layers": layer_steps, "whole": whole_steps},
        "learning rate": learning_rate,
    }
    path = None if checkpoint is None else Path(checkpoint)
    console = console or Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bars = Progress(*columns, console=console, transient=True)
    with torch.inference_mode(False), torch.enable_grad(), _quiet(work), bars:
        parts = {"layers": (layer_steps, work.layer_errors), "whole": (whole_steps, work.whole_error)}
        saved = _load(path, work, about)
        for part, (steps, errors) in parts.items():
            _descend(work, part, steps, errors, loader, learning_rate, path, every, saved, about, bars)
    console.print(work.done)
    return work.done


def _swapped(model: nn.Module, name: str, mechanism: str) -> nn.Module:
    """The module that the swap put into the model."""
    try:
        new = model.get_submodule(name)
    except AttributeError:
        new = None
    if getattr(new, MARK, None) != mechanism:
        raise BadInput(f"the model has no {mechanism} at {name}: pass the model that was swapped, not one around it")
    assert new is not None
    return new


def _check_learning(learning: list[nn.Parameter]) -> None:
    if not learning:
        raise BadInput(
            "no parameter of the swapped modules can learn: they have none, are frozen (call requires_grad_(True)), or "
            "share them with modules that were left"
        )
    if any(each.dtype == torch.float16 for each in learning):
        raise BadInput("steps of the optimizer vanish or overflow in float16: call model.float() or model.bfloat16()")


def _follow(old: nn.Module, new: nn.Module) -> None:
    """Move the old module to where the model went since the swap."""
    if any(each.is_floating_point() for each in new.parameters()):
        dtype, device = dtype_and_device(new)
        if (dtype, device) != dtype_and_device(old):
            old.to(device, dtype)


@contextmanager
def _quiet(work: _Work) -> Iterator[None]:
    """Evaluation, no caches, and gradients for nothing but what learns; as it was afterwards."""
    modules = {each: each.training for whole in (work.model, *work.olds.values()) for each in whole.modules()}
    configs: dict[int, Any] = {id(config): config for each in modules if (config := getattr(each, "config", None))}
    configs = {at: config for at, config in configs.items() if hasattr(config, "use_cache")}
    caches = [(config, config.use_cache) for config in configs.values()]
    learning = {id(each) for each in work.learning}
    frozen = [each for each in work.model.parameters() if each.requires_grad and id(each) not in learning]
    try:
        for module in modules:
            module.training = False
        for config, _ in caches:
            config.use_cache = False
        for each in frozen:
            each.requires_grad_(False)
        yield
    finally:
        for module, training in modules.items():
            module.training = training
        for config, use in caches:
            config.use_cache = use
        for each in frozen:
            each.requires_grad_(True)


Heard = dict[str, list[tuple[tuple[Any, ...], dict[str, Any], Tensor]]]
"""What each module was asked and said, call by call."""


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
        """The parameters of the swapped modules that learn, each once; none that the old ones hold too."""
        held = {id(each) for old in self.olds.values() for each in old.parameters()}
        found = {id(each): each for new in self.news.values() for each in new.parameters() if each.requires_grad}
        return [each for each in found.values() if id(each) not in held]

    @contextmanager
    def old(self, heard: Heard | None = None) -> Iterator[None]:
        """The old modules answer inside the block; what each was asked and said goes to `heard`."""

        def answering(name: str) -> Callable[..., Any]:
            def answer(*args: Any, **kwargs: Any) -> Any:
                asked = args, {key: _kept(value) for key, value in kwargs.items()}
                said = self.olds[name](*args, **kwargs)
                if heard is not None:
                    heard.setdefault(name, []).append((*asked, _tensor(said)))
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
        heard: Heard = {}
        with torch.no_grad(), self.old(heard):
            self.run(self.model, batch)
        if not heard:
            raise BadInput("the model ran without calling a swapped module: nothing to learn from this batch")
        return {
            name: torch.stack(
                [_error(_tensor(self.news[name](*args, **kwargs)), said) for args, kwargs, said in calls]
            ).mean()
            for name, calls in heard.items()
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
    about: dict[str, Any],
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
            _check_finite(found, nn.utils.clip_grad_norm_(learning, 1.0))
            optimizer.step()
            schedule.step()
            work.steps[part] += 1
            for name, error in found.items():
                (work.done.layers[name] if name else work.done.whole).append(error.item())
            mean = sum(error.item() for error in found.values()) / len(found)
            bars.update(bar, completed=work.steps[part], description=f"{part}, error {mean:.4f}")
            if path is not None and work.steps[part] % every == 0:
                _save(path, work, part, about, optimizer, schedule)
    finally:
        optimizer.zero_grad()
        if path is not None and work.steps[part] > first:
            _save(path, work, part, about, optimizer, schedule)


def _check_finite(errors: dict[str, Tensor], norm: Tensor) -> None:
    wrong = [name or "the whole model" for name, error in errors.items() if not error.isfinite()]
    if wrong or not norm.isfinite():
        raise BadInput(
            f"the {'error' if wrong else 'gradient'} of {', '.join(wrong) or 'the swapped modules'} is not finite, so "
            "nothing more was learned: look for values that are not finite in the batch and in what the old modules "
            "say (sequences of nothing but padding?), or take a lower learning rate"
        )


def _rate(step: int, steps: int) -> float:
    """The learning rate of a step (from 0) as a share of its highest."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2


def _error(found: Tensor, wanted: Tensor) -> Tensor:
    """Squared error relative to the variance of what is wanted, over all but the last axis; of one row, in the row."""
    wanted = wanted.float()
    rows = wanted.flatten(0, -2)
    spread = (rows - (rows.mean(0) if len(rows) > 1 else rows.mean())).square().mean()
    return (found.float() - wanted).square().mean() / spread.clamp_min(torch.finfo(torch.float32).tiny)


def _kept(value: Any) -> Any:
    """What a call was given, safe from what the call does to it: a cache is filled."""
    return copy.deepcopy(value) if hasattr(value, "get_seq_length") else value


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
        return (batch.clone() if batch.is_inference() else batch).to(device)
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return [_moved(value, device) for value in batch]
    return batch


def _save(
    path: Path, work: _Work, part: str, about: dict[str, Any], optimizer: torch.optim.Optimizer, schedule: Any
) -> None:
    """Write the state beside the file, then put it in its place."""
    state = {
        "about": about,
        "part": part,
        "steps": work.steps,
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


def _load(path: Path | None, work: _Work, about: dict[str, Any]) -> dict[str, Any]:
    """What an earlier call reached, its weights put in place; empty where there is none."""
    if path is None or not path.exists():
        return {}
    state = torch.load(path, map_location=work.learning[0].device, weights_only=True)
    theirs = state.get("about", {})
    for key, value in about.items():
        if theirs.get(key) != value:
            was = f", {theirs[key]}" if key in theirs and key != "parameters" else ""
            raise BadInput(f"{path} is of a work with other {key}{was}; give another checkpoint= or remove it")
    for name, new in work.news.items():
        new.load_state_dict(state["modules"][name])
    work.done.layers, work.done.whole, work.steps = state["layers"], state["whole"], state["steps"]
    return state
