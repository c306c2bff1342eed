import sys

import pytest
import torch

from attlas import models
from attlas.adapt.in_timm import register_in_timm
from attlas.core.errors import BadInput

timm = pytest.importorskip("timm")


def test_networks_are_created_by_timm():
    names = register_in_timm()
    assert names == register_in_timm()
    assert {f"attlas_{name}" for name in models.models(task="classification")} == set(names)
    assert "attlas_vit_micro" in timm.list_models("attlas_*")
    torch.manual_seed(0)
    net = timm.create_model("attlas_poolformer_micro", num_classes=5, in_chans=1, drop_path_rate=0.1)
    torch.manual_seed(0)
    own = models.create("poolformer_micro", num_classes=5, in_chans=1, drop_path=0.1)
    image = torch.randn(2, 1, 64, 64)
    assert torch.equal(net.eval()(image), own.eval()(image))
    assert [module.rate for module in net.modules() if hasattr(module, "rate")][-1] == pytest.approx(0.1)
    assert net.num_classes == 5
    assert timm.create_model("attlas_ninformer_cifar").num_classes == 10
    assert timm.data.resolve_data_config({}, model=net)["input_size"] == (1, 64, 64)


def test_maps_are_described_as_dense_heads_ask():
    register_in_timm()
    net = timm.create_model("attlas_poolformer_micro", features_only=True, out_indices=(1, 3))
    assert net.feature_info.channels() == [32, 64]
    assert net.feature_info.reduction() == [8, 32]
    assert [tuple(each.shape) for each in net(torch.randn(1, 3, 64, 64))] == [(1, 32, 8, 8), (1, 64, 2, 2)]


def test_the_arguments_of_timms_training_script_are_understood():
    register_in_timm()
    given = {"drop_rate": 0.0, "drop_path_rate": None, "global_pool": None, "num_classes": 3, "img_size": 32}
    net = timm.create_model("attlas_vit_micro", **given)
    assert net(torch.randn(1, 3, 32, 32)).shape == (1, 3)


def test_what_timm_cannot_have(monkeypatch):
    register_in_timm()
    with pytest.raises(BadInput, match="downloads nothing"):
        timm.create_model("attlas_vit_micro", pretrained=True)
    with pytest.raises(BadInput, match="takes no depths"):
        timm.create_model("attlas_vit_micro", depths=(1,))
    monkeypatch.setitem(sys.modules, "timm.models", None)
    with pytest.raises(BadInput, match=r"attlas\[timm\]"):
        register_in_timm()


def test_maps_are_chosen_as_in_timm():
    register_in_timm()
    for indices, channels in ((2, [64, 64]), ((-1,), [64]), ((0, -2), [32, 64])):
        net = timm.create_model("attlas_poolformer_micro", features_only=True, out_indices=indices)
        assert net.feature_info.channels() == channels
    for name in net.feature_info.module_name():
        net.get_submodule(name)
    with pytest.raises(BadInput, match="the last 9 maps, and there are 4"):
        timm.create_model("attlas_poolformer_micro", features_only=True, out_indices=9)


def test_dropout_is_refused_in_the_words_of_timm():
    register_in_timm()
    with pytest.raises(BadInput, match=r"attlas_vit_micro takes no drop_rate; networks that do: attlas_\w+"):
        timm.create_model("attlas_vit_micro", drop_rate=0.1)
