"""Which layers get what ratio: ordered rules, or a mapping from parameter names in a YAML file."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeVar

from torch import nn

from prune_cli.config.locations import find_file
from prune_cli.errors import ConfigError, nearest
from prune_cli.granularities.units import Ratio
from prune_cli.reading import read_yaml, shown
from prune_cli.structure.prunable import Target, layers, target


@dataclass(frozen=True)
class LayerSelector:
    """Which layers a rule is about. A layer matches when it satisfies every key given; the last match wins.

    Attributes:
        types: class names such as Conv2d; `default` stands for every layer type that can be pruned.
        names: dotted module names.
        names_re: regular expressions that must match a whole module name.
        exclude: leave the layer as it is.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    types: tuple[str, ...] | None = None
    names: tuple[str, ...] | None = None
    names_re: tuple[str, ...] | str | None = None
    exclude: bool = False


@dataclass(frozen=True)
class Rule(LayerSelector):
    """One entry of `granularity.rules`.

    Attributes:
        ratio: fraction removed; the granularity's own ratio where absent.
    """

    ratio: Ratio | None = None


Chosen = TypeVar("Chosen", bound=LayerSelector)


def ratios(
    model: nn.Module, ratio: float, rules: Sequence[Rule], ratio_file: Path | None, bare: Collection[str] = ()
) -> dict[str, float | str]:
    """The ratio asked of each weight, by parameter name; layers that stay dense are absent.

    Args:
        ratio: asked of every layer where there are neither rules nor a file, and of rules without their own.
        rules: see `Rule`; layers that no rule matches stay dense.
        ratio_file: YAML with `prune_ratio: {parameter name: ratio or mXnY}`, as in DNN-Model-Prune; a prefix
            `module.` is dropped and unlisted parameters stay dense.
        bare: further parameters that can be asked for, which are no layer's weight.

    Raises:
        ConfigError: both rules and a file, a rule that matches nothing, an unknown name, a ratio outside [0, 1).
    """
    known = [*(Target(name, module) for name, module in layers(model).items()), *(target(model, name) for name in bare)]
    found, names = {one.asked_as: one.module for one in known}, {one.asked_as: one.name for one in known}
    if rules and ratio_file:
        raise ConfigError("granularity: give either rules or ratio_file, not both")
    if ratio_file:
        return _from_file(list(names.values()), ratio_file)
    if not rules:
        return dict.fromkeys(names.values(), ratio)
    chosen = last_matches(found, rules, "granularity.rules")
    return {
        names[name]: ratio if rule.ratio is None else rule.ratio for name, rule in chosen.items() if not rule.exclude
    }


def last_matches(found: dict[str, nn.Module], rules: Sequence[Chosen], path: str) -> dict[str, Chosen]:
    """The last rule that matches each layer, in the order of the layers; those that none matches are absent.

    Args:
        found: layers by name.
        path: of the rules in the config, for messages.

    Raises:
        ConfigError: a rule that matches nothing, an unknown name or an impossible expression.
    """
    chosen: dict[str, Chosen] = {}
    for index, rule in enumerate(rules):
        where = f"{path}[{index}]"
        if rule.types is None and rule.names is None and rule.names_re is None:
            raise ConfigError(
                f"{where}: says no layer; give types, names or names_re ({{types: [default]}} is every layer)"
            )
        matched = [name for name, module in found.items() if _matches(rule, name, module, where, found)]
        if not matched:
            raise ConfigError(f"{where}: matches no layer{_why(rule, found)}")
        chosen |= dict.fromkeys(matched, rule)
    return {name: chosen[name] for name in found if name in chosen}


def _matches(rule: LayerSelector, name: str, module: nn.Module, where: str, found: dict[str, nn.Module]) -> bool:
    if rule.types is not None and "default" not in rule.types and type(module).__name__ not in rule.types:
        return False
    if rule.names is not None:
        for wanted in rule.names:
            if wanted not in found:
                raise ConfigError(f"{where}.names: no layer {wanted!r}{nearest(wanted, found)}")
        if name not in rule.names:
            return False
    if rule.names_re is None:
        return True
    patterns = (rule.names_re,) if isinstance(rule.names_re, str) else rule.names_re
    try:
        return any(re.fullmatch(pattern, name) for pattern in patterns)
    except re.error as error:
        raise ConfigError(f"{where}.names_re: {error}") from error


def _why(rule: LayerSelector, found: dict[str, nn.Module]) -> str:
    kinds = {type(module).__name__ for module in found.values()}
    unknown = [kind for kind in rule.types or () if kind not in kinds and kind != "default"]
    return f"; the network has no {unknown[0]}{nearest(unknown[0], kinds)}" if unknown else ""


def _from_file(names: Collection[str], path: Path) -> dict[str, float | str]:
    path = find_file(path)
    try:
        content = read_yaml(path, ConfigError)
    except ConfigError as error:
        raise ConfigError(f"granularity.ratio_file: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("prune_ratio"), dict):
        raise ConfigError(f"{path}: needs a mapping prune_ratio: {{parameter name: ratio}}")
    chosen: dict[str, float | str] = {}
    for key, value in content["prune_ratio"].items():
        name = str(key).removeprefix("module.")
        if name not in names:
            raise ConfigError(f"{path}: the network has no prunable parameter {key!r}{nearest(name, names)}")
        if name in chosen:
            raise ConfigError(f"{path}: {name} is there twice, with and without module.")
        if isinstance(value, str) and re.fullmatch(r"m\d+n\d+", value):
            chosen[name] = value
        elif isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1:
            chosen[name] = float(value)
        else:
            raise ConfigError(f"{path}: {key}: {shown(value)} is neither a ratio in [0, 1) nor of the form m4n2")
    return chosen
