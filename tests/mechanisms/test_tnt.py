"""What only the Transformer in Transformer holds: its published counts, and who tells whom."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attlas
from attlas.core.errors import BadInput

GRID = attlas.Grid((2, 3), prefix=1)


def build(**settings):
    torch.manual_seed(0)
    settings = {"words": 4, "word_dim": 4, "word_heads": 2} | settings
    layer = attlas.mixer("tnt", 24, 2, grid=GRID, **settings)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return layer.double()


def streams():
    sentences, words = torch.randn(2, 7, 8, dtype=torch.float64), torch.randn(2, 6, 4, 4, dtype=torch.float64)
    return sentences, words


@pytest.mark.parametrize(
    ("dim", "word_dim", "heads", "parameters", "multiplications"),
    [(384, 24, 6, 23_755_336, 5.217e9), (640, 40, 10, 65_406_600, 14.05e9)],
)
def test_twelve_blocks_a_stem_and_a_head_are_the_published_model(dim, word_dim, heads, parameters, multiplications):
    layer = attlas.mixer("tnt", dim + 16 * word_dim, heads)
    assert (layer.dim, layer.word_dim) == (dim, word_dim)
    around = [
        nn.Conv2d(3, word_dim, 7, 4, 3),
        nn.LayerNorm(16 * word_dim),
        nn.Linear(16 * word_dim, dim),
        nn.LayerNorm(dim),
        nn.LayerNorm(dim),
        nn.Linear(dim, 1000),
    ]
    places = (1 + 197) * dim + 16 * word_dim
    count = 12 * sum(p.numel() for p in layer.parameters()) + places
    assert count + sum(p.numel() for module in around for p in module.parameters()) == parameters
    blocks = 12 * layer.cost(1, 197, grid=attlas.Grid((14, 14), prefix=1)).flops // 2
    stem_and_head = 56**2 * 147 * word_dim + 196 * 16 * word_dim * dim + 1000 * dim
    assert blocks + stem_and_head == pytest.approx(multiplications, rel=2e-4)


def test_packing_is_undone():
    layer, (sentences, words) = build(), streams()
    back = layer.unpack(layer.pack(sentences, words), prefix=1)
    assert torch.equal(back[0], sentences)
    assert torch.equal(back[1], words)


def test_words_know_nothing_of_other_sentences_and_everything_of_their_own():
    layer = build()
    x = layer.pack(*streams())[:1]
    jacobian = torch.autograd.functional.jacobian(lambda t: layer(t)[0], x)[:, :, 0]  # (N, C, M, C)
    moved = jacobian.abs() > 0
    for n in range(1, 7):
        own = moved[n, 8:, n, 8:].unflatten(0, (4, 4)).unflatten(2, (4, 4))
        assert own.any(3).any(1).all()  # every word from every word
        others = [m for m in range(7) if m != n]
        assert not moved[n, 8:, others].any()
        assert not moved[n, 8:, n, :8].any()  # nor of their sentence
    assert moved[:, :8, :, :8].any(3).any(1).all()  # every sentence from every sentence
    assert moved[:, :8, 1:, 8:].any(3).any(1).all()  # and from every sentence's words
    assert not moved[:, :8, 0, 8:].any()  # which the class token has not


def test_without_the_bridge_sentences_are_a_plain_transformer():
    layer, (sentences, words) = build(), streams()
    with torch.no_grad():
        layer.bridge.weight.zero_()
        layer.bridge.bias.zero_()
    got, _ = layer.unpack(layer(layer.pack(sentences, words)), prefix=1)
    outer, y = layer.outer, layer.outer.norm(sentences)
    q, k = outer.qk_proj(y).chunk(2, -1)
    q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in (q, k, outer.v_proj(y)))
    o = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    x = sentences + outer.out_proj(o)
    torch.testing.assert_close(got, x + outer.mlp(outer.mlp_norm(x)), rtol=0, atol=1e-12)


def test_sentences_are_told_their_normalised_words_one_after_the_other():
    layer, (sentences, words) = build(), streams()
    with torch.no_grad():
        for part in (layer.inner, layer.outer):
            for last in (part.out_proj, part.mlp[2]):
                last.weight.zero_()
                last.bias.zero_()
    got, same = layer.unpack(layer(layer.pack(sentences, words)), prefix=1)
    assert torch.equal(same, words)
    centred = words - words.mean(-1, keepdim=True)
    normal = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    normal = normal * layer.bridge_norm.weight + layer.bridge_norm.bias
    told = normal.reshape(2, 6, 16) @ layer.bridge.weight.T + layer.bridge.bias
    torch.testing.assert_close(got[:, 1:], sentences[:, 1:] + told, rtol=0, atol=1e-12)
    assert torch.equal(got[:, 0], sentences[:, 0])


def test_the_class_token_is_told_by_sentences_only_and_carries_its_channels_on():
    layer, (sentences, words) = build(), streams()
    x = layer.pack(sentences, words)
    x[:, 0, 8:] = 7.0
    y = layer(x)
    assert torch.equal(y[:, 0, 8:], x[:, 0, 8:])
    torch.testing.assert_close(y[:, :, :8], layer(layer.pack(sentences, words))[:, :, :8], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"words": 0}, "words and word_heads are at least 1, got 0"),
        ({"words": 6}, "24 channels leave 0 for a sentence"),
        ({"words": 16, "word_dim": None}, "words of 0"),
        ({"word_heads": 3}, "word_heads must divide its channels: 4 do not split into 3"),
        ({"word_dim": 5, "word_heads": 1, "words": 3}, "heads must divide its channels: 9"),
        ({"ratio": 0}, "ratio says how many times wider"),
        ({"ratio": 0.2}, "at least 0.25 here, got 0.2"),
    ],
)
def test_what_has_no_meaning_is_refused(settings, words):
    with pytest.raises(BadInput, match=words):
        build(**settings)


def test_streams_that_do_not_fit_are_refused():
    layer, (sentences, words) = build(), streams()
    for wrong in ((sentences[..., :7], words), (sentences[:, :5], words), (sentences, words[..., :3])):
        with pytest.raises(BadInput, match=r"sentences are .batch, tokens, 8. and words"):
            layer.pack(*wrong)


@pytest.mark.parametrize(("dim", "heads"), [(768, 4), (64, 2), (32, 1)])
def test_words_have_as_many_heads_as_divide_their_channels(dim, heads):
    assert attlas.mixer("tnt", dim, 4, grid=(2, 2)).inner.heads == heads
