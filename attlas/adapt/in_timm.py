"""The networks of Attlas by name in timm, for its training scripts and everything else that calls `create_model`.

timm reads a slash as an address on the Hub, so a name is `attlas_` and the network's: `attlas_biformer_tiny`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from attlas.core.errors import BadInput
from attlas.models import create, model, models
from attlas.models.backbone import FeaturePyramid

PREFIX = "attlas_"
THEIRS = {"drop_path_rate": "drop_path", "drop_rate": "drop"}
"""What timm's arguments are called here."""

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "interpolation": "bicubic", "crop_pct": 0.9}


def register_in_timm() -> list[str]:
    """Make every network for classification known to timm; calling it again changes nothing.

    >>> register_in_timm()[0]  # doctest: +SKIP
    'attlas_activator_cifar'

    Returns:
        The names for `timm.create_model`. Its arguments num_classes, in_chans, img_size, drop_path_rate,
        features_only and out_indices are served, and those of `attlas.models.create`.

    Raises:
        BadInput: timm is not installed.
    """
    try:
        from timm.models import is_model, register_model
    except ImportError:
        raise BadInput("timm is not installed: pip install 'attlas[timm]'") from None
    names = []
    for name in models(task="classification"):
        build = _entry(name)
        if not is_model(build.__name__):
            register_model(build)
        names.append(build.__name__)
    return names


def _entry(name: str) -> Callable[..., nn.Module]:
    """What timm calls for one network."""

    def build(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Any = None,
        cache_dir: Any = None,
        **settings: Any,
    ) -> nn.Module:
        if pretrained:
            raise BadInput(
                f"Attlas downloads nothing: build {PREFIX}{name} without pretrained=True and give it a file with "
                "attlas.models.load_weights, or timm's checkpoint_path= with weights of Attlas"
            )
        accepted = model(name).accepted
        side = settings.get("img_size", accepted["img_size"])
        height, width = (side, side) if isinstance(side, int) else side
        own = {THEIRS.get(key, key): value for key, value in settings.items()}
        if "drop" not in accepted and own.pop("drop", None):  # its training script always says 0
            able = [PREFIX + each for each in models(task="classification") if "drop" in model(each).accepted]
            raise BadInput(f"{PREFIX}{name} takes no drop_rate; networks that do: {', '.join(able[:8])}")
        indices = own.pop("out_indices", None) if own.get("features_only") else None
        net = create(name, **own)
        if indices is not None and isinstance(net, FeaturePyramid):
            net = FeaturePyramid(net.backbone, _taken(indices, len(net.channels)))
        config = {
            "architecture": PREFIX + name,
            "input_size": (settings.get("in_chans", 3), height, width),
            "num_classes": settings.get("num_classes", accepted["num_classes"]),
            **IMAGENET,
        }
        described: Any = net
        described.pretrained_cfg = described.default_cfg = config
        described.num_classes = config["num_classes"]
        if isinstance(net, FeaturePyramid):
            described.feature_info = _feature_info(net)
        return net

    build.__name__ = build.__qualname__ = PREFIX + name
    build.__doc__ = f"{name} of Attlas."
    return build


def _taken(indices: int | Sequence[int], count: int) -> list[int]:
    """The maps that timm means: a number is so many of the last, and negative ones count from the end."""
    if isinstance(indices, int):
        if not 1 <= indices <= count:
            raise BadInput(f"out_indices={indices} are the last {indices} maps, and there are {count}")
        return list(range(count - indices, count))
    return [index + count if -count <= index < 0 else index for index in indices]


def _feature_info(net: FeaturePyramid) -> Any:
    """Channels and strides of the maps, as timm's dense heads ask for them."""
    from timm.models import FeatureInfo

    whole = net.backbone
    maps = enumerate(zip(whole.channels, whole.strides, strict=True))
    entries = [
        {"num_chs": chans, "reduction": stride, "module": f"backbone.stages.{at}"} for at, (chans, stride) in maps
    ]
    return FeatureInfo(entries, net.indices)
