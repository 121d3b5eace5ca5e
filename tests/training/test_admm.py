"""ADMM: an iteration by hand, projections against every other choice, convergence on convex losses."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from prune_cli.criteria import weights
from prune_cli.criteria.criterion import Criterion
from prune_cli.granularities.element import Element
from prune_cli.granularities.filter import Filter
from prune_cli.granularities.kernel import Kernel
from prune_cli.granularities.n_m import NM
from prune_cli.granularities.pattern import FIXED5, Pattern
from prune_cli.granularities.stripe import Stripe
from prune_cli.selection.granularity import Granularity
from prune_cli.selection.select import select
from prune_cli.selection.targets import Rule
from prune_cli.training import admm
from prune_cli.training.admm import Projection, Pull, rescaled, residuals, step, substituted

L1, L2 = Criterion(weights.l1), Criterion(weights.l2)


def largest(k: int):
    """Projects a vector named `w` onto those with k entries."""

    def project(model: nn.Module):
        def of(values):
            value = values.get("w", model.w.detach())
            keep = torch.zeros(value.shape, dtype=torch.bool)
            keep[value.abs().topk(k).indices] = True
            return {"w": keep}

        return of

    return project


class Vector(nn.Module):
    def __init__(self, *values: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(values, dtype=torch.double))


def test_two_iterations_by_hand():
    model = Vector(3.0, -2.0, 1.0)
    project = largest(1)(model)
    first = step({"w": model.w.detach()}, None, project)
    assert first.z["w"].tolist() == [3, 0, 0]
    assert first.u["w"].tolist() == [0, 0, 0]
    model.w.grad = torch.tensor([1.0, 1.0, 1.0]).double()
    Pull(model, [first], 0.5)(0, {})
    assert model.w.grad.tolist() == [1, 1 + 0.5 * -2, 1 + 0.5 * 1]
    with torch.no_grad():
        model.w.copy_(torch.tensor([2.5, -1.5, 0.5]))
    assert first.z["w"].tolist() == [3, 0, 0], "Z is no view of W"
    second = step({"w": model.w.detach()}, first, project)
    assert second.z["w"].tolist() == [2.5, 0, 0]
    assert second.u["w"].tolist() == [0, -1.5, 0.5]
    with torch.no_grad():
        model.w.copy_(torch.tensor([1.0, -1.0, 0.25]))
    third = step({"w": model.w.detach()}, second, project)  # W + U = (1, -2.5, 0.75): another entry stays
    assert third.z["w"].tolist() == [0, -2.5, 0]
    assert third.u["w"].tolist() == [1, 0, 0.75]
    halved = rescaled(third, 0.5)  # rho has doubled, rho * U has not changed
    model.w.grad = torch.zeros(3).double()
    Pull(model, [halved], 2.0)(0, {})
    assert model.w.grad.tolist() == [2 * (1 + 0.5), 2 * (-1 + 2.5), 2 * (0.25 + 0.375)]


def test_gradient_of_the_pull_is_that_of_the_squared_penalty_of_all_sets():
    model = Vector(3.0, -2.0, 1.0)
    make = torch.Generator().manual_seed(0)
    sets = [
        Projection({"w": torch.randn(3, generator=make).double()}, {"w": torch.randn(3, generator=make).double()})
        for _ in range(2)
    ]
    penalty = sum(0.3 / 2 * (model.w - part.z["w"] + part.u["w"]).square().sum() for part in sets)
    penalty.backward()
    wanted = model.w.grad.clone()
    model.w.grad.zero_()
    Pull(model, sets, 0.3)(0, {})
    assert model.w.grad.tolist() == pytest.approx(wanted.tolist(), rel=1e-12)


def test_residuals_by_hand():
    before = Projection({"w": torch.tensor([1.0, 0.0])}, {"w": torch.zeros(2)})
    after = Projection({"w": torch.tensor([0.0, 3.0])}, {"w": torch.zeros(2)})
    lines = residuals({"w": torch.tensor([4.0, 3.0])}, before, after, rho=0.1, constraint="units", iteration=2, epoch=5)
    assert [line.parameter for line in lines] == ["w", admm.ALL]
    assert lines[0].primal == pytest.approx(4 / 5)
    assert lines[1].dual == pytest.approx(0.1 * math.sqrt(10) / 5)
    assert residuals({}, None, Projection({}, {}), rho=None, constraint="units", iteration=0, epoch=0) == []


@pytest.mark.parametrize("rho", [1.5, 4.0])
def test_residuals_fall_to_zero_on_a_convex_loss_and_the_best_sparse_vector_is_found(rho):
    """f(w) = |w - a|^2 / 2 over vectors with two entries: the two largest of a; rho is above the curvature."""
    target = torch.tensor([0.3, -2.0, 0.9, 1.5, -0.1]).double()
    model = Vector(*target.tolist())  # trained, as the network that is pruned
    project, split, found = largest(2)(model), None, []
    for _ in range(60):
        before, split = split, step({"w": model.w.detach()}, split, project)
        found.append(
            residuals({"w": model.w.detach()}, before, split, rho=rho, constraint="units", iteration=0, epoch=0)
        )
        for _ in range(100):
            model.w.grad = (model.w - target).detach()
            Pull(model, [split], rho)(0, {})
            with torch.no_grad():
                model.w -= 0.1 * model.w.grad
    assert found[-1][-1].primal < 1e-6 < found[1][-1].primal
    assert found[-1][-1].dual < 1e-5
    assert split.z["w"].tolist() == pytest.approx([0, -2, 0, 1.5, 0], abs=1e-5)


# ---- projections of the granularities -------------------------------------------------------------------------------


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), nn.Flatten(), nn.Linear(12, 2, bias=False))


IMAGE = torch.zeros(1, 2, 4, 4)


def projected(granularity: Granularity, criterion: Criterion, model: nn.Module, values: dict[str, Tensor]):
    with substituted(model, values):
        return select(granularity, criterion, model, IMAGE).masks


def supports_element(count: int, gone: int):
    for removed in itertools.combinations(range(count), gone):
        keep = torch.ones(count, dtype=torch.bool)
        keep[list(removed)] = False
        yield keep


def of_first(**keys) -> dict:
    return {"rules": (Rule(names=("0",), ratio=keys.pop("ratio")),), **keys}


def grid(shape: tuple[int, ...], gone: int):
    size = math.prod(shape)
    return (keep.view(shape).expand(3, 2, 3, 3) for keep in supports_element(size, gone))


def n_m(shape=(3, 2, 3, 3)):
    """Every choice of one of two input channels at three places; the rest as in the first choice is not looked at."""
    for bits in itertools.product([0, 1], repeat=3):
        keep = torch.zeros(shape, dtype=torch.bool)
        for place, bit in enumerate(bits):
            keep[place, bit, 0, 0] = True
        yield keep


@pytest.mark.parametrize(
    ("granularity", "choices"),
    [
        (Granularity(Kernel(), **of_first(ratio=0.5)), lambda: grid((3, 2, 1, 1), 3)),
        (Granularity(Stripe(), **of_first(ratio=2 / 27)), lambda: grid((3, 1, 3, 3), 1)),
        (Granularity(Stripe(), **of_first(ratio=0.15)), lambda: grid((3, 1, 3, 3), 4)),
        (Granularity(Filter(), **of_first(ratio=0.34)), lambda: grid((3, 1, 1, 1), 1)),
        (Granularity(Element(), **of_first(ratio=0.04)), lambda: grid((3, 2, 3, 3), 2)),
    ],
    ids=["kernel", "stripe", "stripe4", "filter", "element"],
)  # fmt: skip
def test_with_l2_a_projection_is_nearer_than_every_other_choice(granularity, choices):
    model = network()
    original = model[0].weight.detach().clone()
    value = original + torch.randn(original.shape, generator=torch.Generator().manual_seed(3))
    mask = projected(granularity, L2, model, {"0.weight": value})["0.weight"]
    assert torch.equal(model[0].weight, original), "scoring W + U leaves W alone"
    mine = (value * ~mask.expand(value.shape)).square().sum()
    best = min((value * ~keep).square().sum() for keep in choices())
    assert mine == pytest.approx(best.item(), rel=1e-6)


def test_n_m_projection_is_nearer_than_every_other_choice():
    model = network()
    value = torch.randn(3, 2, 3, 3, generator=torch.Generator().manual_seed(3))
    mask = projected(Granularity(NM(m=2), **of_first(ratio=0.5)), L2, model, {"0.weight": value})["0.weight"]
    pairs = value.movedim(1, -1).reshape(-1, 2)
    best = sum(min(pair[0] ** 2, pair[1] ** 2) for pair in pairs)
    assert (value * ~mask).square().sum().item() == pytest.approx(best.item(), rel=1e-6)


@pytest.mark.parametrize("criterion", [L1, L2])
@pytest.mark.parametrize("units", [Pattern(library=4), Pattern(pattern_set="fixed5"), Pattern(library=3, entries=3)])
def test_pattern_projection_is_euclidean_with_the_library_of_the_network_that_came(units, criterion):
    model = network()
    granularity = Granularity(units, **of_first(ratio=0.8))
    whole, (patterns, connectivity) = granularity.split(model)
    library = units.patterns([model[0].weight.detach().square()])
    if units.pattern_set == "fixed5":
        assert [tuple(torch.nonzero(row).flatten().tolist()) for row in library] == list(FIXED5)
    values = {"0.weight": torch.randn(3, 2, 3, 3, generator=torch.Generator().manual_seed(5))}
    kernels = values["0.weight"].view(6, 9)
    mask = projected(replace(granularity, units=patterns.units), patterns.criterion or criterion, model, values)
    nearest = torch.stack([(kernels * ~row).square().sum(1) for row in library]).min(0).values
    lost = (kernels * ~mask["0.weight"].view(6, 9)).square().sum(1)
    assert lost.tolist() == pytest.approx(nearest.tolist(), rel=1e-6)

    gone = math.floor((0.8 - (1 - float(units.kept))) / float(units.kept) * 6 + 1e-9)
    mask = projected(replace(granularity, units=connectivity.units), L2, model, values)["0.weight"]
    lost = (kernels * ~mask.expand(3, 2, 3, 3).reshape(6, 9)).square().sum()
    best = min((kernels[list(choice)]).square().sum() for choice in itertools.combinations(range(6), gone))
    assert lost.item() == pytest.approx(best.item(), rel=1e-6)

    last = projected(whole, L2, model, values)["0.weight"].view(6, 9)
    inside = [any(bool((row & ~allowed).sum() == 0) for allowed in library) for row in last]
    assert all(inside)
    assert int((~last.any(1)).sum()) == gone


def test_other_granularities_are_one_set_and_ratio_zero_leaves_everything_free():
    model = network()
    granularity = Granularity(Element(), ratio=0.0)
    whole, sets = granularity.split(model)
    assert whole == granularity
    assert [part.units for part in sets] == [granularity.units]
    values = {name: value.detach() for name, value in model.named_parameters()}
    masks = projected(granularity, L2, model, values)
    assert all(bool(mask.all()) for mask in masks.values())
    split = step(values, None, lambda changed: projected(granularity, L2, model, dict(changed)))
    assert not split.z
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    Pull(model, [split], 1.0)(0, {})
    assert all(bool((parameter.grad == 1).all()) for parameter in model.parameters())


def test_a_weight_that_a_later_choice_leaves_whole_goes_on_with_a_dual_of_zero():
    value = torch.tensor([1.0, 2.0])
    before = Projection({"w": torch.tensor([0.0, 2.0])}, {"w": torch.tensor([0.5, 0.0])})
    after = step({"w": value}, before, lambda values: {})
    assert after.z["w"].tolist() == [1.5, 2.0]
    assert after.u["w"].tolist() == [0.0, 0.0]


def test_the_library_counts_no_kernels_that_are_gone():
    model = network()
    with torch.no_grad():
        model[0].weight[1:] = 0
        model[0].weight[0] = torch.tensor([9.0, 8, 7, 1, 5, 1, 1, 1, 1]).view(3, 3)
    whole, _ = Granularity(Pattern(library=1), **of_first(ratio=0.6)).split(model)
    assert torch.nonzero(whole.units.patterns[0]).flatten().tolist() == [0, 1, 2, 4]
