"""Every published network against the one file of published figures, and against timm where timm has it."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from attlas import models
from attlas.bench.macs import macs
from attlas.models.registry import Published

FIGURES = models.figures()


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return models.create(name)


def parameters(model: nn.Module) -> int:
    return sum(each.numel() for each in model.parameters())


def counted(text: str) -> tuple[float, float]:
    """The number in "28.4M" and how far another one may be away to be printed alike."""
    digits = text.removesuffix("M")
    if digits == text:
        return float(text), 0
    decimals = len(digits.partition(".")[2])
    return 1e6 * float(digits), 0.5e6 * 10**-decimals + 1


def test_every_network_has_figures_and_every_row_is_a_network() -> None:
    networks = {name for name in models.models() if not name.endswith("_micro") and not name.startswith("metaformer")}
    assert networks == set(FIGURES)


def test_every_family_has_a_size_for_tests() -> None:
    families = {models.model(name).family for name in models.models()}
    assert families == {models.model(name).family for name in models.models("*_micro")}


@pytest.mark.parametrize("name", FIGURES)
def test_parameters_and_macs(name: str) -> None:
    figures, model = FIGURES[name], on_meta(name)
    expected, slack = counted(figures.parameters)
    assert abs(parameters(model) - expected) <= slack, f"{parameters(model):,} parameters"
    if figures.gmacs is not None:
        size, chans = figures.img_size, 3
        found = macs(model, torch.empty(1, chans, size, size, device="meta")) / 1e9
        assert found == pytest.approx(figures.gmacs, rel=0.02), f"{found:.3f} GMACs"


def perturb(model: nn.Module, generator: torch.Generator) -> None:
    """Move every weight and statistic, so that no zero or tiny start hides a wrong one."""
    with torch.no_grad():
        for name, value in model.state_dict().items():  # no masks, which are buffers as well
            if not value.is_floating_point():
                continue
            noise = torch.randn(value.shape, generator=generator)
            if name.endswith("running_var"):
                value.add_(0.2 * noise.abs())
            elif value.ndim < 2 or value.numel() == max(value.shape):
                value.add_(0.2 * noise)
            else:
                value.add_(0.02 * noise)


def pooled_first(ours: nn.Module, image: Tensor) -> Tensor:
    """Logits in the order of timm's PoolFormer, which takes the mean before the last norm."""
    head = ours.head
    return head.classifier(head.before(ours.forward_features(image).mean((2, 3), keepdim=True)).flatten(1))


LOGITS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {"poolformer": pooled_first}


def smallest(name: str) -> bool:
    """Whether it is the smallest of its family that timm has; the others differ in sizes alone."""
    family = [
        each
        for each, figures in FIGURES.items()
        if figures.timm and models.model(each).build is models.model(name).build and stem(each) == stem(name)
    ]
    return name == min(family, key=lambda each: counted(FIGURES[each].parameters)[0])


def stem(name: str) -> str:
    return re.split(r"_|\d", name)[0]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if smallest(name) else [pytest.mark.full])
        for name, figures in FIGURES.items()
        if figures.timm
    ],
)
def test_timms_weights_give_timms_logits(name: str) -> None:
    timm = pytest.importorskip("timm")
    figures, generator = FIGURES[name], torch.Generator().manual_seed(0)
    theirs = timm.create_model(figures.timm).eval()
    perturb(theirs, generator)
    ours = models.create(name, weights=theirs.state_dict(), source="timm").eval()
    image = torch.randn(2, 3, figures.img_size, figures.img_size, generator=generator)
    with torch.no_grad():
        found, expected = LOGITS.get(models.model(name).family, nn.Module.__call__)(ours, image), theirs(image)
    assert expected.std() > 1e-3
    assert (found - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("name", [name for name, figures in FIGURES.items() if figures.timm])
def test_every_weight_of_timms_finds_its_place(name: str) -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        theirs, ours = timm.create_model(FIGURES[name].timm), models.create(name)
    entry: Published = models.model(name)
    state = entry.key_maps["timm"](dict(theirs.state_dict()), ours)
    assert {key: value.shape for key, value in state.items()} == {
        key: value.shape for key, value in ours.state_dict().items()
    }
