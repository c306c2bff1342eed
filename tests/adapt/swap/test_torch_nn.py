"""Attention of torch.nn: masks keep torch's meaning, whatever is inside."""

import pytest
import torch
from torch import nn

import attlas
from attlas.core.errors import BadInput, Unsupported

DIM, HEADS = 16, 2


def randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            nn.init.normal_(parameter, std=0.4, generator=generator)


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def causal(size: int) -> torch.Tensor:
    return nn.Transformer.generate_square_subsequent_mask(size)


PADDING = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])


class Alone(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.attention = nn.MultiheadAttention(DIM, HEADS, **settings)

    def forward(self, query, key=None, value=None, **settings):
        key = query if key is None else key
        return self.attention(query, key, key if value is None else value, **settings)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    "settings", [{}, {"bias": False}, {"add_bias_kv": True, "add_zero_attn": True}, {"kdim": 6, "vdim": 10}]
)
def test_attention_alone_is_the_same(batch_first, settings):
    model = Alone(batch_first=batch_first, **settings).eval()
    randomise(model)
    query = tokens(2, 6, DIM)
    key, value = tokens(2, 6, settings.get("kdim", DIM)), tokens(2, 6, settings.get("vdim", DIM))
    if not batch_first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    calls = [
        {},
        {"key_padding_mask": PADDING},
        # With keys appended torch takes this hint for another mask than the one that it comes with.
        {"attn_mask": causal(6), "is_causal": "add_bias_kv" not in settings, "need_weights": False},
        {"attn_mask": tokens(2 * HEADS, 6, 6), "average_attn_weights": False},
        {"attn_mask": causal(6), "key_padding_mask": PADDING.float().masked_fill(PADDING, -torch.inf)},
    ]
    before = [model(query, key, value, **call) for call in calls]
    report = attlas.swap(model, "softmax")
    assert [row.verdict for row in report.rows] == ["exact"]
    for call, (out, weights) in zip(calls, before, strict=True):
        swapped, swapped_weights = model(query, key, value, **call)
        torch.testing.assert_close(swapped, out)
        torch.testing.assert_close(swapped_weights, weights)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_encoder_is_the_same_and_takes_no_fast_path(batch_first, grad):
    layer = nn.TransformerEncoderLayer(DIM, HEADS, 24, batch_first=batch_first)
    model = nn.TransformerEncoder(layer, 2).eval()
    randomise(model)
    x = tokens(2, 6, DIM) if batch_first else tokens(6, 2, DIM)
    real = ~PADDING if batch_first else ~PADDING.T
    calls = [{}, {"src_key_padding_mask": PADDING}, {"mask": causal(6)}, {"mask": causal(6), "is_causal": True}]
    with torch.set_grad_enabled(grad):
        before = [model(x, **call) for call in calls]
        report = attlas.swap(model, "softmax")
        for call, out in zip(calls, before, strict=True):
            torch.testing.assert_close(model(x, **call)[real], out[real], rtol=1e-5, atol=1e-5)
        report.undo()
        report = attlas.swap(model, "linear")
        linear = model(x, src_key_padding_mask=PADDING)
        assert (linear - before[1])[real].abs().max() > 0.1
        report.undo()
        assert torch.equal(model(x, src_key_padding_mask=PADDING), before[1])


def test_nested_tensors_return_with_the_last_undo():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(DIM, HEADS, 24, batch_first=True), 3).eval()
    first, second = attlas.swap(model, "linear", where="layers.1"), attlas.swap(model, "linear", where="layers.2")
    first.undo()
    with torch.no_grad():
        assert model(tokens(2, 6, DIM), src_key_padding_mask=PADDING).isfinite().all()
    second.undo()
    assert model.use_nested_tensor
    assert not hasattr(model, "nested_before_swap")


@pytest.mark.parametrize("mechanism", ["linear", "agent", "softmax", "pool"])
def test_padding_is_never_seen(mechanism):
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(DIM, HEADS, 24, batch_first=True), 2).eval()
    randomise(model)
    settings = {"agents": 4} if mechanism == "agent" else {}
    attlas.swap(model, mechanism, grid=(2, 3), **settings)
    x = tokens(2, 6, DIM)
    other = x.masked_fill(PADDING.unsqueeze(-1), 7.0)
    first, second = (model(each, src_key_padding_mask=PADDING)[~PADDING] for each in (x, other))
    torch.testing.assert_close(first, second)


def transformer(batch_first: bool) -> nn.Transformer:
    model = nn.Transformer(DIM, HEADS, 2, 2, 24, batch_first=batch_first).eval()
    randomise(model)
    return model


