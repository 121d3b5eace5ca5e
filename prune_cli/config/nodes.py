"""From config nodes to Python objects: `_target_` nodes are located, checked against the signature, bound.

Hydra's own `instantiate` finds a wrong keyword of a partial only when it is called, after training. Here every
key and type is checked at once, and every message names the key's full path and what would be right.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Union

from pydantic import ConfigDict, TypeAdapter, ValidationError

from prune_cli.config.locations import GROUPS, options
from prune_cli.errors import ConfigError, nearest, shortened
from prune_cli.reading import shown

SPECIAL = ("_target_", "_partial_")
# Code that shipped files may name; anything else is the user's own and its source is part of the store key.
TRUSTED = ("prune_cli.", "torch.", "torchvision.")
# Modules that recipes and run folders of version 0.1 name by another path.
MOVED = {"prune_cli.lr_schedules": "prune_cli.training.lr_schedules"}


@dataclasses.dataclass(frozen=True)
class Flat:
    """Marks a parameter whose fields are keys of the node itself: `training: Annotated[Training, Flat()]`.

    A function then takes as one dataclass what a recipe spells beside the function's other keys.
    """


@dataclasses.dataclass(frozen=True)
class Whole:
    """Marks a parameter that gets a node as it is, to be built later: `network: Annotated[Mapping[str, Any], Whole()]`."""


def locate(target: str, path: str) -> Callable[..., Any]:
    """Returns the function or class that a dotted name stands for.

    Raises:
        ConfigError: the module does not import or has no such attribute.
    """
    module_name, _, attribute = target.rpartition(".")
    if not module_name:
        raise ConfigError(f"{path}._target_: {target!r} is not a dotted name such as 'my_module.score'")
    try:
        module = importlib.import_module(MOVED.get(module_name, module_name))
    except ImportError as error:
        raise ConfigError(f"{path}._target_: cannot import {module_name!r} ({error})") from error
    if not callable(found := getattr(module, attribute, None)):
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise ConfigError(f"{path}._target_: {module_name!r} has no {attribute!r}{nearest(attribute, names)}")
    return found


def parameters_of(function: Callable[..., Any], path: str) -> dict[str, inspect.Parameter]:
    """The parameters of what a `_target_` names, by name.

    Raises:
        ConfigError: it does not say them, as some built-in functions.
    """
    try:
        return dict(inspect.signature(function).parameters)
    except (ValueError, TypeError) as error:
        name = getattr(function, "__qualname__", function)
        raise ConfigError(
            f"{path}._target_: {name} does not say which parameters it has; name a function of Python"
        ) from error


def resolve(node: Any, path: str, annotation: Any = None, runtime: Sequence[str] = ()) -> Any:
    """Turns plain config data into what it describes.

    Args:
        node: data without interpolations: a mapping with `_target_` becomes the call's result, or a partial where
            `_partial_: true`; a mapping for a parameter that is annotated with a dataclass becomes that dataclass, one
            for a mapping of dataclasses a dictionary of them. A parameter marked `Flat` takes its fields from the keys
            of the node.
        path: dotted path of the node, for messages.
        annotation: type of the parameter that will receive the result.
        runtime: names of parameters that are passed later, at the call; the result is then always a partial.

    Raises:
        ConfigError: an unknown, missing or ill-typed key, or a target that cannot be found.
    """
    if any(isinstance(mark, Whole) for mark in getattr(annotation, "__metadata__", ())):
        return validate(node, path, annotation)
    if isinstance(node, Mapping) and "_target_" in node:
        function = locate(str(node["_target_"]), path)
        return _bind(function, node, path, runtime, partial=bool(node.get("_partial_")) or bool(runtime))
    if isinstance(node, Mapping) and (dataclass := _dataclass_in(annotation)):
        return _bind(dataclass, node, path, runtime, partial=bool(runtime))
    if isinstance(node, Mapping) and typing.get_origin(annotation) in (dict, Mapping):
        values = typing.get_args(annotation)[1]
        if _dataclass_in(values):
            return {str(key): resolve(value, f"{path}.{key}", values) for key, value in node.items()}
    if isinstance(node, list | tuple) and any(isinstance(value, Mapping) and "_target_" in value for value in node):
        node = [
            resolve(value, f"{path}[{index}]") if isinstance(value, Mapping) else value
            for index, value in enumerate(node)
        ]
    if annotation is None:
        if isinstance(node, Mapping):
            return {key: resolve(value, f"{path}.{key}") for key, value in node.items()}
        if isinstance(node, list | tuple):
            return [resolve(value, f"{path}[{index}]") for index, value in enumerate(node)]
        return node
    return validate(node, path, annotation)


@functools.lru_cache(maxsize=1024)
def _adapter(annotation: Any) -> TypeAdapter[Any] | None:
    """What checks values of a type; None where the type brings a config of its own, which pydantic then goes by."""
    try:
        # A number that is not finite is no setting, unless the annotation says so by Field(allow_inf_nan=True).
        return TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False))
    except Exception:
        return None


def validate(value: Any, path: str, annotation: Any) -> Any:
    """Checks plain data against a type annotation and returns it converted (lists to tuples, str to Path).

    Raises:
        ConfigError: one line with the path, what was expected and what was found.
    """
    try:
        adapter = _adapter(annotation)
    except TypeError:  # not hashable, as a Field with a list in it
        adapter = _adapter.__wrapped__(annotation)
    if adapter is None:
        if _dataclass_in(annotation) and value is not None:  # a mapping would have been bound, key by key
            raise _no_option(value, path)
        adapter = TypeAdapter(annotation)
    try:
        found = adapter.validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join([path, *(str(part) for part in first["loc"] if not _is_type_name(part))])
        found = first["input"]
        if first["type"] in ("unexpected_keyword_argument", "extra_forbidden") and (
            dataclass := _dataclass_in(annotation, deep=True)
        ):
            names = [field.name for field in dataclasses.fields(dataclass)]
            where = ".".join([path, *(str(part) for part in first["loc"] if not _is_type_name(part))])
            raise ConfigError(f"{where}: unknown key{nearest(str(first['loc'][-1]), names)}") from error
        if first["type"] in ("callable_type", "dataclass_type") and where.rpartition(".")[2] in GROUPS:
            raise _no_option(found, where) from error
        message = f"{first['msg'][0].lower()}{first['msg'][1:]}".replace("a valid tuple", "a list")
        raise ConfigError(f"{where}: {message}, got {shown(found)}") from error
    if flag := _flag_as_number(value, found, path):
        raise ConfigError(f"{flag}: input should be a number, not true or false")
    return found


def _no_option(value: Any, path: str) -> ConfigError:
    """What to say of a value in the place of a node: it may be meant as the name of an option."""
    group = path.rpartition(".")[2]
    if isinstance(value, str) and group in GROUPS:
        return ConfigError(f"{path}={shortened(value)}: there is no such option{nearest(value, options(group))}")
    return ConfigError(f"{path}: input should be a mapping of keys, got {shortened(repr(value))}")


def _flag_as_number(given: Any, found: Any, path: str) -> str | None:
    """The path of a number that was made from true or false; None where there is none."""
    if isinstance(given, bool):
        return path if isinstance(found, int | float) and not isinstance(found, bool) else None
    if isinstance(given, Mapping):
        inside = found if isinstance(found, Mapping) else getattr(found, "__dict__", {})
        pairs = [(str(key), value, inside.get(key)) for key, value in given.items()]
    elif isinstance(given, list | tuple) and isinstance(found, list | tuple):
        pairs = [(str(index), *pair) for index, pair in enumerate(zip(given, found, strict=False))]
    else:
        return None
    return next((flag for key, *pair in pairs if (flag := _flag_as_number(pair[0], pair[1], f"{path}.{key}"))), None)


def _is_type_name(part: object) -> bool:
    """Union members and wrappers show up in pydantic's locations; they mean nothing to a user."""
    return isinstance(part, str) and (part in _TYPE_NAMES or "[" in part or part[:1].isupper())


