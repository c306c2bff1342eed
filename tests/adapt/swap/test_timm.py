"""Attention of timm models at tiny sizes with random weights."""

import copy
import importlib
import itertools
import pickle

import pytest
import torch
from torch import Tensor, nn

import attlas
from attlas.core.errors import BadInput, Unsupported

timm = pytest.importorskip("timm")

TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}

SMALL = {"num_classes": 5, "embed_dim": 32, "num_heads": 2, "depth": 2, "img_size": 64}
SWIN = {"num_classes": 5, "embed_dim": 16, "num_heads": (2, 4), "depths": (2, 2)}


def build(name: str, **settings) -> nn.Module:
    """In float64, with every parameter away from 0 and 1, where it would hide what it does."""
    torch.manual_seed(0)
    model = timm.create_model(name, **settings).double().eval()
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1
    return model


def images(size: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1)).double()


VITS = {
    "vit_tiny_patch16_224": {},
    "vit_small_patch14_reg4_dinov2": {"img_size": 56},
    "deit_tiny_distilled_patch16_224": {},
    "vit_tiny_patch16_224 with norms": {"qk_norm": True, "qkv_bias": False, "scale_attn_norm": True},
    "vit_base_patch16_siglip_224": {},
    "eva02_tiny_patch14_224": {"img_size": 56},
    "eva_giant_patch14_224": {"img_size": 56},
    "vit_small_patch16_dinov3": {},
    "vit_small_patch16_rope_mixed_224": {},
    "beit_base_patch16_224": {},
    "vit_relpos_small_patch16_224": {},
    "vit_relpos_base_patch32_plus_rpn_256": {},
}
OTHERS = {
    "maxvit_tiny_tf_224": {"depths": (1, 1), "embed_dim": (32, 64), "stem_width": 16, "img_size": 224},
    "pvt_v2_b0": {"depths": (1, 1, 1, 1)},
    "pvt_v2_b2_li": {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 40, 64)},
    "twins_pcpvt_small": {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 40, 64)},
    "davit_tiny": {"depths": (1, 1), "embed_dims": (16, 32), "num_heads": (2, 4)},
    "mobilevit_xxs": {},
}


def vit(name: str) -> tuple[nn.Module, Tensor]:
    settings = SMALL | VITS[name]
    return build(name.partition(" ")[0], **settings), images(settings["img_size"])


@pytest.mark.parametrize("name", VITS)
def test_vits_are_the_same(name):
    model, x = vit(name)
    out = model(x)
    report = attlas.swap(model, "softmax", where="blocks.*.attn")
    assert [row.verdict for row in report.rows] == ["exact", "exact"]
    torch.testing.assert_close(model(x), out, **TOLERANCE)
    report.undo()
    assert torch.equal(model(x), out)
    attlas.swap(model, "linear", where="blocks.*.attn")
    assert (model(x) - out).abs().max() > 1e-4


@pytest.mark.parametrize("name", OTHERS)
def test_others_are_the_same(name):
    model, x = build(name, num_classes=5, **OTHERS[name]), images(224, 1)
    out = model(x)
    report = attlas.swap(model, "softmax")
    assert report.of("exact")
    assert not report.of("approximate")
    torch.testing.assert_close(model(x), out, **TOLERANCE)
    report.undo()
    assert torch.equal(model(x), out)


@pytest.mark.parametrize("kind", ["volo", "metaformer"])
def test_single_attention_is_the_same(kind):
    module = importlib.import_module(f"timm.models.{kind}")
    model = nn.Sequential(module.Attention(32, **{"num_heads": 2} if kind == "volo" else {"head_dim": 16})).double()
    x = images(64)[..., :32] if kind == "volo" else images(64)[:, 0, :, :32]
    out = model(x)
    (row,) = attlas.swap(model, "softmax").rows
    assert row.verdict == "exact"
    torch.testing.assert_close(model(x), out, **TOLERANCE)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "eva02_tiny_patch14_224"])
def test_a_neighbourhood_as_large_as_the_grid_is_the_same(name):
    model, x = vit(name)
    out = model(x)
    report = attlas.swap(model, "neighborhood", window=4)
    assert [row.verdict for row in report.rows] == ["exact", "exact"]
    torch.testing.assert_close(model(x), out, **TOLERANCE)
    report.undo()
    report = attlas.swap(model, "neighborhood", window=3)
    assert [row.verdict for row in report.rows] == ["approximate", "approximate"]
    assert (model(x) - out).abs().max() > 1e-5


