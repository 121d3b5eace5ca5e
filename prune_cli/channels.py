"""Which channels depend on which, what a candidate costs, and which units to remove.

``analyse`` executes the network once on labels (labels.py, operators/, labeller.py), solves the equations and tries the
plan out on a hollow small network (surgery.py does the real one). A *unit* is what lives or dies together: a set of
positions of parameter axes. Everything else is arithmetic on arrays of unit ids.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from fractions import Fraction
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor, nn

from prune_cli import attention, labeller
from prune_cli import trace as tracing
from prune_cli.errors import SurgeryError
from prune_cli.labels import Ledger, flat, marks_of
from prune_cli.modules import named_tensors, walk
from prune_cli.plan import AxisOf, Family, Plan, Tally
from prune_cli.trace import FROZEN_LEVEL, Example, Modules, Refused, Strictness, Trace

log = logging.getLogger(__name__)

# Operators whose rule knows more than one answer; any other is frozen when the small network did not follow
# it.
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


def analyse(model: nn.Module, example_inputs: Example) -> Plan:
    """Finds which channels of a network live and die together.

    Executes the model on labels. Where an operator takes sizes that the model's code may spell out, a half-size
    hollow network is tried out; an operator that did not follow freezes the channels that touch it, and the rest
    is pruned.

    Args:
        model: The network; left as it was.
        example_inputs: A tensor, a tuple of positional arguments or a dict of keyword arguments.

    Returns:
        The plan. The channels of the model's outputs are fixed.

    Raises:
        SurgeryError: The model does not run on the example inputs.
    """
    plan = _label(model, example_inputs, Strictness(), ())
    if not any(trace.literal for trace in plan.traces):
        return plan
    return follow(model, plan, _trial)[0]


def follow(
    model: nn.Module, plan: Plan, choose: Callable[[Plan], np.ndarray]
) -> tuple[Plan, np.ndarray, dict[str, float]]:
    """Tries a choice out on a hollow small network, and keeps more channels until every operator follows.

    Args:
        model: The dense network.
        plan: Where to start.
        choose: Gives ``keep`` for a plan.

    Returns:
        The plan that was followed, its ``keep``, and per attention layer the change of its scale.

    Raises:
        SurgeryError: The model can't be copied.
    """
    from prune_cli import surgery  # the trial needs surgery, surgery needs Plan

    for _ in range(400):
        keep = choose(plan)
        try:
            return plan, keep, surgery.check(surgery.hollow(model, plan, keep), plan, keep)
        except Refused as error:
            log.debug("not followed: %s", error)
            plan = _other_guess(model, plan, keep, error) or _stricter(model, plan, error)
    raise SurgeryError("no part of the model could be shrunk after 400 attempts; please report the model")


def _other_guess(model: nn.Module, plan: Plan, keep: np.ndarray, error: Refused) -> Plan | None:
    """The plan with another guess of the failing module's attributes, if that leads further."""
    from prune_cli import surgery

    if plan.strictness.guesses.get(error.layer):
        return None
    code = {step.layer: step.code for step in plan.traces[error.trace].steps}
    twins = [name for name, kind in code.items() if kind == code.get(error.layer)] if code.get(error.layer) else []
    for guess in (1, 2):
        for layers in (twins, [error.layer]):
            guesses = {**plan.strictness.guesses, **dict.fromkeys(layers, guess)}
            other = replace(plan, strictness=replace(plan.strictness, guesses=guesses))
            if surgery.same_attributes(model, plan, other, keep):
                continue
            try:
                surgery.check(surgery.hollow(model, other, keep), other, keep)
                return other
            except Refused as again:
                if (again.trace, again.ordinal) > (error.trace, error.ordinal):
                    return other
    return None


def _stricter(model: nn.Module, plan: Plan, error: Refused) -> Plan:
    """A plan that keeps the channels of one more operator, the one that did not follow."""
    strictness = plan.strictness
    module = dict(model.named_modules()).get(error.layer)
    code = attention.code_of(module)
    if (
        module is not None
        and (attention.has_heads(module) or error.name == "view")
        and code
        and code not in strictness.tied
        and type(module).__name__ not in attention.TIED_ATTENTION
        and attention.query_projection(module)
    ):
        strictness = replace(strictness, tied=strictness.tied | {code})
        return _label(model, plan.example, strictness, plan.refused)
    levels = dict(strictness.levels)
    _raise_level(plan, levels, error)
    refused = (*plan.refused, f"{error}: its channels are kept")
    return _label(model, plan.example, replace(strictness, levels=levels), tuple(dict.fromkeys(refused)))


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


