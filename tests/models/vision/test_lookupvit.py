"""What only LookupViT holds: one map for both ways, tokens that meet only through the compressed ones, any m."""

import pytest
import torch
from torch import nn

from attlas import Grid, models
from attlas.bench.macs import macs
from attlas.blocks.lookup import TwoWayAttention
from attlas.core.errors import BadInput

GRIDS = Grid((8, 8)), Grid((4, 4))


def built(**settings):
    torch.manual_seed(0)
    return models.create("lookupvit_micro", num_classes=5, **settings).double().eval()


def image(size=64):
    return torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def streams():
    generator = torch.Generator().manual_seed(2)
    return tuple(torch.randn(2, n, 48, dtype=torch.float64, generator=generator) for n in (64, 16))


def test_both_ways_literally():
    attention = TwoWayAttention(8, 2).double()
    asking, asked = (torch.randn(1, n, 8, dtype=torch.float64) for n in (3, 5))
    heard, weights = attention.gather(asking, asked)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 3, dtype=torch.float64))
    told = attention.scatter(asking, weights)
    q, k, v, w = (proj(x)[0] for proj, x in zip(_projections(attention), (asking, asked, asked, asking), strict=True))
    own, back = torch.zeros(3, 8, dtype=torch.float64), torch.zeros(5, 8, dtype=torch.float64)
    for h in (slice(0, 4), slice(4, 8)):
        for m in range(3):
            row = torch.stack([q[m, h] @ k[n, h] / 2 for n in range(5)]).softmax(0)
            for n in range(5):
                own[m, h] += row[n] * v[n, h]
                back[n, h] += row[n] * w[m, h]
    torch.testing.assert_close(heard[0], attention.out_proj(own))
    torch.testing.assert_close(told[0], attention.back_out_proj(back))
    assert not torch.allclose(weights.sum(-2), torch.ones_like(weights.sum(-2)))


def _projections(attention):
    return attention.q_proj, attention.k_proj, attention.v_proj, attention.back_v_proj


def test_lookup_tokens_meet_only_through_the_compressed_ones():
    block, (lookup, compressed) = built().stages[0].blocks[0], streams()
    told = block((lookup, compressed), GRIDS)[0]
    changed = lookup.clone()
    changed[:, 0] = changed[:, 0].flip(-1)
    assert (block((changed, compressed), GRIDS)[0] != told).any(2).all()
    for proj in (block.attention.back_out_proj,):
        nn.init.zeros_(proj.weight)
    told, again = (block((x, compressed), GRIDS)[0] for x in (lookup, changed))
    assert torch.equal(told[:, 1:], again[:, 1:])
    assert not torch.equal(told[:, 0], again[:, 0])


def test_without_looking_up_the_compressed_tokens_are_a_plain_transformer():
    net = built(size=8)
    for block in net.stages[0].blocks:
        nn.init.zeros_(block.attention.out_proj.weight)
        nn.init.zeros_(block.attention.out_proj.bias)
    (lookup, x), (grid, coarse) = net.embed(image())
    assert grid == coarse
    assert torch.equal(lookup, x)
    for block in net.stages[0].blocks:
        x = block.heavy(x, grid)
    torch.testing.assert_close(net.forward_features(image())[1], net.norms[1](x), rtol=0, atol=0)


def test_the_same_weights_serve_every_number_of_compressed_tokens():
    net, logits = built(), []
    for size in (3, 4, 5, 8):
        net.embed.size = size
        logits.append(net(image()))
        again = built(size=size)
        again.load_state_dict(net.state_dict())
        assert torch.equal(again(image()), logits[-1])
    assert all(not torch.allclose(logits[0], each) for each in logits[1:])


@pytest.mark.parametrize(("size", "share"), [(3, 0.378), (5, 0.481), (7, 0.637), (10, 0.973)])
def test_a_blocks_share_of_vits(size, share):
    with torch.device("meta"):
        net = models.create(f"lookupvit_base_{size}x{size}")
    around = 196 * 768 * 768 + 2 * 768 * 1000
    vit = 12 * (12 * 196 * 768**2 + 2 * 196**2 * 768)
    assert (macs(net, torch.empty(1, 3, 224, 224, device="meta")) - around) / vit == pytest.approx(share, abs=5e-4)


def test_compressed_tokens_are_the_picture_resized():
    (lookup, compressed), grids = built().embed(image())
    assert grids == GRIDS
    means = lookup.mT.unflatten(2, (4, 2, 4, 2)).mean((3, 5))
    near = compressed.mT.unflatten(2, (4, 4))
    assert torch.corrcoef(torch.stack([means.flatten(), near.flatten()]))[0, 1] > 0.9


def test_another_mechanism_thinks():
    net = built(mixer="linear")
    assert net.stages[0].blocks[0].heavy.mixer.spec.name == "linear"
    assert net(image()).isfinite().all()


def test_bad_input():
    with pytest.raises(BadInput, match="at least 1"):
        built(size=0)
    with pytest.raises(BadInput, match="bottleneck"):
        built(bottleneck=49)
    with pytest.raises(BadInput, match="heads must divide"):
        TwoWayAttention(8, 3)


def test_maps_of_pictures_that_are_not_square():
    net = models.create("lookupvit_micro", features_only=True, img_size=(64, 96))
    maps = net(torch.randn(1, 3, 64, 96))
    assert [tuple(each.shape[2:]) for each in maps] == [(8, 12), (4, 4)]
    assert net.strides == (8, 16)
