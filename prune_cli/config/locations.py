"""Where recipes lie: shipped ones, those of the working directory and of `PRUNE_RECIPES`. Imports no torch."""

from __future__ import annotations

import os
from pathlib import Path

from prune_cli.errors import ConfigError
from prune_cli.reading import read_text

GROUPS = (
    "recipe", "model", "dataset", "criterion", "granularity", "schedule", "distillation", "regulariser", "optimizer",
    "lr_schedule", "fit", "stage",
)  # fmt: skip


def shipped() -> Path:
    """The folder of the recipes that come with the package: inside a wheel, or beside the package in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "recipes"
    return inside if (inside / "config.yaml").is_file() else package.parent / "recipes"


def searchpath() -> list[Path]:
    """The user's recipe folders, first match wins: PRUNE_RECIPES (several, split like PATH), then ./recipes."""
    named = [Path(entry) for entry in os.environ.get("PRUNE_RECIPES", "").split(os.pathsep) if entry]
    folders = [folder.resolve() for folder in [*named, Path("recipes")] if folder.is_dir()]
    return [folder for folder in dict.fromkeys(folders) if folder != shipped().resolve()]


def options(group: str) -> dict[str, Path]:
    """The options of a group by name, shipped and the user's; shipped names win, as in Hydra's search path."""
    found: dict[str, Path] = {}
    for folder in [*reversed(searchpath()), shipped()]:
        for path in sorted((folder / group).rglob("*.yaml")):
            found[path.relative_to(folder / group).with_suffix("").as_posix()] = path
    return dict(sorted(found.items()))


def find_file(path: Path) -> Path:
    """A file that a recipe names: relative to the working directory, else to the recipe folders."""
    places = [Path(), *searchpath(), shipped()]
    return next((place / path for place in places if (place / path).is_file()), path)


def description(path: Path) -> str:
    """The first comment line of a recipe file that is not a Hydra directive.

    Raises:
        ConfigError: the file cannot be read.
    """
    for line in read_text(path, ConfigError).splitlines():
        if line.startswith("# @package"):
            continue
        return line.lstrip("# ").strip() if line.startswith("#") else ""
    return ""