def _label(model: nn.Module, example: Example, strictness: Strictness, refused: tuple[str, ...]) -> Plan:
    ledger = Ledger()
    modules = walk(model)
    traces: list[Trace] = []
    parameters = labeller.mark_parameters(model, modules, ledger, strictness.tied)
    try:
        trace, used = _run(model, example, modules, ledger, strictness, training=False)
        traces.append(trace)
        if any(id(tensor) not in used for tensor, _ in parameters.values()):  # an auxiliary head, for example
            work = list(ledger.work)
            try:
                second, more = _run(model, example, modules, ledger, strictness, training=True)
                traces.append(second)
                used |= more
            except SurgeryError:
                log.debug("the model does not run in training mode on the example; auxiliary heads are not analysed")
            ledger.work = work
        idle = [name for name, (tensor, _) in parameters.items() if id(tensor) not in used]
        refused = tuple(dict.fromkeys((*refused, *_undecided(traces, idle, ledger))))
    finally:
        labeller.unmark(parameters)
    classes = ledger.solve()
    plan = _plan(model, example, parameters, ledger, classes, traces, refused)
    return replace(plan, strictness=strictness)


def _run(
    model: nn.Module,
    example: Example,
    modules: Modules,
    ledger: Ledger,
    strictness: Strictness,
    *,
    training: bool,
) -> tuple[Trace, set[int]]:
    """The trace, and the identities of the tensors that took part."""
    trace = Trace(training)
    tracer = labeller.Labeller(modules, ledger, trace, strictness)
    for output in tracing.execute(model, example, tracer, training):
        for label in marks_of(output).fields:
            ledger.freeze(label)
    return trace, tracer.used


def _undecided(traces: list[Trace], idle: list[str], ledger: Ledger) -> Iterator[str]:
    """Keeps the channels in modules that decide by their data which layers run, where some did not: nobody knows
    what those layers would read."""
    for layer in sorted({layer for trace in traces for layer in trace.decides}):
        inside = f"{layer}." if layer else ""
        if left := [name for name in idle if name.startswith(inside)]:
            for trace in traces:
                for step in trace.steps:
                    if step.layer == layer or step.layer.startswith(inside):
                        for label in (label for _, marks in step.outs for label in marks.fields):
                            ledger.freeze(label)
            yield f"{layer or 'the model'} chooses by its data what runs, and {left[0]} did not: its channels are kept"


def _plan(
    model: nn.Module,
    example: Example,
    parameters: Mapping[str, tuple[Tensor, dict[int, int]]],
    ledger: Ledger,
    classes: np.ndarray,
    traces: list[Trace],
    refused: tuple[str, ...],
) -> Plan:
    producing = _touched(ledger.producers, ledger.count)
    consuming = _touched(ledger.consumers, ledger.count)
    live = np.zeros(int(classes.max()) + 1, dtype=bool)
    live[classes[producing]] = True
    live[0] = False
    number = np.where(live, np.cumsum(live), 0)  # classes -> unit ids, in order of the first variable
    units = number[classes]
    units[0] = 0
    size = int(live.sum()) + 1
    known: dict[bytes, np.ndarray] = {}  # equal axes share one array
    axes: dict[str, dict[int, np.ndarray]] = {}
    roles: list[tuple[AxisOf, np.ndarray, str]] = []
    for name, (tensor, first) in parameters.items():
        for axis, start in first.items():
            ids = units[start : start + tensor.shape[axis]]
            ids = known.setdefault(ids.tobytes(), ids)
            if ids.any():
                axes.setdefault(name, {})[axis] = ids
                role = "producers" if producing[start] else "consumers" if consuming[start] else "others"
                roles.append(((name, axis), ids, role))
    families = _families(roles, size)
    units, ranged, axes, size = _renumber(units, families, axes)
    shared = _share(model, parameters, axes)
    norms = frozenset(int(u) for array in ledger.norms for u in np.unique(units[np.maximum(array, 0)]) if u)
    unknown = [
        f"{name} in {layer or 'the model'} is unknown: the channels that touch it are kept"
        for trace in traces
        for name, layer in trace.unknown.items()
    ]
    plan = Plan(
        MappingProxyType({name: MappingProxyType(value) for name, value in shared.items()}),
        ranged,
        size,
        (*dict.fromkeys(unknown), *refused),
        norms,
        _tally(parameters, axes, ledger, units),
        example,
        tuple(traces),
        units,
        refused,
    )
    for warning in plan.warnings:
        log.debug("%s", warning)
    return plan


