"""Writes the files in recipes/ratios/ whose ratios nobody published: they grow with depth and meet a published total.

DNN-Model-Prune published totals for most of its runs and single ratios for one (vgg16_cifar10_irre). For the others, the
ratio grows linearly over the layers from `first` to the `last` at which the total comes out. Totals are of the weights
that the units of the granularity cover, as its tables count them: of all parameters, or, where starred, of convolutions.

    python scripts/ratios.py [FOLDER]
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from prune_cli.models.torchvision import torchvision
from prune_cli.models.vgg import vgg
from prune_cli.structure import prunable

Count = Callable[[torch.Size, float], int]
"""(weight shape, ratio) -> weights removed."""


def elements(shape: torch.Size, ratio: float) -> int:
    return math.floor(ratio * shape.numel() + 1e-9)


def stripes(shape: torch.Size, ratio: float) -> int:
    return math.floor(ratio * shape[0] * shape[2] * shape[3] + 1e-9) * shape[1]


def filters(shape: torch.Size, ratio: float) -> int:
    return math.floor(ratio * shape[0] + 1e-9) * shape[1:].numel()


def five_of_nine(shape: torch.Size, ratio: float) -> int:
    """Patterns of 5 entries everywhere, and as many kernels as the ratio still needs."""
    kernels = shape[0] * shape[1]
    gone = math.floor((ratio - 4 / 9) / (5 / 9) * kernels + 1e-9)
    return 4 * (kernels - gone) + 9 * gone


@dataclass(frozen=True)
class File:
    """One ratio file.

    Attributes:
        about: its first line.
        build: the network, whose weights do not matter.
        count: what a ratio removes.
        first: ratio of the first layer in the ramp; None: one ratio for all layers.
        total: what all layers together remove.
        of: modules whose weights are the whole; None: all parameters.
        keep: layers that stay dense; fixed: layers with a ratio of their own.
    """

    about: str
    build: Callable[[], nn.Module]
    count: Count
    first: float | None
    total: float
    of: type[nn.Module] | None = None
    keep: Sequence[str] = ()
    fixed: Mapping[str, float] = field(default_factory=dict)
    kernels: bool = True


def resnet18() -> nn.Module:
    return torchvision(name="resnet18", num_classes=1000, in_shape=[3, 224, 224])


def vgg16_imagenet() -> nn.Module:
    return torchvision(name="vgg16", num_classes=1000, in_shape=[3, 224, 224])


def vgg16_cifar10() -> nn.Module:
    return vgg(num_classes=10, in_shape=[3, 32, 32], depth=16)


SHORTCUTS = tuple(f"layer{stage}.0.downsample.0" for stage in (2, 3, 4))
FILES = {
    "vgg16_cifar10_filter": File(
        "53.4 % of all parameters in whole filters (their own weights; consumers shrink besides)",
        vgg16_cifar10, filters, 0.2, 0.534, keep=("features.0",),
    ),
    "vgg16_cifar10_patdnn": File(
        "74.31 % of all parameters by patterns of 5 entries and whole kernels",
        vgg16_cifar10, five_of_nine, None, 0.7431, keep=("features.0",),
    ),
    "vgg16_imagenet_irre": File(
        "79.26 % of all parameters, single weights; the classifier 0.8, as it published for CIFAR", vgg16_imagenet, elements, 0.3, 0.7926, keep=("features.0",),
        fixed={f"classifier.{index}": 0.8 for index in (0, 3, 6)}, kernels=False,
    ),
    "vgg16_imagenet_patdnn": File(
        "74.55 %* of the convolutions by patterns of 5 entries and whole kernels",
        vgg16_imagenet, five_of_nine, None, 0.7455, nn.Conv2d, keep=("features.0",),
    ),
    "vgg16_imagenet_stripe": File(
        "45.59 %* of the convolutions in stripes", vgg16_imagenet, stripes, 0.2, 0.4559, nn.Conv2d,
        keep=("features.0",),
    ),
    "resnet18_imagenet_irre": File(
        "73.13 % of all parameters, single weights; projections 0.3 and the classifier 0.2 as published",
        resnet18, elements, 0.3, 0.7313, keep=("conv1",), fixed={**dict.fromkeys(SHORTCUTS, 0.3), "fc": 0.2},
        kernels=False,
    ),
    "resnet18_imagenet_patdnn": File(
        "68.99 %* of the convolutions by patterns of 5 entries and whole kernels",
        resnet18, five_of_nine, None, 0.6899, nn.Conv2d, keep=("conv1",),
    ),
    "resnet18_imagenet_stripe": File(
        "44.02 %* of the convolutions in stripes", resnet18, stripes, 0.2, 0.4402, nn.Conv2d, keep=("conv1",),
    ),
}  # fmt: skip


def ramp(file: File, last: float, layers: Sequence[str]) -> dict[str, float]:
    """Ratio per layer, four digits."""
    first = last if file.first is None else file.first
    steps = max(len(layers) - 1, 1)
    return {name: round(first + (last - first) * index / steps, 4) for index, name in enumerate(layers)} | dict(
        file.fixed
    )


def removed(file: File, shapes: Mapping[str, torch.Size], ratios: Mapping[str, float]) -> int:
    return sum(file.count(shapes[name], ratio) for name, ratio in ratios.items())


def solve(file: File) -> tuple[dict[str, float], float]:
    """Ratios whose total is nearest the published one, by bisection, and that total.

    Raises:
        ValueError: no ramp reaches the total.
    """
    with torch.device("meta"):
        model = file.build()
    found = prunable.layers(model)
    shapes = {name: module.weight.shape for name, module in found.items()}
    if file.of is None:
        whole = sum(parameter.numel() for parameter in model.parameters())
    else:
        whole = sum(shapes[name].numel() for name, module in found.items() if isinstance(module, file.of))
    layers = [
        name for name, module in found.items()
        if name not in file.keep and name not in file.fixed
        and (not file.kernels or (isinstance(module, nn.Conv2d) and module.kernel_size[0] > 1))
        and isinstance(module, nn.Conv2d)
    ]  # fmt: skip
    low, high = 0.45 if file.count is five_of_nine else 0.0, 0.999
    for _ in range(40):
        middle = (low + high) / 2
        if removed(file, shapes, ramp(file, middle, layers)) < file.total * whole:
            low = middle
        else:
            high = middle
    ratios = min(
        (ramp(file, round(value, 4), layers) for value in (low - 1e-4, low, high, high + 1e-4)),
        key=lambda given: abs(removed(file, shapes, given) - file.total * whole),
    )
    total = removed(file, shapes, ratios) / whole
    if abs(total - file.total) > 2e-3:
        raise ValueError(f"{file.about}: the nearest total is {total:.4f}")
    return {name: ratios[name] for name in found if name in ratios}, total


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent / "recipes" / "ratios"
    for name, file in FILES.items():
        ratios, total = solve(file)
        lines = [
            f"# {file.about}: the total that DNN-Model-Prune published;",
            f"# ratios per layer derived by scripts/ratios.py (it published none), which remove {100 * total:.2f} %",
            "prune_ratio:",
            *(f"  {layer}.weight: {ratio:g}" for layer, ratio in ratios.items()),
        ]
        (folder / f"{name}.yaml").write_text("\n".join(lines) + "\n")
        print(f"{name}: {100 * total:.2f} % of {100 * file.total:.2f} %, up to {max(ratios.values())}")


if __name__ == "__main__":
    main()
