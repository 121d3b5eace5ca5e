"""Movement pruning: scores and weights by plain loops, straight through the masks, hard and soft."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from prune_cli.errors import ScheduleError
from prune_cli.granularities.element import Element
from prune_cli.granularities.filter import Filter
from prune_cli.granularities.n_m import NM
from prune_cli.schedules.movement import movement
from prune_cli.schedules.requests import Mask, Train
from prune_cli.schedules.schedule import first_request, most_epochs, trains_first
from prune_cli.selection.granularity import Granularity
from tests.schedules.played import asking, play, toy
from tests.session.tiny import DATA, L2, MOVEMENT, begin, run, training

PROBLEM = toy({"a": 8, "b": 8}, {"a": 1, "b": 1}, 0.5, learns=True)
HALF = Granularity(Element(), 0.5)
RATE, STEPS = 0.2, 3  # steps of an epoch


def network() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 6, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(6, 4),
    )  # fmt: skip


@pytest.fixture
def plain(monkeypatch):
    """No momentum, one learning rate: what is easily done by hand."""
    optimizer = functools.partial(torch.optim.SGD, lr=RATE)
    monkeypatch.setattr(
        "tests.session.tiny.training",
        lambda seconds: replace(training(seconds), optimizer=optimizer, lr_schedule=lambda now, epochs: 1.0),
    )


def by_hand(seed: int, removed, updates: int, every: int, epochs: int, shrinkage: float = 0.0):
    """Weights behind and before the masks, and how many came back; `removed(update, scores)` says how many go."""
    model = network()
    names = [name for name, value in model.named_parameters() if value.dim() > 1]
    weights = {name: model.get_parameter(name).detach().clone() for name in names}
    scores = {name: torch.zeros_like(value) for name, value in weights.items()}
    masks = {name: torch.ones_like(value) for name, value in weights.items()}
    batches, returned = DATA.train(16, seed), 0
    for step in range(epochs * STEPS):
        images, labels = list(batches.epoch(step // STEPS))[step % STEPS]
        with torch.no_grad():
            for name in names:
                model.get_parameter(name).copy_(weights[name] * masks[name])
        model.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        with torch.no_grad():
            for name, value in model.named_parameters():
                if name not in names:
                    value -= RATE * value.grad
                    continue
                scores[name] -= RATE * value.grad * weights[name]
                slope = scores[name].sigmoid()
                scores[name] -= RATE * shrinkage * slope * (1 - slope)
                weights[name] -= RATE * value.grad * masks[name]
        update = (step + 1) / every
        if update in range(1, updates + 1):
            for name in names:
                count = removed(int(update), scores[name])
                before = masks[name]
                masks[name] = torch.ones_like(before)
                masks[name].view(-1)[scores[name].flatten().argsort(stable=True)[:count]] = 0
                returned += int(((masks[name] == 1) & (before == 0)).sum())
            if update == updates:
                weights = {name: value * masks[name] for name, value in weights.items()}
    return weights, masks, returned


def cubic(update: int, scores: torch.Tensor) -> int:
    return int((1 - (1 - update / 4) ** 3) * 0.5 * scores.numel() + 1e-9)


def below(update: int, scores: torch.Tensor) -> int:
    half = scores.numel() // 2
    return half if update == 4 else min(int((scores < -0.001).sum()), half)


@pytest.mark.parametrize(
    ("keys", "removed"),
    [({}, cubic), ({"mode": "soft", "threshold": -0.001, "shrinkage": 0.003}, below)],
    ids=["hard", "soft"],
)
def test_weights_and_scores_are_those_of_the_equations(keys, removed, plain, tmp_path):
    """12 steps and 3 more: masks after 3, 6, 9 and 12 of them."""
    schedule = functools.partial(movement, epochs=5, warmup_epochs=0, cooldown_epochs=1, every=3, **keys)
    after = run(begin(tmp_path, model=network()), schedule, HALF, MOVEMENT)
    weights, masks, returned = by_hand(after.stage_seed, removed, 4, 3, 5, keys.get("shrinkage", 0.0))
    assert returned > 0  # else nothing is shown of what is behind the masks
    for name, mask in masks.items():
        assert torch.equal(after.masks[name], mask.bool()), name
        torch.testing.assert_close(after.model.get_parameter(name).detach(), weights[name], rtol=1e-4, atol=1e-6)


def test_hard_masks_follow_the_cubic_and_soft_ones_a_threshold():
    part = Train(total=4, steps=10, final=False)
    masks = [Mask(1 - (1 - update / 2) ** 3, monotone=False, hides=True) for update in (1,)]
    schedule = functools.partial(movement, epochs=4, warmup_epochs=1, cooldown_epochs=1, every=10)
    assert play(schedule, PROBLEM) == [
        Train(1, 4, final=False), part, *masks, part, Mask(monotone=False), Train(total=4),
    ]  # fmt: skip
    soft = play(functools.partial(schedule, mode="soft", threshold=0.1, shrinkage=0.5), PROBLEM)
    assert soft[2] == Mask(monotone=False, hides=True, threshold=0.1)
    assert {one.shrinkage for one in soft[:-1] if isinstance(one, Train)} == {0.5}
    assert most_epochs(schedule) == 4 and trains_first(schedule, PROBLEM)


def test_masks_to_the_last_step_leave_nothing_to_train():
    made = play(functools.partial(movement, epochs=2, every=10, warmup_epochs=0, cooldown_epochs=0), PROBLEM)
    assert isinstance(made[-1], Mask) and sum(one.steps for one in made if isinstance(one, Train)) == 20


@pytest.mark.parametrize(
    ("keys", "problem", "message"),
    [
        ({}, toy({"a": 8}, {"a": 1}, 0.5), "choose criterion=movement"),
        ({"warmup_epochs": 2, "cooldown_epochs": 2}, PROBLEM, r"less than every=10 optimizer steps"),
        ({"mode": "soft"}, toy({"a": 8}, {"a": 1}, 0.5, learns=True, countable=False), "chosen by patterns"),
    ],
)
def test_what_cannot_be_is_refused_when_it_is_first_asked(keys, problem, message):
    with pytest.raises(ScheduleError, match=message):
        first_request(functools.partial(movement, epochs=4, **keys), problem)


@pytest.mark.parametrize("units", [Filter(), NM()], ids=["filter", "n_m"])
def test_coarser_units_come_back_too(units, tmp_path):
    """Filters go by their rows alone meanwhile, so that their scores move on."""
    schedule = functools.partial(movement, epochs=4, warmup_epochs=1, every=1)
    after = run(begin(tmp_path), schedule, Granularity(units, 0.5), MOVEMENT)
    assert after.outcome.ratio_prunable == pytest.approx(0.5, abs=0.06)


def test_what_is_hidden_comes_back_with_its_value(tmp_path):
    """Masked by one choice, zero in training, and there again after another, bit for bit where nothing has trained."""
    schedule = asking(Mask(0.9, hides=True, monotone=False), Train(1), Mask(0.0, monotone=False))
    state = begin(tmp_path)
    before = copy.deepcopy(state.model)
    after = run(state, schedule, HALF, L2)
    for name in ("0.weight", "3.weight", "9.weight"):
        old, new = before.get_parameter(name).detach(), after.model.get_parameter(name).detach()
        gone = old.abs().flatten().argsort()[: int(0.45 * old.numel())]
        assert torch.equal(old.flatten()[gone], new.flatten()[gone])
        assert not torch.equal(old, new)
