"""RigL and SET: what each layer gets, when how much moves, and that every layer has as many weights at all times."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from prune_cli.criteria import gradients
from prune_cli.criteria.criterion import Criterion
from prune_cli.distillation.distillation import Distillation
from prune_cli.errors import ScheduleError
from prune_cli.granularities.element import Element
from prune_cli.granularities.filter import Filter
from prune_cli.granularities.n_m import NM
from prune_cli.masks import MOMENTS
from prune_cli.schedules.allocation import allocated
from prune_cli.schedules.requests import Mask, Regrow, Train
from prune_cli.schedules.rigl import rigl
from prune_cli.schedules.schedule import first_request, most_epochs
from prune_cli.schedules.sparse_evolution import sparse_evolution
from prune_cli.selection.budget import Budget
from prune_cli.selection.granularity import Granularity
from prune_cli.selection.targets import Rule
from prune_cli.session import perform
from prune_cli.session.posing import pose
from prune_cli.stages.prune import check
from tests.schedules.played import asking, play, toy
from tests.session.tiny import DATA, L2, begin, network, run, training

PROBLEM = toy({"a": 8, "b": 8}, {"a": 1, "b": 1}, 0.5, quantity="units", budget=8)
SPARSE = Granularity(Element(), 0.7)
SCHEDULES = {
    "rigl": functools.partial(rigl, epochs=4, every=2),
    "set": functools.partial(sparse_evolution, epochs=4, every=3),
}


def posed(granularity: Granularity):
    model = network()
    return pose(granularity, model, DATA.train(4, 0).epoch(0).__next__()[0][:1], asked=granularity.ratios(model),
                masked={}, steps=4)  # fmt: skip


# ---- what each layer gets ---------------------------------------------------------------------------------------------


def test_erk_densities_stand_in_proportion_to_axes_over_products_and_full_layers_give_to_the_others():
    """Convolutions (8, 3, 3, 3) and (8, 8, 3, 3), a linear layer (4, 8); 30 % of 824 weights."""
    kept = allocated(posed(SPARSE), "erk", "rigl")
    raw = {"0.weight": (8 + 3 + 6) / 216, "3.weight": (16 + 6) / 576, "9.weight": (4 + 8) / 32}
    # the linear layer would get more than it has; the rest share what is left
    factor = (248 - 32) / (17 + 22)
    assert factor * raw["9.weight"] > 1 and kept["9.weight"] == 32
    assert kept["0.weight"] == pytest.approx(factor * 17, abs=1) and kept["3.weight"] == pytest.approx(
        factor * 22, abs=1
    )
    assert 248 - 3 <= sum(kept.values()) <= 248


def test_uniform_is_what_the_granularity_asks_of_each_layer():
    assert allocated(posed(SPARSE), "uniform", "rigl") == {"0.weight": 65, "3.weight": 173, "9.weight": 10}


@pytest.mark.parametrize("allocation", ["uniform", "erk"])
def test_layers_of_which_nothing_is_asked_stay_whole(allocation):
    rules = (Rule(types=("default",), ratio=0.9), Rule(names=("0",), ratio=0.0))
    problem = posed(Granularity(Element(), rules=rules))
    kept = allocated(problem, allocation, "rigl")
    assert kept["0.weight"] == 216
    assert problem.budget - 2 <= sum(kept.values()) <= problem.budget + 2


@pytest.mark.parametrize("allocation", ["uniform", "erk"])
@pytest.mark.parametrize("budget", [Budget(macs=0.3), Budget(params=0.2)])
def test_budgets_are_met(allocation, budget):
    problem = posed(Granularity(Element(), budget=budget))
    kept = allocated(problem, allocation, "rigl")
    assert 0.97 * problem.budget <= problem.cost(kept) <= problem.budget


def test_floors_that_leave_too_much_are_named():
    with pytest.raises(ScheduleError, match=r"floors leave .*min_keep"):
        allocated(posed(Granularity(Element(), budget=Budget(params=0.2), min_keep=0.5)), "erk", "rigl")


@pytest.mark.parametrize("units", [Filter(), NM()])
def test_units_that_cannot_grow_one_by_one_are_refused(units):
    for schedule in SCHEDULES.values():
        with pytest.raises(ScheduleError, match="choose granularity="):
            first_request(schedule, posed(Granularity(units, 0.5)))


# ---- when how much moves ----------------------------------------------------------------------------------------------


def test_rigl_asks_at_every_tenth_step_for_half_a_cosine_less():
    """T = 0.75 * 4 epochs of 10 steps = 30: updates at 10 and 20."""
    made = play(functools.partial(rigl, epochs=4, every=10, fraction=0.4), PROBLEM)
    part = Train(total=4, steps=10, final=False)
    moves = [0.2 * (1 + math.cos(math.pi * step / 30)) for step in (10, 20)]
    assert made == [
        Mask(kept={"a": 4, "b": 4}, monotone=False, random=True, rescale=True), part, Regrow(moves[0], "gradient"), part,
        Regrow(moves[1], "gradient"), Train(total=4),
    ]  # fmt: skip
    assert moves == pytest.approx([0.3, 0.1])
    assert most_epochs(SCHEDULES["rigl"]) == 4


def test_set_asks_after_every_epoch_but_the_last_for_the_same():
    made = play(functools.partial(sparse_evolution, epochs=3), PROBLEM)
    part = Train(total=3, steps=10, final=False)
    assert made[1:] == [part, Regrow(0.3, "random"), part, Regrow(0.3, "random"), Train(total=3)]
    cosine = play(functools.partial(sparse_evolution, epochs=3, decay="cosine"), PROBLEM)
    assert [one.fraction for one in cosine if isinstance(one, Regrow)] == pytest.approx([0.225, 0.075])


@pytest.mark.parametrize("schedule", [rigl, sparse_evolution])
def test_a_first_update_that_comes_too_late_is_refused_before_anything_runs(schedule):
    with pytest.raises(ScheduleError, match=r"every=30 optimizer steps.* smaller every"):
        first_request(functools.partial(schedule, epochs=2, every=30), PROBLEM)


@pytest.mark.parametrize("schedule", [rigl, sparse_evolution])
def test_weights_that_are_trained_already_can_be_chosen_by_the_criterion(schedule):
    first = first_request(functools.partial(schedule, epochs=40, begin="criterion"), PROBLEM)
    assert isinstance(first, Mask) and not first.random and not first.rescale


# ---- at work ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_layer_has_as_many_weights_at_all_times(name, tmp_path, monkeypatch):
    masks, steps = [], []
    learn = perform.Session.train

    def look(self, *arguments, **keys):
        masks.append({name: mask.clone() for name, mask in self.masks.items()})
        made = learn(self, *arguments, **keys)
        steps.append({name: int((self.model.get_parameter(name) != 0).sum()) for name in self.masks})
        return made

    monkeypatch.setattr(perform.Session, "train", look)
    after = run(begin(tmp_path), SCHEDULES[name], SPARSE)
    kept = {name: int(mask.sum()) for name, mask in after.masks.items()}
    assert len(masks) > 3 and sum(kept.values()) <= 248
    assert all({name: int(mask.sum()) for name, mask in one.items()} == kept for one in masks)
    assert all(
        one[name] <= kept[name] for one in steps for name in kept
    )  # a weight that stays may be zero, if just grown
    assert any(not torch.equal(masks[0][name], masks[-1][name]) for name in kept)


@pytest.mark.parametrize("optimizer", [functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9), torch.optim.AdamW])
@pytest.mark.parametrize("grow_by", ["gradient", "random"])
def test_what_grows_begins_at_zero_with_fresh_moments(grow_by, optimizer, tmp_path, monkeypatch):
    seen = []
    regrow = perform.regrowing.regrow

    def look(session, request, position):
        before = {name: mask.clone() for name, mask in session.masks.items()}
        answer = regrow(session, request, position)
        seen.append(answer)
        for name, mask in session.masks.items():
            weight = session.model.get_parameter(name)
            changed = mask != before[name]
            assert answer[name] == int((mask & ~before[name]).sum()) == int((before[name] & ~mask).sum())
            moments = [session.clock.progress.optimizer.state[weight].get(key) for key in MOMENTS]
            for tensor in (weight, *(moment for moment in moments if moment is not None)):
                assert not tensor[changed].any() and tensor[before[name] & mask].any()
        return answer

    monkeypatch.setattr(perform.regrowing, "regrow", look)
    state = begin(tmp_path)
    schedule = asking(
        Mask(kept={"0.weight": 70, "3.weight": 170}, monotone=False, random=True),
        Train(total=3, steps=5, final=False), Regrow(0.5, grow_by), Train(total=3, steps=2, final=False),
        Regrow(0.5, grow_by), Train(total=3),
    )  # fmt: skip
    monkeypatch.setattr("tests.session.tiny.training", lambda seconds: replace(training(seconds), optimizer=optimizer))
    run(state, schedule, SPARSE)
    assert len(seen) == 2 and all(one["0.weight"] > 5 and one["9.weight"] == 0 for one in seen)


def test_growth_follows_the_gradient_of_the_images_that_come_next(tmp_path):
    """From a network that has trained for 5 steps, of three an epoch: batch 2 of epoch 1, norms by the batch, no dropout."""
    first = {"0.weight": 70, "3.weight": 170}
    begun = [Mask(kept=first, monotone=False, random=True), Train(total=3, steps=5, final=False)]
    before = run(begin(tmp_path / "a"), asking(*begun), SPARSE)
    after = run(begin(tmp_path / "b"), asking(*begun, Regrow(0.4, "gradient")), SPARSE)
    images, labels = list(DATA.train(16, before.stage_seed).epoch(1))[2]
    model = before.model.eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.train()
    F.cross_entropy(model(images), labels).backward()
    for name, count in first.items():
        weight, mask = model.get_parameter(name), before.masks[name]
        gone = weight.detach().abs().masked_fill(~mask, float("inf")).flatten().argsort(stable=True)[: int(0.4 * count)]
        survives = mask.flatten().clone()
        survives[gone] = False
        best = weight.grad.abs().flatten().masked_fill(survives, -1).argsort(descending=True, stable=True)[: len(gone)]
        survives[best] = True
        assert torch.equal(after.masks[name].flatten(), survives)


def test_what_an_earlier_stage_masked_never_grows(tmp_path):
    earlier = run(begin(tmp_path / "a"), asking(Mask(0.5)), SPARSE)
    again = begin(tmp_path / "b", model=earlier.model, masks=earlier.masks, forms=earlier.forms)
    after = run(again, functools.partial(rigl, epochs=3, every=2), SPARSE)
    for name, mask in after.masks.items():
        assert not (mask & ~earlier.masks[name]).any()
        assert not after.model.get_parameter(name)[~mask].any()


def test_rows_keep_their_numbers_too(tmp_path):
    rows = Granularity(Element(), 0.5, scope="row")
    after = run(begin(tmp_path), functools.partial(rigl, epochs=3, every=2, allocation="uniform"), rows)
    counts = after.masks["3.weight"].flatten(1).sum(1)
    assert (counts == 36).all()


def test_random_growth_differs_from_update_to_update_and_not_from_run_to_run(tmp_path):
    ask = asking(Mask(kept={"3.weight": 100}, monotone=False, random=True), Regrow(1.0, "random"))
    more = asking(*[Mask(kept={"3.weight": 100}, monotone=False, random=True), *[Regrow(1.0, "random")] * 2])
    one, same, other = (
        run(begin(tmp_path / name), schedule, SPARSE).masks["3.weight"]
        for name, schedule in (("a", ask), ("b", ask), ("c", more))
    )
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_the_criterion_says_what_is_dropped(tmp_path):
    begun = [Mask(kept={"3.weight": 100}, monotone=False, random=True), Train(1), Regrow(0.3, "random")]
    snip = Criterion(gradients.snip, needs=("gradient",), norms="batch")
    masks = [
        run(begin(tmp_path / str(index)), asking(*begun), SPARSE, criterion).masks["3.weight"]
        for index, criterion in enumerate((L2, snip))
    ]
    assert not torch.equal(*masks)


@pytest.mark.parametrize(("keys", "trained_by", "warns"), [
    ({}, "train", True), ({}, None, False), ({"begin": "criterion"}, "train", False),
])  # fmt: skip
def test_masks_at_random_on_a_trained_network_are_warned_of(keys, trained_by, warns, tmp_path, caplog):
    check(
        begin(tmp_path, trained_by=trained_by), criterion=L2, granularity=SPARSE,
        schedule=functools.partial(rigl, epochs=4, every=2, **keys), distillation=Distillation(), training=training(),
    )  # fmt: skip
    assert ("spoil what train has learned" in caplog.text) == warns


def test_rescaled_rows_keep_the_size_of_what_they_sum_up(tmp_path):
    """Every weight that stays is its own times sqrt(n / k) of its output row; a row of which nothing is left stays zero."""
    kept = {"0.weight": 40, "3.weight": 100, "9.weight": 5}
    before = network()
    after = run(begin(tmp_path), asking(Mask(kept=kept, monotone=False, random=True, rescale=True)), SPARSE)
    for name in kept:
        old, mask = before.get_parameter(name).detach().flatten(1), after.masks[name].flatten(1)
        for row, stays, new in zip(old, mask, after.model.get_parameter(name).detach().flatten(1), strict=True):
            factor = (len(row) / max(int(stays.sum()), 1)) ** 0.5
            torch.testing.assert_close(new, row * stays * factor)
