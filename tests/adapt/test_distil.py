import io

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import attlas
from attlas.adapt.distil import distil
from attlas.core.errors import BadInput


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


def data(batches: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 9, 16, generator=generator) for _ in range(batches)]


def swapped(mechanism: str = "linear") -> tuple[Model, attlas.adapt.swap.Report]:
    torch.manual_seed(0)
    model = Model().train()
    for value in model.parameters():  # so that attention says something
        if value.ndim > 1:
            nn.init.normal_(value, std=0.3)
    return model, attlas.swap(model, mechanism)


def quiet() -> Console:
    return Console(file=io.StringIO(), width=100)


def test_layers_and_the_whole_come_nearer():
    model, report = swapped()
    frozen = {key: value.clone() for key, value in model.state_dict().items() if "self_attn" not in key}
    console = quiet()
    done = distil(model, report, data(), layer_steps=60, whole_steps=40, learning_rate=5e-3, console=console)
    assert list(done.layers) == ["encoder.layers.0.self_attn", "encoder.layers.1.self_attn"]
    for errors in done.layers.values():
        assert len(errors) == 60
        assert sum(errors[-5:]) < 0.7 * sum(errors[:5])
    assert len(done.whole) == 40
    assert sum(done.whole[-5:]) < 0.7 * sum(done.whole[:5])
    for key, value in frozen.items():
        assert torch.equal(model.state_dict()[key], value), f"{key} is not of a swapped module"
    assert model.training
    assert all(module.training for module in model.modules())
    said = console.file.getvalue()
    assert "encoder.layers.1.self_attn" in said
    assert f"{sum(done.whole[-20:]) / 20:.4f}" in said
    report.undo()
    assert type(model.encoder.layers[0].self_attn) is nn.MultiheadAttention


def test_what_is_exact_has_nothing_to_learn():
    model, report = swapped("softmax")
    with pytest.raises(BadInput, match="softmax is exact everywhere"):
        distil(model, report, data(), console=quiet())


def test_the_old_layers_are_heard_without_dropout():
    model, report = swapped("linear")
    first, again = (
        distil(model, report, data(1), layer_steps=1, whole_steps=1, learning_rate=1e-12, console=quiet())
        for _ in range(2)
    )
    assert first.whole == pytest.approx(again.whole, rel=1e-5)
    for name, errors in first.layers.items():
        assert errors == pytest.approx(again.layers[name], rel=1e-5)
    assert report.old["encoder.layers.0.self_attn"].training, "the mode it was in"


def test_the_error_of_a_layer_that_answers_the_mean_is_one():
    from attlas.adapt.distil import _error

    wanted = torch.randn(50, 7, 16) + 3
    assert _error(wanted.mean((0, 1)).expand_as(wanted), wanted).item() == pytest.approx(1)


@pytest.mark.parametrize("stop", [3, 10, 13])
def test_an_interrupted_work_goes_on(stop, tmp_path):
    def work(loader, path):
        model, report = swapped()
        torch.manual_seed(1)
        return model, distil(
            model, report, loader, layer_steps=10, whole_steps=6, checkpoint=path, every=2, console=quiet()
        )

    class Once:
        """The same batch always, until the plug is pulled."""

        def __init__(self, most: int) -> None:
            self.left = most

        def __iter__(self):
            for batch in data(1) * 100:
                if not self.left:
                    raise KeyboardInterrupt
                self.left -= 1
                yield batch

    whole, expected = work(Once(1000), None)
    path = tmp_path / "state.pt"
    with pytest.raises(KeyboardInterrupt):
        work(Once(stop), path)
    model, done = work(Once(1000), path)
    assert done == expected
    for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    _, done = work(Once(0), path)
    assert done == expected, "what is finished is not done again"
    other, report = swapped()
    with pytest.raises(BadInput, match="other steps"):
        distil(other, report, data(), layer_steps=10, whole_steps=7, checkpoint=path, console=quiet())
    torch.manual_seed(0)
    small = nn.ModuleDict({"a": Model()})
    report = attlas.swap(small, "linear")
    with pytest.raises(BadInput, match="other modules"):
        distil(small, report, data(), layer_steps=10, whole_steps=6, checkpoint=path, console=quiet())


def test_batches_of_every_kind():
    class Named(Model):
        def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:  # type: ignore[override]
            assert labels is None
            return super().forward(x)  # type: ignore[return-value]

    torch.manual_seed(0)
    model = Named()
    report = attlas.swap(model, "linear")
    for batch in ({"x": data(1)[0], "labels": torch.zeros(4)}, (data(1)[0], torch.zeros(4)), data(1)[0]):
        done = distil(model, report, [batch], layer_steps=1, whole_steps=1, console=quiet())
        assert len(done.whole) == 1
    twice = distil(
        model, report, [data(1)[0]], layer_steps=1, whole_steps=0, run=lambda m, x: m(2 * x), console=quiet()
    )
    assert not twice.whole


def test_bad_input():
    model, report = swapped()
    with pytest.raises(BadInput, match="gave no batch"):
        distil(model, report, iter(data(2)), layer_steps=3, whole_steps=0, console=quiet())
    with pytest.raises(BadInput, match="layer_steps=0, whole_steps=0"):
        distil(model, report, data(), layer_steps=0, whole_steps=0, console=quiet())
    with pytest.raises(BadInput, match="pass run="):
        distil(model, report, data(), layer_steps=0, whole_steps=1, run=lambda m, x: 3, console=quiet())
    report.undo()
    with pytest.raises(BadInput, match="swap again"):
        distil(model, report, data(), console=quiet())
    with pytest.raises(BadInput, match="swap again"):
        distil(model, attlas.swap(model, "linear", dry_run=True), data(), console=quiet())
