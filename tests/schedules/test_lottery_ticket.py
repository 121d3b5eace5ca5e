"""Lottery tickets: what every round takes, what it goes back to, the control arms, and tickets bit for bit."""

from __future__ import annotations

import functools
from itertools import pairwise

import pytest
import torch

from prune_cli.errors import ScheduleError
from prune_cli.granularities.element import Element
from prune_cli.granularities.filter import Filter
from prune_cli.schedules.lottery_ticket import lottery_ticket
from prune_cli.schedules.requests import Mask, Project, Remember, Restore, Train
from prune_cli.schedules.schedule import first_request, most_epochs
from prune_cli.selection.budget import Budget
from prune_cli.selection.granularity import Granularity
from prune_cli.session.remembering import read
from tests.schedules.played import play, toy
from tests.session.tiny import ALWAYS, Cut, begin, cut_after, result, run

PROBLEM = toy({"a": 80, "b": 80, "out": 80}, {"a": 1, "b": 1, "out": 1}, 0.2, quantity="units")


def lottery(**keys):
    return functools.partial(lottery_ticket, **{"rounds": 3, "epochs": 4, **keys})


@pytest.mark.parametrize("rounds", [1, 3, 10])
def test_every_round_takes_the_same_share_of_what_is_left(rounds):
    masks = [one for one in play(lottery(rounds=rounds), PROBLEM) if isinstance(one, Mask)]
    left = [1.0, *(1 - 0.8 * mask.fraction for mask in masks)]
    share = 1 - 0.2 ** (1 / rounds)
    assert [1 - after / before for before, after in pairwise(left)] == pytest.approx([share] * rounds)
    assert masks[-1].fraction == 1.0


def test_rounds_go_back_with_the_clock_and_train_to_the_end():
    back = [Restore("init", clock=True), Train(total=4)]
    made = play(lottery(rounds=2), PROBLEM)
    masks = [one for one in made if isinstance(one, Mask)]
    assert made == [Train(total=4), masks[0], *back, masks[1], back[0], Remember("ticket", leave=True), back[1]]
    assert most_epochs(lottery(rounds=2)) == 12 and most_epochs(lottery(rounds=2, train_first=False)) == 8


def test_admm_before_each_choice_draws_towards_what_the_round_leaves():
    made = play(lottery(rounds=2, admm=2, rho=0.5), PROBLEM)
    steps = [one for one in made if isinstance(one, Project)]
    assert {one.rho for one in steps} == {0.5} and len(steps) == 2 * 3
    assert [one.kept["a"] for one in steps] == [36] * 3 + [16] * 3  # of 80; a fifth is left: 80 sqrt(0.2), rounded up
    drawn = [one for one in made if isinstance(one, Train) and one.penalty]
    assert drawn == [Train(1, 2, soft=True, penalty=True)] * 4
    for place in [place for place, one in enumerate(made) if isinstance(one, Mask)]:
        assert isinstance(made[place - 1], Project)
    assert most_epochs(lottery(rounds=2, admm=2)) == 12 + 4
    whole = play(lottery(admm=1), toy({"a": 80}, {"a": 1}, 0.2, quantity="macs"))
    assert {one.kept for one in whole if isinstance(one, Project)} == {None}


@pytest.mark.parametrize(
    ("keys", "begins"),
    [
        ({"rewind_to": "2ep"}, [Train(2, 4), Remember("2ep"), Train(total=4)]),
        ({"rewind_to": "3st"}, [Train(total=4, steps=3), Remember("3st"), Train(total=4)]),
        ({"rewind_to": "pretrained"}, [Remember("pretrained"), Train(total=4)]),
        ({"rewind_to": "500st", "train_first": False}, []),
        ({"rewind_to": "pretrained", "train_first": False}, [Remember("pretrained")]),
    ],
)
def test_moments_to_go_back_to(keys, begins):
    made = play(lottery(**keys), PROBLEM)
    assert made[: len(begins)] == begins and isinstance(made[len(begins)], Mask)
    assert {one.tag for one in made if isinstance(one, Restore)} == {keys["rewind_to"]}


def test_the_learning_rate_alone_goes_back():
    restored = [one for one in play(lottery(rewind="rate"), PROBLEM) if isinstance(one, Restore)]
    assert restored == [Restore("init", weights=False, clock=True)] * 3


