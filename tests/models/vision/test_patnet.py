"""What PATNet is beside what every network promises."""

import pytest
import torch

from attlas import models
from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.models.vision.patnet import Attended, DistanceTable, SpatialGate, StyleGate
from tests.models.vision.official_names import State, assert_loads, fused, picture, renamed, shaken


def official(state: State) -> State:
    """Our weights under the names of haiduo/PartialNet."""
    state = {key: value[..., None, None] if key == "head.widen.weight" else value for key, value in state.items()}
    return renamed(
        fused(state, ("q_proj", "k_proj", "v_proj"), "qkv"),
        (r"^downsamples\.0\.conv\.", "patch_embed.proj."),
        (r"^downsamples\.0\.after\.", "patch_embed.norm."),
        (r"^stages\.(\d)\.", lambda at: f"stages.{2 * int(at[1])}."),
        (r"^downsamples\.(\d)\.conv\.", lambda at: f"stages.{2 * int(at[1]) - 1}.reduction."),
        (r"^downsamples\.(\d)\.after\.", lambda at: f"stages.{2 * int(at[1]) - 1}.norm."),
        (r"(blocks\.\d+)\.conv\.", r"\1.spatial_mixing.partial_conv3."),
        (r"\.attend\.mix\.", ".spatial_mixing.attn.cfc1."),
        (r"\.attend\.gate_norm\.", ".spatial_mixing.attn.bn."),
        (r"\.attend\.norm\.", ".spatial_mixing.norm."),
        (r"\.attend\.mixer\.position\.table$", ".spatial_mixing.attn.rpe_k.lookup_table_bias"),
        (r"\.attend\.mixer\.out_proj\.", ".spatial_mixing.attn.proj."),
        (r"\.attend\.mixer\.", ".spatial_mixing.attn."),
        (r"\.mlp\.4\.gate\.", ".mlp.4.conv_attn."),
        (r"\.mlp\.4\.mix\.", ".mlp.4.conv."),
        (r"\.mlp\.4\.mix_norm\.", ".mlp.4.norm2."),
        (r"^head\.widen\.", "avgpool_pre_head.1."),
        (r"^head\.classifier\.", "head."),
    )


def test_official_names() -> None:
    net = shaken("patnet_micro")
    assert_loads(net, "patnet_micro", official(net.state_dict()), picture(64, 64))


def test_the_style_gate_sees_the_spread() -> None:
    torch.manual_seed(0)
    gate, x = StyleGate(4).eval(), torch.randn(1, 4, 6, 6)
    centre = x.mean((2, 3), keepdim=True)
    wider = centre + 2 * (x - centre)
    assert not torch.allclose((gate(wider) / wider)[..., 0, 0], (gate(x) / x)[..., 0, 0], rtol=1e-3)
    assert gate(torch.randn(1, 4, 1, 1)).isfinite().all()


def test_gates_of_one_leave_a_partial_convolution() -> None:
    net = shaken("patnet_micro").float()
    block = net.stages[0].blocks[0]
    with torch.no_grad():
        block.attend.mix.weight.zero_()
        block.attend.gate_norm.bias.fill_(9)
        block.attend.gate_norm.running_mean.zero_()
    block.attend.norm, x = torch.nn.Identity(), torch.randn(1, 16, 8, 8)
    mixed = torch.cat([block.conv(x[:, :4]), x[:, 4:]], 1)
    assert torch.allclose(block(x), x + block.mlp(mixed), atol=1e-5)


def test_convolved_and_attending_channels_do_not_meet_in_the_mixer() -> None:
    block = shaken("patnet_micro").stages[3].blocks[0]
    assert isinstance(block.attend, Attended)
    seen = []
    block.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = torch.randn(1, 128, 2, 2, dtype=torch.float64)
    other = x.clone()
    other[:, 32:] += torch.randn_like(other[:, 32:])
    block(x), block(other)
    assert torch.equal(seen[0][:, :32], seen[1][:, :32])
    assert not torch.allclose(seen[0][:, 32:], seen[1][:, 32:])


def test_distances_are_rounded_and_far_ones_share_a_number() -> None:
    table = DistanceTable(1)
    with torch.no_grad():
        table.table.copy_(torch.arange(81.0))
    bias = table.bias(Grid((7, 7)))[0] - 40
    places = Grid((7, 7)).places().float()
    assert torch.equal(bias, torch.cdist(places, places).round())
    assert DistanceTable(1).bias(Grid((1, 300))).shape == (1, 300, 300)
    far = table.bias(Grid((1, 300)))[0, 0] - 40
    assert far[20] == 20
    assert far[60] < 40
    assert far[200:].unique().tolist() == [40]


def test_spatial_gates_are_shares() -> None:
    gate, x = SpatialGate(8).eval(), torch.randn(1, 8, 3, 3)
    kept = gate(x)[:, :4] / x[:, :4]
    assert kept.min() >= 0
    assert kept.max() <= 1
    assert torch.allclose(kept, kept[:, :1].expand_as(kept), atol=1e-5)


@pytest.mark.parametrize(("name", "spatial"), [("patnet_t0", 3558240), ("patnet_t2", 12651072), ("patnet_s", 28976352)])
def test_counts_with_spatial_gates(name: str, spatial: int) -> None:
    with torch.device("meta"):
        net = models.create(name, spatial=True)
    assert sum(p.numel() for p in net.parameters()) == spatial


def test_one_picture_in_training_is_refused() -> None:
    net = models.create("patnet_micro").train()
    with pytest.raises(BadInput, match="train with 2 at least"):
        net(torch.randn(1, 3, 64, 64))
