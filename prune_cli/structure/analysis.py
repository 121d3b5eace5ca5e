"""Which channels depend on which, what a candidate costs, and which units to remove.

`analyse` executes the network once on labels (labels.py, operators/, labeller.py), solves the equations and tries the
plan out on a hollow small network (surgery.py does the real one). A *unit* is what lives or dies together: a set of
positions of parameter axes. Everything else is arithmetic on arrays of unit ids.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np
from torch import Tensor, nn

from prune_cli.errors import SurgeryError
from prune_cli.structure import interpreter as tracing
from prune_cli.structure import propagate
from prune_cli.structure.interpreter import Example, Modules
from prune_cli.structure.labels import DECIDES, OUTPUTS, Constraints, flat, labelling_of
from prune_cli.structure.looks import Looks
from prune_cli.structure.modules import named_tensors, refuse_fixed, walk
from prune_cli.structure.operators.statistics import labels_in
from prune_cli.structure.plan import AxisOf, Family, Plan, Tally
from prune_cli.structure.prunable import owner
from prune_cli.structure.trace import Fallbacks, Look, Trace

log = logging.getLogger(__name__)
GUARD = 8  # operators that code may run before it says that something is wrong
GUARDS = (ValueError, AssertionError, NotImplementedError, TypeError, KeyError)


FLIPS = 6  # conditions that are answered the other way, one at a time


def labelled(model: nn.Module, example: Example, fallbacks: Fallbacks, refused: tuple[str, ...]) -> Plan:
    """Executes the network on labels and solves what was said."""
    modules = walk(model)
    refuse_fixed(modules)
    constraints = Constraints()
    parameters = propagate.mark_parameters(model, modules, constraints, fallbacks.tied)
    run = _Run(model, example, modules, fallbacks, constraints)
    try:
        run.evaluate()
        if fallbacks.training or any(id(tensor) not in run.used for tensor, _ in parameters.values()):
            run.train()  # an auxiliary head, for example
        if parameters and run.used.isdisjoint(id(tensor) for tensor, _ in parameters.values()):
            raise SurgeryError(
                "no parameter of the model takes part when it is called; give the network itself, not what holds it and calls "
                "a copy"
            )
        # A buffer is no layer: those that forward never reads (kept for a later call) say nothing about what runs.
        idle = [
            name
            for name, (tensor, _) in parameters.items()
            if isinstance(tensor, nn.Parameter) and id(tensor) not in run.used
        ]
        refused = tuple(dict.fromkeys((*refused, *run.warnings, *_undecided(run.traces, idle, run.constraints))))
        for tensor, _ in parameters.values() if fallbacks.whole else ():
            for label in labelling_of(tensor).labels:
                run.constraints.freeze(label)
    finally:
        propagate.unmark(parameters)
    classes = run.constraints.solve()
    plan = _plan(model, example, parameters, run.constraints, classes, run.traces, refused)
    return replace(plan, fallbacks=fallbacks)


@dataclass(slots=True)
class _Run:
    """The executions of one network, and what they said together.

    Attributes:
        used: identities of the tensors that took part.
        warnings: a line per module that looks at values of its data.
    """

    model: nn.Module
    example: Example
    modules: Modules
    fallbacks: Fallbacks
    constraints: Constraints
    traces: list[Trace] = field(default_factory=list)
    used: set[int] = field(default_factory=set)
    warnings: list[str] = field(default_factory=list)

    def evaluate(self) -> None:
        """Runs in evaluation mode; again on real values where the network looks at values or does not run on zeros."""
        trace, constraints = Trace(0), self.constraints.copy()
        try:
            used, _ = self._execute(Looks(trace), constraints)
            if not trace.looks:
                self._adopt(trace, constraints, used)
                return
        except SurgeryError:
            log.debug("the model does not run on zeros; executed on its real values")
        real, again = Looks(Trace(0), real=True), self.constraints.copy()
        used, _ = self._execute(real, again)
        if not real.trace.looks:  # what it looked at does not depend on the input
            real.trace.values = None
        self._adopt(real.trace, again, used)
        conditions = [look.layer for look in real.trace.looks if look.answer == "condition"]
        open_ = {look.layer for look in real.trace.looks if look.answer == "number"} | set(conditions[FLIPS:])
        for number, layer in enumerate(conditions[:FLIPS]):
            if not self._answer_otherwise(number):
                open_.add(layer)
        real.freeze(open_, self.constraints)
        self.warnings += _lines(real.trace.looks)

    def _answer_otherwise(self, number: int) -> bool:
        """Follows the code behind the other answer to a condition; False where it does not run, but for a guard: code
        that ends in an error."""
        looks, constraints = Looks(Trace(2 + number), real=True, flip=number), self.constraints.copy()
        try:
            used, _ = self._execute(looks, constraints)
        except SurgeryError as error:
            after = looks.trace.steps[looks.flipped_at or 0 :]
            return len(after) <= GUARD and isinstance(error.__cause__, GUARDS)
        self._adopt(looks.trace, constraints, used)
        return True

    def train(self) -> None:
        """Runs in training mode, if the network does."""
        real = self.traces[0].values is not None
        looks, constraints = Looks(Trace(1), real=real), self.constraints.copy()
        try:
            used, _ = self._execute(looks, constraints)
        except SurgeryError:  # nothing that half a run said holds
            log.debug("the model does not run in training mode on the example; auxiliary heads are not analysed")
            return
        constraints.work = self.constraints.work
        self._adopt(looks.trace, constraints, used)

    def _adopt(self, trace: Trace, constraints: Constraints, used: set[int]) -> None:
        if self.traces:  # multiply-adds are those of the example
            constraints.work = self.constraints.work
        self.traces.append(trace)
        self.constraints = constraints
        self.used |= used

    def _execute(self, looks: Looks, constraints: Constraints) -> tuple[set[int], propagate.Labeller]:
        labeller = propagate.Labeller(self.modules, constraints, looks.trace, self.fallbacks, looks)
        outputs = tracing.execute(self.model, self.example, labeller, looks.trace.training)
        if not outputs:
            raise SurgeryError(
                "the model returns no tensors, so nothing says what must stay; have it return what it computes"
            )
        looks.trace.outputs = [tuple(output.shape) for output in outputs]
        constraints.begin(OUTPUTS, "")
        for output in outputs:
            for label in (*labelling_of(output).labels, *labels_in(output)):
                constraints.freeze(label)
        return labeller.used, labeller


def _lines(looks: Sequence[Look]) -> Iterator[str]:
    """What a module that looks at values means for the small network."""
    by_layer: dict[str, list[str]] = {}
    for look in looks:
        by_layer.setdefault(look.layer, []).append(
            look.name.removeprefix("_local_scalar_dense") or "a number or condition"
        )
    for layer, names in by_layer.items():
        yield (
            f"{layer or 'the model'} looks at values of its data ({', '.join(dict.fromkeys(names))}): other inputs may run "
            "other code than the example did"
        )


def _undecided(traces: list[Trace], idle: list[str], constraints: Constraints) -> Iterator[str]:
    """Keeps the channels in modules that decide by their data which layers run, where some did not: nobody knows
    what those layers would read."""
    decides = {look.layer for trace in traces for look in trace.looks if look.answer != "rows"}
    for layer in sorted(decides):
        inside = f"{layer}." if layer else ""
        if left := [name for name in idle if name.startswith(inside)]:
            why = f"{layer or 'the model'} chooses by its data what runs, and {left[0]} did not"
            constraints.begin(DECIDES, why)
            for trace in traces:
                for step in trace.steps:
                    if step.layer == layer or step.layer.startswith(inside):
                        for label in (label for _, labelling in step.outs for label in labelling.labels):
                            constraints.freeze(label)
            yield f"{why}: its channels are kept"


def _plan(
    model: nn.Module,
    example: Example,
    parameters: Mapping[str, tuple[Tensor, dict[int, int]]],
    constraints: Constraints,
    classes: np.ndarray,
    traces: list[Trace],
    refused: tuple[str, ...],
) -> Plan:
    producing = _touched(constraints.producers, constraints.count)
    consuming = _touched(constraints.consumers, constraints.count)
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
    shared = _tie_names(model, parameters, axes)
    norms = frozenset(int(u) for array in constraints.norms for u in np.unique(units[np.maximum(array, 0)]) if u)
    unknown = [
        f"{name} in {layer or 'the model'} is unknown: the channels that touch it are kept"
        for trace in traces
        for name, layer in trace.unknown.items()
    ]
    places = (
        (name, axis, start, tensor.shape[axis])
        for name, (tensor, first) in parameters.items()
        for axis, start in first.items()
    )
    plan = Plan(
        MappingProxyType({name: MappingProxyType(value) for name, value in shared.items()}),
        ranged,
        size,
        (*dict.fromkeys(unknown), *refused),
        norms,
        _tally(parameters, axes, constraints, units),
        example,
        tuple(traces),
        units,
        refused,
        evidence=(constraints, tuple(places)),
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
            owner(roles_["producers"][0][0]) or roles_["producers"][0][0],
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


def _tie_names(
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
    constraints: Constraints,
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
            layers.append(owner(name))
    macs, mac_layers = [], []
    for work in constraints.work:
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
