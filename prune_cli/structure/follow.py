"""A channel plan that surgery can follow: analysed, tried out, and made stricter where an operator refuses."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from torch import nn

from prune_cli.errors import SurgeryError
from prune_cli.progress import busy
from prune_cli.structure import attention, checker, slicing
from prune_cli.structure.analysis import labelled
from prune_cli.structure.interpreter import FROZEN_LEVEL, Example, Fallbacks, Refused, Trace
from prune_cli.structure.keep import spared
from prune_cli.structure.plan import Plan

log = logging.getLogger(__name__)

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
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.

    Returns:
        The plan. The channels of the model's outputs are fixed.

    Raises:
        SurgeryError: the model does not run on the example inputs.
    """
    plan = labelled(model, example_inputs, Fallbacks(), ())
    if not any(trace.literal for trace in plan.traces):
        return plan
    return follow(model, plan, _trial)[0]


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
    for _ in range(400):
        keep = choose(plan)
        try:
            return plan, keep, checker.check(slicing.hollow(model, plan, keep), plan, keep)
        except Refused as error:
            log.debug("not followed: %s", error)
            plan = _other_guess(model, plan, keep, error) or _stricter(model, plan, error)
    raise SurgeryError("no part of the model could be shrunk after 400 attempts; please report the model")


def _other_guess(model: nn.Module, plan: Plan, keep: np.ndarray, error: Refused) -> Plan | None:
    """The plan with another guess of the failing module's attributes, if that leads further."""
    if plan.fallbacks.guesses.get(error.layer):
        return None
    code = {step.layer: step.code for step in plan.traces[error.trace].steps}
    twins = [name for name, kind in code.items() if kind == code.get(error.layer)] if code.get(error.layer) else []
    for guess in (1, 2):
        for layers in (twins, [error.layer]):
            guesses = {**plan.fallbacks.guesses, **dict.fromkeys(layers, guess)}
            other = replace(plan, fallbacks=replace(plan.fallbacks, guesses=guesses))
            if slicing.same_attributes(model, plan, other, keep):
                continue
            try:
                checker.check(slicing.hollow(model, other, keep), other, keep)
                return other
            except Refused as again:
                if (again.trace, again.ordinal) > (error.trace, error.ordinal):
                    return other
    return None


def _stricter(model: nn.Module, plan: Plan, error: Refused) -> Plan:
    """A plan that keeps the channels of one more operator, the one that did not follow."""
    fallbacks = plan.fallbacks
    module = dict(model.named_modules()).get(error.layer)
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
    _raise_level(plan, levels, error)
    refused = (*plan.refused, f"{error}: its channels are kept")
    return labelled(model, plan.example, replace(fallbacks, levels=levels), tuple(dict.fromkeys(refused)))


def _raise_level(plan: Plan, levels: dict[tuple[bool, int], int], error: Refused) -> None:
    """Lets the operator that did not follow fix more; when it can't any more, its neighbours before it."""
    trace = plan.traces[error.trace]
    ordinal = max(error.ordinal, 0)
    while ordinal >= 0:
        key = (trace.training, ordinal)
        level = levels.get(key, 0)
        if level < FROZEN_LEVEL:
            passed = max(error.ordinal, 0) - ordinal
            # A module that was passed by far: ever larger strides back in it.
            for step in range(max(ordinal - passed, 0), ordinal if passed > 3 else 0):
                if trace.steps[step].layer == trace.steps[ordinal].layer == error.layer:
                    levels[(trace.training, step)] = FROZEN_LEVEL
            most = LEVELLED.get(trace.steps[ordinal].name, 0)
            for twin in _same_code(trace, ordinal):
                levels[(trace.training, twin)] = level + 1 if level < most else FROZEN_LEVEL
            return
        ordinal -= 1
    for step in range(len(trace.steps)):
        levels[(trace.training, step)] = FROZEN_LEVEL


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
