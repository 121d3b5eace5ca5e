"""What a run must leave as it was: tensors of the network that it writes to, and what lists and dicts of modules hold."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict, deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

CONTAINERS = (list, dict, set, deque, OrderedDict, defaultdict)
OF_MODULES = frozenset(vars(nn.Module()))  # what every module has; the interpreter restores it


class Originals:
    """Remembers before it is too late, and puts back.

    Args:
        modules: dotted names and modules of the network.
    """

    def __init__(self, modules: Sequence[tuple[str, nn.Module]]) -> None:
        self.modules = modules
        self.memory: dict[int, list[Tensor]] | None = (
            None  # by address: parameters, buffers and other tensors of modules
        )
        self.tensors: list[tuple[Tensor, Tensor]] = []
        self.contents: list[tuple[Any, Any]] = []

    def remember(self, plain: dict[str, Any]) -> None:
        """Keeps the contents of the lists, dicts and sets among a module's attributes."""
        for key, value in plain.items():
            if type(value) in CONTAINERS and key not in OF_MODULES:
                self._keep(value, 3)

    def _keep(self, value: Any, depth: int) -> None:
        self.contents.append((value, copy.copy(value)))
        for inner in value.values() if isinstance(value, dict) else value:
            if depth and type(inner) in CONTAINERS:
                self._keep(inner, depth - 1)

    def before_write(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keeps the tensors of modules that an operator is about to write to."""
        if name == "native_batch_norm":  # writes running statistics, which its signature does not say
            targets: list[Any] = list(args[3:5]) if len(args) > 5 and args[5] else []
        else:
            first = args[0] if args else None
            targets = [*(first if isinstance(first, (list, tuple)) else [first]), kwargs.get("out")]
        for target in targets:
            if isinstance(target, Tensor) and not hasattr(target, "_prune_hollow") and target.layout is torch.strided:
                self._before(target)

    def _before(self, target: Tensor) -> None:
        if self.memory is None:
            self.memory = {}
            for _, module in self.modules:
                plain = module.__dict__
                for held in (plain["_parameters"], plain["_buffers"], plain):
                    for tensor in held.values():
                        if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
                            self.memory.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
        for tensor in self.memory.pop(target.untyped_storage().data_ptr(), ()):
            self.tensors.append((tensor, tensor.detach().clone()))

    def restore(self) -> None:
        """Puts everything back that was kept."""
        with torch.no_grad():
            for tensor, before in self.tensors:
                tensor.detach().copy_(before)
        for value, before in self.contents:
            value.clear()
            if isinstance(value, (list, deque)):
                value.extend(before)
            else:
                value.update(before)
        self.tensors, self.contents, self.memory = [], [], None
