"""Sparsifiner: what the guess keeps, what it learns from, and what it costs."""

import math

import pytest
import torch

import attlas
from attlas.core.errors import BadInput

HEADS, SIZE, TOKENS = 2, 8, 33


def qkv(tokens=TOKENS, batch=2):
    return torch.randn(3, batch, HEADS, tokens, SIZE, dtype=torch.float64)


def build(tokens=TOKENS, prefix=1, **settings):
    """An attend whose maps differ, so that queries keep different keys."""
    attend = attlas.make_attend("sparsifiner", HEADS, SIZE, grid=attlas.Grid((tokens - prefix,), prefix), **settings)
    with torch.no_grad():
        for parameter in (attend.down, attend.up):
            parameter.normal_()
    return attend.double().eval()


def kept_pairs(attend, q, k, **call):
    """Which keys each query attends to, read off by values that are unit vectors."""
    v = torch.eye(k.shape[2], dtype=q.dtype).expand(*k.shape[:2], -1, -1)
    return attend(q, k, v, grid=attend.site.grid, **call) > 0


def guess_by_hand(attend, q, k, basis_threshold=0.0, coefficients=None, coefficient_threshold=0.0):
    q, k = attend.q_reduce(q), attend.k_reduce(k)
    low = torch.einsum("bhnf,nm->bhfm", k, attend.down)
    mixture = torch.einsum("bhnf,bhfm->bhnm", q, low).div(math.sqrt(HEADS)).softmax(-1)
    if coefficients is not None:
        mixture = mixture * (mixture >= mixture.topk(coefficients).values[..., -1:])
    mixture = mixture * (mixture > coefficient_threshold)
    maps = attend.up.abs() * (attend.up.abs() > basis_threshold)
    return torch.einsum("bhnm,km->bhnk", mixture, maps)


@pytest.mark.parametrize("settings", [{"keep": 1.0}, {"threshold": 0.0}])
def test_keeping_everything_is_dense_attention(settings):
    q, k, v = qkv()
    attend = build(**settings)
    expected = attlas.attend(q, k, v)
    torch.testing.assert_close(attend(q, k, v, grid=attend.site.grid), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("keep", "budget"), [(0.25, 9), (0.1, 4), (0.5, 17)])
def test_every_query_keeps_its_share_and_the_class_token_keeps_all(keep, budget):
    q, k, _ = qkv()
    kept = kept_pairs(build(keep=keep), q, k)
    assert kept[:, :, 0].all()
    assert (kept[:, :, 1:].sum(-1) == budget).all()
    assert not torch.equal(kept[0], kept[1])  # another picture, other keys


@pytest.mark.parametrize(
    "cut",
    [
        {},
        {"coefficients": 2},
        {"basis_threshold": 0.8, "coefficient_threshold": 0.2},
        {"coefficients": 3, "basis_threshold": 0.5},
    ],
    ids=str,
)
def test_what_is_kept_are_the_largest_entries_of_the_guess(cut):
    q, k, _ = qkv()
    attend = build(**cut)
    guess = guess_by_hand(attend, q, k, **cut)[:, :, 1:]
    torch.testing.assert_close(attend.approximate(q, k, prefix=1, cut=True), guess, rtol=0, atol=1e-12)
    order = guess.sort(dim=-1, descending=True, stable=True).indices[..., :9]
    expected = torch.zeros_like(guess, dtype=torch.bool).scatter(-1, order, True)
    assert torch.equal(kept_pairs(attend, q, k)[:, :, 1:], expected)
    above = build(**cut, threshold=0.6)
    above.load_state_dict(attend.state_dict())
    assert torch.equal(kept_pairs(above, q, k)[:, :, 1:], guess > 0.6)


def test_a_query_that_keeps_no_key_gives_zero():
    q, k, v = qkv()
    attend = build(threshold=1e9)
    v.requires_grad_()
    o = attend(q, k, v, grid=attend.site.grid)
    assert not o[:, :, 1:].any()
    torch.testing.assert_close(o[:, :, :1], attlas.attend(q[:, :, :1], k, v), rtol=0, atol=1e-12)
    assert torch.isfinite(torch.autograd.grad(o.sum(), v)[0]).all()


def test_gathering_the_kept_keys_is_the_same_and_costs_what_is_said():
    q, k, v = qkv()
    attend = build(keep=0.25)
    best = attend.approximate(q, k, prefix=1, cut=True).topk(9).indices.unsqueeze(-1).expand(-1, -1, -1, -1, SIZE)
    gathered = [x.unsqueeze(2).expand(-1, -1, TOKENS - 1, -1, -1).gather(3, best) for x in (k, v)]
    scores = torch.einsum("bhnd,bhnmd->bhnm", q[:, :, 1:], gathered[0]) / math.sqrt(SIZE)
    expected = torch.einsum("bhnm,bhnmd->bhnd", scores.softmax(-1), gathered[1])
    got = attend(q, k, v, grid=attend.site.grid)
    torch.testing.assert_close(got[:, :, 1:], expected, rtol=0, atol=1e-12)
    cost, patches, features, maps = attend.cost(2, TOKENS), TOKENS - 1, SIZE // 2, TOKENS // 8
    pairs = TOKENS + patches * 9
    guess = SIZE * features * (TOKENS + patches) + features * maps * (TOKENS + patches) + patches * maps * TOKENS
    assert cost.pairs == 2 * HEADS * pairs
    assert cost.flops == 2 * 2 * HEADS * (guess + 2 * SIZE * pairs)


