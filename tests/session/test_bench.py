"""Candidates are executed no further than their change reaches, and score what the whole masked network scores."""

from __future__ import annotations

import copy
import functools
import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from prune_cli import masks as masking
from prune_cli.data.fake import fake
from prune_cli.granularities.element import Element
from prune_cli.granularities.filter import Filter
from prune_cli.granularities.stripe import Stripe
from prune_cli.measure.accuracy import accuracy
from prune_cli.models.resnet_cifar import resnet_cifar
from prune_cli.schedules.netadapt import netadapt
from prune_cli.schedules.requests import Evaluate, Mask, Train
from prune_cli.schedules.sensitivity import sensitivity
from prune_cli.schedules.simulated_annealing import simulated_annealing
from prune_cli.selection.granularity import Granularity
from prune_cli.session import bench, passes
from prune_cli.session.bench import Bench
from prune_cli.training.batch_norm import has_statistics, recalibrate_bn
from tests.session.tiny import L2, begin, journal, network, result, run, stage_session

DATA = fake((3, 8, 8), 4, train=64, test=16, val=48)


class Twice(nn.Module):
    """A layer and a norm that are called twice, dropout, and a shortcut over both."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.last = (
            nn.Conv2d(3, 6, 3, padding=1),
            nn.Conv2d(6, 6, 3, padding=1),
            nn.Conv2d(6, 8, 3),
        )
        self.norm, self.end, self.drop, self.head = (
            nn.BatchNorm2d(6),
            nn.BatchNorm2d(8),
            nn.Dropout(0.3),
            nn.Linear(8, 4),
        )

    def forward(self, x):
        first = F.relu(self.first(x))
        x = self.norm(self.again(first))
        x = F.relu(self.norm(self.again(x)) + first)
        return self.head(self.drop(F.relu(self.end(self.last(x)))).mean((2, 3)))


def chain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Flatten(), nn.Linear(128, 12), nn.ReLU(), nn.Linear(12, 4),
    )  # fmt: skip


class OverChannels(nn.Module):
    """A norm over channels: the smaller network is not what the masked one is."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.norm = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.GroupNorm(1, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(F.relu(self.norm(self.last(F.relu(self.first(x))))).mean((2, 3)))


NETWORKS = {
    "over channels": OverChannels,
    "tiny": network,
    "chain": chain,
    "residual": lambda: resnet_cifar(num_classes=4, in_shape=(3, 8, 8), depth=8, widths=[4, 8, 8]),
    "twice": Twice,
}
UNITS = {"filter": Filter(), "element": Element(), "stripe": Stripe()}


def state(place, name):
    torch.manual_seed(3)
    return begin(place, model=NETWORKS[name](), data=DATA)


def by_copy(session, kept) -> float:
    """The same with nothing kept from one candidate to the next."""
    model = copy.deepcopy(session.model).eval()
    selection = session.select(session.granularity, L2, session.statistics(L2), session.held(), kept=kept)
    held = masking.joined(session.held(), selection.masks)
    masking.apply(model, session.granularity.complete(model, session.state.example_inputs(), held, session.plan))
    if has_statistics(model):
        recalibrate_bn(model, DATA.calibration(16, 8))
    return accuracy(model, DATA.evaluation("val", 500)).loss


@pytest.fixture
def fine(monkeypatch):
    """Scores are losses, which differ where accuracies of untrained networks do not."""
    monkeypatch.setattr(passes, "accuracy", lambda *arguments: SimpleNamespace(acc1=accuracy(*arguments).loss))


