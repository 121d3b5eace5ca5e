"""Modules: walks over a tree in one pass (`named_modules` costs a generator per level), attributes that hold widths."""

from __future__ import annotations

import re
from functools import lru_cache

from torch import Tensor, nn

NOT_A_WIDTH = re.compile(
    r"^_|kernel|stride|padding|dilation|groups$|eps|window|shift|depth|layers|patch|image|img|grid|resolution|class"
    r"|seq_length|output_size|radix|expansion|block|drop|prob|level|scale|size_in|input_resolution|training|ratio"
)


@lru_cache(maxsize=4096)
def names_a_width(key: str) -> bool:
    """Whether an attribute of this name may say how many channels there are."""
    return not NOT_A_WIDTH.search(key)


def widths_of(module: nn.Module, size: int) -> list[str]:
    """The attributes of a module that may mean this number of channels."""
    return [k for k, v in module.__dict__.items() if type(v) is int and v == size and names_a_width(k)]


def walk(model: nn.Module, *, again: bool = False) -> list[tuple[str, nn.Module]]:
    """Dotted names and modules in the order of `named_modules`.

    Args:
        model: the root, named "".
        again: whether a module that is reached twice is listed twice.
    """
    found: list[tuple[str, nn.Module]] = []
    seen: set[int] = set()
    pending: list[tuple[str, nn.Module]] = [("", model)]
    while pending:
        item = pending.pop()
        module = item[1]
        if not again:
            if id(module) in seen:
                continue
            seen.add(id(module))
        found.append(item)
        children: dict[str, nn.Module | None] = module.__dict__["_modules"]
        if children:
            prefix = f"{item[0]}." if item[0] else ""
            pending += [(prefix + key, child) for key, child in reversed(children.items()) if child is not None]
    return found


def named_tensors(model: nn.Module, *, again: bool = True) -> dict[str, Tensor]:
    """Parameters, then buffers, by dotted name.

    Args:
        model: the module.
        again: whether a tied tensor is listed under each of its names.
    """
    modules = walk(model, again=again)
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for kind in ("_parameters", "_buffers"):
        for name, module in modules:
            held = module.__dict__[kind]
            if not held:
                continue
            for key, tensor in held.items():
                if tensor is None or (not again and id(tensor) in seen):
                    continue
                seen.add(id(tensor))
                found[f"{name}.{key}" if name else key] = tensor
    return found
