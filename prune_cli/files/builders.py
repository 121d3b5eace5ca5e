"""Networks and datasets from a record in a file: only builders on the allow-list, only plain arguments, only what fits.

A file may come from anywhere. What it names must be a public function that one of our modules defines for recipes to
name; its arguments are plain values at any depth; and a network is drawn up without memory first, so that one that is
too large for the weights beside it is refused before it is made.
"""

from __future__ import annotations

import inspect
import logging
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from prune_cli.config.nodes import MOVED, locate, resolve
from prune_cli.errors import CheckpointError, ConfigError, PruneError, first_line
from prune_cli.files.weights import Extent
from prune_cli.reading import shown

log = logging.getLogger(__name__)

FAMILIES = "prune_cli.models."
PLAIN = (bool, int, float)
TIMES = 1000
"""A network before anything was removed is at most so many times larger than the weights that are left of it."""

_FLOOR = 1 << 26  # numbers in a network that any file may name: 256 MiB in float32
_ENTRIES = 20_000  # parameters, buffers and modules of such a network
_LONGEST = 4096  # characters and entries of one argument

Group = Literal["model", "dataset"]
_PACKAGES: Mapping[Group, str] = {"model": FAMILIES, "dataset": "prune_cli.data."}


# ------------------------------------------------------------------------------------------------------- networks


def build(
    node: Mapping[str, Any], num_classes: int | None, in_shape: tuple[int, ...] | None, extent: Extent, source: str
) -> nn.Module:
    """Builds the dense network that a file names, if the builder is one of this package.

    Args:
        extent: of the weights that belong to it.
        source: the file or folder, for messages.

    Raises:
        CheckpointError: another builder, arguments that it does not take, or a network too large for the weights.
    """
    require_ours(node, source)
    require_fitting(node, num_classes, in_shape, extent, source)
    return guarded(lambda: construct(node, num_classes, in_shape), source)()


def guarded(build: Callable[[], nn.Module], source: str) -> Callable[[], nn.Module]:
    """The same builder, for arguments that come from a file: whatever it raises on them is the file's fault."""

    def made() -> nn.Module:
        try:
            return build()
        except PruneError as error:
            raise CheckpointError(f"{source}: {error}") from error
        except Exception as error:  # values of the right type can still be impossible in any way
            raise CheckpointError(f"{source}: the network cannot be built: {first_line(error)}") from error

    return made


def construct(node: Mapping[str, Any], num_classes: int | None, in_shape: tuple[int, ...] | None) -> nn.Module:
    """Builds a network that is about to get its weights from a file, by whatever builder the user named.

    Raises:
        ConfigError: arguments that the builder does not take.
    """
    facts = {"num_classes": num_classes, "in_shape": None if in_shape is None else list(in_shape)}
    known = inspect.signature(locate(str(node.get("_target_")), "model")).parameters
    content = {k: v for k, v in facts.items() if v is not None and k in known} | dict(node)
    if "pretrained" in content:
        content["pretrained"] = False
    with torch.random.fork_rng(devices=[]):
        return _build(content, "model")


def _build(node: Mapping[str, Any], path: str) -> nn.Module:
    made = resolve({key: value for key, value in node.items() if key != "weights"}, path)
    if not isinstance(made, nn.Module):
        raise ConfigError(f"{path}._target_: {node['_target_']} made a {type(made).__name__}, not a torch module")
    return made


# ------------------------------------------------------------------------------------------------ how large it is


def require_fitting(
    node: Mapping[str, Any], num_classes: int | None, in_shape: tuple[int, ...] | None, extent: Extent, source: str
) -> None:
    """Refuses a network that is too large for the weights beside it, before memory is taken for it.

    It is drawn up on the meta device, which holds no numbers, and given up as soon as it is too large. What cannot be
    drawn up like that is left to the builder, in bounds of its own for classes and shapes.

    Raises:
        CheckpointError: it is too large.
    """
    if num_classes is not None and num_classes > max(_FLOOR >> 6, extent.elements):
        raise CheckpointError(f"{source}: {num_classes:,} classes, but weights of {extent.elements:,} numbers")
    try:
        with _counted(extent, source), torch.device("meta"):
            construct(node, num_classes, in_shape)
    except _TooLarge:
        raise
    except (
        Exception
    ):  # arguments that are wrong, which building it will say, or code that reads numbers while it builds
        log.debug("%s cannot be drawn up without memory", node.get("_target_"), exc_info=True)