def test_the_last_layer_at_half_the_rate():
    last = [one for one in play(lottery(output_rate=0.5), PROBLEM) if isinstance(one, Mask)]
    share = 1 - 0.2 ** (1 / 3)
    for number, mask in enumerate(last, 1):
        assert mask.kept["a"] == mask.kept["b"] == pytest.approx(80 * (1 - share) ** number, abs=1)
        assert mask.kept["out"] == pytest.approx(80 * (1 - share / 2) ** number, abs=1)


def test_control_arms_differ_in_the_last_round_alone():
    plain, ticket, init = (play(lottery(control=name), PROBLEM) for name in ("none", "random_ticket", "random_init"))
    assert [one for one in ticket if one not in plain] == [Mask(kept=PROBLEM.whole, random=True, monotone=False)]
    assert [one for one in init if one not in plain] == [Restore("fresh", clock=True)]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rewind_to": "7st", "train_first": False}, "'7st' is not there; give pretrained, init, 500st"),
        ({"rewind_to": "early"}, "'early' is not there"),
        ({"rewind_to": "4ep"}, "4ep is not before the end of epochs=4"),
        ({"rewind_to": "40st"}, "40st is not before the end"),
    ],
)
def test_moments_that_are_not_there_are_refused_when_it_is_first_asked(keys, message):
    with pytest.raises(ScheduleError, match=message):
        first_request(lottery(**keys), PROBLEM)


@pytest.mark.parametrize("scope", ["global", "row"])
def test_a_rate_of_the_last_layer_needs_rates_of_layers(scope):
    problem = toy({"a": 8}, {"a": 1}, 0.5, scope=scope)
    with pytest.raises(ScheduleError, match=r"choose granularity\.scope=layer with a ratio"):
        first_request(lottery(output_rate=0.5), problem)


def ticket_of(state, place):
    """The snapshot that the stage leaves."""
    path = place / "ticket.safetensors"
    path.write_bytes(state.outcome.files["remembered_ticket.safetensors"])
    return read(path)


def test_the_ticket_is_the_early_weights_under_the_last_masks_bit_for_bit(tmp_path):
    schedule, element = lottery(rounds=2, epochs=2), Granularity(Element(), 0.75)
    state = begin(tmp_path)
    initial = state.architecture.build().state_dict()
    after = run(state, schedule, element)
    ticket = ticket_of(after, tmp_path)
    for name, mask in after.masks.items():
        assert int(mask.sum()) == round(0.25 * mask.numel())
        assert torch.equal(ticket.weights[name], initial[name] * mask)
        assert not after.model.get_parameter(name)[~mask].any()
    assert (ticket.epoch, ticket.step) == (0, 0) and after.outcome.epochs == 6


def test_control_arms_keep_as_many_weights_and_other_ones(tmp_path):
    element, kept, tickets = Granularity(Element(), 0.75), {}, {}
    for control in ("none", "random_ticket", "random_init"):
        place = tmp_path / control
        place.mkdir()
        after = run(begin(place), lottery(rounds=2, epochs=1, control=control), element)
        kept[control], tickets[control] = after.masks, ticket_of(after, place).weights
    for name, mask in kept["none"].items():
        assert kept["random_ticket"][name].sum() == mask.sum() and torch.equal(kept["random_init"][name], mask)
        assert not torch.equal(kept["random_ticket"][name], mask)
        assert not torch.equal(tickets["random_init"][name], tickets["none"][name])


@pytest.mark.parametrize("granularity", [Granularity(Element(), 0.5), Granularity(Filter(), budget=Budget(macs=0.5))])
def test_rounds_with_admm_end_with_the_same_bytes_wherever_they_were_cut(granularity, tmp_path, monkeypatch):
    schedule = lottery(rounds=2, epochs=1, admm=1)
    wanted = result(run(begin(tmp_path / "calm"), schedule, granularity, seconds=ALWAYS))
    for answers in (3, 6, 9):
        place = tmp_path / str(answers)
        with monkeypatch.context() as patch:
            cut_after(patch, answers)
            with pytest.raises(Cut):
                run(begin(place), schedule, granularity, seconds=ALWAYS)
        assert result(run(begin(place), schedule, granularity, seconds=ALWAYS)) == wanted
    plain = result(run(begin(tmp_path / "plain"), lottery(rounds=2, epochs=1), granularity))
    assert plain[0] != wanted[0]
