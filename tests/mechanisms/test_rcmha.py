"""The identities of `rcmha`."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attlas
from attlas.core.errors import BadInput, Unsupported

HEADS, SIZE, TOKENS, REACH = 2, 4, 9, 12


def build(causal=False, identity=False, **settings):
    attend = attlas.make_attend("rcmha", HEADS, SIZE, causal=causal, **{"positions": REACH} | settings)
    with torch.no_grad():
        for parameter in attend.parameters():
            parameter.normal_()
        if identity:
            for conv in (attend.q_conv, attend.k_conv, attend.v_conv):
                conv.weight.copy_(torch.tensor([0.0, 0.0, 1.0]).expand_as(conv.weight))
                conv.bias.zero_()
    return attend.double().eval()


def qkv(keys=TOKENS):
    return [torch.randn(1, HEADS, n, SIZE, dtype=torch.float64) for n in (TOKENS, keys, keys)]


def scores(attend, q, k):
    """S, pair by pair."""
    s = torch.empty(HEADS, q.shape[2], k.shape[2], dtype=torch.float64)
    for h in range(HEADS):
        for n in range(q.shape[2]):
            for m in range(k.shape[2]):
                distance = n + k.shape[2] - q.shape[2] - m
                content = (q[0, h, n] + attend.query_bias[h]) @ k[0, h, m]
                place = q[0, h, n] @ attend.key_table[REACH - distance, h] + attend.bias_table[REACH - distance, h]
                s[h, n, m] = (content + place) / SIZE**0.5
    return s


@pytest.mark.parametrize("causal", [True, False])
def test_without_convolutions_the_score_has_its_four_terms(causal):
    attend, (q, k, v) = build(causal, identity=True), qkv()
    s = scores(attend, q, k)
    if causal:
        s = s.masked_fill(torch.ones(TOKENS, TOKENS).triu(1).bool(), -torch.inf)
    assert torch.allclose(attend(q, k, v)[0], s.softmax(-1) @ v[0], rtol=0, atol=1e-12)


def test_queries_of_a_cross_pattern_are_the_last_positions():
    attend, (q, k, v) = build(identity=True), qkv(keys=12)
    expected = scores(attend, q, k).softmax(-1) @ v[0]
    assert torch.allclose(attend(q, k, v, cross=True)[0], expected, rtol=0, atol=1e-12)


def test_a_fresh_score_without_convolutions_is_multi_head_attention():
    attend, (q, k, v) = build(causal=True, identity=True), qkv()
    with torch.no_grad():
        for name in ("query_bias", "key_table", "bias_table"):
            getattr(attend, name).copy_(getattr(attlas.make_attend("rcmha", HEADS, SIZE, positions=REACH), name))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.allclose(attend(q, k, v), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("which", [0, 1, 2], ids=["q", "k", "v"])
def test_nothing_reaches_back_in_time_through_a_convolution(which):
    attend, inputs = build(causal=True), qkv()
    before = attend(*inputs)
    inputs[which] = inputs[which].clone()
    inputs[which][:, :, 5] += 1
    moved = (attend(*inputs) - before).abs().amax((0, 1, 3)) > 0
    assert moved.tolist() == [5 <= t < (8 if which == 0 else TOKENS) for t in range(TOKENS)]


def test_constant_queries_score_by_distance_alone():
    attend, (q, k, _) = build(identity=True), qkv()
    q, k = q[:, :, :1].expand_as(q), torch.zeros_like(k)
    weights = attend(q, k, torch.eye(TOKENS, dtype=torch.float64).expand(1, HEADS, -1, -1)[..., :SIZE])
    first = weights[0].log()  # rows differ by their normalisers only
    differences = first[..., 1:] - first[..., :-1]
    assert torch.allclose(differences[:, 1:, 1:], differences[:, :-1, :-1], rtol=0, atol=1e-12)
    assert not torch.allclose(differences[:, 1:], differences[:, :-1], rtol=0, atol=1e-3)


def test_a_stream_knows_what_stood_before_the_convolutions():
    attend, (q, k, v) = build(causal=True), qkv()
    whole, state, parts = attend(q, k, v), attend.initial_state(1, q), []
    for size in (1, 1, 4, 2, 1):
        now = slice(sum(p.shape[2] for p in parts), sum(p.shape[2] for p in parts) + size)
        o, state = attend.extend(q[:, :, now], k[:, :, now], v[:, :, now], state)
        parts.append(o)
    assert torch.allclose(torch.cat(parts, 2), whole, rtol=0, atol=1e-12)
    assert torch.equal(state.k, k[:, :, -2:])


def test_padding_is_zeros_to_the_convolutions():
    attend, (q, k, v) = build(causal=True), qkv()
    keep = torch.arange(TOKENS).expand(1, -1) >= 3
    late = attend(q[:, :, 3:], k[:, :, 3:], v[:, :, 3:])
    q, k, v = (t.masked_fill(~keep[:, None, :, None], torch.nan) for t in (q, k, v))
    assert torch.allclose(attend(q, k, v, mask=keep)[:, :, 3:], late, rtol=0, atol=1e-12)


def test_published_tables_and_the_parameters_beside_projections():
    attend = attlas.make_attend("rcmha", 8, 64)
    assert attend.key_table.shape == (2 * 4096, 8, 64)
    assert sum(p.numel() for p in attend.parameters()) == 2 * 4096 * 8 * (64 + 1) + 8 * 64 + 3 * (3 * 64 + 64)


class Copier(nn.Module):
    def __init__(self, mechanism, symbols, dim=32, **settings):
        super().__init__()
        self.embed, self.head = nn.Embedding(symbols, dim), nn.Linear(dim, symbols)
        self.mixer = attlas.mixer(mechanism, dim, 2, causal=True, **settings)

    def forward(self, ids):
        return self.head(self.mixer(self.embed(ids)))


def copied(mechanism, steps, symbols=12, **settings):
    """Accuracy of naming the token two places before, after training for so many steps."""
    torch.manual_seed(0)
    model = Copier(mechanism, symbols, **settings)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(steps + 1):
        ids = torch.randint(symbols, (16 if step < steps else 200, 16))
        logits, target = model(ids)[:, 2:], ids[:, :-2]
        if step == steps:
            return (logits.argmax(-1) == target).double().mean().item()
        optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), target.flatten()).backward()
        optimizer.step()


def test_it_learns_to_copy_from_two_places_back_sooner_than_with_absolute_positions():
    ours = copied("rcmha", 100, positions=16, weight_dropout=0.0)
    theirs = copied("softmax", 100, position=attlas.positions.Learned(32, 16))
    assert ours > 0.99 > theirs


def test_what_does_not_fit_is_refused():
    q, k, v = qkv()
    with pytest.raises(BadInput, match="9 queries and 12 keys: pass them all, or extend"):
        build(causal=True)(*qkv(keys=12))
    with pytest.raises(BadInput, match="distances for 8 positions and was given 9: build it with positions=9"):
        build(positions=8)(q, k, v)
    attend = build(causal=True, positions=4)
    _, state = attend.extend(q[:, :, :4], k[:, :, :4], v[:, :, :4], attend.initial_state(1, q))
    with pytest.raises(BadInput, match="4 positions and was given 5"):
        attend.extend(q[:, :, 4:5], k[:, :, 4:5], v[:, :, 4:5], state)
    with pytest.raises(BadInput, match="positions is the most keys of a call"):
        build(positions=0)
    with pytest.raises(Unsupported, match="a mask with pairs"):
        build()(q, k, v, mask=attlas.Mask.window(2))
