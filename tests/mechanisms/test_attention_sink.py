"""Visual attention redistribution: what moves, where to, and where nothing moves."""

import pytest
import torch

import attlas
from attlas.core.errors import BadInput
from attlas.core.registry import mechanism
from attlas.ops.softmax import attention_weights
from tests.contract.checks import Case

DIM, HEADS, SIZE, TOKENS = 64, 4, 16, 20
IMAGE, DIMS = (3, 8), (14, 25)
SINKS = [0, 5, 9]  # one of the text, two of the image


def planted(batch=2, sinks=SINKS):
    """Tokens of which `sinks` are large in one of two channels, and queries and keys."""
    tokens = torch.randn(batch, TOKENS, DIM, dtype=torch.float64)
    for index, sink in enumerate(sinks):
        tokens[:, sink, DIMS[index % 2]] = 400.0 * (-1) ** index
    return tokens, *torch.randn(2, batch, HEADS, TOKENS, SIZE, dtype=torch.float64)


def weights(tokens, q, k, mask=None, **settings):
    """The weights of the mechanism, read off by values that are the unit vectors."""
    settings = {"image": IMAGE, "dims": DIMS, "tau": 7.0} | settings
    attend = attlas.make_attend("attention_sink", HEADS, SIZE, causal=True, **settings)
    v = torch.eye(TOKENS, dtype=torch.float64).expand(*q.shape[:2], -1, -1)
    return attend(q, k, v, mask=mask, tokens=tokens)


def shares(a):
    """Of every row: what it has on the image, and the part of that on the image's sinks."""
    image = a[..., 3:11].sum(-1)
    return image, a[..., [5, 9]].sum(-1) / image.clamp(min=1e-9)


def test_the_sinks_are_found():
    attend = attlas.make_attend("attention_sink", HEADS, SIZE, dims=DIMS, tau=7.0)
    tokens = planted()[0]
    assert attend.find_sinks(tokens).nonzero()[:, 1].tolist() == SINKS * 2
    assert torch.equal(attend.find_sinks(tokens * 1e-2), attend.find_sinks(tokens))
    hidden = torch.randn(1, 30, 4096)
    hidden[0, [0, 4], 1415] = hidden[0, 17, 2533] = 60.0  # as in LLaMA-2-7B, at the published threshold
    hidden[0, 20, 100] = 60.0
    published = attlas.make_attend("attention_sink", 32, 128, dims=(1415, 2533))
    assert published.find_sinks(hidden)[0].nonzero().flatten().tolist() == [0, 4, 17]


def test_rows_sum_to_one_and_sinks_keep_their_share():
    tokens, q, k = planted()
    a = attention_weights(q, k, attlas.Mask.causal_())
    got = weights(tokens, q, k, p=0.6, rho=0.4, summ=0.3)
    assert torch.allclose(got.sum(-1), torch.ones_like(got[..., 0]), rtol=0, atol=1e-12)
    image, sunk = shares(a)
    chosen = (image >= 0.3) & (sunk <= 0.4) & (torch.arange(TOKENS) >= 11)
    assert 0.1 < chosen[:, :, 11:].double().mean() < 0.9
    assert torch.equal(got[~chosen], a[~chosen])  # other rows are not touched
    before, after = a[chosen], got[chosen]
    assert torch.allclose(after[:, SINKS], 0.6 * before[:, SINKS], rtol=0, atol=1e-12)
    others = [3, 4, 6, 7, 8, 10]
    ratio = after[:, others] / before[:, others]
    assert (ratio > 1).all()
    assert torch.allclose(ratio, ratio[:, :1].expand_as(ratio))
    text = [1, 2, *range(11, TOKENS)]
    assert torch.equal(after[:, text], before[:, text])


@pytest.mark.parametrize(
    "settings", [{"p": 1.0}, {"summ": 1.0}, {"rho": 0.0}, {"tau": 1e3}, {"image": None}, {"dims": ()}]
)
def test_where_it_has_nothing_to_do_it_is_softmax_attention(settings):
    tokens, q, k = planted()
    a = attention_weights(q, k, attlas.Mask.causal_())
    assert torch.allclose(weights(tokens, q, k, **settings), a, rtol=0, atol=1e-12)


def test_without_a_sink_in_the_image_nothing_moves():
    tokens, q, k = planted(sinks=[0])
    a = attention_weights(q, k, attlas.Mask.causal_())
    assert torch.equal(weights(tokens, q, k, summ=0.0, rho=1.0), a)


def test_an_image_of_sinks_alone_has_nowhere_to_take_the_weight():
    tokens, q, k = planted(sinks=range(3, 11))
    a = attention_weights(q, k, attlas.Mask.causal_())
    got = weights(tokens, q, k, summ=0.0, rho=1.0)
    assert torch.equal(got, a)


