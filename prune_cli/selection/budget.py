"""What may remain: the largest selection that stays inside a budget, found by arithmetic alone."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from prune_cli.errors import ConfigError
from prune_cli.granularities.units import Group, Units
from prune_cli.measure import cost as measure
from prune_cli.measure import latency
from prune_cli.selection import latency_table
from prune_cli.selection.ranking import Limits, Ranking, smallest
from prune_cli.structure import surgery
from prune_cli.structure.plan import Plan
from prune_cli.structure.prunable import owner

log = logging.getLogger(__name__)

Quantity = Literal["macs", "params", "latency_ms"]
CostOf = Callable[[Sequence[int]], int | float]
"""Units removed from each group -> multiply-adds, parameters or milliseconds that are left."""

NAMES = {"macs": "multiply-adds", "params": "parameters", "latency_ms": "ms"}
HOPELESS = 1.25  # the smallest network's measured time over the budget, from which training first makes no sense


@dataclass(frozen=True)
class Budget:
    """What may remain of a network; exactly one key.

    Attributes:
        macs: fraction of the multiply-adds of one image, in (0, 1]; masked weights count as removed.
        params: fraction of the parameters, in (0, 1]; the same.
        latency_ms: milliseconds for one image, on the device of the run (on a CPU: one thread), in float32.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    macs: Annotated[float, Field(gt=0, le=1)] | None = None
    params: Annotated[float, Field(gt=0, le=1)] | None = None
    latency_ms: Annotated[float, Field(gt=0)] | None = None

    def __post_init__(self) -> None:
        given = [f"{key}={value}" for key in NAMES if (value := getattr(self, key)) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of macs, params and latency_ms, got {' and '.join(given) or 'none'} "
                "(a key that a recipe set goes with key=null)"
            )

    @property
    def quantity(self) -> Quantity:
        """Which key is set."""
        keys: tuple[Quantity, ...] = ("macs", "params", "latency_ms")
        return next(key for key in keys if getattr(self, key) is not None)

    @property
    def target(self) -> Fraction:
        """Its value, exactly as written."""
        return Fraction(str(getattr(self, self.quantity)))

    @property
    def below_all(self) -> bool:
        """Whether a network of which nothing goes cannot be known to stay inside."""
        return self.quantity == "latency_ms" or self.target < 1

    def allowed(self, fraction: Fraction, whole: int | float) -> Fraction:
        """What may remain after a fraction of the way from the whole network to the target."""
        end = self.target if self.quantity == "latency_ms" else self.target * Fraction(whole)
        return Fraction(whole) - fraction * (Fraction(whole) - end)


def check_legal(budget: Budget, units: Units, has_ratios: bool) -> None:
    """Refuses a budget beside ratios, and for units that it does not fit.

    Raises:
        ConfigError: says what would be legal.
    """
    if budget.quantity not in units.budgets:
        taken = f"this granularity takes {' or '.join(units.budgets)}"
        choices = taken if units.budgets else "choose granularity=filter or element"
        raise ConfigError(f"granularity.budget.{budget.quantity} does not work with {units.name} units; {choices}")
    if has_ratios:
        raise ConfigError(
            "granularity.budget finds the ratios itself: rules may name and exclude layers, but not set ratios, and "
            "there is no ratio_file"
        )


def check_reachable(
    budget: Budget, groups: Sequence[Group], limits: Limits, model: nn.Module, example_inputs: Tensor
) -> None:
    """Refuses a budget that no selection inside the limits can meet, whatever the scores.

    Raises:
        ConfigError: names the smallest value that can be met.
    """
    orders = [np.arange(group.scores.numel()) for group in groups]
    most = smallest(groups, limits)
    if budget.quantity != "latency_ms":
        cost = _cost(budget.quantity, groups, orders, model, example_inputs)
        _within(budget, cost(most), cost([0] * len(groups)))
        return
    found = latency.latency(_shrunk(groups, orders, most, model), example_inputs, example_inputs.device)
    if found.median_ms > HOPELESS * float(budget.target):
        raise _unreachable(budget, f"{found.median_ms:.3g} ms, measured")


