"""Shrinking one's own network in three lines of Python, with one's own data, loss and training loop.

    from prune_cli import report, shrink

    small = shrink(model, example_inputs, ratio=0.5)  # or budget={"macs": 0.5}, scope="global", optimizer=optimizer
    print(report(small))  # what went, what stayed whole and why

`save_pruned(small, folder)` and `load_pruned(folder, model=MyNet())` keep it in two files without pickle.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from numbers import Real
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prune_cli.config.locations import options
from prune_cli.config.nodes import resolve, validate
from prune_cli.criteria.criterion import Criterion, LayerView
from prune_cli.criteria.scoring import view_of
from prune_cli.criteria.statistics import Statistics, collect
from prune_cli.data.dataset import Loss
from prune_cli.errors import ConfigError, nearest
from prune_cli.files import artifacts, builders, pruned
from prune_cli.files.pruned import Record
from prune_cli.granularities.filter import Filter
from prune_cli.granularities.units import FindPlan, Normalize
from prune_cli.layers.replacing import closed
from prune_cli.reading import read_yaml
from prune_cli.reporting import Report, report_of
from prune_cli.selection import requirements
from prune_cli.selection.budget import Budget
from prune_cli.selection.granularity import Granularity
from prune_cli.selection.select import select
from prune_cli.selection.targets import Rule
from prune_cli.structure import follow, surgery, verified
from prune_cli.structure.lineage import Shrunk
from prune_cli.structure.prunable import targets

log = logging.getLogger(__name__)

ORIGIN = "_prune_record"
"""Attribute of a shrunk module that says where it comes from; copies of the module keep it."""
REPORT = "_prune_report"
"""Attribute of a shrunk module that says what `shrink` did."""

Score = Callable[[LayerView], Tensor]


def shrink(
    model: nn.Module,
    example_inputs: Any,
    ratio: float | Mapping[str, float] | None = None,
    *,
    budget: Mapping[str, float] | Budget | None = None,
    criterion: str | Score | Criterion = "l1",
    scope: Literal["layer", "global"] | None = None,
    normalize: Normalize | None = None,
    min_keep: float = 0.0,
    max_ratio: float = 1.0,
    batches: Iterable[tuple[Any, Tensor]] = (),
    loss: Loss | None = None,
    seed: int = 0,
    optimizer: torch.optim.Optimizer | None = None,
    warn: bool = True,
) -> nn.Module:
    """Removes the least important channels of a network, with everything that depends on them.

    Args:
        model: any module; left as it was. What its outputs consist of (the classes) is kept.
        example_inputs: a tensor, a tuple of positional arguments or a mapping of keyword arguments, such as a tokenizer
            returns.
        ratio: fraction of the channels to remove, in [0, 1), 0.5 unless told: one number, or one per layer (dotted
            name; the others stay as they are; of layers that are added to each other all must be named). A parameter
            that makes channels without being a layer's weight is named itself, as `experts.gate_up_proj`.
        budget: instead of `ratio`, what may remain: `{"macs": 0.5}` or `{"params": 0.5}`, fractions of the network on
            the example inputs, or `{"latency_ms": 3.0}` for one image.
        criterion: how important a channel is: an option of the command line (`l1`, `l2`, ...), or a function of a
            `LayerView` that returns scores like its weight or one per output channel; higher = keep.
        scope: `layer` removes that fraction of every coupled set of layers, `global` of all of them ranked together; None
            is `layer` for a ratio, and for a budget of MACs or parameters `global`, channels weighed against what they save.
        normalize: with scope `global`, what scores are divided by first: none, layer_mean, layer_l2 or lamp; None for
            what compares channels best.
        min_keep: fraction of a layer's channels that always stays; at least one channel does.
        max_ratio: largest fraction that may go from one layer.
        batches: (inputs, target) pairs for criteria that measure something on data; a few hundred examples do. Where
            inputs are a tuple of tensors (for `loss` to pass on), only criteria of gradients per batch can be used.
        loss: (model, inputs, target) -> mean loss of the batch, for criteria that use gradients; None = cross entropy
            of what `model(inputs)` returns.
        seed: for criteria that draw numbers.
        optimizer: of the parameters of `model`: from now on it is that of the small network, its momentum and moments
            sliced along; where nothing can be shrunk it stays as it was.
        warn: log at WARNING what the network's structure changed about the request: which layers stay whole, and why.
            `report` of the result says it in any case.

    Returns:
        A new module of the same class, with the same names, smaller tensors, and on the example the outputs that the
        given network has with those channels set to zero. What is taken over channels (layer and group norms, also written
        by hand, and softmax) sees only the channels that are left, as do statistics of a weight. It is compared with the
        given network on the example, on other values, scaled, with the other sign, and with a batch twice as large.
        Modules, and their hooks, run about ten times on copies of the inputs; what they keep in themselves is put back.

    Raises:
        ConfigError: a name that is not there, a value out of range, data missing that the criterion needs, a budget that
            cannot be met, or a network of layers that cannot be sliced (stripes).
        SurgeryError: the model does not run on the example inputs, or cannot be shrunk as asked.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model: {type(model).__name__} is no torch.nn.Module; give the network itself")
    if parts := closed(model):
        raise ConfigError(
            f"this network consists of {parts}, whose channels cannot be cut any more; shrink the network that they "
            "were taken from, or let prune run stages=[...,prune] go on from it"
        )
    _check_fractions(ratio, budget, min_keep, max_ratio)
    _check_optimizer(optimizer, model)
    if isinstance(example_inputs, Mapping):
        example_inputs = dict(example_inputs)
    chosen = _criterion(criterion, model)
    rules, most = _rules(0.5 if ratio is None else ratio)
    granularity = Granularity(
        Filter(),
        ratio=most,
        rules=rules,
        scope=validate(scope, "scope", Literal["layer", "global"] | None),
        normalize=validate(normalize, "normalize", Normalize | None),
        min_keep=min_keep,
        max_ratio=max_ratio,
        budget=_budget(budget, example_inputs),
    )
    plan = functools.cache(functools.partial(follow.analyse, model, example_inputs))
    with _in_arguments(), _heard(warn) as notes:
        granularity.check(model, chosen, example_inputs, plan)
        shrunk = _chosen(granularity, chosen, model, example_inputs, batches, loss, seed, plan)
        origin: Record | None = getattr(model, ORIGIN, None)
        lineage = None if origin is None else origin.lineage
        small = verified.checked(model, shrunk, {}, lineage=lineage, check_on=(example_inputs,))
        shrunk = small.shrunk or shrunk
    if optimizer is not None:
        surgery.repoint(optimizer, model, small.model, shrunk.lineage.kept)
    record = Record({"_target_": _class_of(model)}) if origin is None else origin
    object.__setattr__(small.model, ORIGIN, replace(record, lineage=small.lineage, cfg={}))
    object.__setattr__(small.model, REPORT, report_of(model, shrunk, example_inputs, tuple(notes)))
    return small.model