@pytest.mark.parametrize(
    "settings",
    [
        {"gated": True, "scale_norm": True, "qk_norm": True, "norm_layer": nn.LayerNorm, "dim_out": 16},
        {"qkv_fused": False, "num_kv_heads": 2, "rotate_half": True, "num_prefix_tokens": 2},
    ],
)
def test_rotary_attention_with_all_that_timm_has(settings):
    layers = importlib.import_module("timm.layers")
    torch.manual_seed(0)
    model = nn.ModuleDict({"attn": layers.AttentionRope(32, num_heads=4, **settings)}).double().eval()
    prefix = settings.get("num_prefix_tokens", 1)
    x, rope = torch.randn(2, prefix + 6, 32).double(), torch.randn(6, 16).double()
    out = model["attn"](x, rope=rope)
    assert attlas.swap(model, "softmax").rows[0].verdict == "exact"
    torch.testing.assert_close(model["attn"](x, rope=rope), out, **TOLERANCE)


SWINS = {
    "swin_tiny_patch4_window7_224": {"img_size": 112},
    "swin_tiny_patch4_window7_224 padded": {"img_size": 96},
    "swin_tiny_patch4_window7_224 any size": {"img_size": 96, "strict_img_size": False},
    "swinv2_tiny_window8_256": {"img_size": 128},
}


def swin(name: str) -> tuple[nn.Module, Tensor]:
    settings = SWIN | SWINS[name]
    return build(name.partition(" ")[0], **settings), images(settings["img_size"])


@pytest.mark.parametrize("name", SWINS)
def test_swin_in_its_windows_is_the_same(name):
    model, x = swin(name)
    out = model(x)
    report = attlas.swap(model, "softmax")
    assert [row.verdict for row in report.rows] == ["exact"] * 4
    assert all(not row.dropped for row in report.rows)
    torch.testing.assert_close(model(x), out, **TOLERANCE)
    report.undo()
    assert torch.equal(model(x), out)


def test_swin_by_the_mechanism_of_that_name_is_the_same():
    model, x = swin("swin_tiny_patch4_window7_224")
    model.layers[0].blocks[0].attn.relative_position_bias_table.requires_grad_(False)
    out = model(x)
    report = attlas.swap(model, "swin")
    assert [row.verdict for row in report.rows] == ["exact"] * 4
    frozen, learned = (block.attn.core.mechanism.relative_bias for block in model.layers[0].blocks)
    assert (frozen.requires_grad, learned.requires_grad) == (False, True)
    torch.testing.assert_close(model(x), out, **TOLERANCE)
    report.undo()
    assert torch.equal(model(x), out)
    padded, x = swin("swin_tiny_patch4_window7_224 padded")
    assert "exact" not in [row.verdict for row in attlas.swap(padded, "swin").rows]


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
def test_swin_over_the_whole_grid(name):
    model, x = swin(name)
    out = model(x)
    first = attlas.swap(model, "neighborhood", where="layers.0", window=7)
    second = attlas.swap(model, "pool", where="layers.1")
    grid = x.shape[-1] // 4
    assert f"over the whole grid {grid}x{grid}" in first.rows[0].notes[0]
    assert first.rows[0].dropped
    assert (model(x) - out).abs().max() > 1e-5
    assert model.layers[0].blocks[1].attn.core.mechanism.site.grid.shape == (grid, grid)
    first.undo()
    second.undo()
    assert torch.equal(model(x), out)


def test_swin_over_the_whole_grid_mixes_beyond_windows():
    """A pixel in one corner is felt in the other, through `linear` and not through windows."""
    model, x = swin("swin_tiny_patch4_window7_224")
    other = x.clone()
    other[..., :4, :4] += 1.0
    block = model.layers[0].blocks[0]

    def felt() -> Tensor:
        one, two = (block(model.patch_embed(each)) for each in (x, other))
        return (one - two)[:, -1, -1].abs().max()

    assert felt() == 0
    attlas.swap(model, "linear", where="layers.0.blocks.0")
    assert felt() > 0


def test_swin_of_any_size_has_no_grid():
    model, _ = swin("swin_tiny_patch4_window7_224 any size")
    with pytest.raises(Unsupported, match=r"strict_img_size=False.*could: .*softmax"):
        attlas.swap(model, "linear")


