"""A channel plan that surgery can follow: analysed, tried out, and made stricter where an operator refuses."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch import nn

from prune_cli.progress import busy
from prune_cli.structure import attention, checker, scales, slicing
from prune_cli.structure.analysis import labelled
from prune_cli.structure.interpreter import Example, Refused
from prune_cli.structure.keep import spared
from prune_cli.structure.modules import walk
from prune_cli.structure.plan import Plan
from prune_cli.structure.trace import FROZEN_LEVEL, Fallbacks, Trace

log = logging.getLogger(__name__)
PATIENT, ROUNDS = 12, 24
"""Rounds after which an operator that did not follow is frozen at once, and after which everything is kept."""

# Operators whose rule knows more than one answer; any other is frozen when the small network did not follow it.
LEVELLED = {
    "view": 3,
    "_unsafe_view": 3,
    "slice": 3,
    "split": 1,
    "split_with_sizes": 1,
    "unsafe_split": 1,
    "select": 1,
    "constant_pad_nd": 2,
    "channel_shuffle": 1,
    "native_channel_shuffle": 1,
    "sum": 1,
    "linalg_vector_norm": 1,
    "_softmax": 1,
    "_safe_softmax": 1,
    "native_layer_norm": 1,
    "native_group_norm": 1,
}


# ---------------------------------------------------------------------------------------------- analysis


@busy("analysing which channels belong together")
def analyse(model: nn.Module, example_inputs: Example) -> Plan:
    """Finds which channels of a network live and die together.

    Executes the model on labels. Where an operator takes sizes that the model's code may spell out, a half-size
    hollow network is tried out; an operator that did not follow freezes the channels that touch it, and the rest
    is pruned.

    Args:
        model: the network; left as it was.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments; left as they were.

    Returns:
        The plan. The channels of the model's outputs are fixed.

    Raises:
        SurgeryError: the model does not run on the example inputs, or a part of it is compiled or has no values.
    """
    plan = labelled(model, example_inputs, Fallbacks(), ())
    for line in plan.refused:
        log.warning("%s", line)
    if any(trace.literal for trace in plan.traces) or _unseen_training(plan):
        plan, keep, changes = follow(model, plan, _trial)
        if not scales.are_undone(model, plan, keep, changes):
            plan = follow(model, replace(plan, fallbacks=replace(plan.fallbacks, unscaled=True)), _trial)[0]
    return plan


def follow(
    model: nn.Module, plan: Plan, choose: Callable[[Plan], np.ndarray]
) -> tuple[Plan, np.ndarray, dict[str, float]]:
    """Tries a choice out on a hollow small network, and keeps more channels until every operator follows.

    Args:
        model: the dense network.
        plan: where to start.
        choose: gives `keep` for a plan.

    Returns:
        The plan that was followed, its `keep`, and per attention layer the change of its scale.

    Raises:
        SurgeryError: the model can't be copied.
    """
    for number in range(ROUNDS):
        keep = choose(plan)
        small = slicing.hollow(model, plan, keep)
        trained = _unseen_training(plan)
        refusals, changes = checker.examine(small, plan, keep, training=trained)
        if refusals and trained:  # training runs other code than evaluation, or none
            refusals, changes = checker.examine(small, plan, keep)
            if not refusals:
                plan = labelled(model, plan.example, replace(plan.fallbacks, training=True), plan.refused)
                continue
        for error in refusals:
            log.debug("not followed: %s", error)
        if not refusals:
            return plan, keep, changes
        plan = _following(model, plan, keep, refusals) or _stricter(model, plan, refusals, number >= PATIENT)
    line = f"after {ROUNDS} attempts the model still does not run smaller: all its channels are kept"
    plan = labelled(model, plan.example, replace(plan.fallbacks, whole=True), (*plan.refused, line))
    return plan, plan.everything(), {}


def _unseen_training(plan: Plan) -> bool:
    """Whether the network asks if it is being trained, and was not executed so."""
    return plan.traces[0].trains and not plan.fallbacks.training and not any(trace.training for trace in plan.traces)


def _following(model: nn.Module, plan: Plan, keep: np.ndarray, errors: Sequence[Refused]) -> Plan | None:
    """The plan in which the attributes follow that the failing modules' code read just there, if that leads further."""
    fallbacks, error = plan.fallbacks, errors[0]
    codes = {name: attention.code_of(module) for name, module in walk(model)}
    places = {place for one in errors for place in _read_near(plan.traces[one.trace], one, codes)}
    places -= fallbacks.compared | fallbacks.dropped
    if not places:
        return None
    other = replace(plan, fallbacks=replace(fallbacks, compared=fallbacks.compared | places))
    if slicing.same_attributes(model, plan, other, keep):
        return None
    refusals, _ = checker.examine(slicing.hollow(model, other, keep), other, keep)
    if not refusals or (refusals[0].trace, refusals[0].ordinal) > (error.trace, error.ordinal):
        return other
    if len({one.layer for one in errors}) > 1:
        return _following(model, plan, keep, [error])
    dropped = replace(plan, fallbacks=replace(fallbacks, dropped=fallbacks.dropped | places))
    return _stricter(model, dropped, errors, False)


