"""`prune copy RECIPE NEW`: a recipe of one's own to edit."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from prune_cli.config.locations import options
from prune_cli.errors import ConfigError, nearest
from prune_cli.files.artifacts import write_text
from prune_cli.reading import read_text

HELP = """usage: prune copy RECIPE NEW

Copies a recipe to ./recipes/recipe/NEW.yaml; `prune run recipe=NEW` in this folder then uses it.
"""


def main(arguments: list[str]) -> int:
    """Copies the file; never overwrites one."""
    if set(arguments) & {"-h", "--help"}:
        sys.stdout.write(HELP)
        return 0
    if len(arguments) != 2:
        raise ConfigError("usage: prune copy RECIPE NEW")
    recipe, new = arguments
    known = options("recipe")
    if recipe not in known:
        raise ConfigError(f"there is no recipe {recipe!r}{nearest(recipe, known)}")
    if new in known:
        raise ConfigError(f"there is a recipe {new!r} already ({known[new]}); choose another name")
    if not re.fullmatch(r"\w[\w-]*(/\w[\w-]*)*", new):
        raise ConfigError(f"{new!r} is no name for a recipe; use letters, digits, _ and -, with / for a folder below")
    target = Path("recipes/recipe") / f"{new}.yaml"
    write_text(target, read_text(known[recipe], ConfigError).replace(f"recipe={recipe}", f"recipe={new}"))
    sys.stdout.write(f"{target}\n")
    sys.stderr.write(f"next: edit it, then prune show recipe={new}   or   prune run recipe={new}\n")
    return 0
