"""What only routing attention holds: its clusters, its causality, its centroids."""

import pytest
import torch
import torch.nn.functional as F

import attlas
from attlas.core.errors import BadInput, Unsupported


def build(causal=False, heads=2, size=8, **settings):
    return attlas.make_attend("routing", heads, size, causal=causal, **settings).double().eval()


def tensors(tokens, heads=2, size=8, batch=2):
    return [torch.randn(batch, heads, tokens, size, dtype=torch.float64) for _ in range(3)]


def unit(x):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def from_clusters(q, k, v, in_q, in_k, causal=False):
    """Dense attention under each cluster's boolean mask (B, H, C, N), added up."""
    scores = (unit(q) @ unit(k).mT).unsqueeze(2)
    seen = in_q.unsqueeze(-1) & in_k.unsqueeze(-2)
    if causal:
        seen = seen.tril()
    weights = scores.masked_fill(~seen, -1e30).softmax(-1) * seen
    return (weights @ v.unsqueeze(2)).sum(2) / (in_q.sum(2, dtype=v.dtype) + 0.01).unsqueeze(-1)


def best_of_whole_sequence(layer, x, window):
    score = layer.centroids @ unit(x).mT
    return torch.zeros_like(score, dtype=torch.bool).scatter(-1, score.topk(window).indices, True)


@pytest.mark.parametrize("causal", [False, True])
def test_one_cluster_of_all_is_normalised_softmax_attention(causal):
    q, k, v = tensors(12)
    got = build(causal, clusters=1, window=12)(q, k, v)
    full = attlas.attend(unit(q), unit(k), v, scale=1.0, causal=causal)
    torch.testing.assert_close(got, full / 1.01, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [3, 6, 9])
def test_not_causal_equals_dense_attention_under_the_clusters_masks(window):
    layer, (q, k, v) = build(clusters=4, window=window), tensors(24)
    in_q, in_k = (best_of_whole_sequence(layer, x, window) for x in (q, k))
    got, expected = layer(q, k, v), from_clusters(q, k, v, in_q, in_k)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    orphans = ~in_q.any(2)
    assert orphans.any()
    assert not got[orphans].any()


def test_every_cluster_holds_exactly_so_many_tokens():
    layer = build(clusters=4, window=5)
    alike = layer.centroids[:, :1].expand(2, 2, 24, 8)  # ties everywhere
    got = layer(alike, alike, torch.ones_like(alike))
    clusters = (0.01 * got / (1 - got)).round()  # that each query is in: its output is c / (c + 0.01)
    assert torch.equal(clusters[..., 0].sum(-1), torch.full((2, 2), 4 * 5.0).double())


def test_cost_grows_as_the_power_of_one_and_a_half():
    def cost(tokens):
        return attlas.make_attend("routing", 8, 64, length=tokens).cost(1, tokens).flops

    assert cost(4096) == 8 * cost(1024)
    assert cost(4096) < 4 * 8 * 4096**2 * 64 / 10  # a tenth of a dense layer's two products


def test_the_causal_form_is_the_published_one_at_decoding():
    layer, (q, _, v) = build(True, clusters=4, window=5), tensors(20)
    got = layer(q, q, v)
    for t in range(20):
        past = slice(0, t + 1)
        held = best_of_whole_sequence(layer, q[:, :, past], min(5, t + 1))
        step = from_clusters(q[:, :, past], q[:, :, past], v[:, :, past], held, held, causal=True)
        torch.testing.assert_close(got[:, :, t], step[:, :, t], rtol=0, atol=1e-12)


def test_the_published_training_form_sees_the_future_and_this_one_does_not():
    layer, (q, _, v) = build(True, clusters=4, window=5), tensors(20)
    changed = q.clone()
    changed[:, :, 15:] = torch.randn_like(changed[:, :, 15:])

    def published(x):
        held = best_of_whole_sequence(layer, x, 5)
        return from_clusters(x, x, v, held, held, causal=True)[:, :, :15]

    assert not torch.equal(published(q), published(changed))
    assert torch.equal(layer(q, q, v)[:, :, :15], layer(changed, changed, v)[:, :, :15])


def test_with_clusters_held_fixed_the_published_form_is_causal():
    layer, (q, _, v) = build(True, clusters=4, window=5), tensors(20)
    held = best_of_whole_sequence(layer, q, 5)
    changed = v.clone()
    changed[:, :, 15:] += 1
    first, second = (from_clusters(q, q, x, held, held, causal=True) for x in (v, changed))
    assert torch.equal(first[:, :, :15], second[:, :, :15])


def test_of_equal_scores_the_later_position_is_better():
    layer = build(True, clusters=1, window=2, heads=1)
    q, k, v = tensors(5, heads=1)
    k = k[:, :, :1].expand_as(k)
    got = layer(q, k, v)[:, :, 1:]  # all keys are equal: each sees itself and the one before
    torch.testing.assert_close(got, (v[:, :, 1:] + v[:, :, :-1]) / 2 / 1.01, rtol=0, atol=1e-12)


def test_the_state_holds_the_best_tokens_and_does_not_grow():
    layer, (q, k, v) = build(True, clusters=3, window=4), tensors(30)
    state, parts, sizes = layer.initial_state(2, v), [], []
    for piece in zip(*(x.split(7, 2) for x in (q, k, v)), strict=True):
        o, state = layer.extend(*piece, state)
        parts.append(o)
        sizes.append(attlas.state_bytes(state))
    assert len(set(sizes)) == 1
    torch.testing.assert_close(torch.cat(parts, 2), layer(q, k, v), rtol=0, atol=1e-12)
    best = (layer.centroids @ unit(k).mT).topk(4).values
    torch.testing.assert_close(state.score.sort(descending=True).values, best, rtol=0, atol=1e-12)


