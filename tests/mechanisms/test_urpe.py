"""URPE: buckets, Toeplitz matrices, shared tables, and what relative positions alone cannot do."""

import pytest
import torch
from torch import nn

import attlas
from attlas.core.errors import BadInput
from attlas.mechanisms.softmax.urpe import Tables

DOUBLE = {"dtype": torch.float64}


def build(causal=False, random=("bias", "factor"), **settings):
    layer = attlas.mixer("urpe", 16, 2, causal=causal, **settings).double()
    with torch.no_grad():
        for name in random:
            getattr(layer.attend.tables, name).normal_()
    return layer


def test_it_starts_as_plain_attention():
    layer, plain = build(random=()), attlas.mixer("softmax", 16, 2).double()
    plain.load_state_dict(layer.state_dict(), strict=False)
    x = torch.randn(2, 20, 16, **DOUBLE)
    assert torch.allclose(layer(x), plain(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_factors_of_one_are_a_relative_bias(causal):
    layer, plain = build(causal, random=("bias",)), attlas.mixer("softmax", 16, 2, causal=causal).double()
    plain.load_state_dict(layer.state_dict(), strict=False)
    x = torch.randn(2, 20, 16, **DOUBLE)
    bias = layer.attend.tables(20, 20)[0]
    assert torch.allclose(layer(x), plain(x, mask=attlas.Mask.biased(bias)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_only_factors_tell_equal_tokens_apart(causal):
    x = torch.randn(1, 1, 16, **DOUBLE).expand(2, 24, -1)
    deep = nn.Sequential(*(build(causal, random=("bias",)) for _ in range(3)))
    assert deep(x).std(1).max() < 1e-12
    rows = build(causal)(x)[0]
    assert (torch.cdist(rows, rows) + torch.eye(24) > 1e-4).all()


def test_buckets_of_the_official_sizes():
    bucket = Tables(1).bucket(torch.arange(-300, 301))
    near, where = bucket[300 - 15 : 300 + 16].tolist(), dict(zip(range(-300, 301), bucket.tolist(), strict=True))
    assert near == [*range(16, 31), *range(33, 49)]
    assert [where[n] for n in (16, 20, 21, 64, 127, 128, 300)] == [49, 50, 51, 59, 64, 64, 64]
    assert len({where[n] for n in (-128, -129, -300)}) == 1
    assert (bucket.min(), bucket.max()) == (0, 64)
    assert set(range(65)) - set(bucket.tolist()) == {31, 32}  # never read, as officially
    assert (bucket.diff() >= 0).all()


def test_both_matrices_are_toeplitz_and_their_last_rows_those_of_shorter_ones():
    tables = build().attend.tables
    for matrix, last in zip(tables(40, 40), tables(7, 40), strict=True):
        assert torch.equal(matrix[:, 1:, 1:], matrix[:, :-1, :-1])
        assert torch.equal(matrix[:, -7:], last)
        assert not torch.equal(matrix, matrix.mT)


def test_rows_are_not_normalised_again_and_factors_keep_their_sign():
    layer = build()
    q, k = torch.randn(2, 1, 2, 6, 8, **DOUBLE)
    bias, factor = layer.attend.tables(6, 6)
    expected = (q @ k.mT * 8**-0.5 + bias).softmax(-1) * factor
    got = layer.attend(q, k, torch.eye(6, **DOUBLE).expand(1, 2, 6, 6))
    assert torch.allclose(got, expected, rtol=0, atol=1e-12)
    assert (got < 0).any()


def test_layers_share_tables():
    first = build()
    second = attlas.mixer("urpe", 16, 2, tables=first.attend.tables).double()
    model = nn.Sequential(first, second)
    per_layer = 4 * (16 * 16 + 16)
    assert sum(p.numel() for p in model.parameters()) == 2 * per_layer + 2 * 2 * 65
    model(torch.randn(2, 5, 16, **DOUBLE)).square().sum().backward()
    assert second.attend.tables.factor.grad is first.attend.tables.factor.grad
    with pytest.raises(BadInput, match="tables are for 2 heads, the layer has 4"):
        attlas.mixer("urpe", 16, 4, tables=first.attend.tables)


def test_offsets_behind_a_cache_are_those_of_the_whole():
    layer = build(True, buckets=8, reach=6)
    x = torch.randn(2, 30, 16, **DOUBLE)
    keep = torch.arange(30).expand(2, -1) >= torch.tensor([[0], [5]])
    whole, state, parts = layer(x, mask=keep), layer.initial_state(2), []
    for token, real in zip(x.split(3, 1), keep.split(3, 1), strict=True):
        y, state = layer.extend(token, state, keep=real)
        parts.append(y)
    assert torch.allclose(torch.cat(parts, 1)[keep], whole[keep], rtol=0, atol=1e-12)


def test_what_padding_holds_never_matters():
    layer = build()
    q, k, v = torch.randn(3, 2, 2, 6, 8, **DOUBLE)
    keep = torch.arange(6).expand(2, -1) < 4
    expected = layer.attend(q, k, v, mask=keep)
    k[:, :, 4:], v[:, :, 4:] = torch.nan, torch.inf
    assert torch.equal(layer.attend(q, k, v, mask=keep), expected)


def accuracy_of_naming_positions(relative_only, tokens=16, steps=150):
    """One layer and one head that is asked for the position of each random token."""
    torch.manual_seed(0)
    embed, mix, head = nn.Embedding(10, 32), attlas.mixer("urpe", 32), nn.Linear(32, tokens)
    model = nn.Sequential(embed, mix, head)
    mix.attend.tables.factor.requires_grad_(not relative_only)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.02)
    target = torch.arange(tokens).repeat(32)
    for _ in range(steps):
        logits = model(torch.randint(10, (32, tokens))).flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        equal = torch.full((10, tokens), 3)
        equal[:] = torch.arange(10)[:, None]  # ten sequences, each of one token repeated
        return float((model(equal).argmax(-1) == torch.arange(tokens)).double().mean())


def test_positions_can_be_named_with_factors_alone():
    assert accuracy_of_naming_positions(relative_only=False) > 0.9
    assert accuracy_of_naming_positions(relative_only=True) == pytest.approx(1 / 16)  # chance


def test_what_has_no_meaning_is_refused():
    with pytest.raises(BadInput, match=r"buckets is a multiple of 4.*got 6"):
        attlas.mixer("urpe", 16, 2, buckets=6)
    with pytest.raises(BadInput, match=r"reach is beyond the 16 distances.*got 16"):
        attlas.mixer("urpe", 16, 2, reach=16)
    with pytest.raises(BadInput, match="weight_dropout"):
        attlas.mixer("urpe", 16, 2, weight_dropout=1.0)
