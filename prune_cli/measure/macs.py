"""How many multiply-adds one operator call costs, and whose they are.

Formulas are in :func:`macs_of_call`, one per kind of operator; :class:`MacCounter` watches a forward pass and
adds them up. What is measured and reported is in `measure.py`. Not `torch.utils.flop_counter.FlopCounterMode`, because it
adds up per running module and never sees whose weight an operator multiplies by, which the share of its nonzero entries
and weights used by other modules need, and because it leaves out matrix-vector products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from operator import mul
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from prune_cli.structure.prunable import owner


def _size(shape: Iterable[int]) -> int:
    return reduce(mul, shape, 1)


def _conv_macs(args: Sequence[Any], out: Tensor) -> int:
    x, weight, transposed = args[0], args[1], args[6]
    # an output element sums weight[0].numel() products; transposed, an input element is spread over as many
    return (x.numel() if transposed else out.numel()) * _size(weight.shape[1:])


def _product_macs(left: Tensor, out: Any) -> int:
    return out.numel() * left.shape[-1]


def _attention_macs(args: Sequence[Any], _: Any) -> int:
    query, key, value = args[:3]
    rows, columns = _size(query.shape[:-1]), key.shape[-2]
    return rows * columns * (query.shape[-1] + value.shape[-1])


_aten = torch.ops.aten
# operator -> position of the first of its two operands
_PRODUCTS = {_aten.mm: 0, _aten.bmm: 0, _aten.mv: 0, _aten.dot: 0, _aten.linear: 0}
if hasattr(_aten, "_grouped_mm"):
    _PRODUCTS[_aten._grouped_mm] = 0
_SUMMED_PRODUCTS = {_aten.addmm: 1, _aten.baddbmm: 1, _aten.addmv: 1, _aten.addbmm: 1}
_ATTENTION = tuple(
    getattr(_aten, name)
    for name in (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
    )
    if hasattr(_aten, name)
)


def macs_of_call(operator: Any, args: Sequence[Any], out: Any) -> tuple[int, Sequence[Any]]:
    """Returns the MACs of one operator call and its operands; 0 and none for what is no product."""
    if operator == _aten.convolution:
        return _conv_macs(args, out), args[1:2]
    if operator in _ATTENTION:
        return _attention_macs(args, out), ()
    if operator == _aten._trilinear:  # of nn.Bilinear: every entry of the weight, for every example
        return args[0].shape[0] * args[1].numel(), args[1:2]
    first = _PRODUCTS.get(operator, _SUMMED_PRODUCTS.get(operator))
    if first is None:
        return 0, ()
    left, right = args[first : first + 2]
    if operator == _aten.addbmm:
        return left.shape[0] * _product_macs(left, out), (left, right)
    return _product_macs(left, out), (left, right)


class MacCounter(TorchDispatchMode):
    """Adds up the MACs of operator calls, per owner of the parameter in them, else per running module."""

    def __init__(self, owners: Mapping[int, str], alive: Callable[[str, Tensor], float]) -> None:
        super().__init__()
        self.owners = owners  # memory of a parameter -> its name
        self.alive = alive  # (parameter name, view of it) -> fraction that is not zero
        self.stack: list[str] = [""]
        self.macs: dict[str, list[float]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No guard against torch.compile around every operator: nothing is compiled here."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        macs, operands = macs_of_call(func.overloadpacket, args, out)
        if macs:
            module, density = self.stack[-1], 1.0
            for operand in operands:
                name = self.owners.get(operand.untyped_storage()._cdata)
                if name is not None:
                    module, density = owner(name), density * self.alive(name, operand)
            total = self.macs.setdefault(module, [0, 0.0])
            total[0] += macs
            total[1] += macs * density
        return out
