"""Makes a network really smaller: masks, slicing, and the way back from a file.

``shrink`` selects the kept positions of every parameter axis and returns a new module; the dense one is left as it was.
``Lineage`` says what was kept in terms of the dense network, so a fresh process can ``rebuild`` the small one.
"""

from __future__ import annotations

import copy
import logging
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prune_cli import attention, channels, stripe_conv, trace, widths
from prune_cli.channels import Plan
from prune_cli.checker import Checker
from prune_cli.errors import SurgeryError, nearest
from prune_cli.modules import named_tensors, walk

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lineage:
    """How a small network descends from the dense one; plain data, ready for JSON or YAML.

    Attributes:
        kept: Parameter or buffer name -> axis -> kept indices into the dense network. Axes that keep all
        are absent.
        attributes: Module name -> attribute -> value.
        scales: Parameter name -> factor per kept row (axis 0): a change of attention scale folded into the
        query.
        stripes: Name of a convolution -> the stripes it is left with, in the numbers of its kept filters
        (stripe_conv.StripeConv2d).
    """

    kept: Mapping[str, Mapping[int, tuple[int, ...]]] = field(default_factory=dict)
    attributes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    scales: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    stripes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def after(self, first: Lineage) -> Lineage:
        """The lineage of two rounds: ``first`` led from the dense network to the one that ``self`` starts
        from.

        Raises:
            SurgeryError: ``self`` changes a convolution that has stripes; only a plain one can be sliced.
        """
        sliced = {name.rpartition(".")[0] for name in self.kept} | set(self.stripes)
        if both := sorted(sliced & set(first.stripes)):
            raise SurgeryError(
                f"{both[0]} consists of stripes already; expand the network first (stripe_conv.expanded)"
            )
        kept: dict[str, dict[int, tuple[int, ...]]] = {n: dict(axes) for n, axes in first.kept.items()}
        for name, axes in self.kept.items():
            mine = kept.setdefault(name, {})
            for axis, indices in axes.items():
                old = mine.get(axis)
                mine[axis] = tuple(indices) if old is None else tuple(old[i] for i in indices)
        scales = dict(first.scales)
        for name, factors in scales.items():
            rows = self.kept.get(name, {}).get(0)
            scales[name] = factors if rows is None else tuple(factors[i] for i in rows)
        for name, factors in self.scales.items():
            old_factors = scales.get(name, (1.0,) * len(factors))
            scales[name] = tuple(a * b for a, b in zip(old_factors, factors, strict=True))
        attributes = {name: dict(values) for name, values in first.attributes.items()}
        for name, values in self.attributes.items():
            attributes.setdefault(name, {}).update(values)
        return Lineage(kept, attributes, scales, {**first.stripes, **self.stripes})

    def without_stripes(self) -> Lineage:
        """The lineage of the same network with plain convolutions (stripe_conv.expanded)."""
        return replace(self, stripes={})

    def to_dict(self) -> dict[str, Any]:
        """Strings, numbers, lists and dicts only."""
        return {
            "kept": {n: {str(a): list(map(int, i)) for a, i in axes.items()} for n, axes in self.kept.items()},
            "attributes": {n: dict(values) for n, values in self.attributes.items()},
            "scales": {n: list(values) for n, values in self.scales.items()},
            "stripes": {n: list(map(int, numbers)) for n, numbers in self.stripes.items()},
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Lineage:
        """The inverse of ``to_dict``.

        Raises:
            SurgeryError: A key is missing or a value has another form.
        """
        try:
            return Lineage(
                {str(n): {int(a): tuple(map(int, i)) for a, i in axes.items()} for n, axes in data["kept"].items()},
                {str(n): dict(values) for n, values in data["attributes"].items()},
                {str(n): tuple(map(float, values)) for n, values in data["scales"].items()},
                {str(n): tuple(map(int, numbers)) for n, numbers in data.get("stripes", {}).items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SurgeryError(f"not a lineage ({error!r}); it holds kept, attributes, scales, stripes") from error


@dataclass(frozen=True)
class Shrunk:
    """A small network and where it comes from.

    Attributes:
        model: The new module.
        lineage: Kept indices and attribute edits, relative to the network that was shrunk.
        plan: The plan that was followed; it differs from the one asked when an operator could not follow.
        keep: Bool per unit id of that plan.
    """

    model: nn.Module
    lineage: Lineage
    plan: Plan
    keep: np.ndarray


def kept_indices(plan: Plan, keep: np.ndarray) -> dict[str, dict[int, np.ndarray]]:
    """Kept positions per parameter axis; axes that keep everything are left out."""
    present = keep.copy()
    present[0] = True
    found: dict[str, dict[int, np.ndarray]] = {}
    known: dict[int, np.ndarray] = {}  # equal axes share one array
    for name, axes in plan.axes.items():
        for axis, ids in axes.items():
            indices = known.get(id(ids))
            if indices is None:
                indices = known[id(ids)] = present[ids].nonzero()[0]
            if len(indices) < len(ids):
                found.setdefault(name, {})[axis] = indices
    return found


def structured_masks(
    model: nn.Module, plan: Plan, keep: np.ndarray, *, producers_only: bool = False
) -> dict[str, Tensor]:
    """Masks of the parameters that a ``keep`` array touches (True = keep).

    Zeroes the producers' rows, biases and norm parameters and the consumers' columns, so that the masked network
    computes what the shrunk one does, norms over channels excepted.

    Args:
        model: The network that the plan was made for.
        plan: From ``channels.analyse``.
        keep: Bool per unit id.
        producers_only: Zero the producers' rows and biases alone, through which a channel can grow back.

    Returns:
        Parameter name -> bool tensor that broadcasts to the parameter.
    """
    parameters = dict(model.named_parameters())  # a tensor that layers share once
    only = _rows_and_biases(plan) if producers_only else None
    masks: dict[str, Tensor] = {}
    for name, axes in kept_indices(plan, keep).items():
        if (parameter := parameters.get(name)) is None:
            continue
        if only is not None and not (axes := {axis: kept for axis, kept in axes.items() if (name, axis) in only}):
            continue
        mask = torch.ones([1] * parameter.dim(), dtype=torch.bool, device=parameter.device)
        for axis, indices in axes.items():
            line = torch.zeros(parameter.shape[axis], dtype=torch.bool)
            line[torch.from_numpy(indices)] = True
            mask = mask & channels_view(line.to(parameter.device), axis, parameter.dim())
        masks[name] = mask
    return masks


def _rows_and_biases(plan: Plan) -> set[tuple[str, int]]:
    """(parameter, axis) of the producers and of their own biases; of a weight that is a direction times a magnitude
    (weight_norm) the magnitude, since a direction of zero has none."""
    found = set()
    for family in plan.families:
        others = {name for name, _ in family.others}
        for name, axis in family.producers:
            magnitude = re.sub(
                r"weight_v$", "weight_g", re.sub(r"(parametrizations\.weight\.original)1$", r"\g<1>0", name)
            )
            found.add((magnitude if magnitude in others else name, axis))
            layer = re.sub(r"(parametrizations\.weight\..*|weight\w*)$", "", name)
            found.update(place for place in family.others if place[0] == f"{layer}bias")
    return found


def channels_view(line: Tensor, axis: int, rank: int) -> Tensor:
    """A vector as a tensor of the given rank that varies along one axis."""
    size = [1] * rank
    size[axis] = len(line)
    return line.reshape(size)


# ---------------------------------------------------------------------------------------------- slicing

PLAIN = frozenset({int, float, bool, str, type(None)})
NO_AXES: Mapping[int, Any] = {}


def _copy(
    model: nn.Module,
    make: Callable[[Tensor, Mapping[int, Any]], Tensor],
    kept: Mapping[str, Mapping[int, Any]],
) -> nn.Module:
    """A deep copy of the module with new tensors; ties, hooks and everything else are copied as they are."""
    memo: dict[int, Any] = {}
    for name, tensor in named_tensors(model).items():
        if id(tensor) not in memo:
            new = make(tensor, kept.get(name, NO_AXES))
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, requires_grad=tensor.requires_grad)
                if type(tensor) is not nn.Parameter and not isinstance(new, type(tensor)):
                    new.__class__ = type(tensor)
            memo[id(tensor)] = new
    try:
        return _clone(model, memo, {})
    except Exception as error:
        raise SurgeryError(f"the model can't be copied ({error}); remove what copy.deepcopy refuses") from error


def duplicate(model: nn.Module) -> nn.Module:
    """``copy.deepcopy`` of a network, also where that refuses computed tensors (old-style weight_norm)."""
    with torch.no_grad():
        return _copy(model, _slice, {})


def _clone(module: nn.Module, memo: dict[int, Any], ordinary: dict[type, bool]) -> Any:
    """``copy.deepcopy`` with a short way for the plain state of ordinary modules."""
    if id(module) in memo:
        return memo[id(module)]
    kind = type(module)
    simple = ordinary.get(kind)
    if simple is None:
        simple = ordinary[kind] = not (
            hasattr(kind, "__deepcopy__") or kind.__reduce_ex__ is not object.__reduce_ex__ or _restores(kind)
        )
    if not simple:
        for part in module.modules():
            for value in vars(part).values():
                _detach(value, memo)
        return copy.deepcopy(module, memo)
    new = kind.__new__(kind)
    memo[id(module)] = new
    state = new.__dict__
    for key, value in module.__dict__.items():
        sort = type(value)
        if sort in PLAIN:
            state[key] = value
        elif (sort is dict or sort is OrderedDict or sort is set) and not value:
            state[key] = sort()
        elif key == "_modules":
            state[key] = {
                name: None if child is None else _clone(child, memo, ordinary) for name, child in value.items()
            }
        elif key == "_parameters" or key == "_buffers":
            state[key] = {name: None if tensor is None else memo[id(tensor)] for name, tensor in value.items()}
        elif sort is tuple and all(type(v) in PLAIN for v in value):
            state[key] = value
        elif key == "_reversed_padding_repeated_twice" and sort is list:
            state[key] = list(value)
        elif trace.is_cache(key, value):
            state[key] = trace.emptied(value)
        elif key != "_compiled_call_impl":  # as in Module.__getstate__
            _detach(value, memo)
            state[key] = copy.deepcopy(value, memo)
    return new


def _detach(value: Any, memo: dict[int, Any]) -> None:
    """Copies a computed tensor, which deepcopy refuses: the weight that old-style weight_norm leaves behind."""
    if isinstance(value, Tensor) and not value.is_leaf and id(value) not in memo:
        memo[id(value)] = value.detach().clone()


def _restores(kind: type) -> bool:
    """Whether a class rebuilds itself from its state: then deepcopy must do it."""
    ours = all(
        getattr(kind, name).__module__.startswith("torch.nn.modules") for name in ("__getstate__", "__setstate__")
    )
    return issubclass(kind, nn.RNNBase) or not ours


def _slice(tensor: Tensor, axes: Mapping[int, Any]) -> Tensor:
    value = tensor.detach()
    for axis, indices in axes.items():
        here = torch.from_numpy(indices) if isinstance(indices, np.ndarray) else torch.as_tensor(indices)
        value = value.index_select(axis, here if value.is_cpu else here.to(value.device))
    return value if axes else value.clone()


def _hollow(tensor: Tensor, axes: Mapping[int, Any]) -> Tensor:
    if not axes:
        return tensor.detach()
    size = list(tensor.shape)
    for axis, indices in axes.items():
        size[axis] = len(indices)
    return tensor.new_zeros(size)  # fresh zero pages: next to nothing is written


def hollow(model: nn.Module, plan: Plan, keep: np.ndarray) -> nn.Module:
    """The small network without its weights: every changed tensor is zeros."""
    small = _copy(model, _hollow, kept_indices(plan, keep))
    widths.apply(small, _attributes(model, small, plan, keep))
    return small


def _attributes(model: nn.Module, small: nn.Module, plan: Plan, keep: np.ndarray) -> widths.Edits:
    return widths.edits(model, small, plan.traces, plan.variables, keep, plan.strictness.guesses)


def same_attributes(model: nn.Module, plan: Plan, other: Plan, keep: np.ndarray) -> bool:
    """Whether two plans that differ in their guesses set the same attributes."""
    small = _copy(model, _hollow, kept_indices(plan, keep))
    return _attributes(model, small, plan, keep) == _attributes(model, small, other, keep)


def check(small: nn.Module, plan: Plan, keep: np.ndarray) -> dict[str, float]:
    """Executes the small network beside the traces of the dense one.

    Returns:
        Per attention layer, the change of the numbers that it multiplies by (a scale derived from its width).

    Raises:
        Refused: An operator did not follow the new widths.
    """
    present = keep.copy()
    present[0] = True
    of_variable = torch.from_numpy(np.concatenate([[True], present[plan.variables]]))
    modules = walk(small)
    scales: dict[str, float] = {}
    for number, dense in enumerate(plan.traces):
        checker = Checker(modules, dense, of_variable)
        try:
            trace.execute(small, plan.example, checker, dense.training)
        except trace.Refused as error:
            error.trace = number
            raise
        scales = checker.scales | scales
    return scales


def shrink(model: nn.Module, plan: Plan, keep: np.ndarray, optimizer: torch.optim.Optimizer | None = None) -> Shrunk:
    """Removes units and returns a new, smaller module.

    Parameter names, ties, hooks, ``requires_grad``, gradients and the modes survive. The dense model stays as it was.
    Where an operator can't follow, the channels that touch it are kept, and ``Shrunk.plan`` says so in a warning.

    Args:
        model: The network that the plan was made for.
        plan: From ``channels.analyse``.
        keep: Bool per unit id.
        optimizer: Re-pointed in place to the new parameters; momentum and moments are sliced along.

    Raises:
        SurgeryError: ``keep`` would empty an axis, or the model can't be copied.
    """
    if keep.shape != (plan.size,) or keep.dtype != np.bool_:
        raise SurgeryError(f"keep has shape {keep.shape} and type {keep.dtype}; give {plan.size} bools")
    kept = kept_indices(plan, keep)
    for name, axes in kept.items():
        for axis, indices in axes.items():
            if not len(indices):
                raise SurgeryError(f"nothing would be left of axis {axis} of {name!r}; keep at least one unit there")
    small, found = _cut(model, plan, keep, kept)
    try:
        changes = check(small, plan, keep)
    except trace.Refused:
        asked, choice = plan, keep
        plan, keep, changes = channels.follow(model, plan, lambda p: translate(asked, choice, p))
        kept = kept_indices(plan, keep)
        small, found = _cut(model, plan, keep, kept)
        for warning in plan.warnings[len(asked.warnings) :]:
            log.warning("%s", warning)
    scales = _scales(model, small, changes)
    _rescale(small, scales)
    for name, parameter in named_tensors(model, again=False).items():
        if parameter.is_leaf and parameter.grad is not None and isinstance(parameter, nn.Parameter):
            small.get_parameter(name).grad = _slice(parameter.grad, kept.get(name, {}))
    if optimizer is not None:
        repoint(optimizer, model, small, kept)
    plain = _tuples(kept)
    return Shrunk(small, Lineage(plain, found, scales), plan, keep)


def _tuples(kept: Mapping[str, Mapping[int, np.ndarray]]) -> dict[str, dict[int, tuple[int, ...]]]:
    known: dict[int, tuple[int, ...]] = {}
    for axes in kept.values():
        for indices in axes.values():
            if id(indices) not in known:
                known[id(indices)] = tuple(indices.tolist())
    return {name: {axis: known[id(i)] for axis, i in axes.items()} for name, axes in kept.items()}


def _cut(
    model: nn.Module, plan: Plan, keep: np.ndarray, kept: Mapping[str, Mapping[int, np.ndarray]]
) -> tuple[nn.Module, widths.Edits]:
    with torch.no_grad():
        small = _copy(model, _slice, kept)
    found = _attributes(model, small, plan, keep)
    widths.apply(small, found)
    return small, found


def translate(plan: Plan, keep: np.ndarray, other: Plan) -> np.ndarray:
    """The choice in the units of another plan of the same network: a unit stays if any of its positions stayed."""
    present = keep.copy()
    present[0] = True
    result = np.zeros(other.size, dtype=bool)
    for name, axes in other.axes.items():
        for axis, ids in axes.items():
            old = plan.axes.get(name, {}).get(axis)
            stays = np.ones(len(ids), dtype=bool) if old is None else present[old]
            result[ids[stays]] = True
    result[0] = True
    return result


def _scales(dense: nn.Module, small: nn.Module, changes: Mapping[str, float]) -> dict[str, tuple[float, ...]]:
    """Factors of the query's rows that undo the change of a scale that attention derives from its width."""
    found: dict[str, tuple[float, ...]] = {}
    if not changes:
        return found
    named = named_tensors(small)
    for name, module in walk(dense):
        projection = attention.query_projection(module) if name in changes else None
        if projection is None:
            continue
        weight = module.get_parameter(projection)
        joint = weight.shape[0] != weight.shape[1]
        prefix = f"{name}." if name else ""
        queries = named[prefix + projection].shape[0] // (3 if joint else 1)
        for local in (projection, _bias_of(projection)):
            if prefix + local in named:
                others = named[prefix + local].shape[0] - queries
                found[prefix + local] = (1.0 / changes[name],) * queries + (1.0,) * others
    return found


def _bias_of(weight: str) -> str:
    return "in_proj_bias" if weight == "q_proj_weight" else weight.removesuffix("weight") + "bias"


def _rescale(model: nn.Module, scales: Mapping[str, tuple[float, ...]]) -> None:
    if not scales:
        return
    named = named_tensors(model)
    with torch.no_grad():
        for name, factors in scales.items():
            parameter = named[name]
            line = torch.tensor(factors, dtype=parameter.dtype, device=parameter.device)
            parameter.mul_(channels_view(line, 0, parameter.dim()))


def repoint(
    optimizer: torch.optim.Optimizer,
    dense: nn.Module,
    small: nn.Module,
    kept: Mapping[str, Mapping[int, Any]],
) -> None:
    """Gives an optimizer of a network the parameters of a smaller one, in place; its moments are sliced along.

    Args:
        optimizer: Of the parameters of ``dense``.
        dense: The network before.
        small: The network after, with the same names.
        kept: Parameter name -> axis -> kept indices, as in a ``Lineage``.
    """
    twins = {id(p): (name, small.get_parameter(name)) for name, p in dense.named_parameters()}
    for group in optimizer.param_groups:
        group["params"] = [twins[id(p)][1] if id(p) in twins else p for p in group["params"]]
    for old in list(optimizer.state):
        if not isinstance(old, Tensor) or id(old) not in twins:
            continue
        name, new = twins[id(old)]
        state = optimizer.state.pop(old)
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == old.shape:
                state[key] = _slice(value, kept.get(name, {}))
        optimizer.state[new] = state


@torch.no_grad()
def carried(tensors: Mapping[str, Tensor], lineage: Lineage) -> dict[str, Tensor]:
    """Tensors of the dense network, by parameter or buffer name, as the small one has them: sliced and rescaled.

    Args:
        tensors: Other values of parameters and buffers than the network's own, shaped like them.
        lineage: How the small network descends from the one that the tensors belong to.
    """
    found = {name: _slice(tensor, lineage.kept.get(name, NO_AXES)) for name, tensor in tensors.items()}
    for name, factors in lineage.scales.items():
        if name in found:
            value = found[name]
            line = torch.tensor(factors, dtype=value.dtype, device=value.device)
            value.mul_(channels_view(line, 0, value.dim()))
    return found


# ---------------------------------------------------------------------------------------------- the way back


def rebuild(dense: nn.Module, lineage: Lineage) -> nn.Module:
    """The small network from the dense one, without example inputs; weights are sliced along.

    Args:
        dense: The network that the lineage starts from (its weights matter only if none are loaded
        afterwards).
        lineage: From ``shrink``, composed over rounds.

    Raises:
        SurgeryError: The lineage does not fit the network.
    """
    named = named_tensors(dense)
    for name, axes in lineage.kept.items():
        if name not in named:
            raise SurgeryError(f"the network has no tensor {name!r}{nearest(name, named)}")
        for axis, indices in axes.items():
            shape = named[name].shape
            ordered = all(a < b for a, b in pairwise(indices))
            if not (axis < len(shape) and indices and ordered and indices[0] >= 0 and indices[-1] < shape[axis]):
                raise SurgeryError(
                    f"kept indices of axis {axis} of {name!r} do not fit its shape {tuple(shape)}; "
                    "give increasing indices inside it"
                )
    modules = dict(dense.named_modules())
    for name, values in lineage.attributes.items():
        if name not in modules:
            raise SurgeryError(f"the network has no module {name!r}{nearest(name, modules)}")
        for key in values:
            if not hasattr(modules[name], key):
                raise SurgeryError(f"module {name!r} has no attribute {key!r}{nearest(key, vars(modules[name]))}")
    with torch.no_grad():
        small = _copy(dense, _slice, lineage.kept)
    widths.apply(small, {n: dict(values) for n, values in lineage.attributes.items()})
    for name, factors in lineage.scales.items():
        if name not in named or len(factors) != named_tensors(small)[name].shape[0]:
            raise SurgeryError(f"scales of {name!r} do not fit the network")
    _rescale(small, lineage.scales)
    stripe_conv.place(small, lineage.stripes)
    return small


def relative(shrunk: Shrunk, first: Lineage) -> Shrunk:
    """The same result with a lineage that starts from the dense network of ``first``."""
    return replace(shrunk, lineage=shrunk.lineage.after(first))
