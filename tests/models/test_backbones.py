"""What every image network promises, at the smallest size of every family."""

import argparse
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attlas import models
from attlas.bench.networks import oracle_error
from attlas.blocks.drop_path import DropPath, rising
from attlas.blocks.stage import Stage, set_checkpointing
from attlas.core.errors import BadInput, UnknownName
from attlas.core.mechanism import Mixer

MICRO = [name for name in models.models("*_micro") if models.model(name).task != "generation"]
CLASSIFIERS = models.models("*_micro", task="classification")


ONE_SIZE = {"fcaformer_micro", "karat_vit_micro", "ninformer_micro"}
"""They have weights for each place of the grid that they were built for."""


COMPILED = {"poolformer_micro", "resnet_micro", "swin_micro", "tnt_micro", "vit_micro"}
"""One for each skeleton; the others are compiled in the full suite, and every mechanism in the contract suite."""


def side(name: str) -> int:
    return models.model(name).accepted["img_size"]


def picture(name: str, batch: int = 2, chans: int = 3, size: int | None = None) -> Tensor:
    size = side(name) if size is None else size
    return torch.randn(batch, chans, size, size, generator=torch.Generator().manual_seed(1))


def built(name: str, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    net = models.create(name, **settings).eval()
    shake(net)
    return net


def shake(net: nn.Module) -> None:
    """Move vectors off their starting values, so that zeros and tiny layer scales hide nothing."""
    with torch.no_grad():
        for value in net.parameters():
            if value.ndim < 2:
                value.add_(0.1 * torch.randn_like(value))


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classes_and_channels_are_free(name: str) -> None:
    net = built(name, num_classes=7, in_chans=1)
    assert net(picture(name, chans=1)).shape == (2, 7)
    bare = built(name, num_classes=0)
    assert bare(picture(name)).shape == (2, bare.num_features)
    with pytest.raises(BadInput, match="in_chans"):
        net(picture(name, chans=3))


@pytest.mark.parametrize("name", MICRO)
def test_pictures_of_a_batch_do_not_meet(name: str) -> None:
    net, image = built(name), picture(name)
    with torch.no_grad():
        both = net(image)
        alone = net(image[:1])
    assert both.std() > 1e-4
    torch.testing.assert_close(both[:1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_feature_maps(name: str) -> None:
    net = built(name, features_only=True)
    size = side(name)
    maps = net(picture(name))
    assert len(maps) == len(net.channels) == len(net.strides)
    for found, channels, stride in zip(maps, net.channels, net.strides, strict=True):
        assert found.shape == (2, channels, -(-size // stride), -(-size // stride))
        assert found.isfinite().all()
    assert list(net.strides) == sorted(net.strides)
    last = len(net.channels) - 1
    (only,) = built(name, features_only=True, out_indices=[last])(picture(name))
    torch.testing.assert_close(only, maps[last])


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_feature_maps_leave_no_parameter_without_gradient(name: str) -> None:
    net = built(name, features_only=True)
    net.set_grad_checkpointing()
    assert all(module.checkpointing for module in net.modules() if isinstance(module, Stage))
    sum(found.square().mean() for found in net(picture(name))).backward()
    without = [key for key, value in net.named_parameters() if value.grad is None]
    assert not without, f"no gradient reaches {without}"


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_another_size_of_picture(name: str) -> None:
    net, size = built(name), side(name)
    larger = picture(name, size=size * 3 // 2)
    if name in ONE_SIZE:
        with pytest.raises(BadInput, match="build"):
            net(larger)
        return
    assert net(larger).isfinite().all()
    maps = built(name, features_only=True)(larger)
    strides = built(name, features_only=True).strides
    assert maps[0].shape[2] == -(-larger.shape[2] // strides[0])


@pytest.mark.parametrize("name", MICRO)
def test_gradients_with_and_without_checkpointing(name: str) -> None:
    net, image = built(name), picture(name)
    grads = []
    for checkpointing in (False, True):
        net.zero_grad()
        set_checkpointing(net, checkpointing)
        net(image).square().mean().backward()
        without = [key for key, value in net.named_parameters() if value.grad is None]
        assert not without, f"no gradient reaches {without}"
        grads.append([value.grad.clone() for value in net.parameters()])
    for plain, again in zip(*grads, strict=True):
        torch.testing.assert_close(again, plain)
    assert sum(grad.abs().max() > 0 for grad in grads[0]) > 0.9 * len(grads[0])


@pytest.mark.parametrize("name", ["ffnet_micro", "ghostnetv2_micro", "resnet_micro", "shvit_micro"])
def test_checkpointing_moves_running_statistics_once(name: str) -> None:
    states = []
    for checkpointing in (False, True):
        net = built(name, checkpointing=checkpointing).train()
        net(picture(name)).sum().backward()
        states.append({key: value for key, value in net.named_buffers() if "running" in key or "num_batches" in key})
    assert any(value.abs().sum() for value in states[0].values())
    for key, value in states[0].items():
        assert torch.equal(states[1][key], value), key


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_parameter_learns_in_training(name: str) -> None:
    net = built(name, drop_path=0.3).train()
    net(picture(name, batch=4)).square().mean().backward()
    assert all(value.grad is not None for value in net.parameters())
    if any(isinstance(module, DropPath) and module.rate for module in net.modules()):
        torch.manual_seed(1)
        first = net(picture(name))
        torch.manual_seed(2)
        assert not torch.equal(first, net(picture(name)))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in COMPILED else [pytest.mark.full]) for name in MICRO]
)
def test_compiles_whole(name: str) -> None:
    net, image = built(name), picture(name)
    torch.compiler.reset()
    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(net, backend="aot_eager", fullgraph=True)(image), net(image), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("name", MICRO)
def test_own_weights_go_round(name: str) -> None:
    net, image = built(name), picture(name)
    again = models.create(name, weights=net.state_dict()).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(image), net(image), rtol=0, atol=0)


@pytest.mark.parametrize("name", MICRO)
def test_the_mechanisms_inside_are_their_oracles(name: str) -> None:
    assert oracle_error(name) < 1e-4


@pytest.mark.parametrize("name", MICRO)
def test_half_precision(name: str) -> None:
    net, image = built(name), picture(name)
    with torch.no_grad():
        expected = net(image)
        found = net.bfloat16()(image.bfloat16()).float()
    assert found.isfinite().all()
    assert (found - expected).norm() <= 0.1 * expected.norm() + 0.05


def test_checkpoints_from_files(tmp_path: Any) -> None:
    net = built("vit_micro")
    torch.save({"model": {f"module.{key}": value for key, value in net.state_dict().items()}}, tmp_path / "a.pth")
    again = models.create("vit_micro", weights=tmp_path / "a.pth").eval()
    image = picture("vit_micro")
    assert torch.equal(again(image), net(image))
    with pytest.raises(BadInput, match="no checkpoint"):
        models.create("vit_micro", weights=tmp_path / "b.pth")
    with pytest.raises(BadInput, match="downloads nothing"):
        models.create("vit_micro", weights="b.safetensors")


def test_files_that_are_no_checkpoints(tmp_path: Any) -> None:
    state = built("vit_micro").state_dict()
    for name, content in (
        ("args.pth", {"model": state, "args": argparse.Namespace(a=1)}),
        ("net.pth", nn.Linear(1, 1)),
    ):
        torch.save(content, tmp_path / name)
        with pytest.raises(BadInput, match="weights_only=False"):
            models.create("vit_micro", weights=tmp_path / name)
    for name, content in (("list.pth", [1]), ("numbers.pth", {1: torch.zeros(1)})):
        torch.save(content, tmp_path / name)
        with pytest.raises(BadInput, match="no state dict"):
            models.create("vit_micro", weights=tmp_path / name)
    for name, match in (("junk.pth", "weights_only=False"), ("junk.safetensors", "no whole safetensors file")):
        (tmp_path / name).write_text("hello")
        with pytest.raises(BadInput, match=match):
            models.create("vit_micro", weights=tmp_path / name)
    with pytest.raises(BadInput, match="got a list"):
        models.create("vit_micro", weights=[1])


@pytest.mark.parametrize(
    "name",
    ["vit_micro", "convit_micro", "crossvit_micro", "tnt_micro", "volo_micro", "illama_micro", "vig_micro"],
)
def test_wrong_checkpoints_of_others_say_so(name: str) -> None:
    odd, one = torch.zeros(2, 2), torch.tensor(1.0)
    tables = ("cls_token", "pos_embed", "pos_embed_0", "outer_pos", "inner_pos", "patch_pos", "pixel_pos")
    parts = ("blocks.0.attn.qkv.weight", "blocks.0.attn.kv.weight", "blocks.0.inner_attn.qk.weight")
    for source in models.model(name).key_maps:
        for state in ({}, {"a": odd}, dict.fromkeys(tables, one), dict.fromkeys(parts, one), dict.fromkeys(parts, odd)):
            with pytest.raises(BadInput):
                models.create(name, weights=state, source=source)


def test_weights_that_do_not_fit() -> None:
    state = built("vit_micro").state_dict()
    with pytest.raises(BadInput, match=r"shape: head.bias: \(1000,\) for \(10,\)"):
        models.create("vit_micro", weights=state, num_classes=10)
    del state["norm.bias"]
    with pytest.raises(BadInput, match=r"missing: norm\.bias"):
        models.create("vit_micro", weights=state)
    with pytest.raises(BadInput, match="source='keras'"):
        models.create("vit_micro", weights=state, source="keras")


def test_a_skeleton_takes_any_mechanism_that_serves_its_grid() -> None:
    image = picture("metaformer_micro")
    for mixer in ("flow", "agent", "neighborhood", "sigmoid", "focalnet"):
        assert models.create("metaformer_micro", mixer=mixer, mixer_settings=FITTING.get(mixer))(image).isfinite().all()
    stages = models.create("metaformer_micro", mixer=["pool", "pool", "softmax", "softmax"])
    assert [stage.blocks[0].mixer.spec.name for stage in stages.stages] == ["pool", "pool", "softmax", "softmax"]


FITTING = {"neighborhood": {"window": 2}, "focalnet": {"levels": 1}}


def test_names_and_settings_that_are_not_there() -> None:
    with pytest.raises(UnknownName, match="vit_micro"):
        models.create("vit_mikro")
    with pytest.raises(UnknownName, match="poolformer"):
        models.models("poolfromer*")
    with pytest.raises(BadInput, match="vit_micro takes no depths; networks that do: "):
        models.create("vit_micro", depths=(1, 2))
    with pytest.raises(BadInput, match="one for each of the 4 stages"):
        models.create("metaformer_micro", mixer=["pool", "softmax"])
    with pytest.raises(BadInput, match="features_only"):
        models.create("metaformer_micro", out_indices=[1])
    with pytest.raises(BadInput, match="maps 0 to 3"):
        models.create("metaformer_micro", features_only=True, out_indices=[4])
    with pytest.raises(BadInput, match="num_classes"):
        models.create("vit_micro", num_classes=-1)
    with pytest.raises(BadInput, match="72 x 72"):
        models.create("vit_micro")(torch.randn(1, 3, 65, 70))
    with pytest.raises(BadInput, match="task is one of"):
        models.models(task="speech")


def test_drop_path_drops_whole_pictures_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    drop, x = DropPath(0.25), torch.ones(4000, 3)
    dropped = drop(x)
    assert set(dropped.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert (dropped == dropped[:, :1]).all()
    assert dropped.mean().item() == pytest.approx(1, abs=0.05)
    assert drop.eval()(x) is x
    assert rising(0.3, [1, 3]) == [[0.0], pytest.approx([0.1, 0.2, 0.3])]
    with pytest.raises(BadInput, match=r"drop_path is a share in \[0, 1\), got 1.5"):
        rising(1.5, [1])
    with pytest.raises(BadInput, match="at least one in all"):
        models.create("sigmoid_vit_micro", depth=0)


@pytest.mark.parametrize("name", ["activator_micro", "illama_micro", "ninformer_micro", "sigmoid_vit_micro"])
def test_networks_of_patches_are_built_for_pictures_that_divide(name: str) -> None:
    for wrong in ({"img_size": 60}, {"img_size": (64, 4)}, {"patch": 0}):
        with pytest.raises(BadInput, match="img_size is a multiple of the patch"):
            models.create(name, **wrong)


@pytest.mark.parametrize("name", ["care_micro", "patnet_micro", "vig_micro"])
def test_grids_are_those_of_what_rounds_down(name: str) -> None:
    net = models.create(name, img_size=(100, 70)).eval()
    sites = []
    for module in net.modules():
        if isinstance(module, Mixer):
            module.register_forward_pre_hook(
                lambda mixer, _, rest: sites.append((mixer.site.grid, rest["grid"])), with_kwargs=True
            )
    net(torch.randn(1, 3, 100, 70))
    assert sites
    assert all(built_for == got for built_for, got in sites)
    with pytest.raises(BadInput, match="too small"):
        models.create(name, img_size=4)


def test_one_weight_takes_no_two_values() -> None:
    state = {key: value.clone() for key, value in built("ninformer_micro").state_dict().items()}
    models.create("ninformer_micro", weights=state)
    state["stages.1.blocks.0.norm2.bias"] += 1
    with pytest.raises(BadInput, match=r"stages\.1\.blocks\.0\.norm1\.bias and .*norm2\.bias are one weight here"):
        models.create("ninformer_micro", weights=state)
    with pytest.raises(BadInput, match="operator"):
        models.create("karat_vit_micro", universal=True, weights=built("karat_vit_micro").state_dict())


@pytest.mark.parametrize(
    ("name", "state"),
    [
        ("illama_micro", {"x": (1,)}),
        ("vig_micro", {"x": (1,)}),
        ("fcaformer_micro", {"layer_2.blocks.0.attention_biases": (2, 49)}),
        ("fcaformer_micro", {"layer_1.blocks.0.attention_biases": (2, 16)}),
        ("fcaformer_micro", {"layer_2.blocks.0.s_token_bias": (2,)}),
        ("fcaformer_micro", {"layer_2.blocks.0.qkv.weight": (7, 3)}),
        ("hat_micro", {"layers.0.residual_group.blocks.0.attn.relative_position_bias_table": (14, 2)}),
        ("hat_micro", {"layers.0.residual_group.overlap_attn.relative_position_bias_table": (225, 2)}),
        ("overlock_micro", {"blocks1.0.proj.1.dil_conv_k5_1.weight": (16, 1, 5, 5)}),
        (
            "overlock_micro",
            {
                "blocks1.0.proj.1.lk_origin.weight": (16, 1, 3, 3),
                "blocks1.0.proj.1.dil_conv_k5_1.weight": (16, 1, 5, 5),
            },
        ),
        ("maxim_micro", {"x": (1,)}),
    ],
)
def test_checkpoints_of_others_are_refused(name: str, state: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(BadInput) as caught:
        models.create(name, weights={key: torch.zeros(shape) for key, shape in state.items()}, source="official")
    assert "Error" not in str(caught.value)
