"""VGG for small images (Simonyan and Zisserman, arXiv:1409.1556) with batch norm and one linear layer.

The variant that pruning papers call "VGG-16 on CIFAR-10": 13 convolutions of 3x3, global average pooling,
one linear layer. Names are the usual ones: `features.N` counts convolution, norm, ReLU and pooling, as in
torchvision's `vgg16_bn`, so the convolutions of VGG-16 are `features.0`, `features.3`,
`features.7`, ...; the linear layer is `classifier`.

Parameters with 10 classes (biases in the convolutions): VGG-11 9.23 M, VGG-13 9.42 M, VGG-16 14.73 M,
VGG-19 20.04 M. Without biases VGG-16 has 14.72 M. The 14.98 M of Li et al. (arXiv:1608.08710) have one more
linear layer of 512 x 512 with its norm, which this variant leaves out. MACs at 32 x 32 with 10 classes:
VGG-16 313.2 M, VGG-19 398.1 M.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from prune_cli.errors import ConfigError
from prune_cli.models.arguments import check_choice, check_classes_and_shape, is_positive_int
from prune_cli.models.initial import initialise

POOL = "M"

_STAGE_WIDTHS = (64, 128, 256, 512, 512)
_STAGE_CONVS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class VGG(nn.Module):
    """Convolutions and poolings in `features`, global average pooling, the linear layer `classifier`.

    Takes (N, C, H, W) of any size from 1 x 1. Poolings halve and round up (`ceil_mode`), so a map of one
    pixel stays one pixel: 32 -> 16 -> 8 -> 4 -> 2 -> 1, 28 -> 14 -> 7 -> 4 -> 2 -> 1, 8 -> 4 -> 2 -> 1 -> 1 -> 1.
    """

    def __init__(self, cfg: Sequence[int | str], in_channels: int, num_classes: int, bias: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for entry in cfg:
            if isinstance(entry, str):
                layers.append(nn.MaxPool2d(2, ceil_mode=True))
                continue
            layers += [nn.Conv2d(channels, entry, 3, padding=1, bias=bias), nn.BatchNorm2d(entry), nn.ReLU()]
            channels = entry
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def dense_cfg(depth: int) -> list[int | str]:
    """Returns the cfg list of VGG-11, 13, 16 or 19: widths of the convolutions and `"M"` for a pooling.

    Raises:
        ConfigError: if there is no VGG of this depth.
    """
    check_choice("vgg", "depth", depth, _STAGE_CONVS)
    cfg: list[int | str] = []
    for width, convs in zip(_STAGE_WIDTHS, _STAGE_CONVS[depth], strict=True):
        cfg += [*[width] * convs, POOL]
    return cfg


def _check_cfg(cfg: Sequence[int | str], depth: int | None) -> list[int | str]:
    for position, entry in enumerate(cfg):
        if entry != POOL and not is_positive_int(entry):
            raise ConfigError(f"vgg: cfg[{position}] is {entry!r}, not a positive width or '{POOL}'")
    entries = list(cfg)
    if all(entry == POOL for entry in entries):
        raise ConfigError("vgg: cfg has no convolution; it lists widths and 'M', such as [64, 64, 'M', 128]")
    if depth is None:
        return entries
    expected = dense_cfg(depth)
    if len(entries) == len(expected) - 1 and expected[-1] == POOL and entries[-1] != POOL:
        # network-slimming and others leave the last pooling to the head; on 32 x 32 that is another network
        raise ConfigError(
            f"vgg: cfg has no '{POOL}' at the end, VGG-{depth} has; add it, or set depth: null to build cfg as it is"
        )
    if [entry == POOL for entry in entries] != [entry == POOL for entry in expected]:
        raise ConfigError(
            f"vgg: cfg has {len(entries)} entries and does not follow VGG-{depth}, which is "
            f"{' '.join(map(str, expected))}; set depth: null for another layout"
        )
    return entries


def vgg(
    *,
    num_classes: int,
    in_shape: tuple[int, int, int],
    depth: int | None = 16,
    cfg: Sequence[int | str] | None = None,
    bias: bool = True,
) -> VGG:
    """Builds a VGG with batch norm from its depth or from a cfg list.

    Args:
        num_classes: number of outputs.
        in_shape: (channels, height, width) of the input; any size from 1 x 1.
        depth: 11, 13, 16 or 19. With `cfg`, the layout that cfg has to follow; None takes any layout.
        cfg: widths of the convolutions and `"M"` for a 2 x 2 max pooling, such as
            `[64, 64, "M", 128, "M"]`; None for the widths of the paper.
        bias: whether the convolutions have biases, although a norm follows, as in torchvision.

    Raises:
        ConfigError: if the cfg has a wrong length or value, or there is no such depth.
    """
    channels, _, _ = check_classes_and_shape("vgg", num_classes, in_shape)
    if cfg is None:
        if depth is None:
            raise ConfigError("vgg: give depth (11, 13, 16, 19) or cfg")
        cfg = dense_cfg(depth)
    return VGG(_check_cfg(cfg, depth), channels, num_classes, bias)


def cfg_of(model: nn.Module) -> list[int | str]:
    """Returns the cfg list of a VGG, dense or shrunk: `vgg(cfg=cfg_of(model), ...)` has the same shapes.

    Raises:
        ConfigError: if the model has no `features` made of convolutions and poolings.
    """
    features = getattr(model, "features", None)
    if not isinstance(features, nn.Sequential):
        raise ConfigError(f"{type(model).__name__} is not a VGG: it has no sequence named features")
    cfg: list[int | str] = []
    for module in features:
        if isinstance(module, nn.Conv2d):
            cfg.append(module.out_channels)
        elif isinstance(module, nn.MaxPool2d):
            cfg.append(POOL)
    return cfg
