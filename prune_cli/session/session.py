"""A pruning at work: the state that its requests change, and what a checkpoint holds of it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from prune_cli import masks as masking
from prune_cli.criteria.criterion import Criterion
from prune_cli.criteria.statistics import Calibration, Statistics
from prune_cli.data.dataset import Loss
from prune_cli.distillation.distillation import Distillation
from prune_cli.errors import ScheduleError, nearest
from prune_cli.files import artifacts
from prune_cli.granularities.units import Context, Group
from prune_cli.measure.storage import MaskFormat
from prune_cli.pipeline import shrinking
from prune_cli.pipeline.state import Outcome, State, derive_seed
from prune_cli.schedules.problem import Problem
from prune_cli.selection.granularity import Granularity
from prune_cli.selection.select import Selection, scored, select
from prune_cli.session import learning, remembering, teaching
from prune_cli.session.measuring import statistics_of
from prune_cli.session.posing import pose
from prune_cli.session.remembering import FRESH, INIT, Snapshot
from prune_cli.session.standing import Clock, Removed, shrink_progress
from prune_cli.session.tally import Tally
from prune_cli.structure import follow, rebuild
from prune_cli.structure.lineage import Lineage
from prune_cli.structure.plan import Plan
from prune_cli.training import admm
from prune_cli.training import fit as loop
from prune_cli.training.distributed import ALONE, same_masks
from prune_cli.training.fit import Progress
from prune_cli.training.step_sums import StepSum, summed
from prune_cli.training.training import Training

log = logging.getLogger(__name__)

FIT, MASKS, HELD, LOSS, ADMM, SNAPSHOT, HIDDEN = "fit/", "masks/", "held/", "loss/", "admm/", "snapshot/", "hidden/"
RESIDUALS = "admm.csv"


class Session:
    """Owns what a stage changes: the network, its masks, trainings and snapshots.

    The channel plan is found once per network, and the ratios once.

    Args:
        state: as it came to the stage.
        training, epochs: how to train, and how long at most; None where nobody knows.
    """

    def __init__(
        self,
        state: State,
        *,
        criterion: Criterion,
        granularity: Granularity,
        calibration: Calibration,
        distillation: Distillation,
        training: Training,
        epochs: int | None = None,
    ) -> None:
        self.state, self.criterion, self.granularity = state, criterion, granularity
        self.calibration, self.distillation, self.training, self.epochs = calibration, distillation, training, epochs
        self.masks: dict[str, Tensor] = {}
        self.forms: dict[str, MaskFormat] = {}
        self.hidden: dict[str, Tensor] = {}  # parameter name -> what is behind its mask, 0 elsewhere
        self.removed = Removed()
        self.taken = Removed()  # by Shrink, before the present network
        self.clock = Clock()
        self.splitting = admm.Splitting()
        self.snapshots: dict[str, Snapshot] = {}
        self.left: frozenset[str] = frozenset()  # of these, what the stage leaves in its folder
        self.shrunk: Lineage | None = None  # from the network that came to the present one
        self.came = state.lineage  # from the dense network to the one that came
        self.problem: Problem | None = None
        self.warned = False  # that scores are of training images
        self.tally = Tally(state.stage)
        self.bench: Any = None  # what is known of the network while candidates are tried out: bench.Bench
        self.touched = True  # since that was found out
        self._loss: Loss | None = None
        self._waiting: dict[str, Tensor] = {}  # parameters of the loss, as a checkpoint has them
        self._look_at_network()

    # ------------------------------------------------------------------------------------------------ the network

    def _look_at_network(self) -> None:
        """Forgets what was found out about another network; constraint sets are those of the weights as they are."""
        self._plan: Plan | None = None
        self.asked = self.granularity.asked(self.state.model, self.criterion, self.plan)
        self.whole, self.constraints = self.granularity.split(self.state.model, self.asked)

    @property
    def model(self) -> nn.Module:
        """The network as it is now."""
        return self.state.model

    def plan(self) -> Plan:
        """Its channel plan, analysed once."""
        if self._plan is None:
            self._plan = follow.analyse(self.model, self.state.example_inputs())
        return self._plan

    def pose(self) -> Problem:
        """What the schedule may know of the network as it is now; times are those of rank 0."""
        before = self.problem
        problem = pose(
            self.granularity,
            self.model,
            self.state.example_inputs(),
            asked=self.asked,
            masked=self.state.masks,
            tags=tags(self.state),
            seed=self.state.stage_seed,
            steps=self.steps(),
            plan=self.plan,
            budget=None if before is None else (before.quantity, before.budget),
            learns=self.criterion.reads("training"),
        )
        self.problem = Problem.from_dict(self.state.world.broadcast(problem.to_dict()))
        return self.problem

    # ------------------------------------------------------------------------------------------------ choosing

    def held(self, *, monotone: bool = True) -> Mapping[str, Tensor]:
        """What stays removed: what an earlier stage did, and what this one did where the schedule says so."""
        return self.masks if monotone and self.masks else self.state.masks

    def statistics(self, criterion: Criterion) -> Statistics:
        """What a criterion needs: measured on the network as it is now, and summed up while it trained."""
        found = statistics_of(self.state, criterion, list(self.asked), self.calibration)
        for need in criterion.entries:
            if need.source == "training" and self.clock.progress:
                for name in found:
                    found[name][need.name] = summed(need, self.clock.progress.memory, name, self.state.device)
        return found

    def select(
        self,
        granularity: Granularity,
        criterion: Criterion,
        statistics: Statistics,
        held: Mapping[str, Tensor],
        *,
        fraction: float = 1.0,
        kept: Mapping[str, int] | None = None,
        quiet: bool = False,
    ) -> Selection:
        """Masks to join with those that are held, the same on every rank."""
        selection = select(
            granularity,
            criterion,
            self.model,
            self.state.example_inputs(),
            fraction=fraction,
            kept=kept,
            masked=held,
            statistics=statistics,
            seed=self.state.stage_seed % 2**62,
            asked=self.asked,
            plan=self.plan,
            quiet=quiet,
        )
        same_masks(self.state.world, selection.masks)
        return selection

    def scored(
        self,
        statistics: Statistics,
        kept: Mapping[str, int] | None = None,
        *,
        criterion: Criterion | None = None,
        held: Mapping[str, Tensor] | None = None,
        seed: int | None = None,
    ) -> list[Group]:
        """The groups of units with their scores by the present weights; what is masked already ranks lowest.

        Args:
            statistics: of the criterion, for these weights.
            kept: what will be kept of each, for criteria that need to know.
            criterion: instead of the stage's own.
            held: what is masked already; by default all that is.
            seed: for criteria that draw numbers; the stage's own by default.
        """
        masked = self.held() if held is None else held
        context = Context(
            self.model, self.state.example_inputs(), {}, self.asked, masked, self.granularity.dependency, self.plan
        )
        drawn = self.state.stage_seed % 2**62 if seed is None else seed
        return scored(self.granularity, criterion or self.criterion, context, statistics, drawn, kept=kept)

    def keep(self, selection: Selection, held: Mapping[str, Tensor]) -> None:
        """Takes note of a choice; nothing is zeroed here."""
        self.masks = masking.joined(held, selection.masks)
        self.forms = self.granularity.forms(self.model, selection.masks, self.asked)
        self.removed = Removed(
            selection.units, selection.removed, selection.channels, selection.channels_removed, selection.requested
        )

    @property
    def requested(self) -> float | None:
        """What was asked of the network that came."""
        return self.removed.requested if self.taken.requested is None else self.taken.requested

    def hide(self, masks: Mapping[str, Tensor]) -> None:
        """From now on these masks hold, and what they zero keeps its values behind them."""
        self.masks = dict(masks)
        weights = {name: self.model.get_parameter(name).detach() for name in masks}
        self.hidden = {
            name: weights[name].masked_fill(mask.to(weights[name].device), 0) for name, mask in masks.items()
        }

    @torch.no_grad()
    def reveal(self) -> None:
        """What is behind masks has its values again."""
        for name, values in self.hidden.items():
            parameter = self.model.get_parameter(name)
            parameter.copy_(torch.where(values != 0, values, parameter))
        self.hidden = {}

    def fix(self) -> None:
        """The whole masks hold from now on, with what they leave useless."""
        if self.masks:
            self.masks = self.granularity.complete(self.model, self.state.example_inputs(), self.masks, self.plan)
            masking.apply(self.model, self.masks)

    # ------------------------------------------------------------------------------------------------ training

    def train(
        self,
        progress: Progress,
        *,
        epochs: int,
        until: tuple[int, int],
        masks: Mapping[str, Tensor],
        penalty: bool = False,
        shrinkage: float = 0.0,
        save: learning.Save | None = None,
        candidate: bool = False,
        seed: int | None = None,
    ) -> Progress:
        """Trains the network on.

        Args:
            progress: where the training stands.
            epochs: length of the training, `until` the epoch and the batches of it to reach.
            masks: what is held at zero.
            penalty: tie the weights to their projections.
            shrinkage: of scores that are learned; see `Train`.
            save: takes a checkpoint's tensors and numbers.
            candidate: a trial by this process alone: nothing is summed up, and of several processes none stops inside.
            seed: of the batches; the stage's own by default.
        """
        hooks = [] if candidate else self._hooks(progress, penalty=penalty, shrinkage=shrinkage)

        def regularise(step: int, memory: dict[str, Tensor]) -> None:
            for hook in hooks:
                hook(step, memory)

        state, training = self.state, self.training
        if candidate:
            alone = state.world.size == 1
            stop = state.interrupted if alone else lambda: False
            state = replace(state, world=ALONE, interrupted=stop, stage=f"{state.stage}, candidate")
            training = replace(training, fit=replace(training.fit, eval_every=0, early_stop=None))
        return learning.learn(
            state,
            self.loss(),
            epochs=epochs,
            until=until[0],
            beyond=until[1],
            training=training,
            masks=masks,
            regularise=regularise if hooks else None,
            progress=progress,
            save=save,
            seed=seed,
        )

    def loss(self) -> Loss:
        """The loss of the present network; made once, as a term may have parameters that are trained along."""
        if self._loss is None:
            self._loss = teaching.objective(self.state, self.distillation, self.training, self.epochs)
            if self._waiting and isinstance(self._loss, nn.Module):
                self._loss.load_state_dict(self._waiting)
        return self._loss

    def seed(self) -> int:
        """Of the order and the augmentation of the present training's batches."""
        begun, seed = self.clock.begun, self.state.stage_seed
        return seed if begun <= 1 else derive_seed(seed, "training", begun)

    def _hooks(self, progress: Progress, *, penalty: bool, shrinkage: float) -> list[loop.Regularise]:
        """What accompanies a training. Sums are of the loss's own gradient, so they come before anything is added."""

        def rate() -> float:
            assert progress.optimizer is not None
            return float(progress.optimizer.param_groups[0]["lr"])

        needs = [need for need in self.criterion.entries if need.source == "training"]
        hooks: list[loop.Regularise] = [
            StepSum(need, self.model, list(self.asked), rate, hidden=self.hidden, shrinkage=shrinkage) for need in needs
        ]
        if penalty:
            if self.splitting.rho is None:
                raise ScheduleError("schedule: it asks for the penalty of a projection before the first `Project`")
            hooks.append(admm.Pull(self.model, list(self.splitting.sets.values()), self.splitting.rho))
        return hooks

    def batches(self) -> int:
        """Batches of an epoch."""
        return batches(self.state, self.training)

    def steps(self) -> int:
        """Optimizer steps of an epoch."""
        return optimizer_steps(self.state, self.training)

    # ------------------------------------------------------------------------------------------------ snapshots

    def snapshot(self, tag: str) -> Snapshot:
        """What a schedule, or an earlier train stage, keeps under a tag, in the shape of the present network.

        Raises:
            ScheduleError: nothing is kept under it.
        """
        if tag in self.snapshots:
            return self.snapshots[tag]
        if tag not in tags(self.state):
            raise ScheduleError(
                f"schedule: nothing is remembered as {tag!r}{nearest(tag, [*tags(self.state), *self.snapshots])}"
            )
        if tag in (INIT, FRESH):
            found = Snapshot(self._initial(tag))
        else:
            world = self.state.world
            one = remembering.read(self.state.remembered[tag]) if world.main else None
            weights = world.broadcast_tensors(one.weights if one else None)
            found = Snapshot(weights, {}, *world.broadcast([one.epoch, one.step, one.steps] if one else None))
        if _shapes(found.weights) == _shapes(self.model.state_dict()):
            return found
        with torch.device("meta"):
            dense = _shapes(self.state.architecture.build().state_dict())
        if any(dense[name] != shape for name, shape in _shapes(found.weights).items()):
            raise ScheduleError(
                f"schedule: {tag!r} was remembered of a network that had been shrunk before; remember it in a train stage "
                "before the first prune stage"
            )
        for lineage in (self.came, self.shrunk):
            found = found if lineage is None else found.shrunk(lineage)
        return found

    def _initial(self, tag: str) -> Mapping[str, Tensor]:
        """The run's initial weights, or others."""
        if tag == INIT:
            return self.state.architecture.build().state_dict()
        return self.state.architecture.build(f"{FRESH}/{self.state.stage}").state_dict()

    def shrink(self) -> None:
        """Takes what the masks remove out of the network; moments, sums and snapshots go along."""
        self.fix()
        before, joined = self.model, masking.joined(self.state.masks, self.masks)
        if not joined:
            return
        small = shrinking.taken_out(self.state.evolve(masks=joined), self.granularity.units, self.plan)
        # What is chosen from next are the weights of plain layers.
        model, masks, lineage = rebuild.expanded(small.model, small.masks, small.lineage)
        if (progress := self.clock.progress) is not None:
            shrink_progress(progress, before, model, lineage)
        self.snapshots = {tag: one.shrunk(lineage) for tag, one in self.snapshots.items()}
        self.shrunk = lineage if self.shrunk is None else lineage.after(self.shrunk)
        self._become(model, masks, {**self.forms, **self.state.forms})
        self.taken = Removed(
            removed=self.taken.removed + self.removed.removed,
            channels_removed=self.taken.channels_removed + self.removed.channels_removed,
            requested=self.requested,
        )
        self.masks, self.forms, self.hidden, self.splitting = {}, {}, {}, self.splitting.ended()
        self.removed = Removed(
            self.removed.units - self.removed.removed, 0, self.removed.channels - self.removed.channels_removed
        )

    def _become(self, model: nn.Module, masks: Mapping[str, Tensor], forms: Mapping[str, MaskFormat]) -> None:
        """Goes on with a smaller network."""
        assert self.shrunk is not None
        whole = self.shrunk if self.came is None else self.shrunk.after(self.came)
        self.state = self.state.evolve(model=model, masks=masks, forms=forms, lineage=whole)
        self._loss, self._waiting = None, {}  # its parameters, if any, are those of the larger network's features
        self._look_at_network()

    # ------------------------------------------------------------------------------------------------ checkpoints

    def tensors(self, training: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All tensors of a checkpoint, with those of the training."""
        named = {FIT + name: value for name, value in training.items()}
        named |= {MASKS + name: value for name, value in self.masks.items()}
        named |= {HIDDEN + name: value for name, value in self.hidden.items()}
        if self.shrunk is not None:
            named |= {HELD + name: value for name, value in self.state.masks.items()}
        named |= {ADMM + name: value for name, value in self.splitting.tensors().items()}
        own = self._loss.state_dict() if isinstance(self._loss, nn.Module) else self._waiting
        named |= {LOSS + name: value for name, value in own.items()}
        for tag, one in self.snapshots.items():
            named |= {f"{SNAPSHOT}{tag}/weights/{name}": value for name, value in one.weights.items()}
            named |= {f"{SNAPSHOT}{tag}/masks/{name}": value for name, value in one.masks.items()}
        return named

    def numbers(self, training: Mapping[str, Any]) -> dict[str, Any]:
        """The rest of a checkpoint, JSON-serialisable, with that of the training."""
        clock = self.clock
        return {
            "fit": training, "trained": clock.progress is not None, "total": clock.total, "until": clock.until,
            "begun": clock.begun, "removed": asdict(self.removed), "taken": asdict(self.taken),
            "forms": {name: asdict(form) for name, form in self.forms.items()},
            "held": {name: asdict(form) for name, form in self.state.forms.items()},
            "admm": self.splitting.numbers(), "shrunk": None if self.shrunk is None else self.shrunk.to_dict(),
            "left": sorted(self.left),
            "snapshots": {tag: [one.epoch, one.step, one.steps, dict(one.facts)] for tag, one in self.snapshots.items()},
        }  # fmt: skip

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """The inverse of `tensors` and `numbers`: goes on from a checkpoint of this stage."""

        def those(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

        def placed(prefix: str) -> dict[str, Tensor]:
            return {name: value.to(self.state.device) for name, value in those(prefix).items()}

        if numbers["shrunk"] is not None:
            self.shrunk = Lineage.from_dict(numbers["shrunk"])
            small = rebuild.rebuild(self.model, self.shrunk)
            forms = {name: MaskFormat(**form) for name, form in numbers["held"].items()}
            self._become(small, placed(HELD), forms)
        progress = loop.restore_progress(self.model, self.training.optimizer, those(FIT), numbers["fit"])
        self.clock = Clock(
            progress if numbers["trained"] else None,
            numbers["total"],
            None if numbers["until"] is None else tuple(numbers["until"]),
            numbers["begun"],
        )
        self._waiting, self.masks, self.hidden = placed(LOSS), placed(MASKS), placed(HIDDEN)
        self.forms = {name: MaskFormat(**form) for name, form in numbers["forms"].items()}
        self.removed, self.taken = Removed(**numbers["removed"]), Removed(**numbers["taken"])
        self.splitting = admm.Splitting.restored(placed(ADMM), numbers["admm"])
        self.left = frozenset(numbers["left"])
        self.snapshots = {
            tag: Snapshot(placed(f"{SNAPSHOT}{tag}/weights/"), placed(f"{SNAPSHOT}{tag}/masks/"), *clock)
            for tag, clock in numbers["snapshots"].items()
        }
        log.info("%s: going on from epoch %d, step %d", self.state.stage, progress.epoch + 1, progress.step)

    # ------------------------------------------------------------------------------------------------ the end

    def result(self, files: Mapping[str, str | bytes]) -> State:
        """The state after the stage, which a granularity with `shrink` has made smaller.

        Args:
            files: that the stage leaves besides its own, by name.
        """
        self.fix()
        progress, now, taken = self.clock.progress, self.removed, self.taken
        units, removed = now.units + taken.removed, now.removed + taken.removed
        gone, there = now.channels_removed + taken.channels_removed, now.channels + taken.channels_removed
        rows, left = self.splitting.residuals, {tag: self.snapshots[tag] for tag in sorted(self.left)}
        outcome = Outcome(
            epochs=len(progress.history) if progress else 0,
            select_on=self.training.fit.select_on if progress else None,
            ratio_requested=self.requested,
            ratio_prunable=removed / units if units else None,
            ratio_channels=gone / there if there else None,
            history=tuple(progress.history) if progress else (),
            files={
                **files,
                **({RESIDUALS: artifacts.table(admm.Residual, rows)} if rows else {}),
                **remembering.files(left),
            },
        )
        # What an earlier stage masked keeps its form, although these masks are joined with it.
        after = self.state.evolve(
            masks=self.masks or self.state.masks, forms={**self.forms, **self.state.forms}, outcome=outcome
        )
        return shrinking.shrink_state(after, self.granularity.units, self.plan) if self.granularity.shrink else after


def tags(state: State) -> tuple[str, ...]:
    """Snapshots that are there before a schedule begins."""
    return (INIT, FRESH, *state.remembered)


def batches(state: State, training: Training) -> int:
    """Batches of an epoch, the same on every rank."""
    return len(state.data.train(training.batch_size, 0, shard=state.world.shard))


def optimizer_steps(state: State, training: Training) -> int:
    """Optimizer steps of an epoch."""
    return -(-batches(state, training) // training.fit.accumulate)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