def test_swin_swapped_does_not_change_its_size():
    for mechanism in ("linear", "softmax", "pool"):
        model, _ = swin("swin_tiny_patch4_window7_224")
        attlas.swap(model, mechanism)
        with pytest.raises(BadInput, match="undo the swap first"):
            model.set_input_size(img_size=224, window_size=14)
    model, _ = vit("beit_base_patch16_224")
    attlas.swap(model, "softmax")
    with pytest.raises(BadInput, match="undo the swap first"):
        model.set_input_size(img_size=128)


def test_grid_prefix_and_layers_are_known():
    model, _ = vit("vit_small_patch14_reg4_dinov2")
    attlas.swap(model, "linear")
    sites = [block.attn.core.mechanism.site for block in model.blocks]
    assert [(site.grid.shape, site.grid.prefix, site.layer, site.layers) for site in sites] == [
        ((4, 4), 5, 0, 2),
        ((4, 4), 5, 1, 2),
    ]


def test_images_of_another_size():
    settings = {"dynamic_img_size": True, "img_size": 64}
    model = build("vit_tiny_patch16_224", **SMALL | settings)
    wide = torch.cat([images(64), images(64)], -1)
    outs = model(images(128)), model(wide)
    report = attlas.swap(model, "softmax")
    for x, out in zip((images(128), wide), outs, strict=True):
        torch.testing.assert_close(model(x), out, **TOLERANCE)
    report.undo()
    attlas.swap(model, "neighborhood", window=3)
    assert model(images(128)).isfinite().all()
    with pytest.raises(BadInput, match="this image has 4x8"):
        model(wide)
    with pytest.raises(BadInput, match="this image has 2x8"):  # as many patches as 4x4
        model(images(128)[..., :32, :])


def test_masks_of_timm_keep_their_meaning():
    model, x = vit("vit_tiny_patch16_224")
    keep = torch.rand(17, 17, generator=torch.Generator().manual_seed(2)) > 0.3
    keep |= torch.eye(17, dtype=torch.bool)
    heads = torch.stack([keep, keep.roll(3, 1) | torch.eye(17, dtype=torch.bool)])
    calls = [
        {"attn_mask": keep},
        {"attn_mask": heads},
        {"attn_mask": torch.randn(17, 17).double()},
        {"is_causal": True},
    ]
    outs = [model.forward_features(x, **call) for call in calls]
    report = attlas.swap(model, "softmax")
    for call, out in zip(calls, outs, strict=True):
        torch.testing.assert_close(model.forward_features(x, **call), out, **TOLERANCE)
    report.undo()
    attlas.swap(model, "linear")
    with pytest.raises(Unsupported, match="pairs"):
        model.forward_features(x, attn_mask=keep)


def test_bias_is_dropped_where_a_mechanism_takes_none_and_said():
    model, _ = vit("beit_base_patch16_224")
    (row, _) = attlas.swap(model, "linear").rows
    assert row.verdict == "approximate"
    assert set(row.dropped) == {"relative_position_bias_table"}
    assert "position bias is not used" in row.notes[0]


def test_bias_is_said_to_be_dropped_only_where_there_is_one():
    model, _ = vit("beit_base_patch16_224")
    for row in attlas.swap(model, "crossvit").rows:
        assert any("position bias is not used" in note for note in row.notes)
    volo = nn.Sequential(importlib.import_module("timm.models.volo").Attention(32, num_heads=2))
    assert not any("position bias" in note for note in attlas.swap(volo, "linear").rows[0].notes)


def test_undo_takes_the_check_of_images_away():
    model, _ = vit("vit_tiny_patch16_224")
    attlas.swap(model, "linear").undo()
    assert not model.patch_embed._forward_pre_hooks
    attlas.swap(model, "linear")
    model.set_input_size(img_size=(32, 128))
    with pytest.raises(BadInput, match="this image has 2x8"):
        model(torch.randn(1, 3, 32, 128).double())


