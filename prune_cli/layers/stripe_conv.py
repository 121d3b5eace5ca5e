"""Convolutions that are really smaller after stripe pruning (arXiv:2009.14410, section 3.3).

A stripe is one kernel position of one filter. `StripeConv2d` holds only the stripes that are left, as the rows of one
matrix, and computes y_n(p) = sum over its stripes (i, j) of w . x(stride * p + dilation * (i, j)) by the fastest of
three forms: one matrix product for all positions of equal phase, whose results are shifted and added (`_fused`); one
per kernel position on a strided slice of the padded input (`_by_position`); or the dense kernel, with the weight
spread out for the call (`_spread_out`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from prune_cli.errors import SurgeryError

CHUNK = 400_000
"""Elements of the products that the fused form makes at a time: they stay in a core's cache while they are added."""


ADDING, STARTING, MARGIN = 80, 2_000_000, 1.3
"""What the fused form costs besides its products, in multiply-adds of a dense kernel: to add one element of a product,
to begin, and altogether. Fitted to the times of 157 layers of 16 to 512 channels, 2 to 32 pixels, batches of 1 to 64,
50 to 90 % removed, on one x86 core (scripts/bench/stripe.py shows what it leads to)."""

SHORT = 2000
"""Elements per map below which maps are added per kernel position: the calls would take longer than the additions."""


@dataclass(frozen=True)
class _Block:
    """Stripes that one matrix product serves: the same phase of the strides, and the same group of channels."""

    phase: tuple[int, int]
    group: int
    rows: Tensor  # rows of the weight, in order of the product's rows: by kernel position, then by filter
    filters: tuple[int, ...]  # output channel per row
    shifts: tuple[tuple[int, int], ...]  # steps of the output grid per row
    taps: tuple[_Tap, ...]


@dataclass(frozen=True)
class _Tap:
    """The stripes of one kernel position."""

    shift: tuple[int, int]
    rows: Tensor  # of the weight
    filters: Tensor  # output channels, each once
    start: int  # first row of the product


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


