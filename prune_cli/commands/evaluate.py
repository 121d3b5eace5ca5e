"""`prune evaluate CHECKPOINT_OR_RUN [overrides]`: correct of total, acc1, params and MACs."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from prune_cli.config.compose import compose
from prune_cli.errors import CheckpointError, ConfigError, first_line
from prune_cli.files import artifacts
from prune_cli.files.checkpoint import Checkpoint, read_checkpoint, require_whole
from prune_cli.reading import mapping, parse_yaml, read_table, read_yaml, shown

if TYPE_CHECKING:
    from torch import nn

    from prune_cli.data.dataset import Dataset

HELP = """usage: prune evaluate PATH [model=NAME] [dataset=NAME] [split=test|val|train] [key=value ...]

PATH is a run folder (its last stage is taken), a stage folder, a folder with pruned.yaml, a compressed file of a
weight-sharing stage, or a file of weights (safetensors, or a torch file that holds nothing but tensors; needs model=
and dataset=). Keys not given are those of the run.
"""


@dataclass(frozen=True)
class Subject:
    """What is evaluated: a stage folder or a weights file, the config nodes it came with, and its checkpoint.json."""

    path: Path
    config: dict[str, Any]
    stored: Checkpoint | None = None


def main(arguments: list[str]) -> int:
    """Evaluates and prints one line per figure."""
    if set(arguments) & {"-h", "--help"} or not arguments:
        sys.stdout.write(HELP)
        return 0 if arguments else 2
    path, overrides = Path(arguments[0]), arguments[1:]
    if not path.is_dir() and not path.is_file():
        what = "is neither a file nor a folder" if path.exists() else "does not exist"
        raise CheckpointError(f"{path} {what}; give a run folder, a stage folder or a file of weights")
    split = next((text[6:] for text in overrides if text.startswith("split=")), "test")
    if split not in ("train", "val", "test"):
        raise ConfigError(f"split: {split!r} is not one of train, val, test")
    subject = find_subject(path)
    config = _merge(subject, [text for text in overrides if not text.startswith("split=")])

    import torch

    from prune_cli.compression import container
    from prune_cli.console import count, listen
    from prune_cli.files import pruned
    from prune_cli.files.weights import load_weights
    from prune_cli.measure import accuracy
    from prune_cli.measure import cost as measure
    from prune_cli.pipeline import build as pipeline
    from prune_cli.pipeline import loading

    listen(logging.INFO)
    device = pipeline.choose_device(config.get("device", "auto"))
    data = _data(subject, config, device)
    if not data.sizes.get(split):
        raise ConfigError(f"split={split} is empty; set dataset.val to a fraction")
    build = _builder(subject, config["model"], data)
    masks = {}
    small = subject.config.get("model") is not None and container.is_compressed(subject.path)
    if small:
        model, _ = pruned.load_compressed(subject.path, build())
    elif subject.path.is_dir():
        if subject.stored is not None:
            require_whole(subject.path)
        model = loading.load_model(subject.path, build)
        masks = pruned.read_masks(subject.path)
    elif subject.path.name == artifacts.WEIGHTS and (subject.path.parent / artifacts.PRUNED).is_file():
        model = pruned.load(subject.path.parent, build())
    else:
        model = build()
        load_weights(model, subject.path)
    model = model.to(device).eval()
    found = accuracy.accuracy(model, data.evaluation(split, 500))
    cost = measure.cost(model, torch.zeros(1, *data.shape, device=device), masks)
    sparse = bool(masks) or (small and cost.macs_nonzero < cost.macs)
    sys.stdout.write(
        f"{found.correct} of {found.total} correct, acc1 {found.acc1:.2f}, acc5 {found.acc5:.2f}, loss {found.loss:.4f} "
        f"({split} split)\n{count(cost.params)} params ({cost.params}), {count(cost.macs)} MACs ({cost.macs})"
        + (f", {count(cost.macs_nonzero)} MACs with weights that are not zero\n" if sparse else "\n")
    )
    return 0


def _data(subject: Subject, config: dict[str, Any], device: Any) -> Dataset:
    """The data; what is wrong with a dataset that the files name is the files' fault."""
    from prune_cli.pipeline import build as pipeline

    try:
        return pipeline.build_data(config, device)
    except (ConfigError, RuntimeError, MemoryError) as error:
        if config["dataset"] is not subject.config.get("dataset"):
            raise
        raise CheckpointError(f"{subject.path}: the data of its run cannot be had: {first_line(error)}") from error


def _builder(subject: Subject, node: dict[str, Any], data: Dataset) -> Callable[[], nn.Module]:
    """Builds the dense network: as the user named it, or, in bounds, as the files do."""
    from prune_cli.files import builders
    from prune_cli.files.weights import extent_of
    from prune_cli.pipeline import loading

    build = loading.build_architecture(node, data, "", 0).build
    if node is not subject.config.get("model"):
        return build
    weights = subject.path / artifacts.WEIGHTS if subject.path.is_dir() else subject.path
    builders.require_fitting(node, data.num_classes, data.shape, extent_of(weights), str(subject.path))
    return builders.guarded(build, str(subject.path))


