"""The identities and counts of `crossvit` and of the exchange between its two branches."""

import pytest
import torch
import torch.nn.functional as F

import attlas
from attlas import Grid
from attlas.blocks.cross_branch import CrossBranch
from attlas.core.errors import BadInput, Unsupported


def line(patches):
    return Grid((patches,), prefix=1)


def tokens(count, dim, batch=2):
    return torch.randn(batch, count, dim, dtype=torch.float64)


def exchange(dims=(8, 12), heads=(2, 3)):
    torch.manual_seed(1)
    return CrossBranch(dims, heads).double()


def crossvit_parameters(dims, heads, depth, ratio):
    """Patches of 12 and 16 pixels, three stages of 1 and `depth` blocks and an exchange, a head for each branch."""
    total = 0
    for dim, patch, places in zip(dims, (12, 16), (400, 196), strict=True):
        total += 3 * patch**2 * dim + dim + dim + (places + 1) * dim + 2 * dim + 1000 * (dim + 1)
    for dim, blocks in zip(dims, (1, depth), strict=True):
        block = 4 * (dim * dim + dim) + 2 * 2 * dim + 2 * ratio * dim * dim + ratio * dim + dim
        total += 3 * blocks * block
    return total + 3 * sum(p.numel() for p in CrossBranch(dims, heads).parameters())


@pytest.mark.parametrize(
    ("dims", "heads", "depth", "ratio", "published"),
    [
        ((96, 192), (3, 3), 4, 4, 7_014_800),
        ((192, 384), (6, 6), 4, 4, 26_856_272),
        ((384, 768), (12, 12), 4, 4, 105_025_232),
        ((128, 256), (4, 4), 3, 3, 8_553_296),
        ((192, 384), (6, 6), 5, 3, 27_528_464),
        ((224, 448), (7, 7), 6, 3, 43_271_408),
    ],
    ids=["tiny", "small", "base", "9", "15", "18"],
)
def test_parameters_of_the_published_models(dims, heads, depth, ratio, published):
    assert crossvit_parameters(dims, heads, depth, ratio) == published


def test_is_the_first_row_of_dense_attention():
    layer = attlas.mixer("crossvit", 16, 4).double()
    dense = attlas.mixer("softmax", 16, 4).double()
    dense.load_state_dict({name: layer.state_dict()[name] for name in dense.state_dict()})
    x = tokens(7, 16)
    y = layer(x, grid=line(6))
    assert torch.allclose(y[:, 0], dense(x)[:, 0], rtol=0, atol=1e-12)
    assert not y[:, 1:].any()


def test_cross_asks_the_context_and_itself():
    layer = attlas.mixer("crossvit", 16, 4).double()
    x, context = tokens(7, 16), tokens(5, 16)
    joint = torch.cat([x[:, :1], context], 1)
    y = layer(x, context, grid=line(6))
    assert torch.allclose(y[:, 0], layer(joint, grid=line(5))[:, 0], rtol=0, atol=1e-12)
    other = torch.cat([x[:, :1], tokens(6, 16)], 1)
    assert torch.equal(layer(other, context, grid=line(6)), y)


def test_padding_is_as_if_it_were_not_there():
    layer = attlas.mixer("crossvit", 16, 4).double()
    x, context = tokens(7, 16), tokens(5, 16)
    keep = torch.arange(5)[None].expand(2, -1) < 3
    dirty = context.masked_fill(~keep.unsqueeze(-1), torch.nan)
    got = layer(x, dirty, mask=keep, grid=line(6))
    assert torch.allclose(got, layer(x, context[:, :3], grid=line(6)), rtol=0, atol=1e-12)
    got.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())
    nothing = layer(x, mask=torch.zeros(2, 7, dtype=torch.bool), grid=line(6))
    assert torch.equal(nothing[:, 0], layer.out_proj.bias.expand(2, -1))
    layer.float().backend = "oracle"
    nothing = layer(x.float(), mask=torch.zeros(2, 7, dtype=torch.bool), grid=line(6))
    assert torch.equal(nothing[:, 0], layer.out_proj.bias.expand(2, -1))


