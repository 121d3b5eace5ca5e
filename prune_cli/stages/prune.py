"""Pruning: carries out the requests of a schedule, and can stop and resume between and inside any two of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any

from torch import Tensor

from prune_cli import masks as masking
from prune_cli.config.nodes import Flat
from prune_cli.criteria.criterion import Criterion
from prune_cli.criteria.needs import Need
from prune_cli.criteria.statistics import Calibration, Statistics, collect
from prune_cli.distillation.distillation import Distillation
from prune_cli.errors import ConfigError
from prune_cli.files import artifacts
from prune_cli.granularities.units import Constraint
from prune_cli.measure.storage import MaskFormat
from prune_cli.pipeline import shrinking
from prune_cli.pipeline.stage import Parameters, Stage
from prune_cli.pipeline.state import Outcome, State
from prune_cli.schedules.requests import Done, Mask, Memo, Split, Train
from prune_cli.schedules.schedule import Schedule, most_epochs
from prune_cli.selection import requirements
from prune_cli.selection.granularity import Granularity
from prune_cli.selection.select import Selection, select
from prune_cli.stages import learning, teaching
from prune_cli.training import admm
from prune_cli.training import fit as loop
from prune_cli.training.distributed import same_masks
from prune_cli.training.fit import OptimizerFactory, Progress
from prune_cli.training.step_sums import StepSum, summed
from prune_cli.training.training import Training

log = logging.getLogger(__name__)

FIT, MASKS, Z, U = "fit/", "masks/", "z/", "u/"
RESIDUALS = "admm.csv"


@dataclass
class _Course:
    """Where a pruning stands: the memo before the pending request, masks, and the training that goes on.

    Attributes:
        forms: how those of the masks that are this stage's are stored.
        splits: name of a constraint set -> what it keeps of the weights, while a schedule splits them.
        rho: weight of the penalty that ties the weights to their splits; None before the first.
        residuals: lines of the table of residuals so far.
    """

    memo: Memo | None = None
    masks: dict[str, Tensor] = field(default_factory=dict)
    forms: dict[str, MaskFormat] = field(default_factory=dict)
    progress: Progress | None = None
    facts: dict[str, float] = field(default_factory=dict)
    splits: dict[str, admm.Split] = field(default_factory=dict)
    rho: float | None = None
    residuals: list[admm.Residual] = field(default_factory=list)

    def tensors(self, training: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All tensors of a checkpoint, with those of the training."""
        named = {FIT + name: value for name, value in training.items()}
        named |= {MASKS + name: value for name, value in self.masks.items()}
        for constraint, split in self.splits.items():
            named |= {f"{Z}{constraint}/{name}": value for name, value in split.z.items()}
            named |= {f"{U}{constraint}/{name}": value for name, value in split.u.items()}
        return named

    def numbers(self, training: Mapping[str, Any], *, trained: bool) -> dict[str, Any]:
        """The rest of a checkpoint, JSON-serialisable, with that of the training."""
        return {
            "memo": self.memo, "fit": training, "facts": self.facts, "trained": trained, "splits": list(self.splits),
            "forms": {name: asdict(form) for name, form in self.forms.items()}, "rho": self.rho, "residuals": [asdict(residual) for residual in self.residuals],
        }  # fmt: skip

    def keep(self, state: State) -> None:
        """Writes the checkpoint between two requests."""
        training = self.progress or Progress()
        state.keep(
            self.tensors(training.tensors(state.model)),
            self.numbers(training.numbers(), trained=self.progress is not None),
        )


def check(
    state: State,
    *,
    criterion: Criterion,
    granularity: Granularity,
    schedule: Schedule,
    distillation: Distillation,
    training: Training,
) -> State:
    """Refuses combinations that make no sense for this network, before anything is trained.

    Returns:
        the state as later stages will find it: it says whether the network is smaller then.

    Raises:
        ConfigError: says why and what would be legal.
    """
    teaching.check(state, distillation)
    if training.fit.select_on != "last":
        raise ConfigError(
            f"{state.stage}.fit.select_on={training.fit.select_on}: masks change during pruning, so only the last epoch has "
            "all of them; select on a split in finetune instead"
        )
    granularity.check(state.model, criterion, state.example_inputs())
    requirements.check(
        criterion, granularity, state.model, state.data, state.example_inputs(), trained=_trains_first(schedule)
    )
    _check_coupling(state, granularity)
    return state.evolve(shrunk_by=state.stage) if granularity.shrink else state


def _epochs(parameters: Parameters) -> int | None:
    return most_epochs(parameters["schedule"])


