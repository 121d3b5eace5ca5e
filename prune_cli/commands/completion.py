"""`prune completion bash|zsh|fish`: how to get completion of groups and options in the shell."""

from __future__ import annotations

import sys

from prune_cli.errors import ConfigError, nearest

SCRIPTS = {
    "bash": 'eval "$(prune -sc install=bash)"\n',
    "zsh": 'eval "$(prune -sc install=bash)"  # zsh: needs `autoload -U bashcompinit && bashcompinit` before\n',
    "fish": "prune -sc install=fish | source\n",
}


def main(arguments: list[str]) -> int:
    """Prints the line to put into the shell's start-up file."""
    if set(arguments) & {"-h", "--help"} or len(arguments) != 1:
        sys.stdout.write("usage: prune completion bash|zsh|fish\n")
        return 0 if set(arguments) & {"-h", "--help"} else 2
    if arguments[0] not in SCRIPTS:
        raise ConfigError(f"no completion for {arguments[0]!r}{nearest(arguments[0], SCRIPTS)}")
    sys.stdout.write(SCRIPTS[arguments[0]])
    return 0
