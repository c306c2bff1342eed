"""L2ViT beyond what all backbones promise."""

import torch

from attlas import models
from attlas.core.grid import Grid
from attlas.models.vision.l2vit import from_official
from tests.models.vision.official_names import assert_loads, fused, picture, renamed, shaken

QKV = ("q_proj", "k_proj", "v_proj")


def test_official_names() -> None:
    net = shaken("l2vit_micro")
    official = renamed(
        fused(net.state_dict(), QKV, "attn_qkv"),
        *((rf"^downsamples\.0\.convs\.{i}\.", f"downsample_layers.0.proj.proj.{3 * i}.") for i in range(2)),
        *((rf"^downsamples\.0\.norms\.{i}\.", f"downsample_layers.0.proj.proj.{3 * i + 1}.") for i in range(2)),
        (r"^downsamples\.0\.after\.", "downsample_layers.0.norm."),
        (r"^downsamples\.(\d)\.before\.", r"downsample_layers.\1.norm."),
        (r"^downsamples\.(\d)\.conv\.", r"downsample_layers.\1.proj."),
        (r"^stages\.(\d)\.blocks\.", r"stages.\1."),
        (r"^(stages\.\d\.1\.)norm2\.", r"\1local_norm."),
        (r"^(stages\.\d\.1\.)norm3\.", r"\1norm2."),
        (r"\.local_norm\.", ".norm3."),
        (r"\.position1\.conv\.", ".cpe.0.proj."),
        (r"\.position2\.conv\.", ".cpe.1.proj."),
        (r"\.mixer\.attn_qkv\.", ".attn.qkv."),
        (r"\.mixer\.out_proj\.", ".attn.proj."),
        (r"\.mixer\.attend\.temperature", ".attn.temperature"),
        (r"\.local\.norm\.", ".local_mp.bn."),
        (r"\.local\.", ".local_mp."),
        (r"^head\.before\.", "norm."),
        (r"^head\.classifier\.", "head."),
    )
    assert_loads(net, "l2vit_micro", official, picture(64, 96))


def test_windows_and_whole_maps_take_turns() -> None:
    with torch.device("meta"):
        net = models.create("l2vit_tiny")
    kinds = [[block.mixer.spec.name for block in stage.blocks] for stage in net.stages]
    assert kinds == [["davit_window", "l2vit"] * (depth // 2) for depth in (2, 2, 6, 2)]
    other = models.create("l2vit_micro", mixer="softmax")
    assert [block.mixer.spec.name for block in other.stages[0].blocks] == ["davit_window", "softmax"]


def test_a_global_block_is_three_residual_steps() -> None:
    block, grid = shaken("l2vit_micro").stages[0].blocks[1], Grid((4, 6))
    x = torch.randn(1, 24, 16, dtype=torch.float64)
    u = x + block.position1.conv(x.mT.unflatten(2, grid.shape)).flatten(2).mT
    y = u + block.mixer(block.norm1(u), grid=grid)
    v = y + block.local(block.norm2(y), grid)
    torch.testing.assert_close(block(x, grid), v + block.mlp(block.norm3(v)))


def test_windows_see_no_further_and_global_blocks_do() -> None:
    net = shaken("l2vit_micro")
    windows, whole = net.stages[0].blocks
    with torch.no_grad():
        x = torch.randn(1, 256, 16, dtype=torch.float64)
        moved = x.clone()
        moved[:, -1] += 1
        grid = Grid((16, 16))
        assert torch.equal(windows(x, grid)[:, :64], windows(moved, grid)[:, :64])
        assert not torch.equal(whole(x, grid)[:, :64], whole(moved, grid)[:, :64])


def test_only_official_names_are_renamed() -> None:
    net = shaken("l2vit_micro")
    own = net.state_dict()
    again = from_official(dict(own), net)
    assert again.keys() == own.keys()
    assert all(again[key] is value for key, value in own.items())
