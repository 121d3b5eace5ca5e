"""Convolutions that are really smaller after stripe pruning (arXiv:2009.14410, section 3.3).

A stripe is one kernel position of one filter. `StripeConv2d` holds only the stripes that are left, as the rows of one
matrix, and computes y_n(p) = sum over its stripes (i, j) of w . x(stride * p + dilation * (i, j)) by the fastest of
three forms: one matrix product for all positions of equal phase, whose results are shifted and added (`_fused`); one
per kernel position on a strided slice of the padded input (`_by_position`); or the dense kernel, with the weight
spread out for the call (`_spread_out`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from prune_cli.errors import SurgeryError
from prune_cli.layers import stripe_kernel
from prune_cli.layers.stripe_kernel import Block, Geometry, Tap


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
        return stripe_kernel.pays(self.weight, self._blocks, self._geometry(), len(x), self.out_size(x))

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
        padded, geometry = self._pad(x), self._geometry()
        out: Tensor | None = None
        for block in self._blocks:
            for tap in block.taps:
                top = block.phase[0] + tap.shift[0] * self.stride[0]
                left = block.phase[1] + tap.shift[1] * self.stride[1]
                window = padded[
                    :,
                    geometry.channels(block.group),
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
        places: dict[tuple[int, int], list[Tap]] = {}
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
        """The stripes' own kernel, `stripe_kernel.fused`."""
        pad = (lambda images: images) if self.padding_mode == "zeros" else self._pad
        return stripe_kernel.fused(x, self.weight, self.bias, self._blocks, self._geometry(), self.out_size(x), pad)

    def _pad(self, x: Tensor) -> Tensor:
        if not any(self.pads):
            return x
        return F.pad(x, self.pads, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)

    def _geometry(self) -> Geometry:
        before = (self.pads[2], self.pads[0]) if self.padding_mode == "zeros" else (0, 0)
        return Geometry(
            self.in_channels, self.out_channels, self.groups, self.kernel_size, self.stride, self.dilation, before
        )

    def _plan(self) -> list[Block]:
        return stripe_kernel.plan(self.stripes, self._geometry())

    def _apply(self, fn: Any, recurse: bool = True) -> StripeConv2d:
        super()._apply(fn, recurse)
        if not self.stripes.is_meta:
            self._blocks = self._plan()  # its indices live where the weight does
        return self


def _planned(module: nn.Module, keys: Any) -> None:
    assert isinstance(module, StripeConv2d)
    module._blocks = module._plan()


def _pair(value: Any) -> tuple[int, int]:
    first, second = value
    return int(first), int(second)
