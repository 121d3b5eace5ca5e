"""The stripes' own kernel on a CPU: one matrix product for all stripes of equal phase, then sums of shifted maps.

Stripes are sorted into blocks that one product serves (`plan`); `pays` says for which shapes this is faster than the
dense kernel, and `fused` computes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 400_000
"""Elements of the products that the fused form makes at a time: they stay in a core's cache while they are added."""


ADDING, STARTING, MARGIN = 80, 2_000_000, 1.3
"""What the fused form costs besides its products, in multiply-adds of a dense kernel: to add one element of a product,
to begin, and altogether. Fitted to the times of 157 layers of 16 to 512 channels, 2 to 32 pixels, batches of 1 to 64,
50 to 90 % removed, on one x86 core (scripts/bench/stripe.py shows what it leads to)."""

SHORT = 2000
"""Elements per map below which maps are added per kernel position: the calls would take longer than the additions."""


@dataclass(frozen=True)
class Geometry:
    """A convolution without its weights.

    Attributes:
        before: rows above and columns before the image that are zero and not there.
    """

    in_channels: int
    out_channels: int
    groups: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    before: tuple[int, int]

    def channels(self, group: int) -> slice:
        """Input channels of a group."""
        size = self.in_channels // self.groups
        return slice(group * size, (group + 1) * size)


@dataclass(frozen=True)
class Tap:
    """The stripes of one kernel position."""

    shift: tuple[int, int]
    rows: Tensor  # of the weight
    filters: Tensor  # output channels, each once
    start: int  # first row of the product


@dataclass(frozen=True)
class Block:
    """Stripes that one matrix product serves: the same phase of the strides, and the same group of channels."""

    phase: tuple[int, int]
    group: int
    rows: Tensor  # rows of the weight, in order of the product's rows: by kernel position, then by filter
    filters: tuple[int, ...]  # output channel per row
    shifts: tuple[tuple[int, int], ...]  # steps of the output grid per row
    taps: tuple[Tap, ...]


@dataclass(frozen=True)
class _Workspace:
    """Memory of the fused form for `count` images."""

    count: int
    inputs: list[Tensor]  # per block: channels, images, rows, columns, zero around the images
    weights: list[Tensor]  # per block: stripes, channels
    products: list[Tensor]  # per block: stripes, everything
    sums: Tensor  # output channels, everything
    adding: list[tuple[Tensor, list[Tensor]]]  # per filter: where its sum goes, its products, shifted
    together: list[tuple[Tensor, Tensor, Tensor]]  # per kernel position: sums, filters, their products, shifted


def plan(stripes: Tensor, geometry: Geometry) -> list[Block]:
    """The blocks of stripes with these numbers n * K * K + position; their indices live where `stripes` does."""
    positions = geometry.kernel_size[0] * geometry.kernel_size[1]
    found: dict[tuple[int, int, int], list[tuple[int, int, tuple[int, int]]]] = {}
    for row, number in enumerate(stripes.tolist()):
        place, position = divmod(number, positions)
        i, j = divmod(position, geometry.kernel_size[1])
        down, phase_down = divmod(i * geometry.dilation[0], geometry.stride[0])
        right, phase_right = divmod(j * geometry.dilation[1], geometry.stride[1])
        group = place * geometry.groups // geometry.out_channels
        found.setdefault((phase_down, phase_right, group), []).append((row, place, (down, right)))
    return [
        _block((down, right), group, items, stripes.device) for (down, right, group), items in sorted(found.items())
    ]


def _block(
    phase: tuple[int, int], group: int, items: list[tuple[int, int, tuple[int, int]]], device: torch.device
) -> Block:
    def indices(numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, device=device)

    items = sorted(items, key=lambda item: item[2])  # stable: filters stay in order
    rows, filters, shifts = zip(*items, strict=True)
    taps = []
    for shift in dict.fromkeys(shifts):
        mine = [index for index, other in enumerate(shifts) if other == shift]
        taps.append(Tap(shift, indices([rows[i] for i in mine]), indices([filters[i] for i in mine]), mine[0]))
    return Block(phase, group, indices(list(rows)), filters, shifts, tuple(taps))


def pays(weight: Tensor, blocks: Sequence[Block], geometry: Geometry, images: int, out_size: tuple[int, int]) -> bool:
    """Whether the fused form should be faster than the dense kernel.

    Args:
        weight: (stripes, in_channels / groups).
        out_size: height and width of the output.
    """
    height, width = out_size
    down, right = _reach(blocks)
    columns, positions = weight.shape[1], geometry.kernel_size[0] * geometry.kernel_size[1]
    products = len(weight) * (columns + ADDING) * (height + down) * (width + right) * images + STARTING
    dense = geometry.out_channels * columns * positions * height * width * images
    return MARGIN * products < dense