def report(model: nn.Module) -> Report:
    """What `shrink` did when it made this network.

    Raises:
        ConfigError: the network was not returned by `shrink` in this process.
    """
    found: Report | None = getattr(model, REPORT, None)
    if found is None:
        raise ConfigError(
            f"{type(model).__name__} was not returned by shrink in this process, so there is no report on it; "
            "ask for the report of small = shrink(model, ...)"
        )
    return found


def _chosen(
    granularity: Granularity,
    criterion: Criterion,
    model: nn.Module,
    example_inputs: Any,
    batches: Iterable[tuple[Any, Tensor]],
    loss: Loss | None,
    seed: int,
    plan: FindPlan,
) -> Shrunk:
    """The network without the units that the criterion finds least important."""
    asked = granularity.asked(model, criterion, plan)
    statistics = _statistics(criterion, model, example_inputs, batches, loss, list(asked))
    selection = select(
        granularity, criterion, model, example_inputs, statistics=statistics, seed=seed, asked=asked, plan=plan
    )
    log.info("removing %d of %d units", selection.removed, selection.units)
    if selection.candidate is None:  # nothing may shrink
        return surgery.remove_units(model, plan(), plan().everything())
    return surgery.remove_units(model, *selection.candidate)


@contextmanager
def _in_arguments() -> Iterator[None]:
    """Names the arguments of `shrink` where an error names the keys of a recipe."""
    try:
        yield
    except ConfigError as error:
        text = re.sub(r"granularity\.rules\[\d+\]\.names", "ratio", str(error))
        raise ConfigError(text.replace("granularity.", "")) from error


