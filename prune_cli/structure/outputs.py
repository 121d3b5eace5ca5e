"""The tensors in what a model returns, wherever they are: they must stay what they are, and are compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

CLOSED = (
    np.ndarray,
    str,
    bytes,
    int,
    float,
    complex,
    bool,
    type(None),
    type,
    nn.Module,
    ModuleType,
    FunctionType,
    torch.Generator,
)


def tensors_in(value: Any) -> list[Tensor | np.ndarray]:
    """Tensors and arrays of numbers in a model's output, in order: containers, mappings and objects are opened.

    Caches of keys and values (objects whose class is called so) are left out: the model alone reads them, at its next call.
    """
    return list(_found(value, set()))


def _found(value: Any, seen: set[int]) -> Iterator[Tensor | np.ndarray]:
    if isinstance(value, Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind in "fiub"):
        yield value
    elif not isinstance(value, CLOSED) and id(value) not in seen and not _is_cache(type(value)):
        seen.add(id(value))
        for part in _parts(value):
            yield from _found(part, seen)


def _parts(value: Any) -> list[Any]:
    if isinstance(value, Mapping) or (hasattr(value, "items") and callable(value.items)):
        return [part for _, part in value.items()]
    if isinstance(value, (tuple, list)):
        return list(value)
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ()) if isinstance(name, str)]
    held = [getattr(value, name, None) for name in slots if not name.startswith("__")]
    return [*held, *getattr(value, "__dict__", {}).values()]


def _is_cache(kind: type) -> bool:
    return any("cache" in base.__name__.lower() for base in kind.__mro__)
