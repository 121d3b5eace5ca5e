"""Convolutions that are really smaller after stripe pruning (arXiv:2009.14410, section 3.3).

A stripe is one kernel position of one filter. `StripeConv2d` holds only the stripes that are left, as the rows of one
matrix, and computes y_n(p) = sum over its stripes (i, j) of w . x(stride * p + dilation * (i, j)): one matrix product
per kernel position on a strided slice of the padded input, or one for all positions of equal phase.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prune_cli import surgery
from prune_cli.channels import Plan, analyse
from prune_cli.errors import SurgeryError
from prune_cli.masks import Masks
from prune_cli.trace import Example

CHUNK = 400_000
"""Elements of the products that the fused form makes at a time: they stay in a core's cache while they are added."""


@dataclass(frozen=True)
class _Block:
    """Stripes that one matrix product serves: the same phase of the strides, and the same group of channels."""

    phase: tuple[int, int]
    group: int
    rows: Tensor  # rows of the weight, in order of the product's rows
    filters: tuple[int, ...]  # output channel per row
    shifts: tuple[tuple[int, int], ...]  # steps of the output grid per row
    taps: tuple[tuple[tuple[int, int], Tensor, Tensor], ...]  # shift, rows of the weight, output channels


@dataclass(frozen=True)
class _Workspace:
    """Memory of the fused form for `count` images."""

    count: int
    inputs: list[Tensor]  # per block: channels, images, rows, columns, zero around the images
    weights: list[Tensor]  # per block: stripes, channels
    products: list[Tensor]  # per block: stripes, everything
    terms: list[list[Tensor]]  # per filter: its products, shifted
    targets: list[Tensor]  # per filter: where their sum goes
    sums: Tensor


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
        self.padding_mode = conv.padding_mode
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
        full = self.weight.new_zeros(self.out_channels * positions, self.weight.shape[1])
        full = full.index_copy(0, self.stripes, self.weight)
        return full.view(self.out_channels, *self.kernel_size, -1).permute(0, 3, 1, 2)

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
        # Adding many shifted maps by single calls pays on a CPU, where they stay in its cache, and not with autograd.
        learning = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        if x.device.type == "cpu" and not learning and not torch.is_autocast_enabled("cpu"):
            return self._fused(x)
        return self._by_position(x)

    def _by_position(self, x: Tensor) -> Tensor:
        """One 1x1 convolution per kernel position on the strided slice of the padded input."""
        height, width = self.out_size(x)
        padded = self._pad(x)
        out: Tensor | None = None
        for block in self._blocks:
            for shift, rows, places in block.taps:
                top = block.phase[0] + shift[0] * self.stride[0]
                left = block.phase[1] + shift[1] * self.stride[1]
                window = padded[
                    :,
                    self._channels(block.group),
                    top : top + (height - 1) * self.stride[0] + 1 : self.stride[0],
                    left : left + (width - 1) * self.stride[1] + 1 : self.stride[1],
                ]
                part = F.conv2d(window, self.weight[rows.to(x.device)][:, :, None, None])
                if out is None:
                    out = part.new_zeros(x.shape[0], self.out_channels, height, width)
                out = out.index_add(1, places.to(x.device), part)  # a meta tensor has no indices elsewhere
        if out is None:
            out = x.new_zeros(x.shape[0], self.out_channels, height, width)
        return out if self.bias is None else out + self.bias.to(out.dtype).view(-1, 1, 1)

    def _fused(self, x: Tensor) -> Tensor:
        """One product for all stripes of a phase, then sums of shifted maps; a few images at a time.

        In a map of rows of equal length a shift is an offset in memory, so every sum is one over contiguous memory.
        """
        height, width = self.out_size(x)
        blocks = self._blocks
        out = x.new_empty(x.shape[0], self.out_channels, height, width)
        reach = [max((shift[axis] for block in blocks for shift in block.shifts), default=0) for axis in (0, 1)]
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

    def _workspace(self, images: Tensor, rows: int, columns: int, reach: list[int]) -> _Workspace:
        """Memory for some images, and where in it each filter finds its shifted products; made once per call."""
        count = len(images)
        length = count * rows * columns - reach[0] * columns - reach[1]
        terms: list[list[Tensor]] = [[] for _ in range(self.out_channels)]
        inputs, products, weights = [], [], []
        for block in self._blocks:
            inputs.append(images.new_zeros(self.in_channels // self.groups, count, rows, columns))
            product = images.new_empty(len(block.filters), count * rows * columns)
            for part, place, shift in zip(product.unbind(0), block.filters, block.shifts, strict=True):
                terms[place].append(part.narrow(0, shift[0] * columns + shift[1], length))
            products.append(product)
            weights.append(self.weight.detach()[block.rows])
        sums = images.new_empty(self.out_channels, count * rows * columns)
        for place, parts in enumerate(terms):
            if not parts:
                sums[place] = 0
        targets = [row[:length] for row in sums.unbind(0)]
        return _Workspace(count, inputs, weights, products, terms, targets, sums)

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
        for target, parts in zip(space.targets, space.terms, strict=True):
            if len(parts) > 1:
                torch.add(parts[0], parts[1], out=target)
                for part in parts[2:]:
                    target.add_(part)
            elif parts:
                target.copy_(parts[0])

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

        rows, filters, shifts = zip(*items, strict=True)
        taps = tuple(
            (shift, indices([r for r, _, s in items if s == shift]), indices([f for _, f, s in items if s == shift]))
            for shift in dict.fromkeys(shifts)
        )
        return _Block(phase, group, indices(list(rows)), filters, shifts, taps)

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


# ---------------------------------------------------------------------------------------------- networks


def kept_stripes(conv: nn.Conv2d, mask: Tensor) -> Tensor | None:
    """(out_channels, K, K) bool of a mask that treats all input channels alike; None for any other mask."""
    full = mask.expand(conv.weight.shape)
    keep = full.any(1)
    return keep if torch.equal(keep, full.all(1)) else None


def to_stripes(model: nn.Module, masks: Masks) -> nn.Module:
    """A copy of a masked network whose convolutions with stripe masks hold only their stripes.

    Convolutions with other masks, or that keep all stripes, stay as they are.

    Args:
        model: the network; left as it was.
        masks: parameter name -> bool tensor, True = keep, broadcastable.
    """
    small = copy.deepcopy(model)
    for name, module in model.named_modules():
        if type(module) is nn.Conv2d and f"{name}.weight" in masks:
            keep = kept_stripes(module, masks[f"{name}.weight"].to(module.weight.device))
            if keep is not None and not keep.all():
                _place(small, name, StripeConv2d(module, keep).train(module.training))
    return small


def load_stripes(dense: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """The network of a state dict that `to_stripes` made, from a dense network of the same architecture.

    Raises:
        SurgeryError: the state does not fit the network.
    """
    small = copy.deepcopy(dense)
    for key, stripes in state.items():
        name, _, last = key.rpartition(".")
        if last != "stripes":
            continue
        try:
            module = small.get_submodule(name)
        except AttributeError:
            module = None
        if type(module) is not nn.Conv2d:
            raise SurgeryError(f"the network has no convolution {name!r} that could hold stripes")
        total = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
        plain = stripes.dim() == 1 and stripes.dtype == torch.int64
        if not plain or not bool(((stripes >= 0) & (stripes < total)).all()) or bool((stripes.diff() <= 0).any()):
            raise SurgeryError(f"stripes of {name!r} are not increasing numbers below {total}")
        keep = torch.zeros(total, dtype=torch.bool)
        keep[stripes.cpu()] = True
        _place(small, name, StripeConv2d(module, keep.view(module.out_channels, *module.kernel_size)))
    try:
        small.load_state_dict(dict(state))
    except RuntimeError as error:
        raise SurgeryError(f"the state does not fit the network: {' '.join(str(error).split())[:300]}") from error
    return small


def _place(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def dead_filters(plan: Plan, masks: Masks) -> np.ndarray:
    """Units none of whose producers has anything left; the `keep` array for `surgery.shrink`.

    At least one unit of every family stays.
    """
    keep = plan.everything()
    for family in plan.families:
        alive = np.zeros(plan.size, dtype=bool)
        for name, axis in family.producers:
            ids = plan.axes[name][axis]
            if name not in masks:
                alive[ids] = True
                continue
            mask = masks[name].movedim(axis, 0).flatten(1).any(1).cpu().numpy()
            alive[ids[np.broadcast_to(mask, ids.shape)]] = True
        dead = family.units[~alive[family.units]]
        keep[dead[1:] if len(dead) == len(family.units) else dead] = False
    return keep


def without_dead_filters(model: nn.Module, masks: Masks, example: Example) -> tuple[surgery.Shrunk, dict[str, Tensor]]:
    """Removes filters that stripe pruning left empty, with their norms and the consumers' channels.

    A filter without stripes still gives its bias, and its norm a constant; both are dropped, as the paper's training
    zeroes them (section 3.2). Where they are zero the function stays the same.

    Returns:
        The smaller network with its lineage, and the masks cut to it.
    """
    plan = analyse(model, example)
    shrunk = surgery.shrink(model, plan, dead_filters(plan, masks))
    cut: dict[str, Tensor] = {}
    for name, mask in masks.items():
        for axis, indices in shrunk.lineage.kept.get(name, {}).items():
            if mask.shape[axis] > 1:
                mask = mask.index_select(axis, torch.tensor(indices, device=mask.device))
        cut[name] = mask
    return shrunk, cut