@Stage(check=check, trains=_epochs, removes=True, reads_weights=True)
def prune(
    state: State,
    *,
    criterion: Criterion,
    granularity: Granularity,
    schedule: Schedule,
    distillation: Distillation,
    training: Annotated[Training, Flat()],
    calibration: Calibration,
) -> State:
    """Chooses what to remove, in the steps that the schedule asks for, and trains in between where it asks.

    When the schedule is done, a granularity with `shrink` takes the masked units out of the network: so every
    schedule works with masks alone, and what is saved between its requests has one shape.

    Args:
        training: how to train where the schedule asks for it.
        calibration: images for criteria that need them.
    """
    whole, constraints = granularity.split(state.model)  # of the network as it came, also when going on
    course = _resumed(state, training.optimizer)
    loss = None
    while True:
        memo, request = schedule(course.memo)
        if isinstance(request, Done):
            break
        if isinstance(request, Mask):
            chosen = whole if course.splits else granularity
            selection = _mask(state, course, request, criterion, chosen, calibration)
            course.facts = _facts(selection)
            course.masks, course.splits = selection.masks, {}
            masking.apply(state.model, course.masks)
        elif isinstance(request, Split):
            _split(state, course, request, criterion, granularity, constraints, calibration)
        elif isinstance(request, Train):
            if request.enforce and course.masks:
                course.masks = _completed(state, granularity, course.masks)
            loss = loss or teaching.objective(state, distillation, training.label_smoothing)
            sums = {
                need: list(granularity.ratios(state.model)) for need in criterion.entries if need.source == "training"
            }
            _train(state, course, request, loss, sums, training)
        course.memo = memo
        course.keep(state)
    if course.masks:
        course.masks = _completed(state, granularity, course.masks)
    facts = course.facts
    outcome = Outcome(
        epochs=course.progress.epoch if course.progress else 0,
        select_on=training.fit.select_on if course.progress else None,
        ratio_requested=facts.get("requested"),
        ratio_prunable=facts["removed"] / max(facts["units"], 1) if facts else None,
        ratio_channels=facts["channels_removed"] / facts["channels"] if facts.get("channels") else None,
        history=tuple(course.progress.history) if course.progress else (),
        files={RESIDUALS: artifacts.table(admm.Residual, course.residuals)} if course.residuals else {},
    )
    # What an earlier stage masked keeps its form, although these masks are joined with it.
    after = state.evolve(masks=course.masks or state.masks, forms={**course.forms, **state.forms}, outcome=outcome)
    return shrinking.shrink_state(after, granularity.units) if granularity.shrink else after


