"""`prune COMMAND ...`: finds the command, turns errors into one line and an exit code. Imports no torch."""

from __future__ import annotations

import importlib
import os
import sys
import traceback

from prune_cli import __version__
from prune_cli.errors import ConfigError, PruneError, StorageError, nearest, one_line, shortage

COMMANDS = {
    "run": "compose a recipe and run its stages; -m sweeps over comma-separated values",
    "list": "list recipes and the options of every group",
    "show": "show what a recipe would do: config, stages, shapes, counts; --estimate adds time",
    "evaluate": "evaluate a checkpoint, a run or a file of weights",
    "export": "write a network as ONNX and as a torch.export program, compared and timed",
    "copy": "copy a recipe to ./recipes/recipe/NEW.yaml, to edit",
    "store": "list the stage store and its size; --gc sweeps it",
    "completion": "print the shell completion script for bash, zsh or fish",
}

HELP = """usage: prune COMMAND [ARGUMENTS]

Compress neural networks: train, sparsify, prune, fine-tune, distil.

commands:
{commands}

examples:
  prune run recipe=quickstart
  prune run recipe=resnet20_cifar10_irre granularity.ratio=0.9 finetune.epochs=40
  prune run -m recipe=quickstart criterion=l1,l2,random seed=0,1
  prune show recipe=vgg16_cifar10_irre --estimate

`prune COMMAND --help` says more. Exit codes are listed in the README. --debug shows tracebacks.
"""


MOST = 2000  # characters of a message


def main() -> None:
    """Entry point of the `prune` command."""
    code = dispatch(sys.argv[1:])
    try:
        sys.stdout.flush()
    except OSError as error:  # Python would say so itself when it ends, in a traceback
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            code = code or _report(StorageError(f"cannot write the output: {error.strerror or error}"), False)
    sys.exit(code)


def dispatch(arguments: list[str]) -> int:
    """Runs one command and returns its exit code."""
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if debug:
        os.environ["PRUNE_DEBUG"] = "1"
    # User code (`_target_: my_module.score`) is found in the working directory, after everything installed.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    if arguments and arguments[0].startswith("-sc"):
        return importlib.import_module("prune_cli.commands.run").complete(arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        width = max(map(len, COMMANDS))
        lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
        sys.stdout.write(HELP.format(commands="\n".join(lines)))
        return 0
    if arguments[0] in ("-V", "--version"):
        sys.stdout.write(f"prune {__version__}\n")
        return 0
    try:
        if arguments[0] not in COMMANDS:
            raise ConfigError(f"there is no command {arguments[0]!r}{nearest(arguments[0], COMMANDS)}")
        _announce(arguments)
        command = importlib.import_module(f"prune_cli.commands.{arguments[0]}")
        return command.main(arguments[1:]) or 0
    except PruneError as error:
        return _report(error, debug)
    except KeyboardInterrupt:
        sys.stderr.write("error: stopped; nothing that was finished is lost\n")
        return 130
    except BrokenPipeError:  # `prune list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (MemoryError, RuntimeError) as error:
        if (small := shortage(error)) is None:
            raise
        return _report(small, debug)
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        return _report(StorageError(f"cannot read or write{where}: {error.strerror or error}"), debug)


WITH_TORCH = ("run", "show", "evaluate", "export", "store")


def _announce(arguments: list[str]) -> None:
    """Says on a terminal what takes the first seconds; lets bars appear."""
    command, *rest = arguments
    if (command not in WITH_TORCH and "--legal" not in rest) or {"-h", "--help"} & set(rest):
        return
    if "torch" not in sys.modules and sys.stderr.isatty():
        sys.stderr.write("loading torch ...\n")
        sys.stderr.flush()
    importlib.import_module("prune_cli.progress").enable()


def _report(error: PruneError, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    text = one_line(error)
    text = text if len(text) <= MOST else f"{text[:MOST]} ..."
    sys.stderr.write(f"error: {text}\n")
    return error.exit_code


if __name__ == "__main__":
    main()
