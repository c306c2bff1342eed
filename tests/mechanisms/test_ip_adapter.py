"""IP-Adapter: text and image side by side."""

import pytest
import torch

import attlas
from attlas.core.errors import BadInput
from attlas.mechanisms.softmax.ip_adapter import ImagePrompt, IPAdapter

DIM, TEXT, IMAGE = 32, 7, 4


def base(**settings):
    return attlas.mixer("softmax", DIM, 4, context_dim=24, bias=False, **settings).double()


def tokens():
    x = torch.randn(2, 9, DIM, dtype=torch.float64)
    return x, torch.randn(2, TEXT, 24, dtype=torch.float64), torch.randn(2, IMAGE, 24, dtype=torch.float64)


def trained(layer):
    """The adapter after its image projections moved away from the text's."""
    with torch.no_grad():
        layer.k_image.weight.normal_(std=0.3)
        layer.v_image.weight.normal_(std=0.3)
    return layer


def test_without_the_image_it_is_the_layer_that_was_there():
    layer, (x, text, image) = base(), tokens()
    adapter = trained(IPAdapter.from_layer(layer, scale=0.0))
    assert torch.allclose(adapter(x, torch.cat([text, image], 1)), layer(x, text), rtol=0, atol=1e-14)


def test_the_output_is_linear_in_the_scale():
    x, text, image = tokens()
    adapter, context = trained(IPAdapter.from_layer(base())), torch.cat([text, image], 1)
    outputs = []
    for adapter.scale in (0.0, 0.5, 1.0, 3.0):
        outputs.append(adapter(x, context))
    step = outputs[1] - outputs[0]
    assert step.abs().max() > 1e-2
    assert torch.allclose(outputs[2], outputs[0] + 2 * step, rtol=0, atol=1e-12)
    assert torch.allclose(outputs[3], outputs[0] + 6 * step, rtol=0, atol=1e-12)


def test_the_parameters_of_stable_diffusion_1_5():
    with torch.device("meta"):
        prompt = ImagePrompt()
        layers = [
            attlas.mixer("softmax", w, 8, context_dim=768, bias=False) for w in [320] * 5 + [640] * 5 + [1280] * 6
        ]
        adapters = [IPAdapter.from_layer(layer) for layer in layers]
    projector = sum(p.numel() for p in prompt.parameters())
    added = sum(p.numel() for adapter in adapters for p in adapter.parameters() if p.requires_grad)
    assert (added, projector, added + projector) == (19_169_280, 3_150_336, 22_319_616)


def test_the_image_starts_with_the_projections_of_the_text():
    layer, (x, text, _) = base(), tokens()
    adapter = IPAdapter.from_layer(layer, image_tokens=TEXT, scale=0.7)
    layer.out_proj.bias.data.zero_()
    twice = adapter(x, torch.cat([text, text], 1))
    assert torch.allclose(twice, 1.7 * layer(x, text), rtol=0, atol=1e-12)
    adapter.k_image.weight.data.zero_()
    assert layer.k_proj.weight.any()  # a copy, not the weight itself


def test_text_and_image_do_not_compete():
    layer, (x, text, image) = base(), tokens()
    context = torch.cat([text, image], 1)
    together = layer(x, context)  # one softmax over both
    decoupled = IPAdapter.from_layer(layer)
    assert not torch.allclose(decoupled(x, context), together, atol=1e-2)
    decoupled.scale = 0.0
    before = decoupled(x, context)
    context[:, TEXT:] *= 10
    assert torch.equal(decoupled(x, context), before)


def test_only_the_adapter_learns():
    layer, prompt = base(), ImagePrompt(10, 24, IMAGE).double()
    adapter, (x, text, _) = IPAdapter.from_layer(layer), tokens()
    image = prompt(torch.randn(2, 10, dtype=torch.float64))
    adapter(x, torch.cat([text, image], 1)).square().sum().backward()
    learning = {name for name, p in adapter.named_parameters() if p.grad is not None}
    assert learning == {"k_image.weight", "v_image.weight"}
    assert all(p.grad.any() for p in prompt.parameters())
    assert adapter.q_proj is layer.q_proj


