"""Networks from a record in a file: only builders on the allow-list, only plain arguments."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from prune_cli.config.nodes import locate, resolve
from prune_cli.errors import CheckpointError, ConfigError

FAMILIES = "prune_cli.models."
PLAIN = (bool, int, float)


# ------------------------------------------------------------------------------------------------------- builders


def build(node: Mapping[str, Any], num_classes: int | None, in_shape: tuple[int, ...] | None, source: str) -> nn.Module:
    """Builds the dense network that a file names, if the builder is one of this package.

    Raises:
        CheckpointError: another builder, or arguments that it does not take.
    """
    require_ours(node, source)
    try:
        return construct(node, num_classes, in_shape)
    except ConfigError as error:
        raise CheckpointError(f"{source}: {error}") from error


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


def require_ours(node: Mapping[str, Any], source: str) -> Callable[..., Any]:
    """The builder that a file names, if it is a public function of a file in prune_cli.models, with plain arguments.

    Files may come from anywhere: what they name must not be able to run other code.

    Raises:
        CheckpointError: it is not.
    """
    target = str(node.get("_target_"))
    refused = CheckpointError(
        f"{source} names a builder outside prune ({target}); name the dense network: load_pruned(folder, model=MyNet()), or model=OPTION"
    )
    if not re.fullmatch(re.escape(FAMILIES) + r"[a-z]\w*\.[a-z]\w*", target):
        raise refused
    try:
        function = locate(target, "model")
    except ConfigError as error:
        raise CheckpointError(f"{source}: {error}") from error
    if not inspect.isfunction(function) or f"{function.__module__}.{function.__name__}" != target:
        raise refused
    if "num_classes" not in inspect.signature(function).parameters:
        raise refused
    for key, value in node.items():
        if not _is_plain(value):
            raise CheckpointError(f"{source}: model.{key} is {value!r}; arguments are plain values and lists")
    return function


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (*PLAIN, str))
