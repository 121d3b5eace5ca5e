"""`prune run recipe=NAME [overrides]` and `prune run -m ...`: Hydra composes, launches and sweeps; `job` runs one."""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from prune_cli.config.compose import compose, hydra_arguments, plain, require_recipe, translate
from prune_cli.config.locations import shipped
from prune_cli.errors import ConfigError, Interrupted, PruneError
from prune_cli.files import artifacts

log = logging.getLogger("prune_cli")

HELP = """usage: prune run recipe=NAME [key=value ...]
       prune run -m recipe=NAME key=a,b,c ...

Runs the stages of a recipe and leaves outputs/NAME/TIME/ with results.csv, layers.csv, history.csv, run.log,
config.yaml and a checkpoint folder per stage. Finished stages are taken from the store; an interrupted command goes
on where it was when it is given again. -m runs every combination of comma-separated values.

  recipe=NAME             see `prune list recipe`
  GROUP=OPTION            model, dataset, criterion, granularity, schedule, distillation; see `prune list`
  STAGE.key=value         for example finetune.epochs=20 finetune.optimizer.lr=0.01
  stages=[a,b,c]          the order of the stages
  seed=0 device=auto deterministic=false threads=null limit_batches=null latency=true tensorboard=false

`prune show recipe=NAME` prints every key with its value.
"""


def main(arguments: list[str]) -> int:
    """Hands over to Hydra, which calls `job` once or, with -m, once per combination."""
    if set(arguments) & {"-h", "--help"}:
        sys.stdout.write(HELP)
        return 0
    require_recipe(arguments)
    if rank := _rank(arguments):
        return _follow(arguments, rank)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let errors through: they are made readable here
    sys.argv = ["prune run", *hydra_arguments(arguments)]
    try:
        _entry()()
    except PruneError:
        raise
    except Exception as error:
        translated = translate(error, [text for text in arguments if "=" in text])
        if translated is error:
            raise
        raise translated from error
    if _processes() > 1:
        _leave_group()
    return 0


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
    _entry()()
    return 0


def _entry() -> Any:
    return hydra.main(version_base="1.3", config_path=str(shipped()), config_name="config")(job)


def job(config: DictConfig) -> None:
    """Runs one composed config. One line for the user on failure; the traceback goes to the log."""
    settings = HydraConfig.get()
    folder = Path(settings.runtime.output_dir)
    sweeping = settings.mode == RunMode.MULTIRUN
    _logging(folder)
    try:
        if sweeping:
            log.info("job %s: %s", settings.job.num, " ".join(_given(settings)))
        _job(config, settings, folder)
        if sweeping:
            _collect(Path(settings.sweep.dir))
    except PruneError as error:
        log.debug("failed", exc_info=True)
        if sweeping and not isinstance(error, Interrupted):
            log.error("job %s: %s", settings.job.num, " ".join(str(error).split()))
            raise
        _leave(error, error.exit_code)
    except Exception as error:
        log.debug("failed", exc_info=True)
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
    sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
    raise SystemExit(code)


def _job(config: DictConfig, settings: Any, folder: Path) -> None:
    from prune_cli.console import results_table

    content = plain(config, _given(settings))
    choices = {str(key): str(value) for key, value in settings.runtime.choices.items()}
    artifacts.write_text(folder / artifacts.CONFIG, yaml.safe_dump(content, sort_keys=False))
    artifacts.write_json(folder / artifacts.CHOICES, choices)
    rows = _stages(content, choices, folder)
    results_table(rows)
    sys.stdout.write(f"{folder}\n")


def _stages(content: dict[str, Any], choices: dict[str, str], folder: Path) -> list[Any]:
    """Builds and runs the pipeline among the processes of the run; returns the rows on rank 0."""
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
            return run.run(built, store, folder, latency=bool(content.get("latency")))


def _logging(folder: Path) -> None:
    """Console and file handlers of this job; those of an earlier job of the sweep go."""
    from prune_cli.console import Handler

    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    with artifacts.writing(folder):
        file = logging.FileHandler(folder / artifacts.LOG)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    file.setLevel(logging.DEBUG)
    console = Handler(logging.INFO)
    root.addHandler(file)
    root.addHandler(console)
    root.setLevel(logging.INFO)
    logging.getLogger("prune_cli").setLevel(logging.DEBUG)


def _collect(sweep: Path) -> None:
    """Writes the rows of all jobs of a sweep that are there so far into one results.csv."""
    import pandas
    from filelock import FileLock

    with FileLock(sweep / ".results.lock"):
        tables = sorted(sweep.glob(f"*/{artifacts.RESULTS}"), key=lambda path: path.parent.name.zfill(6))
        frames = [pandas.read_csv(path).assign(job=path.parent.name) for path in tables]
        with artifacts.new_file(sweep / artifacts.RESULTS) as temporary:
            pandas.concat(frames).to_csv(temporary, index=False)