def _reach(blocks: Sequence[Block]) -> tuple[int, int]:
    """The farthest stripe's steps of the output grid, down and right."""
    shifts = [shift for block in blocks for shift in block.shifts]
    return max((down for down, _ in shifts), default=0), max((right for _, right in shifts), default=0)


def fused(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    blocks: Sequence[Block],
    geometry: Geometry,
    out_size: tuple[int, int],
    pad: Callable[[Tensor], Tensor],
) -> Tensor:
    """One product for all stripes of a phase, then sums of shifted maps; a few images at a time.

    In a map of rows of equal length a shift is an offset in memory, so every sum is one over contiguous memory.

    Args:
        x: (images, in_channels, height, width).
        weight: (stripes, in_channels / groups).
        bias: (out_channels,) or None.
        blocks: from `plan`.
        out_size: height and width of the output.
        pad: makes the padding that is more than zeros, of a few images.
    """
    height, width = out_size
    out = x.new_empty(x.shape[0], geometry.out_channels, height, width)
    reach = _reach(blocks)
    rows, columns = height + reach[0], width + reach[1]
    most = max(geometry.out_channels, max((len(block.filters) for block in blocks), default=1))
    chunk = max(1, CHUNK // (most * rows * columns))
    space: _Workspace | None = None
    for start in range(0, x.shape[0], chunk):
        images = pad(x[start : start + chunk])
        if space is None or len(images) != space.count:
            space = _workspace(images, weight, blocks, geometry, (rows, columns))
        _add(images, space, blocks, geometry)
        maps = space.sums.view(geometry.out_channels, -1, rows, columns)[:, :, :height, :width].transpose(0, 1)
        if bias is None:
            out[start : start + chunk] = maps
        else:
            torch.add(maps, bias.view(-1, 1, 1), out=out[start : start + chunk])
    return out


def _workspace(
    images: Tensor, weight: Tensor, blocks: Sequence[Block], geometry: Geometry, size: tuple[int, int]
) -> _Workspace:
    """Memory for some images, and where in it each filter finds its shifted products; made once per call."""
    count, (rows, columns), reach = len(images), size, _reach(blocks)
    whole = count * rows * columns
    length = whole - reach[0] * columns - reach[1]
    inputs, products, weights = [], [], []
    for block in blocks:
        inputs.append(images.new_zeros(geometry.in_channels // geometry.groups, count, rows, columns))
        products.append(images.new_empty(len(block.filters), whole))
        weights.append(weight.detach()[block.rows])
    sums = images.new_zeros(geometry.out_channels, whole)
    if whole < SHORT:
        together = [
            (sums[:, :length], tap.filters, product[tap.start : tap.start + len(tap.rows)].narrow(
                1, tap.shift[0] * columns + tap.shift[1], length))
            for block, product in zip(blocks, products, strict=True)
            for tap in block.taps
        ]  # fmt: skip
        return _Workspace(count, inputs, weights, products, sums, [], together)
    terms: list[list[Tensor]] = [[] for _ in range(geometry.out_channels)]
    for block, product in zip(blocks, products, strict=True):
        for part, place, shift in zip(product.unbind(0), block.filters, block.shifts, strict=True):
            terms[place].append(part.narrow(0, shift[0] * columns + shift[1], length))
    adding = [(row[:length], parts) for row, parts in zip(sums.unbind(0), terms, strict=True) if parts]
    return _Workspace(count, inputs, weights, products, sums, adding, [])


def _add(images: Tensor, space: _Workspace, blocks: Sequence[Block], geometry: Geometry) -> None:
    """Fills `space.sums`; what lies behind the output of a row or image is meaningless there."""
    for block, moved, weight, product in zip(blocks, space.inputs, space.weights, space.products, strict=True):
        spans = zip(block.phase, geometry.before, geometry.stride, moved.shape[2:], strict=True)
        (down, from_top), (right, from_left) = (_span(*span) for span in spans)
        phase = images[
            :, geometry.channels(block.group), from_top :: geometry.stride[0], from_left :: geometry.stride[1]
        ]
        phase = phase[:, :, : moved.shape[2] - down, : moved.shape[3] - right].transpose(0, 1)
        moved[:, :, down : down + phase.shape[2], right : right + phase.shape[3]] = phase
        torch.mm(weight, moved.flatten(1), out=product)
    for target, parts in space.adding:
        if len(parts) == 1:
            target.copy_(parts[0])
            continue
        torch.add(parts[0], parts[1], out=target)
        for part in parts[2:]:
            target.add_(part)
    if space.together:
        space.sums.zero_()
        for sums, filters, products in space.together:
            sums.index_add_(0, filters, products)


def _span(phase: int, before: int, stride: int, limit: int) -> tuple[int, int]:
    """Where a phase of an axis begins: its first index inside the image, and the image's index there.

    Index k of the phase is index k * stride + phase of the padded axis, which begins `before` ahead of the image.
    """
    first = max(0, -(-(before - phase) // stride))
    return min(first, limit), first * stride + phase - before