def test_patches_pass_the_exchange_bit_by_bit():
    first, second = tokens(5, 8), tokens(4, 12)
    new_first, new_second = exchange()(first, second)
    for old, new in ((first, new_first), (second, new_second)):
        assert torch.equal(old[:, 1:], new[:, 1:])
        assert not torch.allclose(old[:, 0], new[:, 0])


def test_the_exchange_reads_what_was_there_before_it():
    block, first, second = exchange(), tokens(5, 8), tokens(4, 12)
    expected = []
    for own, other, visit in ((first, second, block.visits[0]), (second, first, block.visits[1])):
        norm, _, linear = visit.go
        guest = linear(F.gelu(norm(own[:, :1])))
        asked = visit.norm(torch.cat([guest, other[:, 1:]], 1))
        q, k, v = (proj(asked) for proj in (visit.ask.q_proj, visit.ask.k_proj, visit.ask.v_proj))
        heads = visit.ask.site.heads
        o = [
            (a[:, :1] @ b.mT / a.shape[-1] ** 0.5).softmax(-1) @ c
            for a, b, c in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True)
        ]
        guest = guest + visit.ask.out_proj(torch.cat(o, -1))
        norm, _, linear = visit.come_back
        expected.append(linear(F.gelu(norm(guest))))
    for got, wanted in zip(block(first, second), expected, strict=True):
        assert torch.allclose(got[:, :1], wanted, rtol=0, atol=1e-12)


def test_the_order_of_the_other_patches_does_not_matter():
    block, first, second = exchange(), tokens(5, 8), tokens(4, 12)
    turned = second[:, [0, 3, 1, 2]]
    assert torch.allclose(block(first, second)[0], block(first, turned)[0], rtol=0, atol=1e-12)


def test_padded_patches_have_no_part_in_the_exchange():
    block, first, second = exchange(), tokens(5, 8), tokens(4, 12)
    keep = torch.tensor([[True, True, False, False]]).expand(2, -1)
    got, _ = block(first, second, second_keep=keep)
    expected, _ = block(first, second[:, :2])
    assert torch.allclose(got, expected, rtol=0, atol=1e-12)


def test_cost_is_linear_in_tokens():
    layer = attlas.mixer("crossvit", 192, 3)
    costs = [layer.cost(1, 1 + patches, grid=line(patches)).flops for patches in (100, 200, 300)]
    assert costs[1] - costs[0] == costs[2] - costs[1] == 100 * (4 * 192 * 192 + 4 * 192)


def test_what_does_not_fit_is_refused():
    layer = attlas.mixer("crossvit", 16, 4)
    with pytest.raises(BadInput, match=r"pass grid=Grid\(shape, prefix=1\)"):
        layer(torch.randn(1, 7, 16))
    with pytest.raises(BadInput, match=r"got a grid 5 after 2 prefix tokens"):
        layer(torch.randn(1, 7, 16), grid=Grid((5,), prefix=2))
    with pytest.raises(BadInput, match=r"context is \(batch, tokens, 16 channels\), got \(1, 5, 8\)"):
        layer(torch.randn(1, 7, 16), torch.randn(1, 5, 8), grid=line(6))
    with pytest.raises(BadInput, match="16 channels do not split into 3 heads"):
        attlas.mixer("crossvit", 16, 3)
    with pytest.raises(Unsupported, match="causal"):
        attlas.mixer("crossvit", 16, 4, causal=True)
    with pytest.raises(BadInput, match=r"second branch is \(batch, class token and patches, 12 channels\)"):
        exchange()(tokens(5, 8), tokens(4, 8))
    with pytest.raises(BadInput, match="both branches are of one batch, got 2 and 3"):
        exchange()(tokens(5, 8), tokens(4, 12, batch=3))
