"""AC/DC: its phases by hand, all weights at work in decompressed ones, momentum afresh, the learning rate going on."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace

import pytest
import torch

from prune_cli.errors import ScheduleError
from prune_cli.granularities.element import Element
from prune_cli.granularities.filter import Filter
from prune_cli.schedules.acdc import acdc
from prune_cli.schedules.requests import Mask, Remember, Restore, Train
from prune_cli.schedules.schedule import first_request, most_epochs
from prune_cli.selection.granularity import Granularity
from prune_cli.session import perform
from tests.schedules.played import asking, play, toy
from tests.session.tiny import L2, begin, result, run, training

PROBLEM = toy({"a": 8, "b": 8}, {"a": 1, "b": 1}, 0.5)
PHASES = {"warmup_epochs": 1, "compressed_epochs": 1, "decompressed_epochs": 2, "final_epochs": 1}
HALF = Granularity(Element(), 0.5)


def test_phases_take_turns_and_the_last_compressed_one_takes_what_is_left():
    schedule = functools.partial(acdc, epochs=9, **PHASES)
    turn = [Mask(monotone=False), Train(1, 9, final=False), Train(2, 9, soft=True, fresh=True)]
    assert play(schedule, PROBLEM) == [
        Train(1, 9, soft=True), *turn, *turn, Mask(monotone=False), Train(total=9),  # the last 2 epochs
    ]  # fmt: skip
    assert most_epochs(schedule) == 9
    assert play(functools.partial(schedule, warmup_epochs=0), PROBLEM)[0] == Mask(monotone=False)


@pytest.mark.parametrize(("epochs", "expected"), [(100, [10, *[5] * 14, 20]), (30, [3, *[2] * 10, 7]), (4, [1, 1, 2])])
def test_phases_scale_with_the_epochs_where_nothing_is_said(epochs, expected):
    made = [one for one in play(functools.partial(acdc, epochs=epochs), PROBLEM) if isinstance(one, Train)]
    lengths = [one.epochs for one in made[:-1]]
    assert [*lengths, epochs - sum(lengths)] == expected


@pytest.mark.parametrize(
    ("keys", "problem", "message"),
    [
        ({"epochs": 4}, PROBLEM, "epochs=4 do not hold warmup_epochs=1, one turn of compressed_epochs=1"),
        ({"epochs": 9}, toy({"a": 8}, {"a": 1}, 0.5, regrows=False), "choose granularity=element"),
    ],
)
def test_what_cannot_be_is_refused_when_it_is_first_asked(keys, problem, message):
    with pytest.raises(ScheduleError, match=message):
        first_request(functools.partial(acdc, **PHASES, **keys), problem)


def test_masks_hold_in_compressed_phases_and_all_weights_train_in_the_others(tmp_path, monkeypatch):
    zeros, begun = [], []
    train = perform.Session.train

    def look(self, progress, **keys):
        begun.append(len(progress.optimizer.state) if progress.optimizer else 0)
        made = train(self, progress, **keys)
        weights = [self.model.get_parameter(name) for name in self.asked]
        zeros.append(sum(int((weight == 0).sum()) for weight in weights))
        return made

    monkeypatch.setattr(perform.Session, "train", look)
    after = run(begin(tmp_path), functools.partial(acdc, epochs=9, **PHASES), HALF)
    assert zeros == [0, 412, 0, 412, 0, 412]
    assert [count > 0 for count in begun] == [False, True, False, True, False, True]  # moments at the start of each
    rates = [row["lr"] for row in after.outcome.history]
    assert rates == sorted(rates, reverse=True) and len(set(rates)) == 9
    assert after.outcome.ratio_prunable == 0.5


def test_each_compressed_phase_chooses_anew(tmp_path, monkeypatch):
    masks = []
    keep = perform.Session.keep

    def look(self, selection, held):
        keep(self, selection, held)
        masks.append(torch.cat([mask.flatten() for mask in self.masks.values()]))

    monkeypatch.setattr(perform.Session, "keep", look)
    fast = functools.partial(torch.optim.SGD, lr=1.0)
    monkeypatch.setattr("tests.session.tiny.training", lambda seconds: replace(training(seconds), optimizer=fast))
    run(begin(tmp_path), functools.partial(acdc, epochs=9, **PHASES), HALF)
    assert len(masks) == 3
    assert any((later & ~earlier).any() for earlier, later in itertools.pairwise(masks))


def test_fresh_moments_leave_the_place_in_the_training(tmp_path):
    """The same bytes as going back to where it stands, which takes fresh moments too."""
    fresh = asking(Train(1, 3), Train(1, 3), Train(1, 3, fresh=True))
    back = asking(Train(1, 3), Train(1, 3), Remember("here"), Restore("here", weights=False, clock=True), Train(1, 3))
    plain = asking(Train(1, 3), Train(1, 3), Train(1, 3))
    made = [run(begin(tmp_path / str(index)), one, HALF) for index, one in enumerate((fresh, back, plain))]
    assert result(made[0])[0] == result(made[1])[0] != result(made[2])[0]
    assert [row["lr"] for row in made[0].outcome.history] == [row["lr"] for row in made[2].outcome.history]


def test_filters_are_refused_where_they_are_known(tmp_path):
    with pytest.raises(ScheduleError, match="channel gets no gradient"):
        run(begin(tmp_path), functools.partial(acdc, epochs=9, **PHASES), Granularity(Filter(), 0.5), L2)
