"""CCNet: criss-cross attention, twice with the same weights, on the last map of a network; for segmentation.

    a = conv x,    h = conv mixer(a),    logits = W conv [x, h]

every convolution 3 x 3 with BN and a leaky ReLU; the mixer is `criss_cross`, or any other mechanism. The published
network stands on a ResNet-101 whose stem is three convolutions and whose two last stages keep stride 8 and are dilated
by 2 and 4. Any backbone by name serves, as it is. Logits are enlarged to the size of the picture, corner to corner, as
in the published evaluation. The auxiliary head of training is left out.

Source: Huang et al., "CCNet: Criss-Cross Attention for Semantic Segmentation", 2018 (arXiv:1811.11721), official code
speedinghzl/CCNet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.blocks.conv_norm import ConvNorm
from attlas.core.errors import BadInput
from attlas.core.grid import Grid
from attlas.core.mechanism import Mixer
from attlas.models.backbone import Backbone
from attlas.models.key_maps import linear, rename
from attlas.models.mixers import map_sizes, stage_mixers
from attlas.models.pyramid import Pyramid
from attlas.models.registry import State, model, published
from attlas.models.vision.resnet import Block
from attlas.ops.maps import to_map, to_tokens
from attlas.ops.precision import wide

HEAD_DIM = 64
STEM = (64, 64, 128)

SIZES: Mapping[str, Mapping[str, Any]] = {
    "ccnet_resnet101": {"backbone": "resnet101", "stem": STEM, "dilations": (1, 1, 2, 4)},
    "ccnet_micro": {"backbone": "resnet_micro", "dilations": (1, 1, 2, 4), "num_classes": 5, "img_size": 64, "dim": 16},
}


def conv(dim: int, out: int) -> nn.Sequential:
    """3 x 3 convolution, BN, leaky ReLU."""
    return nn.Sequential(ConvNorm(dim, out, 3), nn.LeakyReLU(0.01))


class ContextHead(nn.Module):
    """A map to logits of each of its places.

    Args:
        dim: channels of the map.
        mixer: of tokens of a quarter as many channels.
        hidden: channels before the classifier.
        num_classes: K.
        drop: dropout of whole channels before the classifier.
    """

    def __init__(self, dim: int, mixer: Mixer, hidden: int, num_classes: int, drop: float = 0.1) -> None:
        super().__init__()
        inside = mixer.site.dim
        self.before, self.mixer, self.after = conv(dim, inside), mixer, conv(inside, inside)
        self.bottleneck, self.drop = conv(dim + inside, hidden), nn.Dropout2d(drop)
        if num_classes < 0:
            raise BadInput(f"num_classes cannot be negative, got {num_classes}; 0 gives features")
        self.classifier = nn.Conv2d(hidden, num_classes, 1) if num_classes else nn.Identity()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, K, H, W)."""
        a_BNC, grid = to_tokens(self.before(x_BCHW))
        h_BCHW = self.after(to_map(self.mixer(a_BNC, grid=grid), grid))
        return self.classifier(self.drop(self.bottleneck(torch.cat([x_BCHW, h_BCHW], 1))))