@contextmanager
def _counted(extent: Extent, source: str) -> Iterator[None]:
    """While it lasts, no module can be given more parameters, buffers and modules than weights of an extent can have."""
    elements, entries = max(_FLOOR, TIMES * extent.elements), _ENTRIES + 20 * extent.tensors
    held, named = 0, 0

    def count(module: nn.Module, name: str, given: Any) -> None:
        nonlocal held, named
        named += 1
        held += given.numel() if isinstance(given, Tensor) else 0
        if held > elements or named > entries:
            raise _TooLarge(
                f"{source} names a network of over {min(held, elements):,} parameters in {named:,} parts, but its weights are "
                f"{extent.elements:,} numbers in {extent.tensors:,} tensors"
            )

    handles = [
        register(count)
        for register in (
            hooks.register_module_parameter_registration_hook,
            hooks.register_module_buffer_registration_hook,
            hooks.register_module_module_registration_hook,
        )
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _TooLarge(CheckpointError):
    """A network that grows beyond what its file can be of."""


# ------------------------------------------------------------------------------------------------- the allow-list


def require_ours(node: Mapping[str, Any], source: str, group: Group = "model") -> Callable[..., Any]:
    """The builder that a file names, if it is one of ours, with plain arguments.

    Files may come from anywhere: what they name must not be able to run other code.

    Args:
        group: what it builds. Builders of networks take `num_classes`; those of datasets can be called without
            arguments and return a `Dataset`. Helpers beside them, and what their modules import, are no builders.

    Raises:
        CheckpointError: it is not.
    """
    target = str(node.get("_target_"))
    refused = CheckpointError(
        f"{source} names a builder outside prune ({shown(target)}); "
        + (
            "name the dense network: load_pruned(folder, model=MyNet()), or model=OPTION"
            if group == "model"
            else "if you trust it, name it again: dataset=OPTION"
        )
    )
    if not re.fullmatch(re.escape(_PACKAGES[group]) + r"[a-z]\w*\.[a-z]\w*", target, re.ASCII):
        raise refused
    try:
        function = locate(target, group)
    except ConfigError as error:
        raise CheckpointError(f"{source}: {error}") from error
    module, _, name = target.rpartition(".")
    if not inspect.isfunction(function) or (function.__module__, function.__name__) != (
        MOVED.get(module, module),
        name,
    ):
        raise refused
    if not (_builds_network(function) if group == "model" else _builds_dataset(function)):
        raise refused
    for key, value in node.items():
        if key.startswith("_") and key != "_target_":
            raise CheckpointError(f"{source}: {group}.{key}: a file cannot say how its builder is called")
        require_plain(value, f"{source}: {group}.{key}")
    return function


def _builds_network(function: Callable[..., Any]) -> bool:
    return "num_classes" in inspect.signature(function).parameters


def _builds_dataset(function: Callable[..., Any]) -> bool:
    made = typing.get_type_hints(function).get("return")
    kinds = typing.get_args(made) or (made,)
    return all(p.default is not p.empty for p in inspect.signature(function).parameters.values()) and all(
        callable(getattr(kind, "calibration", None)) for kind in kinds
    )


def require_plain(value: Any, where: str) -> None:
    """Refuses an argument that is not made of plain values, or names something to be built, at any depth.

    Raises:
        CheckpointError: it is, or it is longer than any argument of ours.
    """
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, Mapping) and not any(str(key).startswith("_") for key in item):
            waiting += item.values()
        elif isinstance(item, list | tuple):
            waiting += item
        elif not (item is None or isinstance(item, (*PLAIN, str))):
            raise CheckpointError(f"{where} is {shown(value)}; arguments are plain values and lists")
        if isinstance(item, str | list | tuple | Mapping) and len(item) > _LONGEST:
            raise CheckpointError(f"{where} is longer than any argument: {shown(value)}")