@contextmanager
def _heard(aloud: bool) -> Iterator[list[str]]:
    """Collects the warnings that are logged meanwhile, and passes them on or not."""
    lines: list[str] = []

    ours = logging.getLogger("prune_cli")
    passes, own = ours.propagate, list(ours.handlers)

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())
            if aloud and not own and not logging.getLogger().handlers and logging.lastResort:
                logging.lastResort.handle(record)  # as if this handler were not there

    ear = Ear(logging.WARNING)
    ours.addHandler(ear)
    if not aloud:
        ours.propagate = False
        for handler in own:
            ours.removeHandler(handler)
    try:
        yield lines
    finally:
        ours.removeHandler(ear)
        ours.propagate = passes
        for handler in own:
            ours.addHandler(handler)


def save_pruned(model: nn.Module, folder: str | Path, *, builder: Mapping[str, Any] | None = None) -> None:
    """Writes `pruned.yaml` and `weights.safetensors` of a network that `shrink` or `load_pruned` returned.

    Args:
        model: trained on or not.
        folder: made if it is not there.
        builder: how to build the dense network, as in a recipe's `model` with `num_classes` and `in_shape`; then
            `load_pruned(folder)` needs no `model`. Only for networks of prune, torchvision and timm, for example
            `{"_target_": "prune_cli.models.torchvision.torchvision", "name": "resnet18", "num_classes": 10,
            "in_shape": [3, 32, 32]}`.

    Raises:
        ConfigError: the network does not come from `shrink`.
        CheckpointError: a builder that would be refused when it is loaded.
        StorageError: the folder cannot be written.
    """
    origin: Record | None = getattr(model, ORIGIN, None)
    if origin is None:
        raise ConfigError(
            f"{type(model).__name__} was not returned by shrink or load_pruned, so nobody knows what was removed; "
            "save the result of small = shrink(model, ...)"
        )
    if builder is not None:
        builders.require_ours(builder, "save_pruned")
        origin = Record(dict(builder), origin.lineage, dense_sha256=origin.dense_sha256)
    folder = Path(folder)
    with artifacts.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    pruned.write(folder, model, origin)