def candidates(problem) -> list[dict[str, int]]:
    """Every group alone at three sizes, some together, all, and none."""
    less = {group.name: max(group.least, group.whole // 2) for group in problem.groups}
    alone = [
        {**problem.whole, group.name: max(int(group.whole * part), group.least)}
        for group, part in itertools.product(problem.groups, (0.75, 0.5, 0.25))
    ]
    late = dict(list(less.items())[len(less) // 2 :])
    return [*alone, {**problem.whole, **late}, less, problem.whole]


@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_candidate_scores_what_a_masked_copy_scores(name, units, tmp_path, fine):
    session = stage_session(state(tmp_path, name), Granularity(UNITS[units], 0.5))
    found, asked = Bench(session), candidates(session.pose())
    session.model.eval()
    found.expect(asked)
    scores = [found.score(kept) for kept in asked]
    session.model.load_state_dict(found.weights)
    assert scores == pytest.approx([by_copy(session, kept) for kept in asked], rel=1e-5)
    assert len({round(score, 5) for score in scores}) > len(scores) / 2


@pytest.mark.parametrize("units", ["filter", "element"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_candidate_is_prepared_to_the_same_bits_from_a_cut(name, units, tmp_path, monkeypatch):
    session = stage_session(state(tmp_path, name), Granularity(UNITS[units], 0.5))
    asked = candidates(session.pose())
    session.model.eval()
    near = Bench(session)
    near.expect(asked)
    kept_cuts = [cut.module for cut in near._passes._cuts]
    found = []
    for kept in asked:
        near.prepare(kept)
        found.append({key: value.clone() for key, value in session.model.state_dict().items()})
    session.model.load_state_dict(near.weights)
    monkeypatch.setattr(passes, "MEMORY", 0)
    far = Bench(session)
    far.expect(asked)
    assert kept_cuts and not far._passes._cuts
    for kept, bits in zip(asked, found, strict=True):
        far.prepare(kept)
        assert all(torch.equal(value, bits[key]) for key, value in session.model.state_dict().items()), kept


def test_what_lies_in_front_of_the_change_is_not_run_again(tmp_path):
    session = stage_session(state(tmp_path, "residual"), Granularity(Filter(), 0.5))
    problem, found = session.pose(), Bench(session)
    session.model.eval()
    last = problem.groups[-1].name
    asked = [{**problem.whole, last: count} for count in range(1, problem.groups[-1].whole)]
    found.expect(asked)
    seen = []
    hook = session.model.conv1.register_forward_hook(lambda module, given, output: seen.append(len(output)))
    for kept in asked:
        found.score(kept)
    hook.remove()
    assert seen and set(seen) == {1}  # a filler for the code around it


SCHEDULES = {
    "sensitivity": functools.partial(sensitivity, grid=(0.25, 0.5), rounds=2, epochs=1),
    "netadapt": functools.partial(netadapt, step=0.15, short_epochs=0, long_epochs=1),
    "netadapt, trained": functools.partial(netadapt, step=0.2, short_epochs=1),
    "annealing": functools.partial(simulated_annealing, candidates=8),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_search_is_the_same_however_little_memory_there_is(name, tmp_path, monkeypatch):
    half = Granularity(Filter(), 0.5)
    wanted = result(run(state(tmp_path / "much", "residual"), SCHEDULES[name], half))
    monkeypatch.setattr(passes, "MEMORY", 0)
    monkeypatch.setattr(passes, "IMAGES", 0)
    assert result(run(state(tmp_path / "none", "residual"), SCHEDULES[name], half)) == wanted
    monkeypatch.setattr(bench, "SMALLER", 0.0)  # every candidate as a masked network
    assert result(run(state(tmp_path / "masked", "residual"), SCHEDULES[name], half)) == wanted


def test_a_candidate_that_was_scored_is_not_run_again_until_the_network_changes(tmp_path, monkeypatch):
    ran = []
    score = Bench.score

    def follow(self, kept):
        ran.append(dict(kept))
        return score(self, kept)

    monkeypatch.setattr(Bench, "score", follow)
    few, more = {"0": 4, "3": 4}, {"0": 6, "3": 6}

    def schedule(problem):
        first = yield Evaluate([few, more, few])
        second = yield Evaluate([more, few])
        assert first == [*reversed(second), first[0]]
        yield Train(1)
        yield Evaluate([few])
        yield Mask(kept=more)
        yield Evaluate([few], train=1)
        yield Evaluate([few], train=1)

    run(begin(tmp_path), schedule, Granularity(Filter(), 0.5))
    assert ran == [few, more, few]
    rows = [row for row in journal(tmp_path).spent if row]
    assert rows[0][2] == 0.0 and rows[1] == {0: 0.0, 1: 0.0}
