"""Wide residual networks WRN-d-w (Zagoruyko and Komodakis, arXiv:1605.07146): pre-activation, three stages.

Names follow the public PyTorch implementation by xternalz (`block1.layer.0.conv1`, `convShortcut`,
`fc`). Parameters with 10 classes, as in the paper's tables: WRN-16-4 2.7 M, WRN-40-2 2.2 M, WRN-40-4 8.9
M, WRN-28-10 36.5 M; also WRN-16-1 0.2 M, WRN-16-2 0.7 M, WRN-40-1 0.6 M.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from prune_cli.errors import ConfigError
from prune_cli.models.arguments import check_classes_and_shape, is_positive_int
from prune_cli.models.initial import initialise


class PreActBlock(nn.Module):
    """norm-ReLU-conv twice; where the shape changes, a 1x1 convolution of the activated input is added."""

    def __init__(self, in_width: int, width: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_width)
        self.conv1 = nn.Conv2d(in_width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.convShortcut: nn.Conv2d | None = None
        if stride != 1 or in_width != width:
            self.convShortcut = nn.Conv2d(in_width, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(active)
        out = F.relu(self.bn2(self.conv1(active)))
        return shortcut + self.conv2(self.dropout(out))


class Stage(nn.Module):
    """Blocks of one width, in `layer`; only the first strides."""

    def __init__(self, blocks: int, in_width: int, width: int, stride: int, dropout: float) -> None:
        super().__init__()
        first = PreActBlock(in_width, width, stride, dropout)
        rest = [PreActBlock(width, width, 1, dropout) for _ in range(blocks - 1)]
        self.layer = nn.Sequential(first, *rest)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(nn.Module):
    """A 3x3 convolution of 16 channels, stages of 16 w, 32 w and 64 w, norm, pooling, the layer `fc`."""

    def __init__(self, blocks: int, width: int, dropout: float, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        self.block1 = Stage(blocks, 16, 16 * width, 1, dropout)
        self.block2 = Stage(blocks, 16 * width, 32 * width, 2, dropout)
        self.block3 = Stage(blocks, 32 * width, 64 * width, 2, dropout)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64 * width, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(self.avgpool(F.relu(self.bn1(x))).flatten(1))


def wide_resnet(
    *,
    num_classes: int,
    in_shape: tuple[int, int, int],
    depth: int = 16,
    width: int = 4,
    dropout: float = 0.0,
) -> WideResNet:
    """Builds WRN-`depth`-`width`.

    Args:
        num_classes: number of outputs.
        in_shape: (channels, height, width) of the input; any size from 1 x 1, made for 32 x 32.
        depth: 6 n + 4: n blocks of two convolutions in each of three stages (10, 16, 22, 28, 40).
        width: factor on the widths 16, 32, 64.
        dropout: probability of dropping an activation between the two convolutions of a block, in [0, 1).

    Raises:
        ConfigError: if the depth is not 6 n + 4 or a value is out of range.
    """
    channels, _, _ = check_classes_and_shape("wide_resnet", num_classes, in_shape)
    if not is_positive_int(depth) or depth < 10 or (depth - 4) % 6:
        raise ConfigError(f"wide_resnet: depth is {depth!r}, not 6 n + 4 such as 16, 22, 28, 40")
    if not is_positive_int(width):
        raise ConfigError(f"wide_resnet: width is {width!r}, not a positive integer such as 1, 2, 4, 10")
    if not 0 <= dropout < 1:
        raise ConfigError(f"wide_resnet: dropout is {dropout!r}, not in [0, 1)")
    return WideResNet((depth - 4) // 6, width, dropout, channels, num_classes)
