"""`prune list [GROUP]`: recipes and options with the first comment line of their files. Imports no torch, no Hydra."""

from __future__ import annotations

import sys

from prune_cli.config.locations import GROUPS, description, options
from prune_cli.errors import ConfigError, nearest

HELP = f"""usage: prune list [GROUP]

Lists recipes and the options of every group, or of one: {", ".join(GROUPS)}.
"""


def main(arguments: list[str]) -> int:
    """Prints one line per option."""
    if set(arguments) & {"-h", "--help"}:
        sys.stdout.write(HELP)
        return 0
    for group in arguments:
        if group not in GROUPS:
            raise ConfigError(f"there is no group {group!r}{nearest(group, GROUPS)}")
    for group in arguments or GROUPS:
        found = options(group)
        width = max(map(len, found), default=0)
        sys.stdout.write(f"{group}\n")
        for name, path in found.items():
            sys.stdout.write(f"  {name:<{width}}  {description(path)}\n")
    return 0
