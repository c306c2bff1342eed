"""What is said stage by stage, how layers are counted, and checkpoints with names of something else."""

from typing import Any

import pytest
import torch

from attlas import models
from attlas.blocks.local_enhancement import LocallyEnhanced
from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.mechanisms.local_sparse.swin import Swin
from attlas.models.stages import check_stages, enhanced_softmax


def shifts(name: str, **settings: Any) -> list[bool]:
    """Whether windows are shifted, layer by layer."""
    with torch.device("meta"):
        net = models.create(name, **settings)
    return [any(layer.shift) for layer in net.modules() if isinstance(layer, Swin)]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("swin_micro", {"depths": (1, 2)}),
        ("crossformer_micro", {"depths": (1, 2)}),
        ("dinat_micro", {"depths": (1, 2)}),
        ("halonet_micro", {"layout": ("ca", "aca"), "values": 1}),
        ("davit_micro", {"depths": (1, 2)}),
    ],
)
def test_layers_are_counted_from_the_start_of_a_stage(name: str, settings: dict[str, Any]) -> None:
    assert shifts(name, mixer="swin", mixer_settings={"window": 4}, **settings) == [False, False, True]


def test_layers_of_an_isotropic_network() -> None:
    assert shifts("nat_isotropic_micro", mixer="swin") == [False, True] * 2


@pytest.mark.parametrize("name", ["biformer_micro", "ravlt_micro", "sg_former_micro", "agent_pvt_micro"])
def test_other_pyramids_count_alike(name: str) -> None:
    settings = {"depths": (1, 1, 2, 1), "mixer": "swin", "mixer_settings": {"window": 2}}
    assert shifts(name, **settings) == [False, False, False, True, False]


def test_shifts_of_an_l2vit_and_a_litv2() -> None:
    assert shifts("l2vit_micro", mixer="swin", depths=(4, 2, 2, 2)) == [False, True, False, False, False]
    assert shifts("litv2_micro", mixer="swin", depths=(1, 1, 2, 1)) == [False, True, False]


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("swin_micro", {"heads": (2,)}, "heads has one entry for each of the 2 stages"),
        ("swin_micro", {"depths": (1,) * 5, "heads": (1,) * 5}, "1 to 4 stages, got 5"),
        ("swin_micro", {"depths": (1, -1)}, "count the blocks"),
        ("davit_micro", {"depths": ()}, "1 to 4 stages, got 0"),
        ("crossformer_micro", {"groups": (4,)}, "groups has one entry"),
        ("crossformer_micro", {"intervals": (4,)}, "intervals has one entry"),
        ("dinat_micro", {"heads": (2, 4, 8)}, "heads has one entry"),
        ("halonet_micro", {"dims": (32,)}, "dims has one entry"),
        ("halonet_micro", {"layout": ("a",) * 5}, "1 to 4 stages, got 5"),
        ("biformer_micro", {"tops": (1,)}, "tops has one entry"),
        ("biformer_micro", {"dims": (32, 32, 64, 60)}, "60 channels do not split into 8 heads"),
        ("litv2_micro", {"depths": (1, 1)}, "4 stages, got 2"),
        ("litv2_micro", {"windows": (1,)}, "2 stages, got 1: windows"),
        ("sg_former_micro", {"reductions": (8,)}, "reductions has one entry"),
        ("l2vit_micro", {"heads": (3,)}, "heads has one entry"),
        ("ravlt_micro", {"scales": (1.0,)}, "scales has one entry"),
        ("ravlt_micro", {"heads": (1, 2, 3, 5)}, "64 channels do not split into 5 heads"),
        ("nalaformer_micro", {"depths": (1, 1)}, "depths has one entry"),
        ("agent_pvt_micro", {"agents": (4,)}, "agents has one entry"),
        ("agent_swin_micro", {"heads": (1,)}, "heads has one entry"),
        ("agent_deit_micro", {"patch": 0}, "multiple of the patch"),
    ],
)
def test_stages_that_do_not_agree(name: str, settings: dict[str, Any], said: str) -> None:
    with torch.device("meta"), pytest.raises(BadInput, match=said):
        models.create(name, **settings)


def test_what_says_nothing_is_left_out() -> None:
    check_stages(depths=(1, 2), intervals=None)
    with pytest.raises(BadInput, match="1 to 2 stages, got 3"):
        check_stages(1, 2, names="abc")


def test_settings_reach_softmax_attention_and_its_shell() -> None:
    (layer,) = enhanced_softmax(1, 16, 2, Grid((4, 4)), {"scale": 3.0, "bias": False, "kernel": 3}, turned=True)
    assert isinstance(layer, LocallyEnhanced)
    assert (layer.attend.scale, layer.q_proj.bias, layer.kernel, layer.turned) == (3.0, None, 3, True)
    for name in ("ravlt_micro", "nalaformer_micro", "biformer_micro", "sg_former_micro"):
        with torch.device("meta"):
            net = models.create(name, mixer="softmax", mixer_settings={"bias": True, "qk_norm": "rms"})
            assert all(isinstance(s.blocks[0].mixer.q_norm, torch.nn.RMSNorm) for s in net.stages)
            with pytest.raises(BadInput, match="no setting 'bogus'"):
                models.create(name, mixer="softmax", mixer_settings={"bogus": 1})


STRANGE: dict[str, torch.Tensor] = {
    "layers.0.blocks.0.attn.relative_position_bias_table": torch.zeros(91, 2),
    "stages.0.blocks.0.self_attn.q.weight": torch.zeros(2, 32, 1, 1),
    "blocks.0.attn.wa_bias": torch.zeros(2),
    "block1.0.attn.an_bias": torch.zeros(2),
    "block1.0.attn.ah_bias": torch.zeros(2),
}
TIMM = {"stages.0.0.self_attn.q.weight": torch.zeros(2, 32, 1, 1)}
FAMILIES = ("swin", "davit", "crossformer", "dinat", "biformer", "litv2", "sg_former", "l2vit", "ravlt")
AGENTS = ("agent_deit", "agent_pvt", "agent_swin")


@pytest.mark.parametrize("name", [f"{family}_micro" for family in FAMILIES + AGENTS] + ["halonet50ts"])
def test_names_of_something_else(name: str) -> None:
    with torch.device("meta"):
        net = models.create(name)
    for source in models.model(name).key_maps:
        for state in ({}, STRANGE, TIMM, {"a.attn.qkv.weight": torch.zeros(2, 4)}):
            with pytest.raises(BadInput, match=r"not the names and shapes of|does not fit|equal parts|table of"):
                models.load_weights(net, name, state, source)