def test_projections_are_carried_into_a_mechanism_with_its_own():
    settings = {"class_token": False, "global_pool": "avg"}
    model, x = build("vit_tiny_patch16_224", **SMALL | settings), images(64)
    old = model.blocks[0].attn
    (row, _) = attlas.swap(model, "convit").rows
    mixer = model.blocks[0].attn.mixer
    assert torch.equal(mixer.v_proj.weight, old.qkv.weight[64:])
    assert torch.equal(mixer.out_proj.weight, old.proj.weight)
    assert row.verdict == "new"
    assert "mixer.v_proj.weight" not in row.new
    assert "mixer.gate" in row.new
    assert model(x).isfinite().all()


@pytest.mark.parametrize(
    "name", ["eva02_tiny_patch14_224", "beit_base_patch16_224", "vit_small_patch16_rope_mixed_224"]
)
def test_mechanisms_with_projections_of_their_own_go_into_every_vit(name):
    model, x = vit(name)
    (row, _) = attlas.swap(model, "crossvit").rows
    assert row.carried
    assert model(x).isfinite().all()


def test_mechanisms_with_projections_of_their_own_go_into_windows():
    model = build("maxvit_tiny_tf_224", num_classes=5, **OTHERS["maxvit_tiny_tf_224"])
    assert attlas.swap(model, "pool").swapped
    assert model(images(224, 1)).isfinite().all()


def test_unknown_attention_is_left_with_a_reason():
    model = build("vit_base_patch16_siglip_224", **SMALL)
    (left,) = attlas.swap(model, "softmax").of("left")
    assert (left.name, left.kind) == ("attn_pool", "AttentionPoolLatent")
    assert "learned query" in left.notes[0]
    with pytest.raises(Unsupported, match="its keys are narrower"):
        attlas.swap(timm.create_model("levit_128s"), "softmax")


def test_adapters_around_projections():
    class Adapter(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.linear, self.low = linear, nn.Linear(linear.in_features, linear.out_features).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) + self.low(x)

    model, x = vit("vit_tiny_patch16_224")
    for block in model.blocks:
        block.attn.qkv = Adapter(block.attn.qkv)
    with pytest.raises(Unsupported, match=r"it was changed.*out_features"):
        attlas.swap(model, "softmax")
    for block in model.blocks:
        block.attn.qkv.in_features, block.attn.qkv.out_features = 32, 96
    out = model(x)
    attlas.swap(model, "softmax")
    torch.testing.assert_close(model(x), out, **TOLERANCE)


def test_training_with_dropped_patches():
    model = build("vit_tiny_patch16_224", **SMALL | {"patch_drop_rate": 0.5, "attn_drop_rate": 0.2}).train()
    report = attlas.swap(model, "softmax")
    assert model.blocks[0].attn.core.mechanism.weight_dropout == 0.2
    model(images(64)).sum().backward()
    assert model.blocks[0].attn.qkv.weight.grad is not None
    report.undo()
    with pytest.raises(Unsupported, match=r"patch_drop_rate.*could: softmax"):
        attlas.swap(model, "neighborhood", window=3)
    model.patch_drop.prob = 0.0
    attlas.swap(model, "neighborhood", window=3)
    model(images(64)).sum().backward()


@pytest.mark.parametrize(("name", "mechanism"), itertools.product(("vit", "swin"), ("softmax", "linear")))
def test_copies_and_compile(name, mechanism):
    model, x = vit("vit_tiny_patch16_224") if name == "vit" else swin("swin_tiny_patch4_window7_224")
    model, x = model.float(), x.float()
    attlas.swap(model, mechanism)
    out = model(x)
    assert torch.equal(copy.deepcopy(model)(x), out)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), out)
    block = model.blocks[1] if name == "vit" else model.layers[1].blocks[1]
    x = torch.randn(2, 17, 32) if name == "vit" else torch.randn(2, 14, 14, 32)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), block(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "swinv2_tiny_window8_256"])
def test_half_precision_and_autocast(name):
    model, x = swin(name) if name in SWINS else vit(name)
    model, x = model.float(), x.float()
    full = model(x)
    report = attlas.swap(model, "softmax")
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(x).float() - full).abs().max() < 0.1 * full.abs().max()
    report.undo()
    model = model.bfloat16()
    attlas.swap(model, "softmax")
    half = model(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half.float() - full).abs().max() < 0.1 * full.abs().max()


def test_a_mechanism_that_misses_a_prefix():
    model, _ = vit("vit_tiny_patch16_224")
    with pytest.raises(Unsupported, match=r"prefix.*could: "):
        attlas.swap(model, "convit")