def test_the_published_sizes_save_almost_half_of_the_products():
    layer = attlas.make_attend("sparsifiner", 6, 64, grid=attlas.Grid((14, 14), prefix=1), coefficients=8)
    assert layer.cost(1, 197).pairs == 6 * (197 + 196 * 50)
    assert 0.53 < layer.cost(1, 197).flops / attlas.make_attend("softmax", 6, 64).cost(1, 197).flops < 0.55


def test_the_guess_learns_from_its_own_loss_and_from_nothing_else():
    q, k, v = qkv()
    guessing = ("down", "up", "q_reduce.weight", "q_reduce.bias", "k_reduce.weight", "k_reduce.bias")
    attend = build(distill=0.0).train()
    attend(q.requires_grad_(), k, v, grid=attend.site.grid).square().sum().backward()
    assert attend.auxiliary is None
    assert all(parameter.grad is None for parameter in attend.parameters())
    attend = build().train()
    attend(q, k, v, grid=attend.site.grid)
    attlas.auxiliary_loss(attend).backward()
    assert all(dict(attend.named_parameters())[name].grad.any() for name in guessing)


def test_the_loss_is_the_distance_to_the_attention_without_a_mask():
    q, k, v = qkv()
    attend = build().train()
    keep = torch.rand(2, TOKENS) > 0.3
    keep[:, 0] = True
    losses = []
    for backend in ("auto", "oracle"):
        attend.backend = backend
        for mask in (None, keep):
            attend(q, k, v, grid=attend.site.grid, mask=mask)
            losses.append(attend.auxiliary)
    weights = (q @ k.mT / math.sqrt(SIZE)).softmax(-1)
    expected = 0.05 * (guess_by_hand(attend, q, k) - weights)[:, :, 1:].square().sum()
    torch.testing.assert_close(losses[0], expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(losses[0], losses[2], rtol=1e-12, atol=0)
    torch.testing.assert_close(losses[1], losses[3], rtol=1e-12, atol=0)
    assert losses[1] < losses[0]


def test_fitted_to_maps_of_blocks_it_finds_their_keys():
    tokens, groups, batch = 64, 4, 4
    torch.manual_seed(1)
    attend = attlas.make_attend("sparsifiner", 1, 16, length=tokens)
    asked = torch.randint(groups, (batch, 1, tokens))  # the block of keys that each query of each picture asks for
    place = torch.arange(tokens) // (tokens // groups)
    words = torch.randn(groups, 16)
    q, k = (words[n] + 0.1 * torch.randn(batch, 1, tokens, 16) for n in (asked, place))
    target = (3.0 * (asked.unsqueeze(-1) == place)).add(0.1 * torch.randn(batch, 1, tokens, tokens)).softmax(-1)
    optimizer = torch.optim.Adam(attend.parameters(), 0.02)
    losses = []
    for _ in range(200):
        loss = (attend.approximate(q, k) - target).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 10
    kept = kept_pairs(attend.eval(), q, k)
    true = asked.unsqueeze(-1) == place
    assert (kept & true).sum() / true.sum() > 0.8
    assert abs(float((kept & true.roll(1, 0)).sum() / true.sum()) - 0.25) < 0.1  # another picture's blocks: chance


@pytest.mark.parametrize("poison", [1e6, torch.nan])
def test_padding_leaves_its_places_to_real_keys(poison):
    q, k, _ = qkv()
    keep = torch.ones(2, TOKENS, dtype=torch.bool)
    keep[0, 5:15], keep[1, 6:] = False, False  # the second picture has 6 tokens, fewer than 9 are kept
    attend = build()
    kept = kept_pairs(attend, *(x.masked_fill(~keep[:, None, :, None], poison) for x in (q, k)), mask=keep)
    blank = k.masked_fill(~keep[:, None, :, None], 0)
    low = attend.k_reduce(blank).where(keep[:, None, :, None], 0).mT @ attend.down
    guess = (attend.q_reduce(q) @ low / math.sqrt(HEADS)).softmax(-1) @ attend.up.abs().mT
    order = guess.masked_fill(~keep[:, None, None], -torch.inf).topk(9).indices
    expected = torch.zeros_like(guess, dtype=torch.bool).scatter(-1, order, True) & keep[:, None, None]
    rows = keep[:, None, :, None] & (torch.arange(TOKENS) > 0).view(-1, 1)
    assert torch.equal(kept & rows, expected & rows)
    assert (kept.sum(-1)[0][:, keep[0]][:, 1:] == 9).all()
    assert (kept.sum(-1)[1][:, :6] == 6).all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"keep": 0.0}, "keep is a share of the tokens"),
        ({"keep": 1.5}, "keep is a share of the tokens"),
        ({"reduce_tokens": 34}, "reduce_tokens leaves tokens // reduce_tokens: 1 to 33, got 34"),
        ({"reduce_features": 9}, "reduce_features leaves features // reduce_features: 1 to 8, got 9"),
        ({"coefficients": 5}, "coefficients is 1 to 4"),
        ({"basis_threshold": -1.0}, "basis_threshold is compared"),
        ({"coefficient_threshold": -1.0}, "coefficient_threshold is compared"),
        ({"distill": -1.0}, "distill is a coefficient"),
    ],
)
def test_what_has_no_meaning_is_refused_at_construction(settings, words):
    with pytest.raises(BadInput, match=words):
        build(**settings)


def test_it_serves_the_tokens_that_it_was_built_for():
    with pytest.raises(BadInput, match="over one number of tokens"):
        attlas.make_attend("sparsifiner", HEADS, SIZE)
    attend = attlas.make_attend("sparsifiner", HEADS, SIZE, length=16).double()
    with pytest.raises(BadInput, match="built for 16 tokens, got 20 queries"):
        attend(*qkv(20))
