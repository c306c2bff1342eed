"""What all image networks share: features, head, maps for dense tasks, gradient checkpointing.

B batch, C channels, H and W height and width, K classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

from torch import Tensor, nn

from attlas.blocks.attention import Attention
from attlas.blocks.stage import set_checkpointing
from attlas.core.errors import BadInput, share
from attlas.core.mechanism import Mixer

Built = TypeVar("Built", bound=nn.Module)


class Backbone(nn.Module, ABC):
    """Pictures (B, in_chans, H, W) -> logits (B, num_classes), or features where num_classes is 0.

    Subclasses write `forward_features` and set `head`. The names of the methods are those of timm.

    Attributes:
        in_chans: channels of the pictures.
        channels: of the feature maps, finest first.
        strides: pixels of a picture per place of each feature map, rounded where they are no whole number.
        num_features: channels that the classifier reads.
        head: from the last features to logits.
    """

    head: nn.Module

    def __init__(self, in_chans: int, channels: Sequence[int], strides: Sequence[int]) -> None:
        super().__init__()
        if in_chans < 1:
            raise BadInput(f"in_chans counts the channels of the pictures, at least 1, got {in_chans}")
        self.in_chans = in_chans
        self.channels, self.strides = tuple(channels), tuple(strides)
        self.num_features = self.channels[-1]

    @abstractmethod
    def forward_features(self, image_BCHW: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        """Hook: the features before the head; every feature map (B, C, H, W) is also appended to `maps`."""

    def forward_head(self, x: Tensor) -> Tensor:
        """Logits of what `forward_features` gives."""
        return self.head(x)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Logits (B, num_classes).

        Raises:
            BadInput: not a batch of pictures with `in_chans` channels, or of a size that the network cannot cut.
        """
        self._check(image_BCHW)
        return self.forward_head(self.forward_features(image_BCHW))

    def feature_maps(self, image_BCHW: Tensor) -> list[Tensor]:
        """One map (B, C, H, W) for each entry of `channels` and `strides`.

        Raises:
            BadInput: as `forward`.
        """
        self._check(image_BCHW)
        maps: list[Tensor] = []
        self.forward_features(image_BCHW, maps)
        return maps

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute activations inside blocks again in the backward pass instead of keeping them."""
        set_checkpointing(self, enable)

    def headless(self) -> None:
        """Hook: put away what only the logits need, for a network that gives feature maps."""
        self.head = nn.Identity()

    def _check(self, image: Tensor) -> None:
        if image.ndim != 4 or image.shape[1] != self.in_chans:
            raise BadInput(
                f"pictures are (batch, {self.in_chans}, height, width), got {tuple(image.shape)}; for other channels "
                "build with in_chans="
            )


class FeaturePyramid(nn.Module):
    """A backbone without its head: pictures -> maps (B, C, H, W), finest first.

    Attributes:
        channels, strides: of the maps that come out.
    """

    def __init__(self, backbone: Backbone, indices: Sequence[int] | None = None) -> None:
        super().__init__()
        count = len(backbone.channels)
        indices = range(count) if indices is None else indices
        wrong = [index for index in indices if not 0 <= index < count]
        if wrong:
            raise BadInput(f"out_indices name maps 0 to {count - 1}, got {wrong}")
        backbone.headless()
        self.backbone, self.indices = backbone, tuple(indices)
        self.channels = tuple(backbone.channels[index] for index in self.indices)
        self.strides = tuple(backbone.strides[index] for index in self.indices)

    def forward(self, image_BCHW: Tensor) -> list[Tensor]:
        """The maps."""
        maps = self.backbone.feature_maps(image_BCHW)
        return [maps[index] for index in self.indices]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute activations inside blocks again in the backward pass instead of keeping them."""
        set_checkpointing(self, enable)


class Head(nn.Module):
    """From a map to logits: norm, mean over places, norm, dropout, linear.

    Args:
        dim: C.
        num_classes: K; 0 leaves the linear map out.
        before: makes a norm of the map (B, C, H, W).
        after: makes a norm of the mean (B, C).
        drop: dropout before the linear map.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        *,
        before: Callable[[int], nn.Module] | None = None,
        after: Callable[[int], nn.Module] | None = None,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.before = nn.Identity() if before is None else before(dim)
        self.after = nn.Identity() if after is None else after(dim)
        self.drop = nn.Dropout(share("drop", drop))
        self.classifier = classifier(dim, num_classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Logits (B, K)."""
        return self.classifier(self.drop(self.after(self.before(x_BCHW).mean((2, 3)))))


def start_published(
    net: Built, *, std: float = 0.02, kinds: tuple[type[nn.Module], ...] = (nn.Linear,), own: Collection[str] = ()
) -> Built:
    """Start the weights of a network as most vision transformers are published: normal, cut at ± 2, biases 0.

    A mechanism starts as its own paper says: of a mixer only the projections of the shell are touched.

    Args:
        net: the network.
        std: of the weights.
        kinds: modules that start so.
        own: mechanisms that the network's source starts likewise, whole.
    """
    for child in net.children():
        if not isinstance(child, Mixer):
            start_published(child, std=std, kinds=kinds, own=own)
        elif child.spec.name in own:
            for key, value in child.named_parameters():
                if value.ndim > 1:
                    nn.init.trunc_normal_(value, std=std)
                elif key.endswith("bias"):
                    nn.init.zeros_(value)
        elif isinstance(child, Attention):
            for layer in (child.q_proj, child.k_proj, child.v_proj, child.gate_proj, child.out_proj):
                start_normal(layer, std)
    if isinstance(net, kinds):
        start_normal(net, std)
    return net


def start_normal(layer: nn.Module | None, std: float = 0.02) -> None:
    """Weights normal, cut at ± 2, biases 0."""
    if layer is not None:
        weight, bias = layer.weight, layer.bias
        assert isinstance(weight, Tensor)
        nn.init.trunc_normal_(weight, std=std)
        if isinstance(bias, Tensor):
            nn.init.zeros_(bias)


def classifier(dim: int, num_classes: int) -> nn.Module:
    """The last linear map, or nothing for 0 classes."""
    if num_classes < 0:
        raise BadInput(f"num_classes cannot be negative, got {num_classes}; 0 gives features")
    return nn.Linear(dim, num_classes) if num_classes else nn.Identity()