def test_padding_on_the_left_does_not_move_the_image():
    tokens, q, k = planted(batch=1)
    expected = weights(tokens, q, k, summ=0.1)
    pad = torch.randn(1, 4, DIM, dtype=torch.float64)
    pad[:, 1, DIMS[0]] = 400.0  # padding that looks like a sink
    q, k = (torch.cat([torch.randn(1, HEADS, 4, SIZE, dtype=torch.float64), x], 2) for x in (q, k))
    attend = attlas.make_attend("attention_sink", HEADS, SIZE, causal=True, image=IMAGE, dims=DIMS, tau=7.0, summ=0.1)
    v = torch.eye(TOKENS + 4, dtype=torch.float64).expand(1, HEADS, -1, -1)
    keep = torch.arange(TOKENS + 4)[None] >= 4
    got = attend(q, k, v, mask=keep, tokens=torch.cat([pad, tokens], 1))
    assert torch.allclose(got[:, :, 4:, 4:], expected, rtol=0, atol=1e-12)


def test_sinks_of_the_prompt_serve_decoding():
    layer = attlas.mixer(
        "attention_sink", DIM, HEADS, causal=True, image=IMAGE, dims=DIMS, tau=7.0, summ=0.0, rho=1.0
    ).double()
    x = planted()[0]
    with torch.no_grad():
        whole = layer(x)
        prompt, state = layer.extend(x[:, :14], layer.initial_state(2))
        assert state.attend.sinks.rows[0, 0].nonzero().flatten().tolist() == SINKS
        parts = [prompt]
        for t in range(14, TOKENS):
            y, state = layer.extend(x[:, t : t + 1], state)
            parts.append(y)
        layer.attend.backend = "oracle"
        literal = layer.extend(x[:, :14], layer.initial_state(2))[0]
    assert torch.allclose(torch.cat(parts, 1), whole, rtol=0, atol=1e-12)
    assert torch.allclose(literal, prompt, rtol=0, atol=1e-12)


def test_the_examples_redistribute():
    for index in range(len(mechanism("attention_sink").spec.examples)):
        case = Case("attention_sink", index, "causal self")
        layer, inputs = case.build(), case.inputs()
        y = layer(*inputs)
        layer.attend.p = 1.0
        assert (layer(*inputs) - y).abs().max() > 1e-2


def test_a_reader_that_a_background_sink_distracts_answers_better():
    # The image says which class it is in one place; the sink in the image and the first token say other things.
    classes, samples = 8, 300
    answer, place = torch.randint(classes, (samples,)), torch.tensor([4, 6, 7, 8, 10])[torch.arange(samples) % 5]
    rows = torch.arange(samples)
    q = torch.ones(samples, 1, TOKENS, SIZE)
    k, v = torch.zeros(samples, 1, TOKENS, SIZE), torch.zeros(samples, 1, TOKENS, classes)
    k[:, 0, [0, 5]], k[rows, 0, place] = 0.75, 0.8
    v[rows, 0, place, answer] = 1.0
    v[:, 0, [0, 5]] = torch.randn(samples, 2, classes)
    tokens = torch.randn(samples, TOKENS, SIZE)
    tokens[:, [0, 5], 2] = 300.0

    def accuracy(p):
        attend = attlas.make_attend(
            "attention_sink", 1, SIZE, causal=True, image=IMAGE, dims=[2], tau=3.5, rho=0.9, p=p
        )
        return float((attend(q, k, v, tokens=tokens)[:, 0, -1].argmax(-1) == answer).float().mean())

    assert accuracy(0.6) > accuracy(1.0) + 0.1


def test_tokens_of_all_keys_are_needed():
    tokens, q, k = planted()
    with pytest.raises(BadInput, match="finds sinks in the tokens that keys are made of"):
        weights(None, q, k)
    with pytest.raises(BadInput, match=r"\(2, 20, 64\)"):
        weights(tokens[:, :-1], q, k)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image": (-1, 3)}, "image is"),
        ({"image": (0, 0)}, "image is"),
        ({"dims": [64]}, "dims are channels from 0 to 63"),
        ({"tau": -1.0}, "tau is the magnitude.*got -1.0"),
        ({"p": 1.5}, "p is a share"),
        ({"rho": -0.1}, "rho is a share"),
        ({"summ": 2.0}, "summ is a share"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(BadInput, match=message):
        attlas.make_attend("attention_sink", HEADS, SIZE, **settings)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_padding_that_is_no_number_never_matters(poison):
    layer = attlas.mixer("attention_sink", DIM, HEADS, image=IMAGE, dims=DIMS, tau=7.0, summ=0.0, rho=1.0).double()
    x, keep = planted()[0], torch.arange(TOKENS).expand(2, -1) < torch.tensor([[TOKENS], [TOKENS - 3]])
    outputs = []
    for value in (0.5, poison):
        x[~keep] = value
        outputs.append(layer(x, mask=keep)[keep])
    assert torch.equal(*outputs)