def test_content_is_found_however_far_it_is():
    layer, (_, k, v) = build(clusters=8, window=32, size=32), tensors(256, size=32)
    wanted = torch.randperm(256)
    found = (layer(k[:, :, wanted], k, v) - v[:, :, wanted]).abs().amax(-1) < 0.1
    assert 0.4 < found.double().mean() < 0.9  # the others are in no cluster
    near = attlas.attend(k[:, :, wanted], k, v, "neighborhood", window=31, scale=1.0)
    assert ((near - v[:, :, wanted]).abs().amax(-1) < 0.1).double().mean() < 0.2


def test_centroids_find_the_directions_of_the_data():
    signs = torch.tensor([[1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]])
    directions = torch.cat([signs, -signs[:1]]).repeat(1, 2).double()
    layer = build(clusters=4, window=8, heads=1).train()
    layer.sum_average.copy_(unit(directions + torch.randn(4, 8)))  # each starts nearest to one of them
    layer.centroids.copy_(layer.sum_average)

    def cosines():
        return (F.normalize(layer.centroids[0], dim=-1) * F.normalize(directions, dim=-1)).sum(-1)

    assert (cosines() < 0.95).all()
    for _ in range(500):
        x = directions.repeat(16, 1) + 0.2 * torch.randn(64, 8, dtype=torch.float64)
        layer(*[x.view(1, 1, 64, 8)] * 3)
    assert (cosines() > 0.95).all()


def test_one_step_of_the_averages_and_the_loss():
    layer, (q, k, v) = build(clusters=3, window=4, decay=0.9, commitment=0.5).train(), tensors(12)
    before = layer.centroids.clone()
    count, total, loss = torch.ones(2, 3).double(), before.clone(), torch.zeros(()).double()
    fresh_count, fresh_total = torch.zeros_like(count), torch.zeros_like(total)
    for x in (unit(q), unit(k)):
        for b, h, n in torch.cartesian_prod(*map(torch.arange, (2, 2, 12))):
            nearest = (before[h] @ x[b, h, n]).argmax()
            fresh_count[h, nearest] += 1
            fresh_total[h, nearest] += x[b, h, n]
            loss += 0.5 * (x[b, h, n] - before[h, nearest]).square().mean() / (2 * 2 * 12)
    layer(q, k, v)
    count, total = 0.9 * count + 0.1 * fresh_count, 0.9 * total + 0.1 * fresh_total
    torch.testing.assert_close(layer.auxiliary, loss, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.count_average, count, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.centroids, total / count.unsqueeze(-1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("causal", [False, True])
def test_padding_moves_no_centroid_and_adds_no_loss(causal):
    keep = torch.arange(12).expand(2, -1) < torch.tensor([[12], [7]])
    results = []
    for scale in (1.0, 50.0):
        torch.manual_seed(1)
        layer, inputs = build(causal, clusters=3, window=4).train(), tensors(12)
        layer(*(x.where(keep[:, None, :, None], x * scale + scale) for x in inputs), mask=keep)
        results.append((layer.auxiliary, layer.centroids, layer.count_average))
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-12)
    sides = 1 if causal else 2
    tokens = (layer.count_average - layer.decay).sum(-1) / (1 - layer.decay)
    torch.testing.assert_close(tokens, torch.full((2,), sides * 19.0).double(), rtol=1e-9, atol=0)


def test_centroids_stay_at_least_float32_and_are_saved():
    layer = attlas.mixer("routing", 16, 2, clusters=3, window=4).to(torch.bfloat16)
    exact = layer.attend.centroids.clone()
    assert exact.dtype == torch.float32
    assert layer.q_proj.weight.dtype == torch.bfloat16
    layer.train()(torch.randn(1, 8, 16, dtype=torch.bfloat16))
    assert not torch.equal(layer.attend.centroids, exact)
    assert not any("centroids" in name for name, _ in layer.named_parameters())
    other = attlas.mixer("routing", 16, 2, clusters=3, window=4)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.attend.centroids, layer.attend.centroids)


def test_sizes_follow_from_the_length():
    layer = attlas.make_attend("routing", 1, 8, length=256, causal=True)
    assert (layer.clusters, layer.window) == (16, 16)
    assert attlas.mixer("routing", 16, 2, grid=(6, 6)).attend.clusters == 6


def test_what_has_no_meaning_is_refused():
    with pytest.raises(BadInput, match="pass length="):
        attlas.mixer("routing", 16, 2)
    with pytest.raises(BadInput, match="pass length=, or clusters= and window="):
        attlas.mixer("routing", 16, 2, clusters=4, causal=True)
    with pytest.raises(BadInput, match="holds 9 tokens and there are 8; build with a window of at most 8"):
        attlas.mixer("routing", 16, 2, clusters=2, window=9, length=8)
    with pytest.raises(BadInput, match="all 8 of them"):
        build(clusters=2)(tensors(3)[0], *tensors(8)[1:])
    for settings in ({"clusters": 0}, {"clusters": 2, "window": 0}, {"clusters": 2, "decay": 1.0}):
        with pytest.raises(BadInput):
            attlas.mixer("routing", 16, 2, **settings)
    with pytest.raises(Unsupported, match="centroids"):
        attlas.attend(*tensors(8), "routing")