def _touched(arrays: list[np.ndarray], count: int) -> np.ndarray:
    seen = np.zeros(count, dtype=bool)
    if arrays:
        seen[np.maximum(np.concatenate(arrays), 0)] = True
    seen[0] = False
    return seen


def _families(roles: list[tuple[AxisOf, np.ndarray, str]], size: int) -> list[Family]:
    """Units grouped by the set of producing axes that they live on."""
    random = np.random.default_rng(0)
    signature = np.zeros(size, dtype=np.uint64)  # sums of random numbers: equal sets of axes have equal sums
    for _, ids, role in roles:
        if role == "producers":
            lives = np.zeros(size, dtype=bool)
            lives[ids] = True
            signature[lives] += random.integers(1, 1 << 63, dtype=np.uint64)
    _, first, group = np.unique(signature[1:], return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))  # families in the order of their first unit
    family = np.concatenate([[-1], rank[group]]) if size > 1 else np.array([-1])
    along: list[dict[str, list[AxisOf]]] = [{"producers": [], "consumers": [], "others": []} for _ in first]
    touched: dict[int, list[int]] = {}  # by identity: equal axes share one array
    for place, ids, role in roles:
        if id(ids) not in touched:
            seen = np.zeros(len(first) + 1, dtype=bool)
            seen[family[ids]] = True  # the last entry is for fixed positions
            touched[id(ids)] = seen[:-1].nonzero()[0].tolist()
        for number in touched[id(ids)]:
            along[number][role].append(place)
    order = np.argsort(family[1:], kind="stable") + 1
    parts = np.split(order, np.cumsum(np.bincount(family[1:], minlength=len(first)))[:-1]) if len(first) else []
    return [
        Family(
            roles_["producers"][0][0].rpartition(".")[0] or roles_["producers"][0][0],
            units,
            tuple(roles_["producers"]),
            tuple(roles_["consumers"]),
            tuple(roles_["others"]),
        )
        for roles_, units in zip(along, parts, strict=True)
    ]


def _renumber(
    units: np.ndarray, families: list[Family], axes: dict[str, dict[int, np.ndarray]]
) -> tuple[np.ndarray, tuple[Family, ...], dict[str, dict[int, np.ndarray]], int]:
    """Unit ids run family by family, so that every family is one range."""
    order = np.concatenate([f.units for f in families]) if families else np.zeros(0, np.int64)
    number = np.zeros(len(order) + 1, dtype=np.int64)
    number[order] = np.arange(1, len(order) + 1)
    renamed = tuple(Family(f.name, number[f.units], f.producers, f.consumers, f.others) for f in families)
    new = {id(ids): ids for value in axes.values() for ids in value.values()}  # equal axes share one array
    new = {key: number[ids] for key, ids in new.items()}
    axes = {name: {axis: new[id(ids)] for axis, ids in value.items()} for name, value in axes.items()}
    return number[units], renamed, axes, len(order) + 1


def _share(
    model: nn.Module,
    parameters: Mapping[str, tuple[Tensor, dict[int, int]]],
    axes: Mapping[str, dict[int, np.ndarray]],
) -> dict[str, dict[int, np.ndarray]]:
    """Gives every name of a tied tensor its arrays."""
    by_tensor = {id(tensor): axes[name] for name, (tensor, _) in parameters.items() if name in axes}
    return {name: by_tensor[id(tensor)] for name, tensor in named_tensors(model).items() if id(tensor) in by_tensor}