def fit(budget: Budget, ranking: Ranking, fraction: Fraction, model: nn.Module, example_inputs: Tensor) -> list[int]:
    """The fewest units to remove, in the order of a ranking, for the network to stay inside the budget.

    With scope=global units go one by one; with scope=layer all layers have one common ratio, except that where the
    last step takes a unit from several layers, those stay that the budget still has room for.

    Args:
        ranking: of groups whose ratios are all 1.
        fraction: of the way from the whole network to the budget.

    Raises:
        ConfigError: no selection inside the limits meets the budget.
    """
    none = [0] * len(ranking.groups)
    table = None
    if budget.quantity == "latency_ms":
        table = latency_table.measured(model, _structured(ranking.groups), example_inputs)
        cost = _milliseconds(table, ranking.groups, ranking.orders)
    else:
        cost = _cost(budget.quantity, ranking.groups, ranking.orders, model, example_inputs)
    whole = cost(none)
    allowed = budget.allowed(fraction, whole)
    if whole <= allowed:
        if fraction == 1:
            log.info("the whole network is inside the budget %s=%s", budget.quantity, float(budget.target))
        return none
    _within(budget, cost(ranking.counts(Fraction(1))), whole, allowed)
    above, enough = 0, ranking.steps
    while enough - above > 1:
        middle = (above + enough) // 2
        if cost(ranking.counts(Fraction(middle, ranking.steps))) <= allowed:
            enough = middle
        else:
            above = middle
    fewer = ranking.counts(Fraction(above, ranking.steps))
    counts = _refined(ranking.counts(Fraction(enough, ranking.steps)), fewer, cost, allowed)
    _report(budget, cost(counts), whole, ranking, Fraction(enough, ranking.steps))
    if table is not None and fraction == 1:
        _verify(budget, table, ranking, counts, model, example_inputs)
    return counts


def kept_in_plan(groups: Sequence[Group], keeps: Sequence[Tensor]) -> np.ndarray:
    """Bool per unit id of the channel plan that the groups share."""
    chosen: np.ndarray = _structured(groups).everything()
    for group, keep in zip(groups, keeps, strict=True):
        assert group.structure is not None
        chosen[group.structure.units] = keep.cpu().numpy()
    return chosen


def _refined(counts: list[int], fewer: Sequence[int], cost: CostOf, allowed: Fraction) -> list[int]:
    """Gives back what still fits of the last step, the most costly first."""
    there = cost(counts)
    trials = []
    for index, (more, less) in enumerate(zip(counts, fewer, strict=True)):
        if more > less:
            trial = [*counts[:index], less, *counts[index + 1 :]]
            trials.append((there - cost(trial), index))
    for _, index in sorted(trials):
        trial = [*counts[:index], fewer[index], *counts[index + 1 :]]
        if cost(trial) <= allowed:
            counts = trial
    return counts


def _structured(groups: Sequence[Group]) -> Plan:
    structure = groups[0].structure
    assert structure is not None, "units with budgets for latency have a channel plan"
    return structure.plan


def _keep(groups: Sequence[Group], orders: Sequence[np.ndarray], counts: Sequence[int]) -> np.ndarray:
    keep: np.ndarray = _structured(groups).everything()
    for group, order, count in zip(groups, orders, counts, strict=True):
        assert group.structure is not None
        keep[group.structure.units[order[:count]]] = False
    return keep


def _shrunk(
    groups: Sequence[Group], orders: Sequence[np.ndarray], counts: Sequence[int], model: nn.Module
) -> nn.Module:
    if not groups:
        return model
    return surgery.remove_units(model, _structured(groups), _keep(groups, orders, counts)).model


def _cost(
    quantity: Quantity, groups: Sequence[Group], orders: Sequence[np.ndarray], model: nn.Module, example_inputs: Tensor
) -> CostOf:
    """Multiply-adds or parameters: of the smaller network where there will be one, else of what is not masked."""
    if not groups or groups[0].structure is None:
        return _of_weights(quantity, groups, model, example_inputs)
    plan = _structured(groups)

    def count(counts: Sequence[int]) -> int:
        found = plan.count(_keep(groups, orders, counts))
        return int(found.macs if quantity == "macs" else found.params)

    return count