@pytest.mark.parametrize("batch_first", [True, False])
def test_encoder_and_decoder_are_the_same(batch_first):
    model = transformer(batch_first)
    source, target = tokens(2, 6, DIM), tokens(2, 5, DIM)
    if not batch_first:
        source, target = source.transpose(0, 1), target.transpose(0, 1)
    masks = {"tgt_mask": causal(5), "src_key_padding_mask": PADDING, "memory_key_padding_mask": PADDING}
    out = model(source, target, **masks)
    report = attlas.swap(model, "softmax")
    assert len(report.of("exact")) == 6
    torch.testing.assert_close(model(source, target, **masks), out, rtol=1e-5, atol=1e-5)


def test_causal_calls():
    model = transformer(True)
    source, target = tokens(2, 6, DIM), tokens(2, 5, DIM)
    own = "decoder.layers.*.self_attn"
    report = attlas.swap(model, "linear", where=own)
    assert any("causal=True" in note for note in report.rows[0].notes)
    with pytest.raises(Unsupported, match="pairs"):
        model(source, target, tgt_mask=causal(5))
    report.undo()
    attlas.swap(model, "linear", where=own, causal=True)
    later = target.clone()
    later[:, 3:] = 5.0
    first, second = (model(source, each, tgt_mask=causal(5), tgt_is_causal=True) for each in (target, later))
    torch.testing.assert_close(first[:, :3], second[:, :3])
    assert (first - second)[:, 3:].abs().max() > 0.01
    third = model(source, target)  # it was built causal, mask or not
    torch.testing.assert_close(first, third)


def test_cross_attention_by_another_mechanism():
    model = transformer(True)
    source, target = tokens(2, 6, DIM), tokens(2, 5, DIM)
    out = model(source, target, memory_key_padding_mask=PADDING)
    report = attlas.swap(model, "linear", where="decoder.layers.*.multihead_attn")
    assert len(report.swapped) == 2
    hidden = source.masked_fill(PADDING.unsqueeze(-1), 7.0)
    memory = model.encoder(source)
    swapped = model.decoder(target, memory, memory_key_padding_mask=PADDING)
    assert (swapped - out).abs().max() > 0.01
    leak = model.decoder(target, memory.where(~PADDING.unsqueeze(-1), hidden), memory_key_padding_mask=PADDING)
    torch.testing.assert_close(leak, swapped)


def test_a_mechanism_with_its_own_projections():
    model = Alone(batch_first=True).eval()
    randomise(model)
    report = attlas.swap(model, "vig", grid=(2, 3))
    (row,) = report.rows
    assert row.verdict == "new"
    x = tokens(2, 6, DIM)
    assert model(x)[0].shape == x.shape
    with pytest.raises(BadInput, match="one tensor"):
        model(x, tokens(2, 4, DIM))


def test_subclasses_are_left():
    class Own(nn.MultiheadAttention):
        pass

    model = nn.ModuleDict({"own": Own(DIM, HEADS), "plain": nn.MultiheadAttention(DIM, HEADS)})
    report = attlas.swap(model, "linear")
    assert report.swapped == ["plain"]
    assert "Own is a subclass" in report.of("left")[0].notes[0]


@pytest.mark.parametrize("mechanism", ["softmax", "linear"])
def test_compile(mechanism):
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(DIM, HEADS, 24, batch_first=True), 1).eval()
    randomise(model)
    attlas.swap(model, mechanism)
    x = tokens(2, 6, DIM)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


@pytest.mark.parametrize("mechanism", ["softmax", "linear"])
@pytest.mark.parametrize("appending", ["add_bias_kv", "add_zero_attn"])
def test_appended_keys_never_let_tokens_see_ahead(mechanism, appending):
    model = Alone(batch_first=True, **{appending: True}).eval()
    randomise(model)
    x = tokens(2, 6, DIM)
    expected = model(x, attn_mask=causal(6))[0]
    (row,) = attlas.swap(model, mechanism, causal=True).rows
    assert any("causal by masks only" in note for note in row.notes)
    if mechanism == "softmax":
        torch.testing.assert_close(model(x, attn_mask=causal(6))[0], expected)
    else:
        with pytest.raises(Unsupported, match="pairs"):
            model(x, attn_mask=causal(6))


def test_what_cannot_have_keys_appended_is_left():
    with pytest.raises(Unsupported, match="could go to none"):
        attlas.swap(Alone(batch_first=True, add_bias_kv=True), "neighborhood", grid=(2, 3), window=2)


@pytest.mark.parametrize("mechanism", ["softmax", "linear"])
def test_compile_with_padding(mechanism):
    torch._dynamo.reset()
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(DIM, HEADS, 24, batch_first=True), 1).eval()
    randomise(model)
    attlas.swap(model, mechanism)
    x = tokens(2, 6, DIM)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(x, src_key_padding_mask=PADDING), model(x, src_key_padding_mask=PADDING), rtol=1e-5, atol=1e-5
    )