_TYPE_NAMES = frozenset({"int", "float", "str", "bool", "constrained-float", "constrained-int", "function-after"})


def _bind(
    function: Callable[..., Any], node: Mapping[str, Any], path: str, runtime: Sequence[str], *, partial: bool
) -> Any:
    parameters = parameters_of(function, path)
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    hints = _hints(function)
    given = {str(key): value for key, value in node.items() if key not in SPECIAL}
    # A partial is completed by its caller with positional arguments, which come first in the signature.
    later = {
        name
        for name, parameter in parameters.items()
        if name in runtime
        or (partial and parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD)
    }
    flat = {name: found for name in parameters if (found := _flat_in(hints.get(name)))}
    owners = {field.name: name for name, dataclass in flat.items() for field in dataclasses.fields(dataclass)}
    hidden = {*later, *flat, "self", "args", "kwargs"}
    settable = [*(name for name in parameters if name not in hidden), *owners]
    keywords: dict[str, Any] = {}
    parts: dict[str, dict[str, Any]] = {name: {} for name in flat}
    for key, value in given.items():
        if key not in settable and not open_ended:
            raise ConfigError(f"{path}.{key}: unknown key{nearest(key, settable)}")
        if key in owners:
            parts[owners[key]][key] = value
        else:
            keywords[key] = resolve(value, f"{path}.{key}", hints.get(key))
    for name, dataclass in flat.items():
        keywords[name] = _bind(dataclass, parts[name], path, (), partial=False)
    missing = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        and name not in keywords
        and name not in later
    ]
    if missing:
        raise ConfigError(f"{path}: needs a value for {', '.join(missing)}")
    bound = functools.partial(function, **keywords)
    if partial:
        return bound
    try:
        return bound()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error


@functools.lru_cache(maxsize=1024)
def _hints(function: Callable[..., Any]) -> Mapping[str, Any]:
    plain_class = isinstance(function, type) and not dataclasses.is_dataclass(function)
    owner = getattr(function, "__init__") if plain_class else function  # noqa: B009
    try:
        return typing.get_type_hints(owner, include_extras=True)
    except (NameError, TypeError, AttributeError):
        return {}  # annotations that exist for type checkers only: nothing to check against


def _flat_in(annotation: Any) -> Any:
    """The dataclass of a parameter that is marked `Flat`, else None."""
    if any(isinstance(mark, Flat) for mark in getattr(annotation, "__metadata__", ())):
        return typing.get_args(annotation)[0]
    return None


def _dataclass_in(annotation: Any, *, deep: bool = False) -> type | None:
    """The dataclass that a type is or may be; `deep`: that it holds, as in a list of rules."""
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return annotation
    if deep or typing.get_origin(annotation) in (Union, types.UnionType):
        parts = typing.get_args(annotation)
        return next((found for part in parts if (found := _dataclass_in(part, deep=deep))), None)
    return None