def test_it_learns_an_image_and_leaves_the_text_alone():
    layer, (x, text, _) = base(), tokens()
    adapter, prompt = IPAdapter.from_layer(layer), ImagePrompt(6, 24, IMAGE).double()
    embedding, target = torch.randn(2, 6).double(), torch.randn(2, 9, DIM).double()
    learned = [*prompt.parameters(), *(p for p in adapter.parameters() if p.requires_grad)]
    optimizer = torch.optim.Adam(learned, 1e-2)
    losses = []
    for _ in range(100):
        context = torch.cat([text, prompt(embedding)], 1)
        loss = (adapter(x, context) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    adapter.scale = 0.0
    assert torch.allclose(adapter(x, context), layer(x, text), rtol=0, atol=1e-14)


def test_a_text_mask_says_nothing_about_the_image():
    x, text, image = tokens()
    adapter, context = trained(IPAdapter.from_layer(base())), torch.cat([text, image], 1)
    keep = torch.ones(2, TEXT + IMAGE, dtype=torch.bool)
    keep[:, 3:TEXT] = False
    expected = adapter(x, torch.cat([text[:, :3], image], 1))
    assert torch.allclose(adapter(x, context, mask=keep), expected, rtol=0, atol=1e-12)
    keep[:, :TEXT] = False  # no text: the image branch alone
    alone = adapter(x, context, mask=keep)
    adapter.scale = 2.0
    bias = adapter.out_proj.bias
    assert torch.allclose(adapter(x, context, mask=keep) - bias, 2 * (alone - bias), rtol=0, atol=1e-12)


def test_no_image_is_the_projection_of_nothing():
    prompt = ImagePrompt(6, 24, IMAGE)
    assert prompt.unconditional(3).shape == (3, IMAGE, 24)
    assert torch.equal(prompt.unconditional(1), prompt(torch.zeros(1, 6)))
    assert prompt.unconditional(1).abs().max() > 0.1


@pytest.mark.parametrize("count", [3, IMAGE])
def test_a_context_without_text_is_refused(count):
    x, _, image = tokens()
    with pytest.raises(BadInput, match="text followed by 4 image tokens, got"):
        IPAdapter.from_layer(base())(x, image[:, :count])


def test_a_context_of_another_size_is_refused():
    x, _, _ = tokens()
    with pytest.raises(BadInput, match="build with context_dim=5"):
        IPAdapter.from_layer(base())(x, torch.randn(2, 9, 5).double())


@pytest.mark.parametrize(
    "settings",
    [
        {"kv_heads": 2},
        {"qk_norm": "rms"},
        {"output_norm": "rms"},
        {"causal": True},
        {"head_dim": 4},
        {"scale": 1.0},
        {"position": attlas.positions.Learned(DIM, 9)},
    ],
)
def test_a_layer_of_another_form_is_refused(settings):
    with pytest.raises(BadInput, match="goes around a softmax"):
        IPAdapter.from_layer(base(**settings))


@pytest.mark.parametrize("settings", [{"gate": "sigmoid"}, {"out_bias": False}])
def test_a_gate_or_no_output_bias_is_refused(settings):
    with pytest.raises(BadInput, match="without a gate"):
        IPAdapter.from_layer(base(**settings))


def test_bad_settings():
    with pytest.raises(BadInput, match="image_tokens counts"):
        attlas.mixer("ip_adapter", DIM, 4, image_tokens=0)
    with pytest.raises(BadInput, match="heads must divide dim"):
        attlas.mixer("ip_adapter", DIM, 5)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_padding_that_is_no_number_never_matters(poison):
    layer, (queries, _, _) = attlas.mixer("ip_adapter", DIM, 4).double(), tokens()
    x, keep = torch.randn(2, TEXT + IMAGE, DIM).double(), torch.ones(2, TEXT + IMAGE, dtype=torch.bool)
    keep[0, 2:5] = keep[1, -1] = False
    outputs = []
    for value in (0.5, poison):
        x[~keep] = value
        outputs.append(layer(queries, x, mask=keep))
    assert torch.equal(*outputs)
