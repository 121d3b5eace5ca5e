"""ResNets for CIFAR, three stages of basic blocks (He et al., arXiv:1512.03385, section 4.2).

Names follow the public implementation by akamaster (`conv1`, `bn1`, `layer1.0.conv1`, ...,
`linear`), so its checkpoints load. Parameters with 10 classes and shortcut A: ResNet-20 0.27 M, 32 0.46
M, 44 0.66 M, 56 0.85 M, 110 1.73 M. MACs at 32 x 32: ResNet-20 40.6 M, ResNet-56 125.5 M, ResNet-110 252.9
M. The wide ResNet-32 of widths 64, 128, 256 with shortcut B and 100 classes has 7.45 M parameters and 1.10
G MACs, that is 2.20 GFLOPs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from prune_cli.errors import ConfigError
from prune_cli.models.arguments import check_choice, check_classes_and_shape, check_widths, is_positive_int
from prune_cli.models.initial import initialise


class PadShortcut(nn.Module):
    """Shortcut A: every `stride`-th pixel, and channels of zeros before and after the given ones.

    How many channels of zeros is counted when it runs, from the two tensors that are added, so the shortcut
    follows a network whose channels were pruned. `front` is the number of zero channels before the given
    ones, half of them (rounded down) in the original network; surgery sets it to those that it keeps.
    """

    def __init__(self, stride: int, front: int) -> None:
        super().__init__()
        self.stride = stride
        self.front = front

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """Returns `x` (N, C, H, W) in the shape of `residual`."""
        extra = residual.shape[1] - x.shape[1]
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.front, extra - self.front))

    def extra_repr(self) -> str:
        return f"stride={self.stride}, front={self.front}"


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: the identity, A (zeros) or B (1x1 convolution)."""

    def __init__(self, in_width: int, width: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_width, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Sequential()
        if stride != 1 or in_width != width:
            if shortcut == "A":
                self.shortcut = PadShortcut(stride, (width - in_width) // 2)
            else:
                conv = nn.Conv2d(in_width, width, 1, stride, bias=False)
                self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if isinstance(self.shortcut, PadShortcut):
            return F.relu(out + self.shortcut(x, out))
        return F.relu(out + self.shortcut(x))


class CifarResNet(nn.Module):
    """A 3x3 convolution, three stages of basic blocks, global average pooling, the layer `linear`."""

    def __init__(self, blocks: int, widths: Sequence[int], shortcut: str, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        stages, in_width = [], widths[0]
        for stage, width in enumerate(widths):
            stride = 1 if stage == 0 else 2
            first = BasicBlock(in_width, width, stride, shortcut)
            rest = [BasicBlock(width, width, 1, shortcut) for _ in range(blocks - 1)]
            stages.append(nn.Sequential(first, *rest))
            in_width = width
        self.layer1, self.layer2, self.layer3 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(widths[-1], num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(self.avgpool(x).flatten(1))


def resnet_cifar(
    *,
    num_classes: int,
    in_shape: tuple[int, int, int],
    depth: int = 20,
    widths: Sequence[int] = (16, 32, 64),
    shortcut: Literal["A", "B"] = "A",
) -> CifarResNet:
    """Builds a CIFAR ResNet of `depth` = 6 n + 2 layers.

    Args:
        num_classes: number of outputs.
        in_shape: (channels, height, width) of the input; any size from 1 x 1, made for 32 x 32.
        depth: 8, 14, 20, 32, 44, 56, 110, ...: n blocks of two convolutions in each of three stages.
        widths: channels of the three stages; the first convolution has as many as the first stage.
        shortcut: where the width grows: A pads with zeros, without parameters (the paper's CIFAR networks),
            B is a 1x1 convolution with a norm.

    Raises:
        ConfigError: if the depth is not 6 n + 2, a width is not a positive integer, or shortcut A would
            have to drop channels.
    """
    channels, _, _ = check_classes_and_shape("resnet_cifar", num_classes, in_shape)
    if not is_positive_int(depth) or depth < 8 or (depth - 2) % 6:
        raise ConfigError(f"resnet_cifar: depth is {depth!r}, not 6 n + 2 such as 20, 32, 44, 56, 110")
    check_widths("resnet_cifar", "widths", widths, 3)
    check_choice("resnet_cifar", "shortcut", shortcut, ["A", "B"])
    if shortcut == "A" and list(widths) != sorted(widths):
        raise ConfigError(f"resnet_cifar: shortcut A can't narrow, widths are {list(widths)}; shortcut B can")
    return CifarResNet((depth - 2) // 6, widths, shortcut, channels, num_classes)