def find_subject(path: Path) -> Subject:
    """The stage folder that a path means, and the config of its run where there is one.

    Raises:
        CheckpointError: a folder in which nothing was finished.
    """
    if path.name == artifacts.WEIGHTS and (path.parent / artifacts.CHECKPOINT).is_file():
        path = path.parent  # which says what they are of
    if path.is_file():
        return _file(path)
    run = path if (path / artifacts.CONFIG).is_file() else path.parent
    config = _config(run)
    if (path / artifacts.CHECKPOINT).is_file():
        stored = read_checkpoint(path)
        return Subject(path, config | {"model": dict(stored.model)}, stored)
    if (path / artifacts.PRUNED).is_file():
        from prune_cli.files import pruned

        record = pruned.read(path).record
        return Subject(path, config | {"model": dict(record.node)})
    stages = [folder for folder in path.iterdir() if (folder / artifacts.CHECKPOINT).is_file()]
    if not stages:
        raise CheckpointError(f"{path} holds no finished stage: no {artifacts.CHECKPOINT} in it or in its folders")
    last = max(stages, key=lambda folder: _position(path, folder.name))
    stored = read_checkpoint(last)
    return Subject(last, config | {"model": dict(stored.model)}, stored)


def _config(run: Path) -> dict[str, Any]:
    """The config of a run folder, or nothing where there is none."""
    path = run / artifacts.CONFIG
    if not path.is_file():
        return {}
    config = mapping(read_yaml(path), str(path))
    for key in {"model", "dataset"} & config.keys():
        mapping(config[key], f"{path}: {key}")
    if not isinstance(config.get("device", "auto"), str):
        raise CheckpointError(f"{path}: device is {shown(config['device'])}, not a name such as cpu")
    return config


def _file(path: Path) -> Subject:
    """A file of weights; a compressed one may know its network, and lie in the run folder that it came from."""
    from prune_cli.compression import container
    from prune_cli.files import pruned

    if not container.is_compressed(path) or container.open_compressed(path).network is None:
        return Subject(path, {})
    return Subject(path, _config(path.resolve().parent.parent) | {"model": dict(pruned.read_compressed(path).node)})


def _position(run: Path, stage: str) -> int:
    """The line of a stage in the run's results.csv; the order of stages."""
    table = run / artifacts.RESULTS
    if not table.is_file():
        return 0
    return next((line for line, row in enumerate(read_table(table)) if row.get("stage") == stage), -1)


def _merge(subject: Subject, overrides: list[str]) -> dict[str, Any]:
    """The run's model and dataset nodes with the overrides; nodes whose option is named are composed afresh."""
    named = {text.split("=", 1)[0].split(".", 1)[0] for text in overrides}
    chosen = {text.split("=", 1)[0] for text in overrides}
    base = {key: value for key, value in subject.config.items() if key != "limit_batches"}
    if missing := [group for group in ("model", "dataset") if group not in base and group not in chosen]:
        raise ConfigError(f"{subject.path} does not say its {missing[0]}; give {missing[0]}=NAME")
    for node in ("model", "dataset"):
        if node in base and node not in chosen:
            _require_ours(base[node], node, subject.path)
    if "dataset" in base and base["dataset"].get("download"):  # what is fetched is for the user to say
        base["dataset"]["download"] = False
    if not named:
        return base
    fresh = compose([text for text in overrides if text.split(".", 1)[0] not in base or _of(text) in chosen])
    merged = fresh.config | {
        key: value for key, value in base.items() if key in ("model", "dataset") and key not in chosen
    }
    for text in overrides:
        key, _, value = text.partition("=")
        if "." in key and _of(text) not in chosen:
            _set(merged, key, value)
    return merged


def _of(text: str) -> str:
    return text.split("=", 1)[0].split(".", 1)[0]


def _set(config: dict[str, Any], key: str, text: str) -> None:
    """Sets one dotted key of a run's config to a value written as YAML."""
    from prune_cli.errors import nearest

    *parents, last = key.split(".")
    node: Any = config
    for name in parents:
        node = node.get(name) if isinstance(node, dict) else None
    if not isinstance(node, dict) or last not in node:
        raise ConfigError(f"{key}: unknown key{nearest(last, node if isinstance(node, dict) else ())}")
    node[last] = parse_yaml(text, key, ConfigError)


def _require_ours(node: dict[str, Any], group: Literal["model", "dataset"], path: Path) -> None:
    """A run folder may come from elsewhere: the code it names must be ours, or be named again by the user."""
    from prune_cli.files import builders

    target = str(node.get("_target_"))
    if not target.startswith("prune_cli."):
        raise CheckpointError(
            f"{group}: these files name code outside prune ({shown(target)}); if you trust it, name it again with "
            f"{group}=OPTION"
        )
    builders.require_ours(node, str(path), group)
