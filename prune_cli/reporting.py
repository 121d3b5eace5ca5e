"""What a call of `shrink` did: what went, what stayed whole and why, what that costs as predicted and as counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from prune_cli.errors import SurgeryError
from prune_cli.measure.cost import cost
from prune_cli.structure.interpreter import Example
from prune_cli.structure.lineage import Shrunk
from prune_cli.structure.plan import PlanCost
from prune_cli.structure.prunable import targets
from prune_cli.structure.whole import Whole, in_words, whole


@dataclass(frozen=True)
class Report:
    """What `shrink` did to a network.

    MACs are those of one forward pass on the example inputs (one multiply-add = 1).

    Attributes:
        dense: params and MACs of the network that was given.
        predicted: of the small one, by the arithmetic of the channel plan.
        realised: of the small one, counted while it runs; None where counting fails.
        units: sets of coupled channels that could go, and `removed` those that did.
        widths: layer (dotted name) -> output channels before and after, of all convolutions and linear layers.
        whole: what makes channels of which none could go, with the reason and what would help.
        notes: what the structure of the network changed about the request, one line each.
    """

    dense: PlanCost
    predicted: PlanCost
    realised: PlanCost | None
    units: int
    removed: int
    widths: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    whole: tuple[Whole, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """A few lines for a terminal."""
        found = self.realised or self.predicted
        lines = [
            f"{self.removed} of {self.units} units removed",
            f"params {self.dense.params:,} -> {found.params:,} ({_part(found.params, self.dense.params)}), "
            f"predicted {self.predicted.params:,}",
            f"MACs   {self.dense.macs:,} -> {found.macs:,} ({_part(found.macs, self.dense.macs)}), "
            f"predicted {self.predicted.macs:,}",
        ]
        stay = [one for one in self.whole if not one.output]
        if stay and not any("stay whole" in note for note in self.notes):
            lines.append(f"{len(stay)} layers stay whole: {in_words(stay)}")
        return "\n".join([*lines, *self.notes])


def report_of(model: nn.Module, shrunk: Shrunk, example: Example, notes: tuple[str, ...] = ()) -> Report:
    """The report on a surgery.

    Args:
        model: the network that was shrunk.
        shrunk: what became of it.
        example: inputs to count with.
        notes: see `Report`.
    """
    plan, keep = shrunk.plan, shrunk.keep
    before, after = targets(model), targets(shrunk.model)
    return Report(
        dense=plan.count(plan.everything()),
        predicted=plan.count(keep),
        realised=_counted(shrunk.model, example),
        units=plan.size - 1,
        removed=int((~keep[1:]).sum()),
        widths={one.layer: (one.channels, after[name].channels) for name, one in before.items() if name in after},
        whole=whole(plan, before),
        notes=notes,
    )


def _counted(model: nn.Module, example: Example) -> PlanCost | None:
    try:
        found = cost(model, example)
    except (SurgeryError, RuntimeError, TypeError, ValueError):
        return None
    return PlanCost(found.params, found.macs)


def _part(now: int, before: int) -> str:
    return f"{100 * now / before:.1f} %" if before else "-"
