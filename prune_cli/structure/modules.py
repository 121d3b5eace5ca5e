"""Modules: walks over a tree in one pass (`named_modules` costs a generator per level), attributes that hold widths."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from prune_cli.errors import SurgeryError

NOT_A_WIDTH = re.compile(
    r"^_|kernel|stride|padding|dilation|groups$|eps|window|shift|depth|layers|patch|image|img|grid|resolution|class"
    r"|seq_length|output_size|radix|expansion|block|drop|prob|level|scale|size_in|input_resolution|training|ratio"
)

NUMBERED = (int, list, tuple)


@lru_cache(maxsize=4096)
def names_a_width(key: str) -> bool:
    """Whether an attribute of this name may say how many channels there are."""
    return not NOT_A_WIDTH.search(key)


LAYERS = (
    _ConvNd,
    nn.Linear,
    nn.Bilinear,
    _NormBase,
    nn.GroupNorm,
    nn.Embedding,
    nn.PReLU,
)  # their weights say their widths
OPEN = (nn.Unflatten, nn.Transformer)  # modules of torch whose own code reads a width


def counts(value: Any) -> bool:
    """Whether an attribute's value may be a number of channels, or several."""
    if type(value) is int:
        return value > 1
    return type(value) in (list, tuple) and bool(value) and all(type(item) is int for item in value)


@lru_cache(maxsize=4096)
def _lends(kind: type) -> bool:
    """Whether modules of a class may hold widths in attributes that nothing else says."""
    ours = not kind.__module__.startswith("torch.nn.modules.") or issubclass(kind, OPEN)
    return ours and not issubclass(kind, LAYERS)


def lendable(module: nn.Module) -> list[str]:
    """The attributes of a module that may hold widths, but for layers, whose weights say it."""
    kind: type = type(module)
    if not _lends(kind):
        return []
    return [
        k
        for k, v in module.__dict__.items()
        if type(v) in NUMBERED and k != "normalized_shape" and names_a_width(k) and counts(v)
    ]


def _functions(kind: type) -> dict[str, FunctionType]:
    """Methods and properties that a class has beyond torch's own modules, by name."""
    found: dict[str, FunctionType] = {}
    for base in reversed(kind.__mro__):
        if base is nn.Module or base is object:
            continue
        for name, value in vars(base).items():
            function = getattr(value, "fget", None) or getattr(value, "__func__", value)
            function = inspect.unwrap(function) if isinstance(function, FunctionType) else None
            if isinstance(function, FunctionType):
                found[name] = function
    return found


def _names(code: CodeType) -> set[str]:
    inner = (const for const in code.co_consts if isinstance(const, CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _reached(start: FunctionType, methods: Mapping[str, FunctionType]) -> set[CodeType]:
    """The code of a function, of the methods that it names and of functions that its globals give it, outside torch."""
    pending, seen = [start], set[CodeType]()
    while pending:
        function = pending.pop()
        if function.__code__ not in seen:
            seen.add(function.__code__)
            pending += _named(function, methods)
    return seen


def _named(function: FunctionType, methods: Mapping[str, FunctionType]) -> list[FunctionType]:
    """Functions behind the names in a function: methods, globals, what tables of functions hold, and members of modules of
    the same package."""
    names, found = _names(function.__code__), list[Any]()
    for name in names:
        value = methods.get(name) or function.__globals__.get(name)
        if isinstance(value, dict):
            found += value.values()
        elif isinstance(value, (list, tuple)):
            found += value
        elif isinstance(value, ModuleType):
            ours = value.__name__.partition(".")[0] == str(function.__module__).partition(".")[0]
            found += [vars(value).get(other) for other in names] if ours else []
        else:
            found.append(value)
    return [one for one in found if isinstance(one, FunctionType) and not str(one.__module__).startswith("torch.")]


@lru_cache(maxsize=4096)
def _forward_code(kind: type) -> frozenset[CodeType]:
    methods = _functions(kind)
    return frozenset(_reached(methods["forward"], methods)) if "forward" in methods else frozenset()


@lru_cache(maxsize=4096)
def names_in_forward(kind: type) -> frozenset[str]:
    """Every name that a class's forward and the functions that it calls may read; so also in code that did not run."""
    return frozenset[str]().union(*map(_names, _forward_code(kind)))


def names_read(modules: Sequence[tuple[str, nn.Module]]) -> frozenset[str]:
    """The same for all modules of a network, and for functions that they hold."""
    kinds: list[type] = [type(module) for _, module in modules]
    names = frozenset[str]().union(*map(names_in_forward, set(kinds)))
    for kind, (_, module) in zip(kinds, modules, strict=True):
        if not (_lends(kind) or module._forward_hooks or module._forward_pre_hooks):
            continue
        held = [value for value in vars(module).values() if type(value) is FunctionType]
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            held += [hook for hook in hooks.values() if type(hook) is FunctionType]
        if held:
            names = names.union(*(_names(code) for function in held for code in _reached(function, {})))
    return names


@lru_cache(maxsize=4096)
def _asks_for_training(kind: type) -> tuple[bool, bool]:
    """Whether a class's own code asks if it is being trained, in a way that can be watched, and whether it spells numbers
    out that may be widths."""
    known = kind.__module__.startswith("torch.nn.modules.") or issubclass(kind, _NormBase)
    if known:
        return False, False
    asks = getattr(kind, "__getattr__", None) is nn.Module.__getattr__ and "training" in names_in_forward(kind)
    return asks, asks and any(map(_spells, _forward_code(kind)))


def _spells(code: CodeType) -> bool:
    pending = list(code.co_consts)
    while pending:
        const = pending.pop()
        if type(const) is int and const > 1:
            return True
        if isinstance(const, CodeType):
            pending += const.co_consts
        elif isinstance(const, tuple):
            pending += const
    return False


def may_train_otherwise(module: nn.Module) -> bool:
    """Whether training may run code of a module that evaluation does not, and that depends on widths."""
    kind: type = type(module)
    asks, spells = _asks_for_training(kind)
    return asks and (spells or bool(module._modules or module._parameters))


def refuse_fixed(modules: Sequence[tuple[str, nn.Module]]) -> None:
    """Raises where the code of a module is compiled, so cannot follow other widths, or its weights have no values.

    Raises:
        SurgeryError: with the module's name.
    """
    for name, module in modules:
        where = name or "the model"
        if isinstance(module, torch.jit.ScriptModule):
            raise SurgeryError(
                f"{where} is TorchScript (torch.jit), whose widths are compiled in; give the Python module that it was made "
                "from, and script the small network afterwards"
            )
        if isinstance(getattr(module, "_orig_mod", None), nn.Module) and type(module).__name__ == "OptimizedModule":
            raise SurgeryError(
                f"{where} is compiled (torch.compile); give what it was made from, its _orig_mod, and compile the small "
                "network afterwards"
            )
        if isinstance(module, torch.fx.GraphModule) and "eval" in vars(module):
            raise SurgeryError(
                f"{where} is a program of torch.export, whose widths are written down; give the Python module that it was "
                "made from, and export the small network afterwards"
            )
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                raise SurgeryError(
                    f"{name}.{key} is on the meta device, without values; load the weights first".removeprefix(".")
                )


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
        children: dict[str, nn.Module | None] = module.__dict__.get("_modules", {})  # TorchScript has none of its own
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