class Segmenter(Backbone):
    """A backbone and a head on its last map: pictures (B, C, H, W) -> logits (B, K, H, W).

    Args:
        backbone: its own head is dropped.
        head: from its last map to logits of each place.
        num_features: channels that the classifier reads.
    """

    def __init__(self, backbone: Backbone, head: nn.Module, num_features: int) -> None:
        super().__init__(backbone.in_chans, backbone.channels, backbone.strides)
        backbone.head = nn.Identity()
        self.backbone, self.head = backbone, head
        self.num_features = num_features

    def forward_features(self, image_BCHW: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        """The last map of the backbone."""
        found: list[Tensor] = [] if maps is None else maps
        self.backbone.forward_features(image_BCHW, found)
        return found[-1]

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Logits of each pixel (B, K, H, W).

        Raises:
            BadInput: as `Backbone.forward`.
        """
        logits = super().forward(image_BCHW)
        size = tuple(image_BCHW.shape[2:])
        return F.interpolate(wide(logits), size, mode="bilinear", align_corners=True).to(logits.dtype)


def dilated(net: Pyramid, dilations: Sequence[int]) -> Pyramid:
    """A ResNet, changed in place: stages with a dilation keep the size of the map and look so much further apart."""
    if len(dilations) != len(net.stages) or min(dilations) < 1 or dilations[0] != 1:
        raise BadInput(
            f"dilations are 1 for the first stage and at least 1 for each of {len(net.stages)}, got {list(dilations)}"
        )
    strides: list[int] = []
    for index, (stage, dilation) in enumerate(zip(net.stages, dilations, strict=True)):
        strides.append(net.strides[index] if dilation == 1 else strides[-1])
        for layer in stage.modules() if dilation > 1 else ():
            if isinstance(layer, nn.Conv2d):
                layer.stride = (1, 1)
                layer.dilation = (dilation, dilation)
                layer.padding = tuple(dilation * (size // 2) for size in layer.kernel_size)
    net.strides = tuple(strides)
    return net


def deep_stem(net: Pyramid, widths: Sequence[int], in_chans: int) -> Pyramid:
    """A ResNet, changed in place: its stem three convolutions of these widths, the last as wide as it likes."""
    if len(widths) != 3 or min(widths) < 1:
        raise BadInput(f"stem names the channels behind each of three convolutions, got {list(widths)}")
    blocks: Any = net.stages[0].blocks
    a, b, c = widths
    convs = [ConvNorm(in_chans, a, 3, 2), nn.ReLU(), ConvNorm(a, b, 3), nn.ReLU(), ConvNorm(b, c, 3), nn.ReLU()]
    net.downsamples[0] = nn.Sequential(*convs, nn.MaxPool2d(3, 2, 1, ceil_mode=True))
    inside = blocks[0].convs[0].conv.out_channels
    blocks[0] = Block(c, inside, net.channels[0] // inside)
    return net


def from_official(state: State, model: nn.Module) -> State:
    """The names of speedinghzl/CCNet; its auxiliary head is left out."""
    state = {key: value for key, value in state.items() if not key.startswith("dsn.")}
    for key in [key for key in state if key.endswith("running_mean")]:
        state.setdefault(key.replace("running_mean", "num_batches_tracked"), torch.tensor(0))
    state = rename(
        state,
        (
            *((rf"^layer{i + 1}\.", f"backbone.stages.{i}.blocks.") for i in range(4)),
            *((rf"^conv{i + 1}\.", f"backbone.downsamples.0.{2 * i}.conv.") for i in range(3)),
            *((rf"^bn{i + 1}\.", f"backbone.downsamples.0.{2 * i}.norm.") for i in range(3)),
            *((rf"(blocks\.\d+)\.conv{i + 1}\.", rf"\1.convs.{i}.conv.") for i in range(3)),
            *((rf"(blocks\.\d+)\.bn{i + 1}\.", rf"\1.convs.{i}.norm.") for i in range(3)),
            (r"\.downsample\.0\.", ".shortcut.1.conv."),
            (r"\.downsample\.1\.", ".shortcut.1.norm."),
            (r"^head\.bottleneck\.3\.", "head.classifier."),
            (r"^head\.conva\.", "head.before."),
            (r"^head\.convb\.", "head.after."),
            (r"^head\.(before|after|bottleneck)\.0\.", r"head.\1.0.conv."),
            (r"^head\.(before|after|bottleneck)\.1\.", r"head.\1.0.norm."),
            (r"^head\.cca\.query_conv\.", "head.mixer.q_proj."),
            (r"^head\.cca\.key_conv\.", "head.mixer.k_proj."),
            (r"^head\.cca\.value_conv\.", "head.mixer.v_proj."),
            (r"^head\.cca\.", "head.mixer."),
        ),
    )
    return linear(state, r"mixer\.\w_proj\.weight$")


@published(
    SIZES,
    title="CCNet: Criss-Cross Attention for Semantic Segmentation",
    year=2018,
    paper="arXiv:1811.11721",
    task="segmentation",
    key_maps={"official": from_official},
)
def ccnet(
    *,
    backbone: str,
    backbone_settings: Mapping[str, Any] | None = None,
    stem: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    dim: int = 512,
    mixer: str = "criss_cross",
    mixer_settings: Mapping[str, Any] | None = None,
    drop_path: float = 0.0,
    num_classes: int = 19,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 769,
) -> Segmenter:
    """The head of CCNet with any mechanism on any backbone.

    Args:
        backbone: a network by name, of task "classification".
        backbone_settings: what it takes.
        stem: widths of three convolutions in place of the stem of a ResNet.
        dilations: of each stage of a ResNet; stages with one do not halve the map.
        dim: channels before the classifier.
        mixer: the mechanism, on a quarter of the channels of the last map; it may have heads of 64 channels.
        mixer_settings: of the mechanism.
        drop_path: rate of the backbone's last block.
        num_classes: of each pixel; 0 for features.
        in_chans: channels of the pictures.
        img_size: that it is trained on, for mechanisms that depend on it.
    """
    entry = model(backbone)
    if entry.task != "classification":
        raise BadInput(f"backbone is a network with feature maps, got {backbone}, which is for {entry.task}")
    own = {"num_classes": 0, "in_chans": in_chans, "img_size": img_size, "drop_path": drop_path}
    net = entry.build(**{**entry.settings, **own, **(backbone_settings or {})})
    assert isinstance(net, Backbone)
    if stem is not None or dilations is not None:
        if not isinstance(net, Pyramid) or entry.family != "resnet":
            raise BadInput(f"stem and dilations change a ResNet, got backbone={backbone!r}: pass None for both")
        net = net if stem is None else deep_stem(net, stem, in_chans)
        net = net if dilations is None else dilated(net, dilations)
    inside = net.channels[-1] // 4
    (size,) = map_sizes(img_size, net.strides[-1:])
    (chosen,) = stage_mixers(mixer, 1, inside, max(1, inside // HEAD_DIM), Grid(size), mixer_settings)
    return Segmenter(net, ContextHead(net.channels[-1], chosen, dim, num_classes), dim)
