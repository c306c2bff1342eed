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


def test_a_batch_of_one_has_an_error_too():
    from attlas.adapt.distil import _error

    wanted = torch.tensor([[1.0, 3.0]])
    assert _error(torch.tensor([[2.0, 2.0]]), wanted).item() == pytest.approx(1)


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


def work_of(model: nn.Module, report: attlas.adapt.swap.Report, run=None):
    from attlas.adapt.distil import Distilled, _run, _Work

    news = {name: model.get_submodule(name) for name in report.old}
    return _Work(model, news, report.teachers, run or _run, Distilled({name: [] for name in news}))


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_cache_that_the_teacher_fills_is_not_the_students(kind, use_cache):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    ids = torch.randint(0, 50, (2, 7))
    batch = {"input_ids": ids}
    if kind == "llama":
        config = transformers.LlamaConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        model = transformers.LlamaForCausalLM(config).eval()
    else:
        config = transformers.T5Config(
            vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0
        )
        model = transformers.T5ForConditionalGeneration(config).eval()
        batch |= {"decoder_input_ids": ids}
    report = attlas.swap(model, "softmax", scale=0.1)
    for name in report.old:  # keys of the student's own, which the teacher's must not stand beside
        new = model.get_submodule(name)
        nn.init.normal_((new.k_proj if kind == "llama" else new.k).weight)
    work = work_of(model, report, lambda m, x: m(**x, use_cache=use_cache))
    errors = work.layer_errors(batch)
    assert set(errors) == set(report.old)
    torch.stack(list(errors.values())).sum().backward()
    for name in report.old:
        for key, parameter in model.get_submodule(name).named_parameters():
            assert "relative_attention_bias" in key or parameter.grad is not None, f"{name}.{key}"
    attending = {name: error.item() for name, error in errors.items()}
    alone = work_of(model, report, lambda m, x: m(**x, use_cache=False)).layer_errors(batch)
    assert attending == pytest.approx({name: error.item() for name, error in alone.items()})


def test_no_cache_is_kept_while_distilling():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    model = transformers.LlamaForCausalLM(config)
    report = attlas.swap(model, "linear")
    seen = []
    model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("past_key_values")), with_kwargs=True
    )
    ids = torch.randint(0, 50, (2, 7))
    distil(model, report, [{"input_ids": ids}], layer_steps=1, whole_steps=1, console=quiet())
    assert set(seen) == {None}
    assert model.config.use_cache


def test_every_call_of_a_layer_is_heard():
    class Thrice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = x + self.a(x, x, x)[0]
            return x

    model = Thrice()
    report = attlas.swap(model, "linear")
    calls = []
    model.a.core.register_forward_hook(lambda *_: calls.append(1))
    distil(model, report, data(1), layer_steps=1, whole_steps=0, console=quiet())
    assert len(calls) == 3


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
def test_models_of_timm(name):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    vit = {"embed_dim": 16, "num_heads": 2, "depth": 1, "img_size": 32}
    swin = {"embed_dim": 16, "num_heads": (2,), "depths": (2,), "img_size": 40, "window_size": 4}
    model = timm.create_model(name, num_classes=3, **(vit if name.startswith("vit") else swin))
    for value in model.parameters():
        value.data += 0.2 * torch.randn_like(value)
    size = 32 if name.startswith("vit") else 40
    images = torch.randn(2, 3, size, size)
    expected = model.eval()(images)
    report = attlas.swap(model, "linear", where="blocks.*.attn" if name.startswith("vit") else "layers.*")
    with work_of(model, report).old():
        torch.testing.assert_close(model(images), expected)
    done = distil(model, report, [images], layer_steps=20, whole_steps=2, learning_rate=5e-3, console=quiet())
    for errors in done.layers.values():
        assert errors[-1] < errors[0]
    report.undo()
    torch.testing.assert_close(model(images), expected)


def test_a_model_that_was_moved_since():
    model, report = swapped()
    model.double()
    done = distil(model, report, [data(1)[0].double()], layer_steps=1, whole_steps=1, console=quiet())
    assert len(done.whole) == 1
    report.undo()
    assert {value.dtype for value in model.parameters()} == {torch.float64}


def test_only_the_model_that_was_swapped():
    model, report = swapped()
    with pytest.raises(BadInput, match="pass the model that was swapped"):
        distil(nn.Sequential(model), report, data(), console=quiet())
    with pytest.raises(BadInput, match="pass the model that was swapped"):
        distil(Model(), report, data(), console=quiet())


def test_what_cannot_learn():
    model, report = swapped()
    model.requires_grad_(False)
    with pytest.raises(BadInput, match=r"requires_grad_\(True\)"):
        distil(model, report, data(), console=quiet())
    model = Model().half()
    with pytest.raises(BadInput, match=r"model\.float\(\)"):
        distil(model, attlas.swap(model, "linear"), data(), console=quiet())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_on_inside(mode):
    model, report = swapped()
    before = model.encoder.layers[0].self_attn.in_proj_weight.clone()
    with mode():
        distil(model, report, data(), layer_steps=1, whole_steps=1, console=quiet())
        distil(model, report, [torch.randn(4, 9, 16)], layer_steps=1, whole_steps=1, console=quiet())
    assert not torch.equal(model.encoder.layers[0].self_attn.in_proj_weight, before)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_errors_that_are_not_finite_change_and_save_nothing(tmp_path):
    model, report = swapped()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    path = tmp_path / "state.pt"
    bad = data(1)[0]
    bad[0, 0, 0] = torch.nan
    with pytest.raises(BadInput, match=r"error of encoder\.layers\.0\.self_attn.*not finite"):
        distil(model, report, [bad], layer_steps=2, whole_steps=1, checkpoint=path, console=quiet())
    assert not path.exists()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("mechanism", "settings", "said"),
    [
        ("performer", {}, "other mechanism, linear"),
        ("linear", {"layer_steps": 400}, "other steps"),
        ("linear", {"whole_steps": 5}, "other steps"),
        ("linear", {"learning_rate": 1e-2}, r"other learning rate, 0\.001"),
        ("linear", {"gate": "silu"}, "other parameters"),
    ],
)
def test_checkpoints_of_another_work_are_refused(mechanism, settings, said, tmp_path):
    path = tmp_path / "state.pt"
    steps = {"layer_steps": 2, "whole_steps": 2, "checkpoint": path, "console": quiet()}
    model, report = swapped()
    distil(model, report, data(), **steps)
    report.undo()
    gate = {"gate": settings["gate"]} if "gate" in settings else {}
    report = attlas.swap(model, mechanism, **gate)
    with pytest.raises(BadInput, match=said):
        distil(model, report, data(), **steps | {key: settings[key] for key in settings if key != "gate"})


def test_parameters_of_layers_that_were_left_do_not_change():
    torch.manual_seed(0)
    model = Model()
    first, second = (layer.self_attn for layer in model.encoder.layers)
    first.out_proj.weight = second.out_proj.weight
    report = attlas.swap(model, "linear", where="encoder.layers.0")
    before = second.out_proj.weight.clone()
    distil(model, report, data(), layer_steps=2, whole_steps=1, console=quiet())
    assert torch.equal(second.out_proj.weight, before)
    assert model.encoder.layers[0].self_attn.out_proj.weight is second.out_proj.weight
