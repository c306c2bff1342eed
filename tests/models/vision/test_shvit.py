"""What only SHViT holds: blocks that begin as the identity, stages without attention, parts that become one."""

import copy

import pytest
import torch

from attlas import models
from attlas.blocks.conv_norm import ConvNorm, fuse
from attlas.core.errors import BadInput
from tests.models.vision.official_names import assert_loads, picture, renamed, shaken


def test_a_block_begins_as_the_identity():
    net, x = models.create("shvit_micro").eval(), torch.randn(2, 32, 5, 4)
    torch.testing.assert_close(net.stages[1](x), x, rtol=0, atol=0)
    assert not torch.allclose(shaken("shvit_micro").float().stages[1](x), x)


def test_the_first_stage_has_no_mixers_and_the_others_those_of_the_paper():
    with torch.device("meta"):
        net = models.create("shvit_s3")
    assert [stage.blocks[0].mixer is None for stage in net.stages] == [True, False, False]
    assert [stage.blocks[0].mixer.attended for stage in net.stages[1:]] == [75, 96]
    assert {stage.blocks[0].mixer.key_dim for stage in net.stages[1:]} == {16}
    assert net.strides == (16, 32, 64)


def test_fused_it_is_the_same_without_norms_of_convolutions():
    net, x = shaken("shvit_micro"), picture(64, 96)
    one = fuse(copy.deepcopy(net))
    assert not any(isinstance(module, ConvNorm) for module in one.modules())
    assert sum(p.numel() for p in one.parameters()) < sum(p.numel() for p in net.parameters())
    with torch.no_grad():
        torch.testing.assert_close(one(x), net(x), rtol=1e-10, atol=1e-10)


def test_mixers_are_named_for_the_stages_that_have_one():
    net = models.create("shvit_micro", mixer=["flow", "shvit"])
    assert [stage.blocks[0].mixer.spec.name for stage in net.stages[1:]] == ["flow", "shvit"]
    with pytest.raises(BadInput, match="one for each of the 2 stages"):
        models.create("shvit_micro", mixer=["flow", "shvit", "shvit"])


def test_official_names():
    net = shaken("shvit_micro")
    official = renamed(
        net.state_dict(),
        (r"\.num_batches_tracked", ".tracked"),
        (r"\.conv\.weight$", ".c.weight"),
        (r"^(downsamples\.0\.\d)\.norm\.", r"\1.bn."),
        (r"^(downsamples\.[12]\.2\.\d)\.norm\.", r"\1.bn."),
        (r"\.module\.norm\.", ".m.bn."),
        (r"\.module\.c\.", ".m.c."),
        (r"\.module\.([02])\.norm\.", r".module.\1.bn."),
        (r"\.module\.0\.", ".m.pw1."),
        (r"\.module\.2\.", ".m.pw2."),
        (r"^downsamples\.0\.", "patch_embed."),
        (r"^downsamples\.([12])\.2\.0\.", r"downsamples.\1.2.conv1."),
        (r"^downsamples\.([12])\.2\.2\.", r"downsamples.\1.2.conv2."),
        (r"^downsamples\.([12])\.2\.4\.squeeze", r"downsamples.\1.2.se.fc1"),
        (r"^downsamples\.([12])\.2\.4\.excite", r"downsamples.\1.2.se.fc2"),
        (r"^downsamples\.([12])\.2\.5\.", r"downsamples.\1.2.conv3."),
        *(
            (rf"^downsamples\.{i}\.{new}\.", f"blocks{i + 1}.{old}.")
            for i in (1, 2)
            for old, new in (("0.0", 0), ("0.1", 1), ("1", 2), ("2.0", 3), ("2.1", 4))
        ),
        (r"^stages\.0\.blocks\.0\.", "blocks1.0."),
        (r"^stages\.1\.blocks\.0\.", "blocks2.3."),
        (r"^stages\.2\.blocks\.0\.", "blocks3.3."),
        (r"(blocks\d\.\d)\.conv\.norm\.", r"\1.conv.m.bn."),
        (r"(blocks\d\.\d)\.c\.weight", r"\1.c.weight"),
        (r"(blocks[123]\.[03])\.conv\.c\.", r"\1.conv.m.c."),
        (r"\.mixer\.norm\.", ".mixer.m.pre_norm."),
        (r"\.mixer\.qkv_proj\.", ".mixer.m.qkv.c."),
        (r"\.mixer\.qkv_norm\.", ".mixer.m.qkv.bn."),
        (r"\.mixer\.out_proj\.", ".mixer.m.proj.1.c."),
        (r"\.mixer\.out_norm\.", ".mixer.m.proj.1.bn."),
        (r"\.mlp\.([02])\.norm\.", r".mlp.\1.bn."),
        (r"\.mlp\.0\.", ".ffn.m.pw1."),
        (r"\.mlp\.2\.", ".ffn.m.pw2."),
        (r"^head\.after", "head.bn"),
        (r"^head\.classifier", "head.l"),
        (r"\.tracked", ".num_batches_tracked"),
    )
    own = {"blocks1.0.c.weight": "blocks1.0.conv.m.c.weight", "blocks2.3.c.weight": "blocks2.3.conv.m.c.weight"}
    own["blocks3.3.c.weight"] = "blocks3.3.conv.m.c.weight"
    official = {own.get(key, key): value for key, value in official.items()}
    for key, value in official.items():
        if value.ndim == 2 and not key.startswith("head"):
            official[key] = value[..., None, None]
    assert {"patch_embed.0.c.weight", "blocks2.0.0.m.c.weight", "blocks3.3.mixer.m.qkv.bn.bias"} <= set(official)
    assert_loads(net, "shvit_micro", official, picture(64, 128))