def load_pruned(folder: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The network of a folder with `pruned.yaml`, or of a compressed file.

    Args:
        folder: a stage folder of a run, or one that `save_pruned` wrote: it holds `pruned.yaml` and
            `weights.safetensors`. Or the `weights.compressed` of a weight-sharing stage, which needs nothing beside it.
        model: the dense network, needed for one's own classes: `load_pruned(folder, model=MyNet())`. Its weights do
            not matter, and it is left as it was.

    Returns:
        The small network, on the CPU, in evaluation mode, with the same logits bit for bit.

    Raises:
        CheckpointError: files that are damaged, were edited or do not fit, or a builder outside prune and no `model`.
    """
    path = Path(folder)
    if path.is_file():
        small, record = pruned.load_compressed(path, model)
    else:
        small, record = pruned.load(path, model), pruned.read(path).record
    object.__setattr__(small, ORIGIN, record)
    return small


def _criterion(given: str | Score | Criterion, model: nn.Module) -> Criterion:
    if isinstance(given, Criterion):
        return given
    if callable(given):
        return Criterion(given, _level(given, model))
    if not isinstance(given, str):
        raise ConfigError(f"criterion: {given!r} is no option's name and no function of a LayerView")
    known = options("criterion")
    if given not in known:
        raise ConfigError(f"criterion: there is no {given!r}{nearest(given, known)}")
    found: Criterion = resolve(read_yaml(known[given], ConfigError), "criterion", Criterion)
    return found


def _level(score: Score, model: nn.Module) -> Literal["element", "channel"]:
    """What one score of a function stands for, seen on the first layer."""
    for name in targets(model):
        view = view_of(model, name, 0)
        return "element" if score(view).shape == view.weight.shape else "channel"
    raise ConfigError(f"{type(model).__name__} has no convolution and no linear layer to shrink")


def _statistics(
    criterion: Criterion,
    model: nn.Module,
    example_inputs: Any,
    batches: Iterable[tuple[Any, Tensor]],
    loss: Loss | None,
    names: list[str],
) -> Statistics:
    """What the criterion needs, measured on the batches."""
    left = sorted(need.name for need in criterion.entries if not need.any_inputs)
    if left and not isinstance(example_inputs, Tensor):
        raise ConfigError(
            f"criterion: {', '.join(left)} can only be measured on models of one input tensor; choose one that "
            "reads the weights, such as l1 or fpgm, or taylor_group"
        )
    examples = list(batches) if requirements.needs_images(criterion) else []
    for number, pair in enumerate(examples):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise ConfigError(
                f"batches: number {number} is no pair; give [(inputs, target), ...], as a DataLoader does"
            )
    if requirements.needs_images(criterion) and not examples:
        raise ConfigError(
            "criterion: needs data; give batches=[(inputs, target), ...] and, if not cross entropy, loss="
        )
    return collect(
        model,
        examples,
        criterion.needs,
        loss or _cross_entropy,
        example_inputs,
        at=criterion.at,
        norms=criterion.norms,
        names=names,
    )


def _cross_entropy(model: nn.Module, inputs: Any, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(inputs), target)


def _check_fractions(
    ratio: float | Mapping[str, float] | None, budget: object, min_keep: float, max_ratio: float
) -> None:
    if ratio is not None and budget is not None:
        raise ConfigError("ratio and budget both say how much goes; give one of them")
    ratios = {"ratio": ratio} if not isinstance(ratio, Mapping) else {f"ratio of {k}": v for k, v in ratio.items()}
    for name, value in [*ratios.items(), ("min_keep", min_keep)][ratio is None :]:
        if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= value < 1:
            raise ConfigError(f"{name}: {value!r} is not a fraction from 0 to below 1")
    if not isinstance(max_ratio, Real) or not 0 < max_ratio <= 1:
        raise ConfigError(f"max_ratio: {max_ratio!r} is not a fraction above 0, at most 1")


def _check_optimizer(optimizer: torch.optim.Optimizer | None, model: nn.Module) -> None:
    """Refuses an optimizer of something else, before anything is done.

    Raises:
        ConfigError: none of its parameters is the network's.
    """
    if optimizer is None:
        return
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(
            f"optimizer: {type(optimizer).__name__} is no torch.optim.Optimizer; give the one that trains it"
        )
    own = {id(parameter) for parameter in model.parameters()}
    if not any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
        raise ConfigError(
            f"optimizer: none of its parameters is one of {type(model).__name__}; give the optimizer that trains it"
        )


def _budget(given: Mapping[str, float] | Budget | None, example_inputs: Any) -> Budget | None:
    """The budget, checked.

    Raises:
        ConfigError: not exactly one of macs, params and latency_ms, a value out of range, or a latency of no image.
    """
    if given is None:
        return None
    found: Budget = given if isinstance(given, Budget) else resolve(dict(given), "budget", Budget)
    if found.quantity == "latency_ms" and not isinstance(example_inputs, Tensor):
        raise ConfigError("budget: latency_ms is that of a network of one input tensor; give macs or params")
    return found


def _rules(ratio: float | Mapping[str, float]) -> tuple[tuple[Rule, ...], float]:
    if not isinstance(ratio, Mapping):
        return (), ratio
    rules = tuple(Rule(names=(name,), ratio=value) for name, value in ratio.items())
    return rules, max(ratio.values(), default=0.0)


def _class_of(model: nn.Module) -> str:
    return f"{type(model).__module__}.{type(model).__qualname__}"