def _read_near(trace: Trace, error: Refused, codes: Mapping[str, str]) -> set[tuple[str, str]]:
    """(module, attribute) read by the code of the failing module, and of modules that run the same code."""
    alike = {name for name, code in codes.items() if code and code == codes.get(error.layer)} | {error.layer}
    here = {origin.key for at, layer, origin in trace.touched if layer == error.layer or 0 <= at - error.ordinal <= 1}
    return {
        (origin.module, origin.key)
        for at, layer, origin in trace.touched
        if origin.key in here and (layer in alike or 0 <= at - error.ordinal <= 1)
    }


def _stricter(model: nn.Module, plan: Plan, errors: Sequence[Refused], freeze: bool) -> Plan:
    """A plan that keeps the channels of more operators: of those that did not follow, the first of every module.

    Args:
        freeze: whether their rules are not asked for anything in between any more.
    """
    fallbacks, error = plan.fallbacks, errors[0]
    module = dict(walk(model)).get(error.layer)
    code = attention.code_of(module)
    if (
        module is not None
        and (attention.has_heads(module) or error.name == "view")
        and code
        and code not in fallbacks.tied
        and type(module).__name__ not in attention.TIED_ATTENTION
        and attention.query_projection(module)
    ):
        fallbacks = replace(fallbacks, tied=fallbacks.tied | {code})
        return labelled(model, plan.example, fallbacks, plan.refused)
    levels = dict(fallbacks.levels)
    treated: set[tuple[int, str]] = set()
    for one in errors:
        key = plan.traces[one.trace].kind, max(one.ordinal, 0)
        if (one.trace, one.layer) not in treated and levels.get(key) == fallbacks.levels.get(key):
            treated.add((one.trace, one.layer))
            _raise_level(plan, levels, one, freeze)
    refused = (*plan.refused, *(f"{one}: its channels are kept" for one in errors if (one.trace, one.layer) in treated))
    return labelled(model, plan.example, replace(fallbacks, levels=levels), tuple(dict.fromkeys(refused)))


def _raise_level(plan: Plan, levels: dict[tuple[int, int], int], error: Refused, freeze: bool) -> None:
    """Lets the operator that did not follow fix more; when it can't any more, its neighbours before it."""
    trace = plan.traces[error.trace]
    ordinal = max(error.ordinal, 0)
    while ordinal >= 0:
        key = (trace.kind, ordinal)
        level = levels.get(key, 0)
        if level < FROZEN_LEVEL:
            passed = max(error.ordinal, 0) - ordinal
            # A module that was passed by far: ever larger strides back in it.
            for step in range(max(ordinal - passed, 0), ordinal if passed > 3 else 0):
                if trace.steps[step].layer == trace.steps[ordinal].layer == error.layer:
                    levels[(trace.kind, step)] = FROZEN_LEVEL
            most = 0 if freeze else LEVELLED.get(trace.steps[ordinal].name, 0)
            for twin in _same_code(trace, ordinal):
                levels[(trace.kind, twin)] = level + 1 if level < most else FROZEN_LEVEL
            return
        ordinal -= 1
    for step in range(len(trace.steps)):
        levels[(trace.kind, step)] = FROZEN_LEVEL


def _same_code(trace: Trace, ordinal: int) -> list[int]:
    """Steps of other modules of the same class at the same place: the same line of the model's code."""
    if not trace.steps[ordinal].code:
        return [ordinal]
    place: Counter[tuple[str, str]] = Counter()
    found: dict[int, tuple[str, str, int]] = {}
    for index, step in enumerate(trace.steps):
        found[index] = (step.code, step.name, place[step.layer, step.name])
        place[step.layer, step.name] += 1
    return [index for index, key in found.items() if key == found[ordinal]]


def _trial(plan: Plan) -> np.ndarray:
    """Keeps half of every family, at irregular positions."""
    keep = plan.everything()
    generator = np.random.default_rng(0)
    for family in plan.families:
        n = len(family.units)
        keep[generator.permutation(family.units)[: n // 2]] = False
    return spared(plan, keep, np.zeros(plan.size))
