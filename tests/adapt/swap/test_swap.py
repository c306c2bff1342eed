"""`swap` itself, on a small encoder of torch.nn."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn

import attlas
from attlas.adapt.swap import Verdict
from attlas.core.errors import BadInput, UnknownName, Unsupported

DIM, HEADS, TOKENS = 16, 2, 6


def encoder(layers: int = 3, dropout: float = 0.0) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(DIM, HEADS, 24, dropout, batch_first=True)
    model = nn.TransformerEncoder(layer, layers).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, TOKENS, DIM, generator=torch.Generator().manual_seed(1))


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_dry_run_changes_nothing_and_says_the_same(x):
    model = encoder()
    before, modules, rng = state(model), list(model.modules()), torch.get_rng_state()
    dry = attlas.swap(model, "agent", grid=(2, 3), agents=4, dry_run=True)
    assert same(before, state(model))
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert torch.equal(rng, torch.get_rng_state())
    assert "dry run" in str(dry)
    assert attlas.swap(model, "agent", grid=(2, 3), agents=4).rows == dry.rows
    with pytest.raises(BadInput, match="dry run"):
        dry.undo()


def test_undo_brings_back_the_modules_whatever_was_trained(x):
    model = encoder()
    before, out, modules = state(model), model(x), list(model.modules())
    report = attlas.swap(model, "linear")
    for parameter in model.layers[0].self_attn.parameters():
        nn.init.normal_(parameter)
    assert not torch.allclose(model(x), out, atol=1e-3)
    report.undo()
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert same(before, state(model))
    assert torch.equal(model(x), out)
    with pytest.raises(BadInput, match="was undone"):
        report.undo()


def test_undo_follows_mode_and_dtype_of_the_model(x):
    model = encoder()
    report = attlas.swap(model, "softmax")
    model.train().double()
    report.undo()
    assert model.layers[0].self_attn.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}


def test_swaps_of_different_modules_are_undone_in_any_order(x):
    model = encoder()
    out = model(x)
    first = attlas.swap(model, "linear", where="layers.0")
    second = attlas.swap(model, "performer", where=["layers.2.self_attn"])
    assert (first.swapped, second.swapped) == (["layers.0.self_attn"], ["layers.2.self_attn"])
    first.undo()
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention
    second.undo()
    assert torch.equal(model(x), out)


def test_layers_are_numbered_also_in_a_second_swap():
    model = encoder()
    attlas.swap(model, "linear", where="layers.0")
    attlas.swap(model, "performer", where="layers.2")
    first, third = (model.layers[layer].self_attn.core.mechanism.site for layer in (0, 2))
    assert (first.layer, first.layers, third.layer, third.layers) == (0, 3, 2, 3)


def test_undo_refuses_where_something_came_after():
    model = encoder()
    report = attlas.swap(model, "linear")
    model.layers[1].self_attn = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
    with pytest.raises(BadInput, match=r"layers\.1\.self_attn is no longer"):
        report.undo()


def test_swapped_twice():
    model = encoder()
    attlas.swap(model, "linear", where="layers.1")
    with pytest.raises(BadInput, match=r"layers\.1\.self_attn holds linear.*undo"):
        attlas.swap(model, "softmax", where="layers.1.*")
    with pytest.raises(BadInput, match="undo"):
        attlas.swap(model, "softmax")


@pytest.mark.parametrize(
    ("where", "swapped"),
    [
        ("*", [0, 1, 2]),
        ("layers.1", [1]),
        ("layers.[02].self_attn", [0, 2]),
        ("layers.0, layers.1", [0, 1]),
        (("layers.2", "layers.0"), [0, 2]),
    ],
)
def test_where(where, swapped):
    report = attlas.swap(encoder(), "softmax", where=where)
    assert report.swapped == [f"layers.{layer}.self_attn" for layer in swapped]


def test_where_that_matches_nothing_names_what_there_is():
    with pytest.raises(UnknownName, match=r"did you mean 'layers\.0\.self_attn'"):
        attlas.swap(encoder(), "softmax", where="layer.0.self_attn")
    with pytest.raises(UnknownName, match=r"such as layers\.0\.linear1 \(Linear\)"):
        attlas.swap(encoder(), "softmax", where="layers.*.linear1")


def test_bad_names_settings_and_models():
    with pytest.raises(UnknownName, match="softmax"):
        attlas.swap(encoder(), "softmaxx")
    with pytest.raises(BadInput, match=r"no setting 'windw'.*window"):
        attlas.swap(encoder(), "neighborhood", windw=3)
    with pytest.raises(BadInput, match="has no setting 'bias'"):
        attlas.swap(encoder(), "softmax", bias=False)
    with pytest.raises(BadInput, match="head counts"):
        attlas.swap(encoder(), "softmax:mqa")
    with pytest.raises(Unsupported, match="no attention module"):
        attlas.swap(nn.Sequential(nn.Linear(3, 3)), "softmax")
    with pytest.raises(BadInput, match="itself an attention module"):
        attlas.swap(nn.MultiheadAttention(4, 2), "softmax")


def test_mechanism_that_cannot_go_anywhere_names_some_that_could():
    model = encoder()
    before = list(model.modules())
    with pytest.raises(Unsupported, match=r"retention does not serve noncausal.*causal=True.*could: .*abc"):
        attlas.swap(model, "retention")
    with pytest.raises(Unsupported, match="pass grid="):
        attlas.swap(model, "agent")
    assert all(a is b for a, b in zip(before, model.modules(), strict=True))


def test_a_place_where_it_cannot_go_is_left_with_the_reason():
    model = nn.Transformer(DIM, HEADS, 1, 1, 24, batch_first=True)
    report = attlas.swap(model, "neighborhood", window=3)
    assert report.swapped == ["encoder.layers.0.self_attn", "decoder.layers.0.self_attn"]
    (left,) = report.of("left")
    assert left.name == "decoder.layers.0.multihead_attn"
    assert "does not serve noncausal cross" in left.notes[0]
    assert type(model.decoder.layers[0].multihead_attn) is nn.MultiheadAttention


def test_verdicts_and_counts():
    shared = 4 * (DIM * DIM + DIM)
    (exact,) = attlas.swap(encoder(1), "softmax").rows
    assert (exact.verdict, exact.carried, exact.new, exact.dropped) == (Verdict.EXACT, shared, {}, {})
    (close,) = attlas.swap(encoder(1), "linear").rows
    assert (close.verdict, close.carried) == (Verdict.APPROXIMATE, shared)
    (scaled,) = attlas.swap(encoder(1), "softmax", scale=1.0).rows
    assert scaled.verdict == Verdict.APPROXIMATE
    (whole,) = attlas.swap(encoder(1), "softmax", scale=1).rows
    assert whole.verdict == Verdict.APPROXIMATE
    (gated,) = attlas.swap(encoder(1), "linear", gate="silu").rows
    assert gated.verdict == Verdict.NEW
    assert gated.new == {"core.gate_proj.weight": DIM * DIM, "core.gate_proj.bias": DIM}
    (mixed,) = attlas.swap(encoder(1), "pool", grid=(2, 3)).rows
    assert (mixed.verdict, mixed.carried) == (Verdict.APPROXIMATE, 0)
    assert sum(mixed.dropped.values()) == shared


def test_report_prints_one_line_for_like_modules():
    text = str(attlas.swap(encoder(), "linear", gate="silu"))
    assert "layers.0.self_attn" in text
    assert "layers.2.self_attn" in text
    assert "layers.1.self_attn" not in text
    assert "core.gate_proj.weight" in text
    assert max(map(len, text.splitlines())) <= 120


def test_state_dict_round_trip_and_names_of_the_old_weights(x):
    old = encoder()
    model, fresh = copy.deepcopy(old), encoder()
    attlas.swap(model, "agent", grid=(2, 3), agents=4)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    attlas.swap(fresh, "agent", grid=(2, 3), agents=4)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))
    assert not model.load_state_dict(old.state_dict(), strict=False).unexpected_keys


def test_deepcopy_and_pickle(x):
    model = encoder()
    attlas.swap(model, "agent", grid=(2, 3), agents=4)
    out = model(x)
    assert torch.equal(copy.deepcopy(model)(x), out)
    loaded = pickle.loads(pickle.dumps(model))
    assert torch.equal(loaded(x), out)
    with pytest.raises(BadInput, match="holds agent"):
        attlas.swap(loaded, "softmax")


def test_what_the_module_was_is_carried():
    model = encoder(2, dropout=0.25).train().double()
    model.layers[0].self_attn.requires_grad_(False)
    model.layers[1].self_attn.eval()
    attlas.swap(model, "softmax")
    first, second = (layer.self_attn for layer in model.layers)
    assert (first.training, second.training) == (True, False)
    assert (first.core.training, second.core.training) == (True, False)
    assert first.core.mechanism.weight_dropout == 0.25
    assert not any(parameter.requires_grad for parameter in first.parameters())
    assert all(parameter.requires_grad for parameter in second.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}


def test_dropout_without_a_counterpart_is_said():
    (row,) = attlas.swap(encoder(1, dropout=0.25), "linear").rows
    assert any("no dropout of weights (0.25)" in note for note in row.notes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mechanism", ["softmax", "linear", "agent"])
def test_half_precision(x, dtype, mechanism):
    model = encoder().to(dtype)
    out = model(x.to(dtype))
    settings = {"agents": 4} if mechanism == "agent" else {}
    attlas.swap(model, mechanism, grid=(2, 3), **settings)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    swapped = model(x.to(dtype))
    assert swapped.dtype == dtype
    assert swapped.isfinite().all()
    if mechanism == "softmax":
        torch.testing.assert_close(swapped, out, rtol=0.05, atol=0.05)


def test_autocast(x):
    model = encoder()
    attlas.swap(model, "linear")
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).isfinite().all()


def test_a_module_at_two_places_stays_one(x):
    model = encoder()
    model.layers[2].self_attn = model.layers[0].self_attn
    out = model(x)
    report = attlas.swap(model, "softmax")
    assert report.swapped == ["layers.0.self_attn", "layers.1.self_attn"]
    assert model.layers[2].self_attn is model.layers[0].self_attn
    torch.testing.assert_close(model(x), out)
    report.undo()
    assert model.layers[2].self_attn is model.layers[0].self_attn
    assert torch.equal(model(x), out)
    attlas.swap(model, "softmax", where="layers.2")
    assert model.layers[2].self_attn is model.layers[0].self_attn


def test_parameters_of_two_attentions_stay_tied():
    model = encoder()
    attention = [layer.self_attn for layer in model.layers]
    attention[1].in_proj_weight = attention[0].in_proj_weight
    attention[2].out_proj.weight = attention[0].out_proj.weight
    report = attlas.swap(model, "linear", where="layers.0,layers.1")
    first, second, third = (layer.self_attn for layer in model.layers)
    assert first.in_proj_weight is second.in_proj_weight
    assert first.in_proj_weight is not attention[0].in_proj_weight
    assert first.out_proj.weight is third.out_proj.weight
    assert any("out_proj.weight is shared" in note for note in report.rows[0].notes)


def test_parameters_shared_with_a_module_that_is_left_stay_tied():
    model = nn.Transformer(DIM, HEADS, 1, 1, 24, batch_first=True)
    layer = model.decoder.layers[0]
    layer.self_attn.in_proj_weight = layer.multihead_attn.in_proj_weight
    report = attlas.swap(model, "neighborhood", window=3)
    assert "decoder.layers.0.multihead_attn" not in report.swapped
    assert layer.self_attn.in_proj_weight is layer.multihead_attn.in_proj_weight


def test_weights_that_cannot_be_copied_are_left():
    model = encoder(2)
    attention = model.layers[0].self_attn
    scale = nn.Parameter(torch.ones(()))
    del attention.in_proj_weight
    attention.in_proj_weight = torch.randn(3 * DIM, DIM) * scale  # computed by a hook, say, and no leaf
    report = attlas.swap(model, "linear")
    assert report.swapped == ["layers.1.self_attn"]
    assert "cannot be copied" in report.of("left")[0].notes[0]


def test_replaced_forward_is_left_and_hooks_are_copied(x):
    model = encoder(2)
    model.layers[0].self_attn.forward = lambda *args, **settings: (args[0], None)
    calls = []
    model.layers[1].self_attn.register_forward_hook(lambda *_: calls.append(1))
    report = attlas.swap(model, "linear")
    assert [row.verdict for row in report.rows] == ["left", "approximate"]
    assert "forward was replaced" in report.rows[0].notes[0]
    assert "hooks on it were kept" in report.rows[1].notes
    model(x)
    assert calls == [1]


def test_old_modules_are_there_as_teachers(x):
    model = encoder()
    attention = model.layers[1].self_attn
    report = attlas.swap(model, "linear")
    assert report.old["layers.1.self_attn"] is attention
    report.undo()
    assert report.old == {}


def test_gradients_reach_every_parameter(x):
    model = encoder()
    attlas.swap(model, "agent", grid=(2, 3), agents=4)
    model(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(("mechanism", "rescale"), [("softmax", 1.0), ("performer", 8**0.5)])
def test_a_scale_of_the_host_is_a_setting_or_a_factor_on_the_queries(monkeypatch, mechanism, rescale):
    from attlas.adapt.swap import torch_nn

    places = torch_nn.TorchHost.places
    monkeypatch.setattr(
        torch_nn.TorchHost, "places", lambda host, model: [replace(place, scale=1.0) for place in places(host, model)]
    )
    model = encoder(1)
    attlas.swap(model, mechanism)
    core = model.layers[0].self_attn.core
    assert core.rescale == pytest.approx(rescale)
    assert getattr(core.mechanism, "scale", 1.0) == 1.0
    q, k, v = torch.randn(3, 1, HEADS, TOKENS, DIM // HEADS)
    plain = core.mechanism(q * rescale, k, v)
    torch.testing.assert_close(core(q, k, v, tokens=torch.randn(1, TOKENS, DIM)), plain.transpose(1, 2).flatten(2))


def test_failure_of_a_host_leaves_the_model_as_it_was(monkeypatch):
    from attlas.adapt.swap import torch_nn

    def fail(self, model, places):
        raise RuntimeError("no")

    monkeypatch.setattr(torch_nn.TorchHost, "enter", fail)
    model = encoder()
    before = list(model.modules())
    with pytest.raises(RuntimeError, match="no"):
        attlas.swap(model, "linear")
    assert all(a is b for a, b in zip(before, model.modules(), strict=True))


def test_what_is_made_causal_is_not_exact(x):
    model = encoder()
    out = model(x)
    report = attlas.swap(model, "softmax", causal=True)
    assert [row.verdict for row in report.rows] == [Verdict.APPROXIMATE] * 3
    assert "now causal whatever the call says" in report.rows[0].notes
    assert (model(x) - out).abs().max() > 0.01


def test_hooks_stay_the_same_hooks(x):
    class Recorder:
        def __init__(self) -> None:
            self.calls = 0

        def hear(self, *_: object) -> None:
            self.calls += 1

    for mechanism in ("linear", "pool"):
        model, recorder = encoder(1), Recorder()
        handle = model.layers[0].self_attn.register_forward_hook(recorder.hear)
        model.layers[0].self_attn.out_proj.register_forward_hook(recorder.hear)
        report = attlas.swap(model, mechanism, grid=(2, 3))
        assert "hooks on it were kept" in report.rows[0].notes
        model(x)
        assert recorder.calls >= 1
        handle.remove()
        assert not model.layers[0].self_attn._forward_hooks
        report.undo()
        assert not model.layers[0].self_attn._forward_hooks


def test_compiled_attention_is_left():
    model = nn.ModuleDict({"a": torch.compile(nn.MultiheadAttention(DIM, HEADS), backend="eager")})
    with pytest.raises(Unsupported, match="compile after the swap"):
        attlas.swap(model, "linear")


def test_distributed_models_are_refused():
    class DistributedDataParallel(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    with pytest.raises(BadInput, match="swap, then wrap"):
        attlas.swap(DistributedDataParallel(encoder()), "linear")


def test_under_inference_mode_parameters_can_still_be_trained(x):
    model = encoder()
    with torch.inference_mode():
        attlas.swap(model, "linear")
    model(x).sum().backward()
    assert model.layers[0].self_attn.in_proj_weight.grad is not None


def test_small_slips():
    assert attlas.swap(encoder(), "softmax", where="layers.0,").swapped == ["layers.0.self_attn"]
    for nothing in ([], "", ","):
        with pytest.raises(BadInput, match=r"where names no module.*'\*' means all"):
            attlas.swap(encoder(), "softmax", where=nothing)
    with pytest.raises(BadInput, match=r"\(6,\)"):
        attlas.swap(encoder(), "neighborhood", grid=6, window=3)
    model = encoder()
    attlas.swap(model, "linear")
    with pytest.raises(BadInput, match="a copy of a swapped model has no report"):
        attlas.swap(copy.deepcopy(model), "softmax")


def test_undo_keeps_the_mode_of_every_part():
    model = encoder().train()
    model.layers[0].self_attn.out_proj.eval()
    attlas.swap(model, "softmax").undo()
    assert model.layers[0].self_attn.training
    assert not model.layers[0].self_attn.out_proj.training


def test_a_report_does_not_claim_weights_that_went():
    report = attlas.swap(encoder(), "pool", grid=(2, 3))
    assert "none of its weights have a meaning here" in report.rows[0].notes
    assert "all weights" not in str(report)
