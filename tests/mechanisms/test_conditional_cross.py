"""The identities of `conditional_cross`."""

import pytest
import torch

import attlas
from attlas.core.errors import BadInput, Unsupported


def build(**settings):
    return attlas.mixer("conditional_cross", 16, 4, **settings).double()


def tokens(count=6, batch=3):
    return torch.randn(batch, count, 16, dtype=torch.float64)


def parameters(**settings):
    return sum(p.numel() for p in attlas.mixer("conditional_cross", 16, 4, **settings).parameters())


@pytest.mark.parametrize("embedding", ["embed", "onehot_fc"])
def test_a_condition_costs_one_vector(embedding):
    assert parameters(conditions=9, embedding=embedding) - parameters(conditions=8, embedding=embedding) == 16


@pytest.mark.parametrize("embedding", ["embed", "onehot_fc"])
def test_the_condition_changes_the_output_and_nothing_before_it(embedding):
    layer, x = build(embedding=embedding), tokens()
    seen = []
    for proj in (layer.k_proj, layer.v_proj):
        proj.register_forward_hook(lambda module, args, output: seen.append(output))
    outputs = []
    for condition in range(8):
        layer.condition = condition
        outputs.append(layer(x))
    assert all(torch.equal(seen[0], k) and torch.equal(seen[1], v) for k, v in zip(seen[2::2], seen[3::2], strict=True))
    for first in range(8):
        assert all(not torch.allclose(outputs[first], outputs[second]) for second in range(first))


def test_each_sequence_may_have_its_own_condition():
    layer, x = build(), tokens()
    layer.condition = torch.tensor([2, 0, 7])
    mixed = layer(x)
    for b, condition in enumerate((2, 0, 7)):
        layer.condition = condition
        assert torch.allclose(layer(x[b : b + 1]), mixed[b : b + 1], rtol=0, atol=1e-12)


def test_only_conditions_that_were_asked_for_learn():
    layer = build()
    layer.condition = torch.tensor([2, 0, 2])
    layer(tokens()).sum().backward()
    assert layer.table.weight.grad.any(1).nonzero()[:, 0].tolist() == [0, 2]


def test_the_image_in_the_place_of_the_condition_is_softmax_attention():
    layer, plain, x = build(), attlas.mixer("softmax", 16, 4).double(), tokens()
    plain.load_state_dict({name: layer.state_dict()[name] for name in plain.state_dict()})
    keep = torch.arange(6).expand(3, -1) < 4
    assert torch.allclose(layer.ask(x, x), plain(x), rtol=0, atol=1e-12)
    assert torch.allclose(layer.ask(x, x, keep)[:, :4], plain(x, mask=keep)[:, :4], rtol=0, atol=1e-12)


def test_a_context_is_asked_instead_of_the_tokens():
    layer, x, context = build(), tokens(), tokens(9)
    assert torch.equal(layer(x, context), layer(context)[:, :6])


def test_padding_may_hold_anything():
    layer, x = build(), tokens()
    keep = torch.arange(6).expand(3, -1) < 4
    y = layer(x.masked_fill(~keep.unsqueeze(-1), torch.nan), mask=keep)
    assert torch.allclose(y[:, :4], layer(x[:, :4]), rtol=0, atol=1e-12)
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_cost_is_linear_in_tokens():
    costs = [attlas.mixer("conditional_cross", 16, 4).cost(1, count).flops for count in (100, 200, 300)]
    assert costs[1] - costs[0] == costs[2] - costs[1]


def mean_average_precision(embedded, labels):
    """Of retrieving those of the same label among all others."""
    similar = (embedded @ embedded.T).fill_diagonal_(-torch.inf)
    order = similar.argsort(1, descending=True)[:, :-1]
    hit = (labels[order] == labels[:, None]).double()
    precision = hit.cumsum(1) / torch.arange(1, len(labels))
    return float(((precision * hit).sum(1) / hit.sum(1)).mean())


@pytest.mark.parametrize("conditional", [True, False])
def test_two_conditions_hold_two_attributes_where_one_space_cannot(conditional):
    """Tokens say a colour and a shape. The figures are mAP of an attribute under its own and the other condition."""
    torch.manual_seed(0)
    layer = attlas.mixer("conditional_cross", 16, 2, conditions=2)
    colours, shapes = torch.randn(4, 16), torch.randn(4, 16)
    optimizer = torch.optim.Adam(layer.parameters(), 5e-3)

    def batch(size):
        labels = torch.randint(4, (2, size))
        clean = torch.stack([colours[labels[0]], shapes[labels[1]]], 1).repeat(1, 3, 1)
        return clean + 0.3 * torch.randn(size, 6, 16), labels

    def embed(x, condition):
        layer.condition = condition if conditional else 0
        return torch.nn.functional.normalize(layer(x)[:, 0], dim=-1)

    for step in range(400):
        x, labels = batch(48)
        e = embed(x, step % 2)
        same, s = labels[step % 2][:, None] == labels[step % 2], e @ e.T
        # Triplets of one attribute: each is to be nearer to its own kind than to any other, by a margin.
        loss = (0.3 + s[:, None, :] - s[:, :, None]).relu()[same[:, :, None] & ~same[:, None, :]].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    with torch.no_grad():
        x, labels = batch(400)
        own = [mean_average_precision(embed(x, c), labels[c]) for c in range(2)]
        other = [mean_average_precision(embed(x, c), labels[1 - c]) for c in range(2)]
    if conditional:
        assert min(own) > 0.95
        assert max(other) < 0.55
    else:
        assert min(own) < 0.85


def test_what_does_not_fit_is_refused():
    layer = build(conditions=3)
    layer.condition = 3
    with pytest.raises(BadInput, match="condition is 0 to 2, got 3"):
        layer(tokens())
    layer.condition = torch.tensor([0, 1])
    with pytest.raises(BadInput, match=r"one integer for each of 3 sequences, got torch.int64 \(2,\)"):
        layer(tokens())
    layer.condition = torch.tensor([True, False, True])
    with pytest.raises(BadInput, match=r"got torch.bool \(3,\)"):
        layer(tokens())
    with pytest.raises(BadInput, match="'embed' or 'onehot_fc', got 'table'"):
        build(embedding="table")
    with pytest.raises(BadInput, match="at least 1, got 0"):
        build(conditions=0)
    with pytest.raises(BadInput, match="16 channels do not split into 3 heads"):
        attlas.mixer("conditional_cross", 16, 3)
    with pytest.raises(BadInput, match=r"context is \(batch, tokens, 16 channels\), got \(3, 6, 8\)"):
        build()(tokens(), tokens()[..., :8])
    with pytest.raises(Unsupported, match="causal"):
        attlas.mixer("conditional_cross", 16, 4, causal=True)
