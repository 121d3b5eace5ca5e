"""`prune run recipe=NAME [overrides]` and `prune run -m ...`: Hydra composes, launches and sweeps; `job` runs one."""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from prune_cli.commands import sweep
from prune_cli.config.compose import compose, hydra_arguments, plain, quoted, require_recipe, translate
from prune_cli.config.locations import shipped
from prune_cli.config.overrides import as_written, check_words, choices_of, for_hydra
from prune_cli.errors import ConfigError, Interrupted, PruneError, one_line, shortage
from prune_cli.files import artifacts
from prune_cli.files.artifacts import Row
from prune_cli.files.run_log import RunLog

log = logging.getLogger("prune_cli")

HELP = """usage: prune run recipe=NAME [key=value ...]
       prune run -m recipe=NAME key=a,b,c ...

Runs the stages of a recipe and leaves outputs/NAME/TIME/ with results.csv, layers.csv, history.csv, run.log,
config.yaml and a checkpoint folder per stage. Finished stages are taken from the store; an interrupted command goes
on where it was when it is given again. -m runs every combination of comma-separated values, and ends with one table
and the folder of the sweep.

  recipe=NAME             see `prune list recipe`
  GROUP=OPTION            model, dataset, criterion, granularity, schedule, distillation; see `prune list`
  STAGE.key=value         for example finetune.epochs=20 finetune.optimizer.lr=0.01
  stages=[a,b,c]          the order of the stages
  --into DIR              run, or sweep, in this folder; the same sweep given again goes on there
  seed=0 device=auto deterministic=false threads=null limit_batches=null latency=true tensorboard=false

`prune show recipe=NAME` prints every key with its value.
"""


def main(arguments: list[str]) -> int:
    """Hands over to Hydra, which calls `job` once or, with -m, once per combination."""
    if set(arguments) & {"-h", "--help"}:
        sys.stdout.write(HELP)
        return 0
    sweeping = bool({"-m", "--multirun"} & set(arguments))
    given, place = _placed(arguments)
    check_words(given, flags=True)
    require_recipe(given)
    arguments = [*given, *([f"hydra.{'sweep' if sweeping else 'run'}.dir={quoted(str(place))}"] if place else [])]
    if rank := _rank(arguments):
        return _follow(arguments, rank)
    if sweeping:
        compose(_first_values(given))  # what is wrong for all jobs is said before there is a folder
        if place:
            sweep.claim(place, given)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let errors through: they are made readable here
    sys.argv = ["prune run", *hydra_arguments(arguments)]
    folders: list[Path] = []
    try:
        _entry(functools.partial(job, sweep_of=given, folders=folders))()
    except PruneError:
        raise
    except Exception as error:
        translated = translate(error, [text for text in arguments if "=" in text])
        if translated is error:
            raise
        raise translated from error
    finally:
        for folder in dict.fromkeys(folders):
            sweep.finish(folder)
    if _processes() > 1:
        _leave_group()
    return 0


def _placed(arguments: list[str]) -> tuple[list[str], Path | None]:
    """The arguments without `--into DIR`, and DIR.

    Raises:
        ConfigError: no folder behind it.
    """
    rest, place = list(arguments), None
    for index, word in enumerate(arguments):
        if word == "--into" and index + 1 < len(arguments):
            rest, place = arguments[:index] + arguments[index + 2 :], arguments[index + 1]
        elif word.startswith("--into="):
            rest, place = arguments[:index] + arguments[index + 1 :], word.partition("=")[2]
        elif word == "--into":
            place = ""
    if place == "":
        raise ConfigError("--into: give a folder: prune run -m --into outputs/multirun/mine ...")
    return rest, None if place is None else Path(place)


def _first_values(arguments: list[str]) -> list[str]:
    """The overrides of the first job of a sweep; what cannot be read is left for composition to say."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser, found = OverridesParser.create(), []
    for text in for_hydra([text for text in arguments if not text.startswith(("-", "hydra."))]):
        try:
            override = parser.parse_override(text)
            if override.is_sweep_override():
                text = f"{text.partition('=')[0]}={next(iter(override.sweep_string_iterator()))}"
        except (HydraException, ValueError, StopIteration):
            pass
        found.append(text)
    return found


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _leave_group() -> NoReturn:
    from prune_cli.training.distributed import leave

    leave()


def _rank(arguments: list[str]) -> int:
    """This process among those that torchrun started; 0 where it runs alone.

    Raises:
        ConfigError: a sweep in several processes.
    """
    if _processes() > 1 and {"-m", "--multirun"} & set(arguments):
        raise ConfigError("torchrun runs one job in several processes; start a sweep without it, or one job at a time")
    return int(os.environ.get("RANK", "0"))


def _follow(arguments: list[str], rank: int) -> int:
    """A process beside rank 0: the same config and stages, but no files and no tables."""
    from prune_cli.console import Handler

    logging.getLogger().addHandler(Handler(logging.WARNING))
    composed = compose([text for text in arguments if not text.startswith("hydra.")])
    try:
        _stages(composed.config, composed.choices, Path())
    except PruneError:
        if rank:  # rank 0 says it
            return 1
        raise
    _leave_group()


def complete(arguments: list[str]) -> int:
    """Answers Hydra's completion protocol for `prune run ...` as if the command were `prune ...`."""
    line, point = os.environ.get("COMP_LINE", ""), int(os.environ.get("COMP_POINT", "0") or 0)
    words = line.split(" ", 2)
    if len(words) > 1 and words[1] in ("run", "show", "evaluate"):
        cut = len(words[1]) + 1
        os.environ["COMP_LINE"] = " ".join([words[0], *words[2:]])
        os.environ["COMP_POINT"] = str(max(point - cut, 0))
    sys.argv = ["prune", *hydra_arguments(arguments)] if len(arguments) > 1 else ["prune", *arguments]
    _entry(job)()
    return 0


