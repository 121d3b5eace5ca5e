"""Stripes: one position of one filter over all its input channels, W[n, :, i, j] (Meng et al., arXiv:2009.14410)."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from prune_cli import masks as masking
from prune_cli.criteria.criterion import Criterion
from prune_cli.errors import SurgeryError
from prune_cli.granularities.filter import kept_units
from prune_cli.granularities.spatial import many_positions, with_such_units
from prune_cli.granularities.units import Context, FindPlan, Group, Units
from prune_cli.layers import replacing, stripes
from prune_cli.layers.kind import Data
from prune_cli.masks import Masks
from prune_cli.measure.latency import latency
from prune_cli.measure.storage import MaskFormat
from prune_cli.structure import rebuild, slicing, surgery
from prune_cli.structure.follow import analyse
from prune_cli.structure.interpreter import call_model
from prune_cli.structure.lineage import Replacement, Shrunk
from prune_cli.structure.modes import evaluating
from prune_cli.structure.plan import Plan
from prune_cli.structure.prunable import targets

log = logging.getLogger(__name__)

BATCHES = (1, 64)  # those of the results table
ROUNDS = 5
KIND = "stripes"  # of replaced layers

NEEDS = "a convolution with kernels larger than 1x1 (a 1x1 stripe is a whole filter)"


@dataclass(frozen=True)
class Stripe(Units):
    """Every stripe is a unit; the stripes of a whole layer compete, not those of each filter.

    A stripe's score is the sum over its input channels: with criterion=l1 its L1 norm, with l2 its squared L2 norm.
    Linear and 1x1 layers stay dense, or are refused where they were chosen by name.

    Attributes:
        convert: which convolutions become `StripeConv2d` when the network is shrunk: all, or those that are faster
            so at batch 1 and 64, measured on the network's device; the others stay dense under their masks.
    """

    name: ClassVar[str] = "stripe"
    budgets: ClassVar[tuple[str, ...]] = ("macs", "params")
    shrinks: ClassVar[bool] = True

    convert: Literal["all", "faster"] = "all"

    def check(self, model: nn.Module, ratios: Mapping[str, float | str], criterion: Criterion) -> None:
        """Kernels larger than 1x1 must be there."""
        with_such_units(model, ratios, many_positions, self.name, NEEDS)

    def groups(self, context: Context) -> list[Group]:
        """One group per convolution."""
        asked = with_such_units(context.model, context.ratios, many_positions, self.name, NEEDS)
        return [_group(context, name, ratio) for name, ratio in asked.items()]

    def forms(self, model: nn.Module, ratios: Mapping[str, float | str]) -> dict[str, MaskFormat]:
        """The kept stripes' values and one bit per stripe."""
        return {name: MaskFormat("stripe") for name, target in targets(model).items() if many_positions(target.module)}

    def complete(
        self, model: nn.Module, example_inputs: Any, masks: Masks, plan: FindPlan | None = None
    ) -> dict[str, Tensor]:
        """The masks with those of filters without stripes: bias, norm parameters and the consumers' channels.

        Such a filter still gives a constant, which its norm's shift makes another one. Removing it with its norm is
        what the network's training under these masks must see, so that masked and shrunk network are the same.
        """
        if not _has_dead_filters(masks):
            return dict(masks)
        try:
            found = plan() if plan else analyse(model, example_inputs)
        except SurgeryError as error:
            log.warning("filters without stripes keep their norms, as the network cannot be analysed: %s", error)
            return dict(masks)
        return masking.joined(masks, slicing.structured_masks(model, found, _living(found, masks)))

    def shrink(self, model: nn.Module, example_inputs: Any, masks: Masks, plan: FindPlan | None = None) -> Shrunk:
        """The network without filters of which the masks leave nothing, its convolutions of the stripes they leave.

        Convolutions that stripes cannot replace (`stripes.fitting`) keep their masks.
        """
        channels = plan() if plan else analyse(model, example_inputs)
        shrunk = surgery.remove_units(model, channels, kept_units(model, channels, masks))
        cut = {name: masking.sliced(mask, shrunk.lineage.kept.get(name, {})) for name, mask in masks.items()}
        inputs = _inputs(shrunk.model, example_inputs)
        found = {name: data for name, data in stripes.fitting(shrunk.model, cut).items() if name in inputs}
        if self.convert == "faster":
            found = {name: data for name, data in found.items() if _faster(shrunk.model, name, data, inputs[name])}
        replaced = {name: Replacement(KIND, data) for name, data in found.items()}
        rebuild.place(shrunk.model, replaced)
        return replace(shrunk, lineage=replace(shrunk.lineage, replaced=replaced))


def _group(context: Context, name: str, ratio: float) -> Group:
    pooled = context.pooled(name, 1, 1)

    def mask(keep: Tensor) -> dict[str, Tensor]:
        return {name: keep.view(pooled.shape).unsqueeze(1)}

    return Group(name, pooled.flatten(), ratio, mask)


# ------------------------------------------------------------------------------------------------------- shrinking


def _has_dead_filters(masks: Masks) -> bool:
    return any(mask.dim() > 1 and not bool(mask.flatten(1).any(1).all()) for mask in masks.values())


def _living(plan: Plan, masks: Masks) -> np.ndarray:
    """Units any of whose producers has something left, as a `keep` array; at least one unit of every family stays."""
    keep: np.ndarray = plan.everything()
    for family in plan.families:
        alive = np.zeros(plan.size, dtype=bool)
        for name, axis in family.producers:
            ids = plan.axes[name][axis]
            if name not in masks:
                alive[ids] = True
                continue
            rows = masks[name].movedim(axis, 0).flatten(1).any(1).cpu().numpy()
            alive[ids[np.broadcast_to(rows, ids.shape)]] = True
        dead = family.units[~alive[family.units]]
        keep[dead[1:] if len(dead) == len(family.units) else dead] = False
    return keep


def _inputs(model: nn.Module, example_inputs: Any) -> dict[str, torch.Size]:
    """Shapes of the inputs of the convolutions that the network calls as modules."""
    shapes: dict[str, torch.Size] = {}
    handles = []
    for name, module in model.named_modules():
        if type(module) is nn.Conv2d:

            def note(_: nn.Module, arguments: tuple[Any, ...], name: str = name) -> None:
                if len(arguments) == 1 and arguments[0].dim() == 4:
                    shapes[name] = arguments[0].shape

            handles.append(module.register_forward_pre_hook(note))
    try:
        with evaluating(model), torch.no_grad():
            call_model(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return shapes


def _faster(model: nn.Module, name: str, data: Data, shape: torch.Size) -> bool:
    """Whether stripes beat the dense convolution at every batch size of the table; timed in turns, medians."""
    dense = nn.Sequential(model.get_submodule(name)).eval()
    small = copy.deepcopy(dense)
    replacing.place(small, "0", KIND, data)
    device = next(dense.parameters()).device
    verdicts = []
    for count in BATCHES:
        images = torch.rand(count, *shape[1:])
        turns = [[latency(layer, images, device, repeats=2, warmup=1).median_ms for layer in (dense, small)]
                 for _ in range(ROUNDS)]  # fmt: skip
        before, after = (median(column) for column in zip(*turns, strict=True))
        verdicts.append(after < before)
        log.info("%s, batch %d: dense %.3g ms, stripes %.3g ms", name, count, before, after)
    return all(verdicts)
