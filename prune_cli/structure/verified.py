"""From masks to a network that is really smaller, checked against the masked one, and back where masks are needed.

The masks say which units are gone; the granularity's units know how to take them out. What comes back computes what
the masked network computes: channels without which it does not are kept, and where none could go it is an error.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from prune_cli import masks as masking
from prune_cli.errors import SurgeryError
from prune_cli.layers.replacing import kind_named
from prune_cli.masks import Masks
from prune_cli.structure import reference, surgery
from prune_cli.structure.culprits import TooManyTries, culprits
from prune_cli.structure.lineage import Lineage, Shrunk
from prune_cli.structure.modes import evaluating
from prune_cli.structure.plan import Family, Plan
from prune_cli.structure.slicing import duplicate

log = logging.getLogger(__name__)
Result = TypeVar("Result")
TRIES = 40
"""How many small networks are tried out to find the channels without which the two differ."""


class Shrinks(Protocol):
    """Units of a granularity that can be taken out of a network; those that can declare it."""

    def shrink(
        self, model: nn.Module, example_inputs: Any, masks: Masks, plan: Callable[[], Plan] | None = None
    ) -> Shrunk:
        """The network without the units that the masks remove; `plan` gives its channel plan, where somebody keeps it."""


@dataclass(frozen=True)
class Small:
    """A shrunk network.

    Attributes:
        model: the new module.
        masks: what the masks still remove inside the smaller tensors; empty where whole units were all they removed.
        lineage: how it descends from the dense network, over all rounds.
        shrunk: what surgery did in this round; None where there was none.
    """

    model: nn.Module
    masks: dict[str, Tensor]
    lineage: Lineage
    shrunk: Shrunk | None = None


def shrink(
    units: Shrinks,
    model: nn.Module,
    example_inputs: Any,
    masks: Masks,
    *,
    lineage: Lineage | None = None,
    check_on: Iterable[Any] = (),
    plan: Callable[[], Plan] | None = None,
) -> Small:
    """Takes the masked units out of a network whose masked entries are zero.

    Args:
        units: the granularity that made the masks.
        model: the masked network; left as it was.
        example_inputs: inputs for the analysis of shapes.
        masks: parameter name -> bool tensor, True = keep.
        lineage: how `model` descends from the dense network; None = it is the dense network.
        check_on: inputs, shaped like the example, on which masked and shrunk network must agree; also on `variants` of
            the first. Norms over channels (LayerNorm, GroupNorm, softmax) are compared over the kept channels.
        plan: gives the channel plan of `model`, where somebody keeps it.

    Raises:
        SurgeryError: the two do not agree, or the network cannot be analysed.
    """
    known = () if plan is None else (plan,)
    shrunk = units.shrink(model, example_inputs, masks, *known)
    return checked(model, shrunk, masks, lineage=lineage, check_on=check_on)


def checked(
    model: nn.Module,
    shrunk: Shrunk,
    masks: Masks,
    *,
    lineage: Lineage | None = None,
    check_on: Iterable[Any] = (),
) -> Small:
    """What surgery made of a network, after a look at whether the two agree; see `shrink`.

    Families of channels without which they do not are kept, with a warning.

    Raises:
        SurgeryError: they do not agree whatever is kept.
    """
    many = list(check_on)
    try:
        _compare(model, shrunk, many)
    except SurgeryError as error:
        shrunk = _without_culprits(model, shrunk, many, error)
    left = _left(masks, shrunk)
    whole = shrunk.lineage if lineage is None else shrunk.lineage.after(lineage)
    return Small(shrunk.model, {name: mask for name, mask in left.items() if not bool(mask.all())}, whole, shrunk)


def _compare(model: nn.Module, shrunk: Shrunk, check_on: Sequence[Any]) -> None:
    with evaluating(model), evaluating(shrunk.model):
        for number, inputs in enumerate(check_on):
            _agree(model, shrunk, inputs)
            if not number:
                _agree_on_others(model, shrunk, inputs)


def _without_culprits(model: nn.Module, shrunk: Shrunk, check_on: Sequence[Any], error: SurgeryError) -> Shrunk:
    """The small network with those families of channels kept without which it differs or does not run.

    Raises:
        SurgeryError: the one given, where they are not the reason, or nothing else would go.
    """
    plan, keep = shrunk.plan, shrunk.keep
    going = [family for family in plan.families if not keep[family.units].all()]

    def made(families: Sequence[Family]) -> Shrunk:
        chosen = plan.everything()
        for family in families:
            chosen[family.units] = keep[family.units]
        return surgery.remove_units(model, plan, chosen)

    def holds(families: Sequence[Family]) -> bool:
        try:
            _compare(model, made(families), check_on)
        except SurgeryError:
            return False
        return True

    surgery.log.disabled = True  # it has said already what it would say again
    try:
        if shrunk.lineage.replaced or len(going) < 2 or holds(going) or not holds([]):
            raise error
        found = culprits(going, holds, TRIES)
        rest = [family for family in going if all(family is not one for one in found)]
        if not rest or not holds(rest):
            raise error
        small = made(rest)
    except TooManyTries:
        raise error from None
    finally:
        surgery.log.disabled = False
    names = [family.name for family in found]
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    why = str(error).partition("; keep the masks")[0]
    log.warning("%s%s: all channels stay, since without some of them %s", ", ".join(names[:5]), more, why)
    return small


def variants(example: Any) -> Iterator[tuple[str, Any]]:
    """Other inputs that a network which takes the example should take: what the example did not show, they may."""
    tensors = [leaf for leaf in tree_leaves(example) if isinstance(leaf, Tensor)]
    rows = next((len(tensor) for tensor in tensors if tensor.dim()), 0)

    def shuffled(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.roll(1, -1) if tensor.dim() and tensor.dtype is not torch.bool else tensor
        order = torch.randperm(tensor.numel(), generator=torch.Generator().manual_seed(0))
        return tensor.flatten()[order.to(tensor.device)].reshape(tensor.shape)

    def twice(tensor: Tensor) -> Tensor:
        return torch.cat([tensor, shuffled(tensor)]) if tensor.dim() and len(tensor) == rows else tensor

    def scaled(factor: float) -> Callable[[Tensor], Tensor]:
        return lambda tensor: factor * tensor if tensor.is_floating_point() else tensor

    changes = {
        "other values": shuffled,
        "inputs three times as large": scaled(3.0),
        "inputs of the other sign": scaled(-1.0),
        "a batch twice as large": twice,
    }
    for what, change in changes.items():
        yield what, tree_map(lambda leaf, change=change: change(leaf) if isinstance(leaf, Tensor) else leaf, example)


def _agree_on_others(model: nn.Module, shrunk: Shrunk, example: Any) -> None:
    """Looks at inputs that the user did not give; what the masked network does not take, or makes no numbers of, says
    nothing."""
    for what, inputs in variants(example):
        try:
            want = _outputs(reference.forward, model, shrunk.plan, shrunk.keep, inputs)
        except SurgeryError as error:
            log.debug("not compared on %s: %s", what, error)
            continue
        if any(t.is_floating_point() and bool(t.isnan().any()) for t in want):
            continue
        _agree(model, shrunk, inputs, f" on {what}")


def _agree(model: nn.Module, shrunk: Shrunk, inputs: Any, where: str = "") -> None:
    advice = "keep the masks (granularity.shrink=false) and report the network"
    try:
        worst = _outputs(reference.difference, model, shrunk, inputs)
        if not worst <= reference.TOLERANCE:  # what rounding decides (the order of scores) is decided alike in float64
            worst = min(worst, _in_double(model, shrunk, inputs))
    except (SurgeryError, RuntimeError, IndexError, TypeError, ValueError) as error:
        raise SurgeryError(f"{' '.join(str(error).split())[:250]}{where}; {advice}") from error
    log.debug("masked and shrunk network differ by %.1e of the largest output%s", worst, where)
    if not worst <= reference.TOLERANCE:
        how = f"by {worst:.1e} of the largest output" if math.isfinite(worst) else "or gives what is no number"
        raise SurgeryError(f"the shrunk network differs from the masked one{where} {how}; {advice}")


def _in_double(model: nn.Module, shrunk: Shrunk, inputs: Any) -> float:
    """The difference in float64; infinite where the network insists on its own type."""
    exact = tree_map(lambda leaf: leaf.double() if _real(leaf) else leaf, inputs)
    twins = (duplicate(net).double() for net in (model, shrunk.model))
    try:
        return _outputs(reference.difference, next(twins), replace(shrunk, model=next(twins)), exact)
    except SurgeryError:
        return math.inf


def _real(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _outputs(compute: Callable[..., Result], *args: Any) -> Result:
    with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
        return compute(*args)


def _left(masks: Masks, shrunk: Shrunk) -> dict[str, Tensor]:
    """The masks in the shapes of the parameters of the smaller network."""
    kept = shrunk.lineage.kept
    left = {name: masking.sliced(mask, kept.get(name, {})) for name, mask in masks.items()}
    for module, one in shrunk.lineage.replaced.items():
        own = {name: left.pop(name) for name in list(left) if name.startswith(f"{module}.")}
        inside = {name[len(module) + 1 :]: mask for name, mask in own.items()}
        inside = kind_named(one.kind).masks_left(shrunk.model.get_submodule(module), inside)
        left |= {f"{module}.{name}": mask for name, mask in inside.items()}
    return left