def _entry(task: Callable[..., None]) -> Any:
    def hydra_task(config: DictConfig) -> None:  # Hydra asks a function for its module and its name
        task(config)

    return hydra.main(version_base="1.3", config_path=str(shipped()), config_name="config")(hydra_task)


def job(config: DictConfig, *, sweep_of: Sequence[str] = (), folders: list[Path] | None = None) -> None:
    """Runs one composed config. One line for the user on failure; the traceback goes to the log.

    Args:
        sweep_of: what a sweep was asked for.
        folders: gets the sweep's folder.
    """
    settings = HydraConfig.get()
    folder = Path(settings.runtime.output_dir)
    sweeping = settings.mode == RunMode.MULTIRUN
    if sweeping and folders is not None:
        folders.append(Path(settings.sweep.dir))
    _logging(folder)
    try:
        if sweeping:
            said = [as_written(text) for text in _given(settings)]
            log.info("job %s: %s", settings.job.num, " ".join(said))
        rows = _job(config, settings, folder)
        if sweeping:
            sweep.note(Path(settings.sweep.dir), folder, sweep_of, said)
            sweep.collect(Path(settings.sweep.dir))
        else:
            _report(rows, folder)
    except PruneError as error:
        log.debug("failed", exc_info=True)
        _discard(folder)
        if sweeping and not isinstance(error, Interrupted):
            log.error("job %s: %s", settings.job.num, " ".join(str(error).split()))
            raise
        _leave(error, error.exit_code)
    except Exception as error:
        log.debug("failed", exc_info=True)
        if (small := shortage(error)) is not None:
            _discard(folder)
            if sweeping:
                raise small from error
            _leave(small, small.exit_code)
        if sweeping or isinstance(error, OSError):
            raise
        _leave(
            PruneError(f"unexpected {type(error).__name__}: {error}; the traceback is in {folder / artifacts.LOG}"), 1
        )


def _given(settings: Any) -> list[str]:
    """The overrides of the command line as they were given, with their interpolations."""
    found: list[str] = OmegaConf.to_container(settings.overrides.task, resolve=False)  # type: ignore[assignment]
    return found


def _leave(error: PruneError, code: int) -> None:
    """Ends the process. Not an Exception: Hydra would print lines of its own about it."""
    if os.environ.get("PRUNE_DEBUG"):
        traceback.print_exc()
    sys.stderr.write(f"error: {one_line(error)}\n")
    raise SystemExit(code)


def _job(config: DictConfig, settings: Any, folder: Path) -> list[Row]:
    choices = choices_of(settings.runtime.choices)
    return _stages(plain(config, _given(settings), choices), choices, folder)


def _report(rows: Sequence[Row], folder: Path) -> None:
    """Prints the table of a run, its folder as the last line on stdout, and on stderr what to do next."""
    from prune_cli.console import results_table

    results_table(rows)
    sys.stdout.write(f"{folder}\n")
    sys.stdout.flush()
    where = os.path.relpath(folder) if folder.is_relative_to(Path.cwd()) else str(folder)
    log.info("next: prune evaluate %s", where)
    log.info("      prune export %s --compare", where)


def _discard(folder: Path) -> None:
    """Takes away the folder of a run that ended before it began: it has no config.yaml."""
    if (folder / artifacts.CONFIG).exists():
        return
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, logging.FileHandler)]:
        root.removeHandler(handler)
        handler.close()
    (folder / artifacts.LOG).unlink(missing_ok=True)
    sweep.remove_empty(folder)


def _stages(content: dict[str, Any], choices: dict[str, str], folder: Path) -> list[Row]:
    """Builds and runs the pipeline among the processes of the run; returns the rows on rank 0.

    The config is written when all is found to be right and something is about to be computed.
    """
    from prune_cli.console import Console, tensorboard
    from prune_cli.pipeline import build, run, step
    from prune_cli.pipeline.store import Store, default_root
    from prune_cli.signals import graceful_stop
    from prune_cli.training.distributed import joined

    store = Store(default_root())
    with graceful_stop() as interrupted, joined(build.choose_device(content.get("device", "auto"))) as world:
        world.agree("the config", json.dumps(content, sort_keys=True))
        with tensorboard(folder) if content.get("tensorboard") and world.main else nullcontext() as scalar:
            built = build.build(content, choices, Console(scalar=scalar), store)
            built = step.within(built, interrupted, world)
            if world.main:
                artifacts.write_text(folder / artifacts.CONFIG, yaml.safe_dump(content, sort_keys=False))
                artifacts.write_json(folder / artifacts.CHOICES, choices)
            return run.run(built, store, folder, latency=bool(content.get("latency")))


def _logging(folder: Path) -> None:
    """Console and file handlers of this job; those of an earlier job of the sweep go."""
    from prune_cli.console import Handler

    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    with artifacts.writing(folder):
        file = RunLog(folder / artifacts.LOG)
    console = Handler(logging.INFO)
    root.addHandler(file)
    root.addHandler(console)
    root.setLevel(logging.INFO)
    logging.getLogger("prune_cli").setLevel(logging.DEBUG)
