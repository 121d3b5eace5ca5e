"""LeNet-300-100 and LeNet-5 (LeCun et al., Proc. IEEE 1998), in the variants of the pruning papers.

Parameters on 28 x 28 x 1 with 10 classes: LeNet-300-100 266,610 (267 K in Han et al., arXiv:1506.02626),
LeNet-5 431,080 (431 K, the Caffe variant with 20 and 50 filters).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from prune_cli.models.arguments import check_classes_and_shape, check_widths

_PADDED_BELOW = 16
_MIN_SIDE = 4


class LeNet300100(nn.Module):
    """Three linear layers `fc1`, `fc2`, `fc3` on the flattened image, ReLU between them."""

    def __init__(self, inputs: int, widths: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, widths[0])
        self.fc2 = nn.Linear(widths[0], widths[1])
        self.fc3 = nn.Linear(widths[1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x.flatten(1))))))


class LeNet5(nn.Module):
    """Two 5x5 convolutions, each with ReLU and 2x2 max pooling, then `fc1` and `fc2`.

    The convolutions don't pad, as in the original (28 -> 24 -> 12 -> 8 -> 4), unless a side of the image is
    under 16 pixels: then both pad by 2 (8 -> 8 -> 4 -> 4 -> 2).
    """

    def __init__(self, in_shape: tuple[int, int, int], widths: Sequence[int], num_classes: int) -> None:
        super().__init__()
        channels, *sides = in_shape
        padding = 2 if min(sides) < _PADDED_BELOW else 0
        for _ in range(2):
            sides = [(side + 2 * padding - 4) // 2 for side in sides]
        self.conv1 = nn.Conv2d(channels, widths[0], 5, padding=padding)
        self.conv2 = nn.Conv2d(widths[0], widths[1], 5, padding=padding)
        self.fc1 = nn.Linear(widths[1] * sides[0] * sides[1], widths[2])
        self.fc2 = nn.Linear(widths[2], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


def lenet_300_100(
    *, num_classes: int, in_shape: tuple[int, int, int], widths: Sequence[int] = (300, 100)
) -> LeNet300100:
    """Builds LeNet-300-100, a perceptron with two hidden layers.

    Args:
        num_classes: number of outputs.
        in_shape: (channels, height, width) of the input, flattened.
        widths: units of the two hidden layers.

    Raises:
        ConfigError: if `widths` is not two positive integers.
    """
    channels, height, width = check_classes_and_shape("lenet_300_100", num_classes, in_shape)
    check_widths("lenet_300_100", "widths", widths, 2)
    return LeNet300100(channels * height * width, widths, num_classes)


def lenet5(*, num_classes: int, in_shape: tuple[int, int, int], widths: Sequence[int] = (20, 50, 500)) -> LeNet5:
    """Builds LeNet-5 for images of at least 4 x 4 pixels.

    Args:
        num_classes: number of outputs.
        in_shape: (channels, height, width) of the input.
        widths: filters of the two convolutions and units of the hidden linear layer.

    Raises:
        ConfigError: if `widths` is not three positive integers or the image is too small.
    """
    shape = check_classes_and_shape("lenet5", num_classes, in_shape, _MIN_SIDE)
    check_widths("lenet5", "widths", widths, 3)
    return LeNet5(shape, widths, num_classes)
