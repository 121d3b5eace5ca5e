"""ResNet-18, 34, 50, 101 and 152 (He et al., arXiv:1512.03385), buildable with any width per convolution.

Names are those of torchvision (`conv1`, `bn1`, `layer1.0.conv1`, `layer2.0.downsample.0`, `fc`),
and with the ImageNet stem the network is torchvision's, so its checkpoints load. The stride of a bottleneck
is in its 3x3 convolution. Parameters with the CIFAR stem and 10 classes: ResNet-18 11.17 M, 34 21.28 M, 50
23.52 M, 101 42.51 M, 152 58.16 M; with the ImageNet stem and 1,000 classes: 11.69 M, 21.80 M, 25.56 M,
44.55 M, 60.19 M. MACs: ResNet-18 555.4 M at 32 x 32 (CIFAR stem) and 1.81 G at 224 x 224 (ImageNet stem),
ResNet-50 4.09 G at 224 x 224.

The cfg is a 2-D list: row 0 is `[stem width]`, row b the widths of the convolutions on the main path of
block b, two for a basic block, three for a bottleneck. ResNet-18 is `[[64], [64, 64], [64, 64], [128,
128], ...]`. Whether a block's shortcut has a projection is part of the topology and never decided anew
from the widths: a pruned stem that happens to be as wide as a block keeps its projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from prune_cli.errors import ConfigError
from prune_cli.models.arguments import check_choice, check_classes_and_shape, check_widths
from prune_cli.models.initial import initialise

_STAGE_WIDTHS = (64, 128, 256, 512)
_STAGE_BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
_BOTTLENECK_DEPTHS = (50, 101, 152)
_EXPANSION = 4


class Block(nn.Module):
    """The residual block: one conv-norm per width, ReLU between them and after the addition.

    Two widths make the basic block (3x3, 3x3, stride in the first), three the bottleneck (1x1, 3x3, 1x1,
    stride in the 3x3).
    """

    def __init__(self, in_width: int, widths: Sequence[int], stride: int, projection: bool) -> None:
        super().__init__()
        inputs = [in_width, *widths[:-1]]
        kernels, strides = ((3, 3), (stride, 1)) if len(widths) == 2 else ((1, 3, 1), (1, stride, 1))
        convs = [
            nn.Conv2d(inputs[i], widths[i], kernels[i], strides[i], kernels[i] // 2, bias=False)
            for i in range(len(widths))
        ]
        self.conv1, self.bn1 = convs[0], nn.BatchNorm2d(widths[0])
        self.conv2, self.bn2 = convs[1], nn.BatchNorm2d(widths[1])
        self.conv3: nn.Conv2d | None = None
        self.bn3: nn.BatchNorm2d | None = None
        if len(widths) == 3:
            self.conv3, self.bn3 = convs[2], nn.BatchNorm2d(widths[2])
        self.relu = nn.ReLU()
        self.downsample: nn.Sequential | None = None
        if projection:
            conv = nn.Conv2d(in_width, widths[-1], 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(widths[-1]))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.conv3 is not None and self.bn3 is not None:
            out = self.bn3(self.conv3(self.relu(out)))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """Stem, four stages of blocks, global average pooling, the layer `fc`."""

    def __init__(
        self,
        cfg: Sequence[Sequence[int]],
        projection: Sequence[bool],
        stage_blocks: Sequence[int],
        stem: str,
        in_channels: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        width = cfg[0][0]
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(in_channels, width, 7, 2, 3, bias=False)
        else:
            self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.maxpool: nn.Module = nn.MaxPool2d(3, 2, 1) if stem == "imagenet" else nn.Identity()
        stages: list[nn.Sequential] = []
        row = 1
        for blocks in stage_blocks:
            layers = []
            for block in range(blocks):
                stride = _stride(len(stages), block)
                layers.append(Block(width, cfg[row], stride, projection[row - 1]))
                width, row = cfg[row][-1], row + 1
            stages.append(nn.Sequential(*layers))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


def _stride(stage: int, block: int) -> int:
    return 2 if stage > 0 and block == 0 else 1


def dense_cfg(depth: int) -> list[list[int]]:
    """Returns the 2-D cfg of the dense ResNet of this depth.

    Raises:
        ConfigError: if there is no ResNet of this depth.
    """
    check_choice("resnet", "depth", depth, _STAGE_BLOCKS)
    cfg = [[_STAGE_WIDTHS[0]]]
    for width, blocks in zip(_STAGE_WIDTHS, _STAGE_BLOCKS[depth], strict=True):
        row = [width, width, width * _EXPANSION] if depth in _BOTTLENECK_DEPTHS else [width, width]
        cfg += [list(row) for _ in range(blocks)]
    return cfg


def dense_projection(depth: int) -> list[bool]:
    """Returns, per block, whether its shortcut is a 1x1 convolution in the dense ResNet of this depth.

    The first block of every stage has one, except stage 1 of ResNet-18 and 34, which neither strides nor widens.
    """
    check_choice("resnet", "depth", depth, _STAGE_BLOCKS)
    return [
        block == 0 and (stage > 0 or depth in _BOTTLENECK_DEPTHS)
        for stage, blocks in enumerate(_STAGE_BLOCKS[depth])
        for block in range(blocks)
    ]


def _check_cfg(depth: int, cfg: Sequence[Sequence[int]], projection: Sequence[bool]) -> None:
    dense = dense_cfg(depth)
    if len(cfg) != len(dense):
        raise ConfigError(f"resnet: cfg has {len(cfg)} rows, ResNet-{depth} has {len(dense)}: stem and blocks")
    if len(projection) != len(dense) - 1 or not all(isinstance(flag, bool) for flag in projection):
        raise ConfigError(f"resnet: projection is {projection!r}, ResNet-{depth} needs {len(dense) - 1} true or false")
    for row, (widths, dense_widths) in enumerate(zip(cfg, dense, strict=True)):
        if not isinstance(widths, Sequence):
            raise ConfigError(f"resnet: cfg[{row}] is {widths!r}, not a list of {len(dense_widths)} widths")
        check_widths("resnet", f"cfg[{row}]", widths, len(dense_widths))
    row = 0
    for stage, blocks in enumerate(_STAGE_BLOCKS[depth]):
        for block in range(blocks):
            row += 1
            where = f"resnet: block {row} (layer{stage + 1}.{block})"
            if projection[row - 1]:
                continue
            if _stride(stage, block) != 1:
                raise ConfigError(f"{where} has stride 2 and needs projection: true")
            if cfg[row][-1] != cfg[row - 1][-1]:
                raise ConfigError(
                    f"{where} adds its {cfg[row][-1]} channels to {cfg[row - 1][-1]}; make the last widths "
                    "of the rows equal or give the block a projection"
                )


def resnet(
    *,
    num_classes: int,
    in_shape: tuple[int, int, int],
    depth: int = 18,
    stem: Literal["cifar", "imagenet"] = "cifar",
    cfg: Sequence[Sequence[int]] | None = None,
    projection: Sequence[bool] | None = None,
) -> ResNet:
    """Builds a ResNet from its depth, or from a cfg of widths of that depth.

    Args:
        num_classes: number of outputs.
        in_shape: (channels, height, width) of the input; any size from 1 x 1.
        depth: 18, 34 (basic blocks), 50, 101 or 152 (bottlenecks).
        stem: cifar (3x3, stride 1, no pooling) or imagenet (7x7, stride 2, then max pooling, stride 2).
        cfg: `[[stem], [widths of block 1], ...]` (see above); None for the widths of the paper.
        projection: per block, whether its shortcut is a 1x1 convolution with a norm; None as in the paper.

    Raises:
        ConfigError: if the cfg or projection has a wrong length or value, or an addition would not fit.
    """
    channels, _, _ = check_classes_and_shape("resnet", num_classes, in_shape)
    check_choice("resnet", "stem", stem, ["cifar", "imagenet"])
    cfg = dense_cfg(depth) if cfg is None else cfg
    projection = dense_projection(depth) if projection is None else projection
    _check_cfg(depth, cfg, projection)
    return ResNet(cfg, projection, _STAGE_BLOCKS[depth], stem, channels, num_classes)


def _blocks_of(model: nn.Module) -> list[nn.Module]:
    stages = [getattr(model, f"layer{stage}", None) for stage in range(1, 5)]
    if not all(isinstance(stage, nn.Sequential) for stage in stages):
        raise ConfigError(f"{type(model).__name__} is not a ResNet of four stages layer1 ... layer4")
    return [block for stage in stages if isinstance(stage, nn.Sequential) for block in stage]


def cfg_of(model: nn.Module) -> list[list[int]]:
    """Returns the 2-D cfg of a ResNet of this module or of torchvision, dense or shrunk.

    `resnet(cfg=cfg_of(model), projection=projection_of(model), ...)` has the same shapes.

    Raises:
        ConfigError: if the model is not such a ResNet.
    """
    modules = [[model.get_submodule("conv1")]]
    for block in _blocks_of(model):
        names = [name for name in ("conv1", "conv2", "conv3") if getattr(block, name, None) is not None]
        modules.append([block.get_submodule(name) for name in names])
    return [[conv.out_channels for conv in row if isinstance(conv, nn.Conv2d)] for row in modules]


def projection_of(model: nn.Module) -> list[bool]:
    """Returns, per block, whether its shortcut is a projection.

    Raises:
        ConfigError: if the model is not a ResNet of this module or of torchvision.
    """
    return [getattr(block, "downsample", None) is not None for block in _blocks_of(model)]
