"""Blocks that hand tokens on: how many, to whom, and that padding has no part in them."""

import pytest
import torch
import torch.nn.functional as F

from attlas.blocks.fcaformer import FcaBlock, FcaStage, merged_keep, merged_tokens
from attlas.core.errors import BadInput
from attlas.core.grid import Grid


def randomise(module):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module.double().eval()


def tokens(count, batch=2):
    return torch.randn(batch, count, 16, dtype=torch.float64)


@pytest.mark.parametrize(
    ("dim", "heads", "grid", "depth", "parameters"),
    [
        (192, 6, (14, 14), 6, 2_744_160),
        (320, 10, (7, 7), 2, 2_492_864),
        (320, 10, (14, 14), 7, 8_779_656),
        (480, 15, (7, 7), 2, 5_582_494),
    ],
    ids=["L1 third", "L1 fourth", "L2 third", "L2 fourth"],
)
def test_stages_have_the_published_parameters(dim, heads, grid, depth, parameters):
    assert sum(p.numel() for p in FcaStage(dim, heads, grid, depth).parameters()) == parameters


def test_blocks_see_what_the_latest_handed_on_and_the_last_hands_on_nothing():
    assert (merged_tokens((14, 14)), merged_tokens((7, 7)), merged_tokens((5, 9))) == (16, 4, 6)
    stage = FcaStage(16, 2, (5, 9), 5, latest=2)
    assert [block.mix.handed for block in stage.blocks] == [0, 6, 12, 12, 12]
    assert [block.merge is not None for block in stage.blocks] == [True] * 4 + [False]
    x, calls = torch.randn(2, 45, 16), []
    for block in stage.blocks:
        block.register_forward_hook(lambda module, args, output: calls.append((args[1], output[1])))
    assert stage(x).shape == x.shape
    for index in range(1, 5):
        handed = torch.cat([own for _, own in calls[max(0, index - 2) : index]], 1)
        assert torch.equal(calls[index][0], handed)
    assert calls[0][1].shape == (2, 6, 16)
    assert calls[4][1] is None


def test_a_block_is_what_its_formula_says():
    block = randomise(FcaBlock(16, 2, (4, 6), handed=3))
    x, s = tokens(24), tokens(3)
    picture = (2, 16, 4, 6)

    def norm(t, layer):
        return F.layer_norm(t, (16,), layer.weight, layer.bias)

    y = x + block.scale.weight * block.mix(norm(x, block.norm), s, grid=(4, 6))
    merged = F.conv2d(y.mT.reshape(picture), block.merge.weight, stride=4, padding=3, groups=16)
    y = F.conv2d(y.mT.reshape(picture), block.local.weight, padding=1, groups=16)
    bn = block.local_norm
    y = F.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias).flatten(2).mT
    first, second, grow, _, shrink = block.mlp
    y = y + block.mlp_scale.weight * shrink(F.gelu(grow(norm(norm(y, first), second))))
    got, handed = block(x, s)
    torch.testing.assert_close(got, y, rtol=0, atol=1e-12)
    torch.testing.assert_close(handed, merged.flatten(2).mT, rtol=0, atol=1e-12)


def test_a_grid_may_be_a_grid():
    assert merged_tokens(Grid((5, 9))) == 6
    stage = FcaStage(16, 2, Grid((5, 9)), 2).double()
    assert stage(tokens(45), keep=torch.ones(2, 45, dtype=torch.bool)).shape == (2, 45, 16)
    with pytest.raises(BadInput, match="without prefix tokens, got a grid 4x4 after 1"):
        FcaBlock(16, 2, Grid((4, 4), prefix=1))


def test_later_blocks_depend_on_what_was_handed_on():
    block = randomise(FcaBlock(16, 2, (4, 4), handed=1))
    x, s = tokens(16), tokens(1)
    assert (block(x, s)[0] - block(x, -s)[0]).abs().max() > 1e-3


def test_the_local_convolution_has_no_residual():
    block = randomise(FcaBlock(16, 2, (4, 4)))
    with torch.no_grad():
        block.local.weight.zero_()
        block.mlp_scale.weight.zero_()
    y, _ = block(tokens(16))
    assert y.std(1).max() < 1e-12


def test_handed_tokens_are_merged_around_every_fourth_position():
    block = randomise(FcaBlock(16, 2, (6, 9)))
    with torch.no_grad():
        block.scale.weight.zero_()  # so that they depend on x around them only
    jacobian = torch.autograd.functional.jacobian(lambda t: block(t)[1].sum((0, 2)), tokens(54, 1))[:, 0]
    seen = (jacobian.abs().sum(-1) > 0).unflatten(1, (6, 9))
    rows, columns = torch.arange(6), torch.arange(9)
    for index, (y, x) in enumerate((y, x) for y in (0, 4) for x in (0, 4, 8)):
        near = ((rows - y).abs() <= 3).unsqueeze(1) & ((columns - x).abs() <= 3)
        assert torch.equal(seen[index], near)


@pytest.mark.parametrize("train", [False, True])
def test_padding_below_and_to_the_right_is_a_smaller_grid(train):
    whole, small = randomise(FcaStage(16, 2, (6, 9), 3)), FcaStage(16, 2, (5, 5), 3).double()
    x, keep = tokens(54).unflatten(1, (6, 9)), torch.zeros(2, 6, 9, dtype=torch.bool)
    keep[:, :5, :5] = True
    # Of 2 x 3 merged tokens those of the third column have nothing real within reach.
    assert merged_keep(keep.flatten(1), (6, 9)).tolist() == [[True, True, False] * 2] * 2
    state = {}
    for name, t in whole.state_dict().items():
        if name.endswith("position_bias"):
            t = t[:, :5, :5]
        if name.endswith(("handed_bias", "handed_scale")):
            t = t.unflatten(-1, (-1, 2, 3))[..., :2].flatten(-3)
        state[name] = t
    small.load_state_dict(state)
    x = x.masked_fill(~keep.unsqueeze(-1), torch.nan)
    got = whole.train(train)(x.flatten(1, 2), keep=keep.flatten(1)).unflatten(1, (6, 9))[:, :5, :5]
    expected = small.train(train)(x[:, :5, :5].flatten(1, 2))
    torch.testing.assert_close(got.flatten(1, 2), expected, rtol=0, atol=1e-11)


def test_what_has_no_meaning_is_refused():
    with pytest.raises(BadInput, match=r"grid is .height, width."):
        FcaBlock(16, 2, (16,))
    for ratio in (0, 0.05):
        with pytest.raises(BadInput, match=r"ratio says how many times wider the MLP is, at least 0\.0625"):
            FcaBlock(16, 2, (4, 4), ratio=ratio)
    with pytest.raises(BadInput, match="handed_keep marks handed tokens, and there are none"):
        FcaBlock(16, 2, (4, 4))(torch.randn(1, 16, 16), handed_keep=torch.ones(1, 1, dtype=torch.bool))
    with pytest.raises(BadInput, match="depth and latest count blocks, at least 1, got 0 and 12"):
        FcaStage(16, 2, (4, 4), 0)
    with pytest.raises(BadInput, match="keep marks the real tokens"):
        FcaBlock(16, 2, (4, 4))(torch.randn(1, 16, 16), keep=torch.ones(1, 15, dtype=torch.bool))
