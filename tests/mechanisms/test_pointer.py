"""What only pointing holds: distributions over inputs, and the network that learns to sort and to tour."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import attlas
from attlas.core.errors import BadInput
from attlas.models.pointer import PointerNetwork

DOUBLE = {"dtype": torch.float64}


def build(**settings):
    return attlas.mixer("pointer", 12, **settings).double()


def network(dim=16, **settings):
    net = PointerNetwork(2, dim, **settings).double().eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.6)
    return net


def test_pointing_is_the_softmax_of_additive_scores():
    layer, x, context = build(), torch.randn(2, 3, 12, **DOUBLE), torch.randn(2, 5, 12, **DOUBLE)
    w1, w2, v = layer.key.weight, layer.query.weight, layer.score.weight[0]
    u = torch.einsum("c,bnmc->bnm", v, ((x @ w2.T)[:, :, None] + (context @ w1.T)[:, None]).tanh())
    torch.testing.assert_close(layer.point(x, context), u.log_softmax(-1), rtol=0, atol=1e-12)
    torch.testing.assert_close(layer(x, context), u.softmax(-1) @ context, rtol=0, atol=1e-12)
    clipped = build(clip=10.0)
    clipped.load_state_dict(layer.state_dict())
    torch.testing.assert_close(clipped.point(x, context), (10 * u.tanh()).log_softmax(-1), rtol=0, atol=1e-12)


def test_probabilities_sum_to_one_over_real_keys_and_are_zero_at_padding():
    layer, x, context = build(), torch.randn(2, 3, 12, **DOUBLE), torch.randn(2, 5, 12, **DOUBLE)
    keep = torch.tensor([[True] * 5, [True, True, False, True, False]])
    context[~keep] = torch.nan
    p = layer.point(x, context, keep).exp()
    assert (p.transpose(1, 2)[~keep] == 0).all()
    torch.testing.assert_close(p.sum(-1), torch.ones(2, 3, **DOUBLE), rtol=0, atol=1e-12)
    loss = -layer.point(x.requires_grad_(), context, keep)[..., 0].sum()
    for grad in torch.autograd.grad(loss, [x, *layer.parameters()]):
        assert torch.isfinite(grad).all()


def test_tokens_that_are_padding_reach_neither_the_output_nor_the_gradients():
    layer, x, grads = build(), torch.randn(2, 5, 12, **DOUBLE), []
    keep = torch.tensor([[True] * 5, [True, True, False, True, False]])
    for value in (0.5, torch.nan):
        x[~keep] = value
        y = layer(x, mask=keep)
        assert torch.isfinite(y).all()
        grads.append(torch.autograd.grad(y[keep].square().sum(), list(layer.parameters())))
    assert all(map(torch.equal, *grads))


def test_permuting_what_is_pointed_to_permutes_the_distribution():
    layer, x, context = build(), torch.randn(2, 3, 12, **DOUBLE), torch.randn(2, 5, 12, **DOUBLE)
    order = torch.randperm(5)
    torch.testing.assert_close(layer.point(x, context)[..., order], layer.point(x, context[:, order]))


def test_a_network_reads_points_and_not_blends():
    net, points = network(), torch.rand(2, 6, 2, **DOUBLE)
    targets = torch.tensor([[3, 1, 6, 6], [0, 5, 2, 6]])
    e, state = net.encoder(points)
    given = torch.stack([net.first.expand(2, 2), points[[0, 1], [3, 0]], points[[0, 1], [1, 5]]], 1)
    d, _ = net.decoder(given, state)
    slots = torch.cat([e, net.end.expand(2, 1, -1)], 1)
    torch.testing.assert_close(net(points, targets)[:, :3], net.pointer.point(d, slots), rtol=0, atol=1e-12)


def test_a_padded_batch_is_its_sequences_one_by_one():
    net, points = network(), torch.rand(3, 7, 2, **DOUBLE)
    lengths = torch.tensor([7, 4, 1])
    keep = torch.arange(7) < lengths[:, None]
    whole = net(points, torch.zeros(3, 3, dtype=torch.long), keep)
    decoded = net.decode(points, keep, beam=3)
    assert (whole.exp().transpose(1, 2)[:, :7][~keep] == 0).all()
    for b, n in enumerate(lengths.tolist()):
        alone = net(points[b : b + 1, :n], torch.zeros(1, 3, dtype=torch.long))
        ends = torch.cat([whole[b, :, :n], whole[b, :, 7:]], -1)
        torch.testing.assert_close(ends, alone[0], rtol=0, atol=1e-12)
        best = net.decode(points[b : b + 1, :n], beam=3).slots[0]
        assert decoded.slots[b, : n + 1].where(decoded.slots[b, : n + 1] < 7, n).tolist() == best.tolist()


def score(net, points, answer):
    log_p = net(points, torch.tensor([answer]))[0]
    return log_p[range(len(answer)), answer].sum().item()


def test_a_wide_beam_finds_the_most_probable_answer():
    net, points = network(), torch.rand(1, 3, 2, **DOUBLE)
    answers = [
        [*places, 3] if len(places) < 4 else list(places)
        for steps in range(5)
        for places in itertools.product(range(3), repeat=steps)
    ]
    best = max(answers, key=lambda answer: score(net, points, answer))
    slots, log_p = net.decode(points, beam=100)
    assert slots[0, : len(best)].tolist() == best
    assert float(log_p) == pytest.approx(score(net, points, best))
    greedy = net.decode(points)
    assert (slots[0, len(best) :] == 3).all()
    assert float(greedy.log_p) <= float(log_p)


@pytest.mark.parametrize("beam", [1, 4])
def test_every_tour_is_a_permutation(beam):
    net, points = network(), torch.rand(20, 8, 2, **DOUBLE)
    lengths = torch.randint(1, 9, (20,))
    keep = torch.arange(8) < lengths[:, None]
    slots, log_p = net.decode(points, keep, beam=beam, visit_once=True)
    for tour, n in zip(slots.tolist(), lengths.tolist(), strict=True):
        assert sorted(tour[:n]) == list(range(n))
        assert set(tour[n:]) <= {8}
    assert torch.isfinite(log_p).all()


def test_the_parameters_are_two_lstms_three_matrices_and_two_vectors():
    lstm = 4 * (256 * (2 + 256) + 2 * 256)
    assert sum(p.numel() for p in PointerNetwork(2, 256).parameters()) == 2 * lstm + 2 * 256**2 + 256 + 256 + 2


def right(net, count):
    """The share of places, of sorted numbers that the network points to by itself."""
    points = torch.rand(500, count, 1)
    return float((net.decode(points).slots[:, :count] == points[..., 0].argsort(1)).float().mean())


def test_it_learns_to_sort_and_sorts_more_numbers_than_it_has_seen():
    net = PointerNetwork(1, 64)
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    for step in range(250):
        points = torch.rand(128, 3 + step % 3, 1)
        targets = points[..., 0].argsort(1)
        loss = F.nll_loss(net(points, targets).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 2)
        optimizer.step()
    assert right(net, 5) > 0.6
    assert right(net, 7) > 2 / 7


def test_what_does_not_fit_is_refused():
    layer, net, points = build(), network(), torch.rand(2, 5, 2, **DOUBLE)
    with pytest.raises(BadInput, match=r"clip is the largest score.*got 0"):
        build(clip=0.0)
    with pytest.raises(BadInput, match=r"context is \(batch, tokens, 12 channels\)"):
        layer.point(torch.rand(2, 3, 12, **DOUBLE), torch.rand(2, 3, 11, **DOUBLE))
    with pytest.raises(BadInput, match="pointer has one head, the bias is for 2"):
        layer(torch.rand(1, 3, 12, **DOUBLE), mask=torch.zeros(2, 3, 3, **DOUBLE))
    with pytest.raises(BadInput, match=r"points are \(batch, points, 2 features\)"):
        net.decode(points[..., :1])
    with pytest.raises(BadInput, match="targets are integers"):
        net(points, torch.rand(2, 5))
    with pytest.raises(BadInput, match="real points stand before padding"):
        net.decode(points, torch.tensor([[True] * 5, [True, False, True, True, False]]))
    with pytest.raises(BadInput, match=r"mask is bool \(2, 5\)"):
        net.decode(points, torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(BadInput, match="at least one beginning, got 0"):
        net.decode(points, beam=0)
