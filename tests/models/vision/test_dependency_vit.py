"""What only DependencyViT holds: messages that get less down the depth, and tokens that are pruned by them."""

import pytest
import torch

from attlas import Grid, models
from attlas.analysis.trees import edges
from attlas.blocks.positions import Rotary
from attlas.core.errors import BadInput


def built(name="dependency_vit_micro", **settings):
    torch.manual_seed(0)
    return models.create(name, num_classes=5, **settings).double().eval()


def image(size=96):
    return torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def tokens():
    return torch.randn(2, 36, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def watched(net):
    seen = []
    for stage in net.stages:
        for block in stage.blocks:
            block.register_forward_hook(lambda block, args, out: seen.append(out))
    return seen


def test_messages_only_get_less():
    net = built()
    seen = watched(net)
    net(image())
    left = torch.stack([message for _, message in seen])
    assert (left[0] < 1).all()
    assert (left[1:] < left[:-1]).all()
    assert (left > 0).all()


def test_a_block_is_what_the_mechanism_sends():
    block, grid = built().stages[0].blocks[0], Grid((6, 6))
    left = torch.rand(2, 36, dtype=torch.float64)
    x, _ = block((tokens(), left), grid)
    block.mixer.attend.incoming = left
    y = tokens() + block.mixer(block.norm1(tokens()), grid=grid)
    torch.testing.assert_close(x, y + block.mlp(block.norm2(y)))


def test_without_messages_a_block_is_its_mlp():
    block = built().stages[0].blocks[0]
    found, left = block((tokens(), torch.zeros(2, 36, dtype=torch.float64)), Grid((6, 6)))
    y = tokens() + block.mixer.out_proj.bias
    torch.testing.assert_close(found, y + block.mlp(block.norm2(y)))
    assert not left.any()


def test_no_layer_remembers_the_messages_of_a_picture():
    net = built()
    net(image())
    assert all(block.sender.incoming is None for stage in net.stages for block in stage.blocks)


def test_lite_keeps_who_has_most_to_say():
    net = built("dependency_vit_lite_micro")
    seen = watched(net)
    features = net.forward_features(image())
    assert [x.shape[1] for x, _ in seen] == [36, 25, 18, 13]
    assert features.shape == (2, 13, 64)
    before, after = seen[0][1], seen[1][1]
    kept = before.topk(25).indices.sort(1).values
    sent = after / before.gather(1, kept)
    assert ((sent > 0) & (sent < 1)).all()


def test_pruning_nobody_is_the_whole_network():
    whole = built()
    none = built(keep=(1.0, 1.0, 1.0))
    assert torch.equal(whole(image()), none(image()))


def test_maps_of_lite_have_every_place_and_parents_stand_for_the_pruned():
    net = built("dependency_vit_lite_micro")
    plain = net.forward_features(image())
    maps = net.feature_maps(image())
    assert [tuple(each.shape) for each in maps] == [(2, 64, 6, 6)] * 4
    assert [len(each[0].flatten(1).unique(dim=1).T) for each in maps] == [36, 25, 18, 13]
    last = net.norm(maps[-1].flatten(2).mT)
    for picture, rest in zip(last, plain, strict=True):
        assert (torch.cdist(rest, picture, compute_mode="donot_use_mm_for_euclid_dist").min(1).values < 1e-10).all()


@pytest.mark.parametrize(
    "settings", [{}, {"qk_norm": "rms"}, {"qk_activation": "silu"}, {"kv_heads": 1}, {"position": Rotary(32)}]
)
def test_a_parent_is_whom_a_token_would_send_to_most(settings):
    block, grid = built(mixer_settings=settings).stages[1].blocks[0], Grid((36,))
    with torch.no_grad():
        for value in block.mixer.q_norm.parameters():
            value.normal_()
    among = torch.rand(2, 36, generator=torch.Generator().manual_seed(3)) < 0.5
    found = block.parents(tokens(), grid, among)
    strengths = edges(block.mixer, block.norm1(tokens()), grid=grid)
    for picture in range(2):
        allowed = among[picture].nonzero()[:, 0]
        for child in range(36):
            best = allowed[strengths[picture, allowed, child].argmax()]
            assert found[picture, child] == best


def test_ordinary_attention_to_compare_with():
    net = built(mixer="softmax")
    assert net(image()).isfinite().all()
    with pytest.raises(BadInput, match="left to send"):
        built("dependency_vit_lite_micro", mixer="softmax")(image())


def test_bad_input():
    for keep in ((0.5,) * 4, (0.0,), (1.5,)):
        with pytest.raises(BadInput, match="keep holds shares"):
            built(keep=keep)
