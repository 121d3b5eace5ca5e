"""MobileNetV1 (Howard et al., arXiv:1704.04861): depthwise and pointwise convolutions, a width multiplier.

Parameters with 1,000 classes and width 1: 4.2 M, MACs at 224 x 224: 569 M; width 0.75: 2.6 M, 325 M; 0.5:
1.3 M, 149 M; 0.25: 0.5 M, 41 M (tables 4 to 6 of the paper). With the CIFAR stem and 10 classes 3.2 M and
46 M at 32 x 32.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from prune_cli.errors import ConfigError
from prune_cli.models.arguments import check_choice, check_classes_and_shape
from prune_cli.models.initial import initialise

# (channels at width 1, stride of the depthwise convolution) of each block: table 1 of the paper
_BLOCKS = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    (512, 1),
    (512, 1),
    (512, 1),
    (512, 1),
    (512, 1),
    (1024, 2),
    (1024, 1),
)
_STEM_WIDTH = 32


class DepthwiseSeparable(nn.Module):
    """3x3 depthwise convolution, norm, ReLU, 1x1 convolution, norm, ReLU."""

    def __init__(self, in_width: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_width, in_width, 3, stride, 1, groups=in_width, bias=False)
        self.bn1 = nn.BatchNorm2d(in_width)
        self.conv2 = nn.Conv2d(in_width, width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)))


class MobileNetV1(nn.Module):
    """A 3x3 convolution, 13 blocks in `layers`, global average pooling, the layer `linear`."""

    def __init__(self, width: float, stem_stride: int, in_channels: int, num_classes: int) -> None:
        super().__init__()
        channels = _scaled(_STEM_WIDTH, width)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stem_stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        blocks = []
        for base, stride in _BLOCKS:
            blocks.append(DepthwiseSeparable(channels, _scaled(base, width), stride))
            channels = _scaled(base, width)
        self.layers = nn.Sequential(*blocks)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(channels, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(F.relu(self.bn1(self.conv1(x))))
        return self.linear(self.avgpool(x).flatten(1))


def _scaled(base: int, width: float) -> int:
    return max(1, round(base * width))


def mobilenet_v1(
    *,
    num_classes: int,
    in_shape: tuple[int, int, int],
    width: float = 1.0,
    stem: Literal["cifar", "imagenet"] = "cifar",
) -> MobileNetV1:
    """Builds a MobileNetV1.

    Args:
        num_classes: number of outputs.
        in_shape: (channels, height, width) of the input; any size from 1 x 1.
        width: factor on every number of channels (alpha in the paper), above 0; rounded, at least 1 channel.
        stem: stride of the first convolution: imagenet 2 (the paper), cifar 1.

    Raises:
        ConfigError: if the width is not above 0 or there is no such stem.
    """
    channels, _, _ = check_classes_and_shape("mobilenet_v1", num_classes, in_shape)
    if isinstance(width, bool) or not 0 < width < float("inf"):
        raise ConfigError(f"mobilenet_v1: width is {width!r}, not a factor above 0 such as 1, 0.75, 0.5, 0.25")
    check_choice("mobilenet_v1", "stem", stem, ["cifar", "imagenet"])
    return MobileNetV1(width, 2 if stem == "imagenet" else 1, channels, num_classes)
