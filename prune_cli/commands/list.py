"""`prune list [GROUP]`: recipes and options with the first comment line of their files; `--legal`: what goes together.

Without `--legal` it imports no torch and no Hydra.
"""

from __future__ import annotations

import sys

from prune_cli.config.locations import GROUPS, description, options
from prune_cli.errors import ConfigError, nearest

HELP = f"""usage: prune list [GROUP]
       prune list --legal [--why] [GROUP=NAME[,NAME...]] [key=value ...]

Lists recipes and the options of every group, or of one: {", ".join(GROUPS)}.

--legal prints which criteria, granularities, schedules and regularisers each stage takes together, as `prune run` would
check them; --why says under each table why the others are refused. criterion=wanda or stage=prune,sensitivity shows these
only. Asked is a small ResNet, unless a recipe, a model or a dataset is given; an option's keys are those of its file, unless
they are given too: prune list --legal criterion=movement schedule.start=1
"""


def main(arguments: list[str]) -> int:
    """Prints one line per option, or the tables of what goes together."""
    if set(arguments) & {"-h", "--help"}:
        sys.stdout.write(HELP)
        return 0
    if "--legal" in arguments:
        from prune_cli.pipeline.legality import render, table

        cells = table([argument for argument in arguments if argument not in ("--legal", "--why")])
        sys.stdout.write(render(cells, reasons="--why" in arguments))
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
