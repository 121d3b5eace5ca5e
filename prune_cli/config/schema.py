"""The root of a composed config: its keys and their types."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from prune_cli.config.locations import GROUPS, options
from prune_cli.config.nodes import validate
from prune_cli.errors import ConfigError, nearest


@dataclass(frozen=True)
class Root:
    """The keys of a composed config besides its stages. Paths and counts in user units; see recipes/config.yaml."""

    model: dict[str, Any]
    dataset: dict[str, Any]
    criterion: dict[str, Any]
    granularity: dict[str, Any]
    schedule: dict[str, Any]
    distillation: dict[str, Any]
    regulariser: dict[str, Any]
    stages: list[str]
    seed: int = 0
    device: Literal["auto", "cpu", "cuda", "mps"] | str = "auto"
    deterministic: bool = False
    threads: int | None = None
    limit_batches: int | None = None
    latency: bool = True
    tensorboard: bool = False


def check_root(config: dict[str, Any]) -> list[str]:
    """Checks the root keys of a composed config and returns the order of its stages.

    Raises:
        ConfigError: a key that is neither of the schema nor a stage, an ill-typed value, an unknown stage.
    """
    known = {field.name for field in fields(Root)}
    nodes = {key for key, value in config.items() if isinstance(value, dict) and "_target_" in value} - known
    for key in config:
        if key not in known and key not in nodes:
            raise ConfigError(f"{key}: unknown key{nearest(key, known | nodes)}")
    for key in sorted(known):
        if key not in config or (key in GROUPS and config[key] is None):
            right = f"{key}=NAME, see `prune list {key}`" if key in GROUPS else f"{key}=VALUE"
            raise ConfigError(f"{key}: needs a value; give {right}")
    root = {key: value for key, value in config.items() if key in known}
    for field in fields(Root):
        if field.name in root:
            root[field.name] = validate(root[field.name], field.name, _hint(field.name))
    if not root.get("stages"):
        raise ConfigError("stages: the list is empty; give for example stages=[train,prune,finetune]")
    for stage in root["stages"]:
        if stage not in nodes:
            raise ConfigError(f"stages: there is no stage {stage!r}{nearest(stage, nodes | set(options('stage')))}")
    return list(root["stages"])


def _hint(name: str) -> Any:
    import typing

    return typing.get_type_hints(Root)[name]
