"""The identities of `lama` and its pool."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attlas
from attlas.core.errors import BadInput
from attlas.mechanisms.softmax.lama import LamaPool

DIM, HEADS, WORDS = 16, 5, 9


def randomised(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)
    return module.double()


def words(batch=3, length=WORDS):
    return torch.randn(batch, length, DIM, dtype=torch.float64)


@pytest.mark.parametrize("rank", [1, 3])
def test_scores_are_those_of_explicit_matrices(rank):
    pool, x = randomised(LamaPool(DIM, HEADS, rank=rank, normalise=False)), words()
    c = pool.context[:, 0]
    for head in range(HEADS):
        own = slice(head * rank, (head + 1) * rank)
        matrix = sum(torch.outer(p, q) for p, q in zip(pool.p[:, own].T, pool.q[:, own].T, strict=True))
        assert torch.linalg.matrix_rank(matrix) == rank
        expected = (x @ matrix.T @ c).tanh().softmax(-1)
        assert torch.allclose(pool.weights(x)[:, head], expected, rtol=0, atol=1e-12)


def test_scores_of_a_word_have_norm_one_over_the_heads():
    plain, normed = (randomised(LamaPool(DIM, HEADS, normalise=n)) for n in (False, True))
    normed.load_state_dict(plain.state_dict())
    x = words()
    f = (plain.context.T @ plain.p)[..., None] * (x @ plain.q).transpose(1, 2)
    f = f.tanh()
    expected = (f / f.norm(dim=1, keepdim=True)).softmax(-1)
    assert torch.allclose(normed.weights(x), expected, rtol=0, atol=1e-9)
    assert not torch.allclose(plain.weights(x), expected, atol=1e-3)


@pytest.mark.parametrize(
    ("dim", "heads", "rank", "count"), [(768, 8, 1, 13_056), (768, 8, 4, 4 * 2 * 768 * 8 + 768), (600, 20, 1, 24_600)]
)
def test_parameters(dim, heads, rank, count):
    assert sum(p.numel() for p in LamaPool(dim, heads, rank=rank).parameters()) == count


def test_rows_sum_to_one_padding_gets_nothing_and_order_does_not_matter():
    pool, x = randomised(LamaPool(DIM, HEADS)), words()
    keep = torch.arange(WORDS) < torch.tensor([[9], [4], [0]])
    a = pool.weights(x.masked_fill(~keep.unsqueeze(-1), torch.nan), keep)
    assert torch.allclose(a.sum(-1), torch.tensor([1.0, 1.0, 0.0]).double()[:, None].expand(-1, HEADS))
    assert not a.masked_select(~keep.unsqueeze(1)).any()
    assert torch.allclose(a[1, :, :4], pool.weights(x[1:2, :4])[0], rtol=0, atol=1e-12)
    order = torch.randperm(WORDS)
    assert torch.allclose(pool.weights(x[:, order]), pool.weights(x)[..., order], rtol=0, atol=1e-12)
    assert not pool(x, keep)[2].any()


def test_a_layer_is_the_pool_once_per_token():
    pool = randomised(LamaPool(DIM, HEADS, output_dim=DIM, rank=2))
    layer = attlas.mixer("lama", DIM, HEADS, rank=2).double()
    with torch.no_grad():
        pool.out_proj.bias.zero_()
        for name in ("p", "q"):
            getattr(layer, name).copy_(getattr(pool, name))
        layer.out_proj.weight.copy_(pool.out_proj.weight)
    contexts, x = words(length=4), words()
    expected = torch.stack([pool(x, context=contexts[:, n]) for n in range(4)], 1)
    assert torch.allclose(layer(contexts, x), expected, rtol=0, atol=1e-12)


def test_the_pool_gives_a_vector_per_head_or_one_of_the_wanted_size():
    assert LamaPool(DIM, HEADS)(words().float()).shape == (3, HEADS, DIM)
    assert LamaPool(DIM, HEADS, output_dim=7)(words().float()).shape == (3, 7)


def test_a_pool_costs_in_proportion_to_its_words():
    layer = attlas.mixer("lama", 64, 8)
    fixed = 2 * 64 * 8 + 2 * 8 * 64 * 64  # the context's features and the output, whatever the words
    short, long = (layer.cost(1, 1, words).flops - fixed for words in (512, 4096))
    assert long == 8 * short


class Classifier(nn.Module):
    def __init__(self, pooled):
        super().__init__()
        self.embed = nn.Embedding(60, DIM)
        self.pool = LamaPool(DIM, 4) if pooled else None
        self.head = nn.Linear(4 * DIM if pooled else DIM, 10)

    def forward(self, ids):
        x = self.embed(ids)
        return self.head(x.mean(1) if self.pool is None else self.pool(x).flatten(1))


def spotted(pooled, steps=250):
    """Accuracy of naming the one key word among 49 others, and the model."""
    torch.manual_seed(0)
    model = Classifier(pooled)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(steps + 1):
        batch = 64 if step < steps else 1000
        ids, key = torch.randint(10, 60, (batch, 50)), torch.randint(10, (batch,))
        place = torch.randint(50, (batch, 1))
        ids = ids.scatter(1, place, key[:, None])
        if step == steps:
            return (model(ids).argmax(1) == key).double().mean().item(), model, ids, place
        optimizer.zero_grad()
        F.cross_entropy(model(ids), key).backward()
        optimizer.step()


def test_it_spots_the_key_word_and_looks_at_it():
    pooled, model, ids, place = spotted(True)
    mean, *_ = spotted(False)
    assert pooled > 0.95
    assert mean < pooled
    a = model.pool.weights(model.embed(ids)).amax(1)
    assert (a.argmax(1) == place[:, 0]).double().mean() > 0.9


def test_what_does_not_fit_is_refused():
    pool, x = LamaPool(DIM, HEADS), words().float()
    with pytest.raises(BadInput, match=r"rank is the number of products.*got 0"):
        attlas.mixer("lama", DIM, 2, rank=0)
    with pytest.raises(BadInput, match="heads must be at least 1, got 0"):
        LamaPool(DIM, 0)
    with pytest.raises(BadInput, match=r"words are \(batch, words, 16 channels\), got \(3, 9, 4\)"):
        pool(x[..., :4])
    with pytest.raises(BadInput, match=r"keep is a bool tensor \(3, 9\), got torch.float32"):
        pool(x, torch.ones(3, 9))
    with pytest.raises(BadInput, match=r"one vector per text, \(3, 16\), got \(1, 16\)"):
        pool(x, context=x[:1, 0])
    with pytest.raises(BadInput, match=r"context is \(batch, tokens, 16 channels\)"):
        attlas.mixer("lama", DIM, 2)(x, x[..., :4])