class StripeConv2d(nn.Module):
    """A two-dimensional convolution of single stripes, equal to the masked one.

    Args:
        conv: the dense layer, whose weights are taken over; any stride, padding, dilation, padding mode and groups.
        keep: (out_channels, kernel height, kernel width) bool.

    Its state is plain tensors: `weight` (stripes, in_channels / groups), `bias` (out_channels,) if any, and `stripes`
    (stripes,) int64, the numbers n * K * K + position in increasing order. A filter without stripes gives its bias.
    """

    stripes: Tensor

    def __init__(self, conv: nn.Conv2d, keep: Tensor) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.groups = conv.in_channels, conv.out_channels, conv.groups
        self.kernel_size, self.stride, self.dilation = _pair(conv.kernel_size), _pair(conv.stride), _pair(conv.dilation)
        self.padding, self.padding_mode = conv.padding, conv.padding_mode
        self.pads = tuple(int(pad) for pad in conv._reversed_padding_repeated_twice)  # left, right, top, bottom
        if tuple(keep.shape) != (self.out_channels, *self.kernel_size):
            raise SurgeryError(f"keep has shape {tuple(keep.shape)}; give {(self.out_channels, *self.kernel_size)}")
        numbers = torch.nonzero(keep.to(conv.weight.device).flatten()).flatten()
        rows = conv.weight.detach().permute(0, 2, 3, 1).reshape(-1, conv.weight.shape[1])[numbers]
        self.weight = nn.Parameter(rows.clone(), requires_grad=conv.weight.requires_grad)
        self.bias = None if conv.bias is None else nn.Parameter(conv.bias.detach().clone(), conv.bias.requires_grad)
        self.register_buffer("stripes", numbers)
        self._blocks = self._plan()
        self.register_load_state_dict_post_hook(_planned)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stripes={len(self.weight)}"

    def macs(self, height: int, width: int) -> int:
        """Multiply-adds of one image with an output of this size: stripes * channels * height * width."""
        return self.weight.numel() * height * width

    def dense_weight(self) -> Tensor:
        """The weight of the masked convolution, (out_channels, in_channels / groups, K, K)."""
        positions = self.kernel_size[0] * self.kernel_size[1]
        filters = torch.div(self.stripes, positions, rounding_mode="floor")
        full = self.weight.new_zeros(self.out_channels, self.weight.shape[1], positions)
        full[filters, :, self.stripes - filters * positions] = self.weight
        return full.view(self.out_channels, -1, *self.kernel_size)

    def rows(self, weight: Tensor) -> Tensor:
        """What stands in a tensor shaped like the masked convolution's weight, in the order of the stripes' rows."""
        return weight.permute(0, 2, 3, 1).reshape(-1, weight.shape[1])[self.stripes.to(weight.device)]

    def spread(self, mask: Tensor | None = None) -> Tensor:
        """The mask of the masked convolution's weight; (out_channels, 1, K, K) where whole stripes are all it says.

        Args:
            mask: (stripes, in_channels / groups), what is masked inside the stripes.
        """
        positions = self.kernel_size[0] * self.kernel_size[1]
        rows = torch.ones(1, 1, dtype=torch.bool, device=self.stripes.device) if mask is None else mask
        rows = rows.to(self.stripes.device).expand(len(self.stripes), rows.shape[1])
        full = torch.zeros(self.out_channels * positions, rows.shape[1], dtype=torch.bool, device=rows.device)
        full = full.index_copy(0, self.stripes, rows)
        return full.view(self.out_channels, *self.kernel_size, -1).permute(0, 3, 1, 2)

    def dense(self) -> nn.Conv2d:
        """The masked convolution itself."""
        conv = nn.utils.skip_init(
            nn.Conv2d,
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.bias is not None,
            self.padding_mode,
            device=self.weight.device,
            dtype=self.weight.dtype,
        )
        with torch.no_grad():
            conv.weight.copy_(self.dense_weight())
            if self.bias is not None and conv.bias is not None:
                conv.bias.copy_(self.bias)
                conv.bias.requires_grad_(self.bias.requires_grad)
        conv.weight.requires_grad_(self.weight.requires_grad)
        return conv.train(self.training)

    def out_size(self, x: Tensor) -> tuple[int, int]:
        """Height and width of the output."""
        left, right, top, bottom = self.pads
        sizes = (x.shape[2] + top + bottom, x.shape[3] + left + right)
        grid = [
            (size - step * (kernel - 1) - 1) // stride + 1
            for size, step, kernel, stride in zip(sizes, self.dilation, self.kernel_size, self.stride, strict=True)
        ]
        if min(grid) < 1:
            raise SurgeryError(f"an input of {tuple(x.shape)} is smaller than the kernel {self.kernel_size}")
        return grid[0], grid[1]

    def forward(self, x: Tensor) -> Tensor:
        # The form depends on shapes alone, so that a network gives the same bits in every process.
        if torch.compiler.is_compiling():
            return self._spread_out(x)
        if is_in_torch_dispatch_mode():  # counted or analysed: what is needed, operator by operator
            return self._by_position(x)
        # Adding many shifted maps by single calls pays on a CPU, where they stay in its cache, and not with autograd.
        learning = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        if x.device.type == "cpu" and not learning and not torch.is_autocast_enabled("cpu") and self._pays(x):
            return self._fused(x)
        return self._spread_out(x)

    def _pays(self, x: Tensor) -> bool:
        """Whether the fused form should be faster than the dense kernel on an input of this shape."""
        height, width = self.out_size(x)
        down, right = self._reach()
        columns = self.weight.shape[1]
        fused = len(self.weight) * (columns + ADDING) * (height + down) * (width + right) * len(x) + STARTING
        dense = self.out_channels * columns * self.kernel_size[0] * self.kernel_size[1] * height * width * len(x)
        return MARGIN * fused < dense

    def _reach(self) -> tuple[int, int]:
        """The farthest stripe's steps of the output grid, down and right."""
        shifts = [shift for block in self._blocks for shift in block.shifts]
        return max((down for down, _ in shifts), default=0), max((right for _, right in shifts), default=0)

    def _spread_out(self, x: Tensor) -> Tensor:
        """The masked convolution by the dense kernel."""
        zeros = self.padding_mode == "zeros"
        x, padding = (x, self.padding) if zeros else (self._pad(x), 0)
        return F.conv2d(x, self.dense_weight(), self.bias, self.stride, padding, self.dilation, self.groups)

    def _by_position(self, x: Tensor) -> Tensor:
        """One 1x1 convolution per kernel position on the strided slice of the padded input."""
        if self.groups > 1 and self.weight.shape[1] == 1:
            return self._depthwise(x)
        height, width = self.out_size(x)
        padded = self._pad(x)
        out: Tensor | None = None
        for block in self._blocks:
            for tap in block.taps:
                top = block.phase[0] + tap.shift[0] * self.stride[0]
                left = block.phase[1] + tap.shift[1] * self.stride[1]
                window = padded[
                    :,
                    self._channels(block.group),
                    top : top + (height - 1) * self.stride[0] + 1 : self.stride[0],
                    left : left + (width - 1) * self.stride[1] + 1 : self.stride[1],
                ]
                part = F.conv2d(window, self.weight[tap.rows.to(x.device)][:, :, None, None])
                if out is None:
                    out = part.new_zeros(x.shape[0], self.out_channels, height, width)
                out = out.index_add(1, tap.filters.to(x.device), part)  # a meta tensor has no indices elsewhere
        if out is None:
            out = x.new_zeros(x.shape[0], self.out_channels, height, width)
        return out if self.bias is None else out + self.bias.to(out.dtype).view(-1, 1, 1)

    def _depthwise(self, x: Tensor) -> Tensor:
        """`_by_position` where every group is one channel: all groups at once, as they would be hundreds of calls."""
        height, width = self.out_size(x)
        padded = self._pad(x)
        places: dict[tuple[int, int], list[_Tap]] = {}
        for block in self._blocks:
            for tap in block.taps:
                steps = zip(block.phase, tap.shift, self.stride, strict=True)
                top, left = (phase + shift * stride for phase, shift, stride in steps)
                places.setdefault((top, left), []).append(tap)
        out = x.new_zeros(x.shape[0], self.out_channels, height, width)
        for (top, left), taps in places.items():
            rows = torch.cat([tap.rows for tap in taps]).to(x.device)
            filters = torch.cat([tap.filters for tap in taps]).to(x.device)
            window = padded[
                :,
                filters * self.groups // self.out_channels,
                top : top + (height - 1) * self.stride[0] + 1 : self.stride[0],
                left : left + (width - 1) * self.stride[1] + 1 : self.stride[1],
            ]
            part = F.conv2d(window, self.weight[rows][:, :, None, None], groups=len(rows))
            out = out.index_add(1, filters, part)
        return out if self.bias is None else out + self.bias.to(out.dtype).view(-1, 1, 1)

    def _fused(self, x: Tensor) -> Tensor:
        """One product for all stripes of a phase, then sums of shifted maps; a few images at a time.

        In a map of rows of equal length a shift is an offset in memory, so every sum is one over contiguous memory.
        """
        height, width = self.out_size(x)
        blocks = self._blocks
        out = x.new_empty(x.shape[0], self.out_channels, height, width)
        reach = self._reach()
        rows, columns = height + reach[0], width + reach[1]
        most = max(self.out_channels, max((len(block.filters) for block in blocks), default=1))
        chunk = max(1, CHUNK // (most * rows * columns))
        space: _Workspace | None = None
        for start in range(0, x.shape[0], chunk):
            images = x[start : start + chunk]
            if self.padding_mode != "zeros":
                images = self._pad(images)
            if space is None or len(images) != space.count:
                space = self._workspace(images, rows, columns, reach)
            self._add(images, space)
            maps = space.sums.view(self.out_channels, -1, rows, columns)[:, :, :height, :width].transpose(0, 1)
            if self.bias is None:
                out[start : start + chunk] = maps
            else:
                torch.add(maps, self.bias.view(-1, 1, 1), out=out[start : start + chunk])
        return out

    def _workspace(self, images: Tensor, rows: int, columns: int, reach: tuple[int, int]) -> _Workspace:
        """Memory for some images, and where in it each filter finds its shifted products; made once per call."""
        count = len(images)
        whole = count * rows * columns
        length = whole - reach[0] * columns - reach[1]
        inputs, products, weights = [], [], []
        for block in self._blocks:
            inputs.append(images.new_zeros(self.in_channels // self.groups, count, rows, columns))
            products.append(images.new_empty(len(block.filters), whole))
            weights.append(self.weight.detach()[block.rows])
        sums = images.new_zeros(self.out_channels, whole)
        if whole < SHORT:
            together = [
                (sums[:, :length], tap.filters, product[tap.start : tap.start + len(tap.rows)].narrow(
                    1, tap.shift[0] * columns + tap.shift[1], length))
                for block, product in zip(self._blocks, products, strict=True)
                for tap in block.taps
            ]  # fmt: skip
            return _Workspace(count, inputs, weights, products, sums, [], together)
        terms: list[list[Tensor]] = [[] for _ in range(self.out_channels)]
        for block, product in zip(self._blocks, products, strict=True):
            for part, place, shift in zip(product.unbind(0), block.filters, block.shifts, strict=True):
                terms[place].append(part.narrow(0, shift[0] * columns + shift[1], length))
        adding = [(row[:length], parts) for row, parts in zip(sums.unbind(0), terms, strict=True) if parts]
        return _Workspace(count, inputs, weights, products, sums, adding, [])

    def _add(self, images: Tensor, space: _Workspace) -> None:
        """Fills `space.sums`; what lies behind the output of a row or image is meaningless there."""
        for block, moved, weight, product in zip(
            self._blocks, space.inputs, space.weights, space.products, strict=True
        ):
            spans = zip(block.phase, self._before(), self.stride, moved.shape[2:], strict=True)
            (down, from_top), (right, from_left) = (_span(*span) for span in spans)
            phase = images[:, self._channels(block.group), from_top :: self.stride[0], from_left :: self.stride[1]]
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

    def _pad(self, x: Tensor) -> Tensor:
        if not any(self.pads):
            return x
        return F.pad(x, self.pads, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)

    def _before(self) -> tuple[int, int]:
        """Rows above and columns before the image that are zero and not there."""
        return (self.pads[2], self.pads[0]) if self.padding_mode == "zeros" else (0, 0)

    def _channels(self, group: int) -> slice:
        size = self.in_channels // self.groups
        return slice(group * size, (group + 1) * size)

    def _plan(self) -> list[_Block]:
        positions = self.kernel_size[0] * self.kernel_size[1]
        found: dict[tuple[int, int, int], list[tuple[int, int, tuple[int, int]]]] = {}
        for row, number in enumerate(self.stripes.tolist()):
            place, position = divmod(number, positions)
            i, j = divmod(position, self.kernel_size[1])
            down, phase_down = divmod(i * self.dilation[0], self.stride[0])
            right, phase_right = divmod(j * self.dilation[1], self.stride[1])
            group = place * self.groups // self.out_channels
            found.setdefault((phase_down, phase_right, group), []).append((row, place, (down, right)))
        return [self._block((down, right), group, items) for (down, right, group), items in sorted(found.items())]

    def _block(self, phase: tuple[int, int], group: int, items: list[tuple[int, int, tuple[int, int]]]) -> _Block:
        def indices(numbers: list[int]) -> Tensor:
            return torch.tensor(numbers, device=self.stripes.device)

        items = sorted(items, key=lambda item: item[2])  # stable: filters stay in order
        rows, filters, shifts = zip(*items, strict=True)
        taps = []
        for shift in dict.fromkeys(shifts):
            mine = [index for index, other in enumerate(shifts) if other == shift]
            taps.append(_Tap(shift, indices([rows[i] for i in mine]), indices([filters[i] for i in mine]), mine[0]))
        return _Block(phase, group, indices(list(rows)), filters, shifts, tuple(taps))

    def _apply(self, fn: Any, recurse: bool = True) -> StripeConv2d:
        super()._apply(fn, recurse)
        if not self.stripes.is_meta:
            self._blocks = self._plan()  # its indices live where the weight does
        return self


def _span(phase: int, before: int, stride: int, limit: int) -> tuple[int, int]:
    """Where a phase of an axis begins: its first index inside the image, and the image's index there.

    Index k of the phase is index k * stride + phase of the padded axis, which begins `before` ahead of the image.
    """
    first = max(0, -(-(before - phase) // stride))
    return min(first, limit), first * stride + phase - before


def _planned(module: nn.Module, keys: Any) -> None:
    assert isinstance(module, StripeConv2d)
    module._blocks = module._plan()


def _pair(value: Any) -> tuple[int, int]:
    first, second = value
    return int(first), int(second)