def _completed(state: State, granularity: Granularity, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The masks with what they leave useless, applied to the network."""
    completed = granularity.complete(state.model, state.example_inputs(), masks)
    masking.apply(state.model, completed)
    return completed


def _trains_first(schedule: Schedule) -> bool:
    """Whether a schedule trains before it first asks for scores; its parameters are checked by asking."""
    return isinstance(schedule(None)[1], Train)


def _check_coupling(state: State, granularity: Granularity) -> None:
    """Refuses to prune by other norms than those that an earlier stage made sparse."""
    if state.sparse_norms is None or not granularity.units.coupled:
        return
    matching = {"inner": ("inner_only",), "all": ("group", "union_keep")}[state.sparse_norms]
    if granularity.dependency not in matching:
        raise ConfigError(
            f"{state.stage}: granularity.dependency={granularity.dependency}, but the network was made sparse with "
            f"regulariser.norms={state.sparse_norms}, which goes with dependency={' or '.join(matching)}"
        )


def _facts(selection: Selection) -> dict[str, float]:
    """The numbers of a selection that a resumed stage reports too."""
    names = ("requested", "units", "removed", "channels", "channels_removed")
    return {name: value for name in names if (value := getattr(selection, name)) is not None}


def _mask(
    state: State,
    course: _Course,
    request: Mask,
    criterion: Criterion,
    granularity: Granularity,
    calibration: Calibration,
) -> Selection:
    # What an earlier stage removed stays removed; what this one did, only where the schedule says so.
    held: Mapping[str, Tensor] = (course.masks or state.masks) if request.monotone else state.masks
    statistics = _statistics(state, course, criterion, granularity, calibration)
    selection = _select(state, granularity, criterion, statistics, held, request.share)
    course.forms = granularity.forms(state.model, selection.masks)
    log.info("%s: removed %d of %d units", state.stage, selection.removed, selection.units)
    return replace(selection, masks=masking.joined(held, selection.masks))


def _select(
    state: State,
    granularity: Granularity,
    criterion: Criterion,
    statistics: Statistics,
    held: Mapping[str, Tensor],
    share: float = 1.0,
) -> Selection:
    """Masks to join with those that are held, the same on every rank."""
    selection = select(
        granularity,
        criterion,
        state.model,
        state.example_inputs(),
        share=share,
        masked=held,
        statistics=statistics,
        seed=state.stage_seed % 2**62,
    )
    same_masks(state.world, selection.masks)
    return selection


def _split(
    state: State,
    course: _Course,
    request: Split,
    criterion: Criterion,
    granularity: Granularity,
    constraints: tuple[Constraint, ...],
    calibration: Calibration,
) -> None:
    """Projects W + U onto every constraint set, with statistics of W where the criterion needs some."""
    weights = {name: parameter.detach() for name, parameter in state.model.named_parameters()}
    last = course.residuals[-1].iteration + 1 if course.residuals else 0
    splits = {}
    for constraint in constraints:
        scored = constraint.criterion or criterion
        units = replace(granularity, units=constraint.units)
        statistics = _statistics(state, course, scored, units, calibration)

        def project(
            values: admm.Weights,
            scored: Criterion = scored,
            units: Granularity = units,
            statistics: Statistics = statistics,
        ) -> Mapping[str, Tensor]:
            with admm.substituted(state.model, values):
                return masking.joined(state.masks, _select(state, units, scored, statistics, state.masks).masks)

        before = course.splits.get(constraint.name)
        after = admm.step(weights, before, project)
        found = admm.residuals(
            weights, before, after, rho=course.rho, constraint=constraint.name, iteration=last,
            epoch=course.progress.epoch if course.progress else 0,
        )  # fmt: skip
        course.residuals += found
        splits[constraint.name] = admm.rescaled(after, (course.rho or request.rho) / request.rho)
        if found:
            dual = "" if found[-1].dual is None else f", dual {found[-1].dual:.2e}"
            log.info("%s: iteration %d, %s: primal residual %.4f%s, rho %g",
                     state.stage, last, constraint.name, found[-1].primal, dual, request.rho)  # fmt: skip
    course.splits, course.rho = splits, request.rho


def _statistics(
    state: State, course: _Course, criterion: Criterion, granularity: Granularity, calibration: Calibration
) -> Statistics:
    """What the criterion needs: measured on the network as it is now, and summed up while it trained."""
    found = statistics_of(state, criterion, granularity, calibration)
    for need in criterion.entries:
        if need.source == "training" and course.progress:
            for name in found:
                found[name][need.name] = summed(need, course.progress.memory, name, state.device)
    return found


def statistics_of(state: State, criterion: Criterion, granularity: Granularity, calibration: Calibration) -> Statistics:
    """What the criterion needs, measured on the network as it is now, with its loss on the labels alone."""
    images = requirements.needs_images(criterion)
    batches = state.data.calibration(calibration.images, calibration.batch_size) if images else ()
    shared = state.world.size > 1 and len(batches) >= state.world.size  # else every rank sees all of them
    if shared:
        batches = state.data.calibration(calibration.images, calibration.batch_size, shard=state.world.shard)
    return collect(
        state.model,
        batches,
        criterion.needs,
        learning.cross_entropy(0.0),
        state.example_inputs(),
        at=criterion.at,
        names=list(granularity.ratios(state.model)),
        reduce=state.world.add_up if shared else None,
    )


def _train(
    state: State,
    course: _Course,
    request: Train,
    loss: loop.Loss,
    sums: Mapping[Need, Sequence[str]],
    training: Training,
) -> None:
    def save(tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        state.keep(course.tensors(tensors), course.numbers(numbers, trained=True))

    progress = course.progress or Progress()

    def rate() -> float:
        assert progress.optimizer is not None
        return float(progress.optimizer.param_groups[0]["lr"])

    # Statistics are of the loss alone, so they come before anything is added to its gradients.
    hooks: list[loop.Regularise] = [StepSum(need, state.model, names, rate) for need, names in sums.items()]
    if request.pull:
        assert course.rho is not None, "a schedule splits before it pulls"
        hooks.append(admm.Pull(state.model, list(course.splits.values()), course.rho))

    def regularise(step: int, memory: dict[str, Tensor]) -> None:
        for hook in hooks:
            hook(step, memory)

    course.progress = learning.learn(
        state,
        loss,
        epochs=request.of,
        until=request.until,
        training=training,
        masks=course.masks if request.enforce else state.masks,
        regularise=regularise if hooks else None,
        progress=progress,
        save=save,
    )


def _resumed(state: State, optimizer: OptimizerFactory) -> _Course:
    found = state.unfinished()
    if not found:
        return _Course()
    tensors, numbers = found

    def named(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    def placed(prefix: str) -> dict[str, Tensor]:
        return {name: value.to(state.device) for name, value in named(prefix).items()}

    progress = loop.restore_progress(state.model, optimizer, named(FIT), numbers["fit"])
    splits = {name: admm.Split(placed(f"{Z}{name}/"), placed(f"{U}{name}/")) for name in numbers["splits"]}
    log.info("%s: going on from epoch %d, step %d", state.stage, progress.epoch + 1, progress.step)
    forms = {name: MaskFormat(**form) for name, form in numbers["forms"].items()}
    return _Course(
        numbers["memo"],
        placed(MASKS),
        forms,
        progress if numbers["trained"] else None,
        numbers["facts"],
        splits,
        numbers["rho"],
        [admm.Residual(**row) for row in numbers["residuals"]],
    )
