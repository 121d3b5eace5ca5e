"""The kinds of replaced layers that there are, and how a module of a network is exchanged for one."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from prune_cli.errors import SurgeryError, nearest
from prune_cli.layers.kind import Data, Kind
from prune_cli.layers.stripes import Stripes

KINDS: dict[str, Kind] = {
    "stripes": Stripes(),
}
"""All kinds by name: the only ones that a file may name."""

MARK = "_prune_kind"
"""Attribute of a replaced module that names its kind; copies of the module keep it."""


def kind_named(name: str) -> Kind:
    """The kind of this name.

    Raises:
        SurgeryError: there is none.
    """
    if name not in KINDS:
        raise SurgeryError(f"there is no kind of replaced layer {name!r}{nearest(name, KINDS)}")
    return KINDS[name]


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of a module that `place` put into a network; None for any other."""
    name = getattr(module, MARK, None)
    return None if name is None else kind_named(name)


def replaced(model: nn.Module) -> Iterator[tuple[str, nn.Module, Kind]]:
    """Dotted name, module and kind of everything in a network that was replaced."""
    for name, module in model.named_modules():
        if (kind := kind_of(module)) is not None:
            yield name, module, kind


def closed(model: nn.Module) -> str:
    """What the layers of a network consist of that cannot be sliced; empty where there are none."""
    return next((kind.closed for _, _, kind in replaced(model) if kind.closed), "")


def place(model: nn.Module, name: str, kind: str, data: Data) -> nn.Module:
    """Replaces one module, in place, under all names that it has, and returns what replaces it.

    Raises:
        SurgeryError: no such module, no such kind, or data that do not fit.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if not name or name not in modules:
        raise SurgeryError(f"the network has no module {name!r} that could be replaced{nearest(name, modules)}")
    try:
        made = kind_named(kind).build(modules[name], data)
    except SurgeryError as error:
        raise SurgeryError(f"{name!r}, {kind}: {error}") from error
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise SurgeryError(
            f"{name!r}: the data do not fit the kind {kind} ({type(error).__name__}: {reason})"
        ) from error
    object.__setattr__(made, MARK, kind)
    exchange(model, modules[name], made)
    return made


def exchange(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts a module in the place of another, under all names that it has."""
    for parent in [module for module in model.modules() if module is not new]:
        for child, module in list(parent._modules.items()):
            if module is old:
                parent._modules[child] = new