def _of_weights(quantity: Quantity, groups: Sequence[Group], model: nn.Module, example_inputs: Tensor) -> CostOf:
    """Every unit of a group masks equally many weights; a weight masked is its products saved."""
    total, owned = masked_costs(quantity, groups, model, measure.cost(model, example_inputs))
    each = [mine / group.scores.numel() for mine, group in zip(owned, groups, strict=True)]
    fixed = total - sum(owned)

    def count(counts: Sequence[int]) -> int:
        left = (mine - unit * gone for mine, unit, gone in zip(owned, each, counts, strict=True))
        return math.ceil(fixed) + sum(math.ceil(part) for part in left)

    return count


def masked_costs(
    quantity: Quantity, groups: Sequence[Group], model: nn.Module, whole: measure.Cost
) -> tuple[int, list[Fraction]]:
    """Parameters or multiply-adds of the whole network, and what of them the masks of each group could remove."""
    macs = {layer.name: layer.macs for layer in whole.layers}
    parameters = dict(model.named_parameters())
    owned = []
    for group in groups:
        saved = Fraction(0)
        for name, mask in group.mask(
            torch.zeros(group.scores.numel(), dtype=torch.bool, device=group.scores.device)
        ).items():
            size = parameters[name].numel()
            gone = size - int(mask.expand(parameters[name].shape).sum())
            saved += Fraction(gone, size) * macs.get(owner(name), 0) if quantity == "macs" else gone
        owned.append(saved)
    return whole.macs if quantity == "macs" else whole.params, owned


def _milliseconds(table: latency_table.Table, groups: Sequence[Group], orders: Sequence[np.ndarray]) -> CostOf:
    def predict(counts: Sequence[int]) -> float:
        return table.predict(_keep(groups, orders, counts)).median_ms

    return predict


def _within(budget: Budget, least: int | float, whole: int | float, allowed: Fraction | None = None) -> None:
    if least <= (budget.allowed(Fraction(1), whole) if allowed is None else allowed):
        return
    if budget.quantity == "latency_ms":
        raise _unreachable(budget, f"{least:.3g} ms, predicted")
    raise _unreachable(budget, f"{math.ceil(1e4 * least / whole) / 1e4} of the {NAMES[budget.quantity]}")


def _unreachable(budget: Budget, least: str) -> ConfigError:
    return ConfigError(
        f"granularity.budget.{budget.quantity}={float(budget.target)} cannot be met: what the layers asked for, "
        f"min_keep, max_ratio, round_to and dependency leave is at least {least}"
    )


def unreachable(budget: Budget, why: str) -> ConfigError:
    """What to raise where no unit can go at all."""
    return ConfigError(f"granularity.budget.{budget.quantity}={float(budget.target)} cannot be met: {why}")


def _report(budget: Budget, left: int | float, whole: int | float, ranking: Ranking, fraction: Fraction) -> None:
    bound = ranking.bound(fraction)
    log.info(
        "budget %s=%s: %.6g of %.6g %s remain (%.4f)%s", budget.quantity, float(budget.target), left, whole,
        NAMES[budget.quantity], left / whole,
        f"; min_keep and max_ratio acted on {', '.join(bound)}" if bound else "",
    )  # fmt: skip


def _verify(
    budget: Budget,
    table: latency_table.Table,
    ranking: Ranking,
    counts: Sequence[int],
    model: nn.Module,
    example_inputs: Tensor,
) -> None:
    """Measures the network that a latency budget led to, beside its prediction."""
    expected = table.predict(_keep(ranking.groups, ranking.orders, counts))
    small = _shrunk(ranking.groups, ranking.orders, counts, model)
    found = latency.latency(small, example_inputs, example_inputs.device)
    log.info(
        "latency of one image: predicted %.3f ms (p95 %.3f), measured %.3f ms (p95 %.3f) over %d passes on %s",
        expected.median_ms, expected.p95_ms, found.median_ms, found.p95_ms, found.repeats, found.device,
    )  # fmt: skip
    if found.median_ms > float(budget.target):
        log.warning(
            "the smaller network takes %.3f ms, more than the %s ms asked: the table's prediction was off by %.0f %%",
            found.median_ms, float(budget.target), 100 * (found.median_ms / expected.median_ms - 1),
        )  # fmt: skip
