"""The skeleton of two branches: what its head reads, and which maps it gives."""

import pytest
import torch
from torch import nn

from attlas import Grid
from attlas.core.errors import BadInput
from attlas.models.backbone import FeaturePyramid
from attlas.models.two_branch import BranchHead, PairStage, TwoBranch


class Cut(nn.Module):
    """Every pixel as a token, and every second one behind a prefix token."""

    def forward(self, image):
        coarse = image[:, :, ::2, ::2]
        second = nn.functional.pad(coarse.flatten(2).mT, (0, 0, 1, 0))
        grids = Grid(tuple(image.shape[2:])), Grid(tuple(coarse.shape[2:]), prefix=1)
        return (image.flatten(2).mT, second), grids


class Swap(nn.Module):
    """Adds to each branch the mean of the other."""

    def forward(self, pair, grids):
        first, second = pair
        return first + second.mean(1, keepdim=True), second + first.mean(1, keepdim=True)


def build(head):
    return TwoBranch(
        Cut(),
        [PairStage([Swap(), Swap()])],
        [nn.Identity(), nn.Identity()],
        head,
        in_chans=3,
        channels=(3, 3),
        strides=(1, 2),
        num_features=head.num_features,
    )


def test_maps_of_both_branches_without_the_prefix():
    maps = FeaturePyramid(build(BranchHead((3, 3), 4)))(torch.randn(2, 3, 4, 6))
    assert [tuple(each.shape) for each in maps] == [(2, 3, 4, 6), (2, 3, 2, 3)]


@pytest.mark.parametrize(("reads", "features"), [((0,), 3), ((1,), 5), ((0, 1), 8)])
def test_what_the_head_reads(reads, features):
    pair = torch.randn(2, 4, 3), torch.randn(2, 6, 5)
    bare = BranchHead((3, 5), 0, reads=reads, pool="mean")
    assert bare.num_features == features
    assert torch.equal(bare(pair), torch.cat([pair[branch].mean(1) for branch in reads], -1))
    head = BranchHead((3, 5), 7, reads=reads)
    votes = [vote(pair[branch][:, 0]) for vote, branch in zip(head.classifiers, reads, strict=True)]
    torch.testing.assert_close(head(pair), sum(votes) / len(reads))


def test_checkpointing_gives_the_same():
    net, image = build(BranchHead((3, 3), 4)), torch.randn(2, 3, 4, 4)
    plain = net(image)
    net.set_grad_checkpointing()
    assert torch.equal(net(image), plain)


def test_bad_input():
    with pytest.raises(BadInput, match="'token' or 'mean'"):
        BranchHead((3, 3), 4, pool="max")
    with pytest.raises(BadInput, match="in_chans"):
        build(BranchHead((3, 3), 4))(torch.randn(1, 1, 4, 4))