def _tally(
    parameters: Mapping[str, tuple[Tensor, dict[int, int]]],
    axes: Mapping[str, dict[int, np.ndarray]],
    ledger: Ledger,
    units: np.ndarray,
) -> Tally:
    index: dict[bytes, int] = {}
    same: dict[int, int] = {}  # by identity, for the axes of parameters, which share arrays
    arrays: list[np.ndarray] = []

    def number(ids: np.ndarray) -> int:
        key = ids.tobytes()
        if key not in index:
            index[key] = len(arrays)
            arrays.append(ids)
        return index[key]

    def shared(ids: np.ndarray) -> int:
        if id(ids) not in same:
            same[id(ids)] = number(ids)
        return same[id(ids)]

    def rows(items: list[tuple[int, list[int]]]) -> tuple[np.ndarray, np.ndarray]:
        width = max((len(which) for _, which in items), default=1) or 1
        table = np.full((len(items), width), -1, dtype=np.int64)
        for row, (_, which) in enumerate(items):
            table[row, : len(which)] = which
        return np.array([static for static, _ in items], dtype=np.int64), table

    params, layers = [], []
    for name, (tensor, _) in parameters.items():
        if isinstance(tensor, nn.Parameter):
            mine = axes.get(name, {})
            fixed = tensor.numel()
            for axis in mine:
                fixed //= tensor.shape[axis]
            params.append((fixed, [shared(ids) for ids in mine.values()]))
            layers.append(name.rpartition(".")[0])
    macs, mac_layers = [], []
    for work in ledger.work:
        static, which = work.static, []
        for factor in work.factors:
            ids = units[np.maximum(flat(factor), 0)]
            if ids.any():
                which.append(number(ids))
            else:
                static *= ids.size
        macs.append((static, which))
        mac_layers.append(work.layer)
    lengths = np.array([0] + [len(a) for a in arrays], dtype=np.int64)
    starts = np.cumsum(lengths)[:-1] if arrays else np.zeros(0, np.int64)
    ids = np.concatenate(arrays) if arrays else np.zeros(0, np.int64)
    return Tally(ids, starts, rows(params), rows(macs), tuple(layers), tuple(mac_layers))


# ---------------------------------------------------------------------------------------------- choosing


def removed(ratio: float | str | Fraction, n: int) -> int:
    """How many of n units a ratio removes: ``int(ratio * n)`` in exact arithmetic.

    Raises:
        SurgeryError: The ratio is not in [0, 1].
    """
    exact = ratio if isinstance(ratio, Fraction) else Fraction(str(ratio))
    if not 0 <= exact <= 1:
        raise SurgeryError(f"ratio {ratio} is not a fraction removed; give a value from 0 to 1")
    return int(exact * n)


def lowest(scores: np.ndarray, k: int) -> np.ndarray:
    """Indices of the k lowest scores; equal scores go by index, lowest first."""
    return np.argsort(scores, kind="stable")[:k]


def select(
    plan: Plan, scores: np.ndarray | None = None, ratio: float | Mapping[str, float] = 0.5, min_keep: int = 1
) -> np.ndarray:
    """Removes the lowest-scored fraction of every family.

    Args:
        plan: From ``analyse``.
        scores: One score per unit id (higher = keep), length ``plan.size``; None removes the first units.
        ratio: Fraction removed, in [0, 1], or one per family name (families that are not named keep
        everything).
        min_keep: Units that stay in every family, at least 1.

    Returns:
        ``keep``: bool per unit id.

    Raises:
        SurgeryError: A ratio out of range, or scores of another length or not finite.
    """
    values = np.arange(plan.size, dtype=np.float64) if scores is None else np.asarray(scores, dtype=np.float64)
    if values.shape != (plan.size,):
        raise SurgeryError(f"scores have shape {values.shape}; give one score per unit id, {plan.size} in all")
    if np.isnan(values[1:]).any():
        raise SurgeryError("scores hold nan; give finite numbers (higher = keep)")
    keep = plan.everything()
    for family in plan.families:
        fraction = ratio.get(family.name, 0.0) if isinstance(ratio, Mapping) else ratio
        n = len(family.units)
        k = min(removed(fraction, n), max(n - max(min_keep, 1), 0))
        keep[family.units[lowest(values[family.units], k)]] = False
    return spared(plan, keep, values)


def spared(plan: Plan, keep: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """The same choice with the best unit of every axis that would be empty: layers may read a part of a family.

    Args:
        plan: From ``analyse``.
        keep: Bool per unit id.
        scores: One per unit id, higher = keep.
    """
    present = keep.copy()
    present[0] = True
    for ids in {id(ids): ids for axes in plan.axes.values() for ids in axes.values()}.values():
        if not present[ids].any():
            present[ids[np.argmax(scores[ids])]] = True
    return present


def units_of(plan: Plan, name: str, axis: int) -> Tensor:
    """Unit id per position of one parameter axis, zeros where the axis is fixed entirely."""
    ids = plan.axes.get(name, {}).get(axis)
    if ids is None:
        raise SurgeryError(f"axis {axis} of {name!r} can't shrink")
    return torch.from_numpy(ids)
