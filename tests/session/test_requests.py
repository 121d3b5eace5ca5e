"""What the requests of a schedule do to a network, and what they leave alone; resuming, shrunk networks among it."""

from __future__ import annotations

import functools
import json
import logging

import numpy as np
import pytest
import torch
from torch import nn

from prune_cli.data.fake import fake
from prune_cli.distillation.distillation import Distillation
from prune_cli.errors import ConfigError, ScheduleError
from prune_cli.granularities.element import Element
from prune_cli.granularities.filter import Filter
from prune_cli.granularities.kernel import Kernel
from prune_cli.granularities.n_m import NM
from prune_cli.granularities.stripe import Stripe
from prune_cli.schedules.requests import Evaluate, Mask, Remember, Restore, Shrink, Train
from prune_cli.selection.budget import Budget
from prune_cli.selection.granularity import Granularity
from prune_cli.selection.latency_table import Table
from prune_cli.session import candidates
from prune_cli.session.journal import Journal
from prune_cli.session.posing import pose
from prune_cli.stages.prune import check
from prune_cli.structure.follow import analyse
from tests.schedules.played import asking
from tests.session.searching import in_rounds, lottery, netadapt
from tests.session.tiny import (
    ALWAYS,
    DATA,
    L2,
    NEVER,
    Cut,
    begin,
    cut_after,
    cut_at_step,
    journal,
    network,
    result,
    run,
    training,
)

HALF = Granularity(Filter(), 0.5)
FIFTH = Granularity(Filter(), budget=Budget(params=0.2), shrink=True)


def wide() -> nn.Module:
    """Two layers of many filters, so that a search has many rounds."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 60, 3, padding=1), nn.BatchNorm2d(60), nn.ReLU(),
        nn.Conv2d(60, 60, 1), nn.BatchNorm2d(60), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(60, 4),
    )  # fmt: skip


def searching(place, **changes):
    """One step per epoch: what is looked at is the search, not its training."""
    return begin(place, model=wide(), data=DATA.limit(1), **changes)


@pytest.fixture
def analyses(monkeypatch):
    """The networks that were analysed."""
    found = []

    def count(model, example_inputs):
        found.append(model)
        return analyse(model, example_inputs)

    for module in ("granularities.units", "granularities.filter", "granularities.stripe", "structure.follow"):
        monkeypatch.setattr(f"prune_cli.{module}.analyse", count)
    return found


@pytest.fixture
def evaluated(monkeypatch):
    """How often a candidate was run."""
    ran, call = [], candidates._Trial.__call__

    def count(self, index):
        ran.append(index)
        return call(self, index)

    monkeypatch.setattr(candidates._Trial, "__call__", count)
    return ran


# ---- a search ---------------------------------------------------------------------------------------------------------


def test_netadapt_over_a_hundred_rounds_with_one_analysis(tmp_path, analyses):
    twentieth = Granularity(Filter(), budget=Budget(params=0.05), shrink=True)
    after = run(searching(tmp_path), functools.partial(netadapt, step=1e-6), twentieth)
    assert len(journal(tmp_path).answers) > 100
    assert len(analyses) == 1
    dense = sum(p.numel() for p in wide().parameters())
    small = sum(p.numel() for p in after.model.parameters())
    assert 0.03 * dense < small <= 0.05 * dense
    assert not after.masks


@pytest.mark.parametrize("seconds", [NEVER, ALWAYS], ids=["no checkpoints", "checkpoints"])
def test_netadapt_goes_on_and_evaluates_no_candidate_twice(tmp_path, monkeypatch, evaluated, seconds):
    schedule = functools.partial(netadapt, step=0.15)
    wanted = result(run(searching(tmp_path / "calm"), schedule, FIFTH, seconds=seconds))
    whole, rounds = len(evaluated), len(journal(tmp_path / "calm").answers) - 1
    assert rounds > 5
    for answers in (1, 4, rounds):
        evaluated.clear()
        place = tmp_path / str(answers)
        with monkeypatch.context() as patch:
            cut_after(patch, answers)
            with pytest.raises(Cut):
                run(searching(place), schedule, FIFTH, seconds=seconds)
        assert result(run(searching(place), schedule, FIFTH, seconds=seconds)) == wanted
        assert len(evaluated) == whole


def test_cut_between_two_candidates_the_first_keeps_its_score(tmp_path, monkeypatch, evaluated):
    schedule = functools.partial(netadapt, step=0.15)
    wanted = result(run(searching(tmp_path / "calm"), schedule, FIFTH, seconds=ALWAYS))
    whole = len(evaluated)
    for part in (1, 3, 6):
        evaluated.clear()
        place, noted = tmp_path / str(part), 0
        with monkeypatch.context() as patch:
            note = Journal.part

            def die(self, *arguments, note=note, part=part):
                nonlocal noted
                note(self, *arguments)
                noted += 1
                if noted == part:
                    raise Cut

            patch.setattr(Journal, "part", die)
            with pytest.raises(Cut):
                run(searching(place), schedule, FIFTH, seconds=ALWAYS)
        assert journal(place).parts
        assert result(run(searching(place), schedule, FIFTH, seconds=ALWAYS)) == wanted
        assert len(evaluated) == whole


def test_netadapt_that_shrinks_between_rounds_goes_on_from_a_shrunk_checkpoint(tmp_path, monkeypatch, analyses):
    schedule = functools.partial(netadapt, step=0.15, shrink_every=2)
    after = run(searching(tmp_path / "calm"), schedule, FIFTH, seconds=ALWAYS)
    wanted, record = result(after), journal(tmp_path / "calm")
    shrinks = [
        number
        for number, (_, answer) in enumerate(record.answers, 1)
        if isinstance(answer, dict) and "problem" in answer
    ]
    assert len(shrinks) > 2
    assert len(analyses) == len({id(model) for model in analyses}) <= len(shrinks) + 1
    for answers in (shrinks[0], shrinks[1], shrinks[1] + 1, len(record.answers) - 1):
        place = tmp_path / str(answers)
        with monkeypatch.context() as patch:
            cut_after(patch, answers + 1 if answers in shrinks[1:] else answers)
            with pytest.raises(Cut):
                run(searching(place), schedule, FIFTH, seconds=ALWAYS)
        assert result(run(searching(place), schedule, FIFTH, seconds=ALWAYS)) == wanted
    assert sum(p.numel() for p in after.model.parameters()) <= 0.2 * sum(p.numel() for p in wide().parameters())
    assert after.outcome.ratio_prunable == pytest.approx(
        1 - sum(m.out_channels for m in after.model if isinstance(m, nn.Conv2d)) / 120
    )


def test_a_search_that_finds_nothing_more_says_so_also_when_it_is_started_again(tmp_path):
    stuck = Granularity(Filter(), budget=Budget(params=0.05), min_keep=0.5)
    for _ in range(2):
        with pytest.raises(ScheduleError, match="nothing can shrink any more"):
            run(searching(tmp_path), functools.partial(netadapt, step=0.2), stuck)


# ---- Evaluate ---------------------------------------------------------------------------------------------------------


def candidate(count: int) -> dict[str, int]:
    return {"0": count, "3": count}


@pytest.mark.parametrize("train", [0, 2])
def test_evaluating_leaves_everything_bit_for_bit(tmp_path, train):
    schedule = asking(Train(1, total=2), Evaluate([candidate(2), candidate(6)], train=train), Train(1, total=2))
    without = asking(Train(1, total=2), Train(1, total=2))
    seen = run(begin(tmp_path / "a"), schedule, HALF)
    plain = run(begin(tmp_path / "b"), without, HALF)
    assert result(seen)[:2] == result(plain)[:2]
    assert seen.outcome.history == plain.outcome.history
    scores = schedule.heard[1]
    assert all(0 <= score <= 100 for score in scores)
    assert seen.model.training == plain.model.training


def test_candidates_that_cost_too_much_are_never_run(tmp_path, evaluated):
    problems = []

    def schedule(problem):
        problems.append(problem)
        cost = problem.cost(candidate(4))
        problems.append((yield Evaluate([candidate(8), candidate(4), candidate(5), candidate(1)], within=cost)))

    run(begin(tmp_path), schedule, Granularity(Filter(), budget=Budget(macs=0.5)))
    scores = problems[1]
    assert [score is None for score in scores] == [True, False, True, False]
    assert len(evaluated) == 2
    with pytest.raises(ScheduleError, match="costs more"):
        run(begin(tmp_path / "b"), asking(Evaluate([candidate(8)], within=1, adopt=True)), HALF)


def test_the_best_candidate_is_adopted_with_the_weights_it_was_trained_to(tmp_path, monkeypatch):
    tried = []
    prepare = candidates._Trial.prepare

    def follow(self, index):
        prepare(self, index)
        tried.append({name: value.clone() for name, value in self._session.model.state_dict().items()})

    monkeypatch.setattr(candidates._Trial, "prepare", follow)
    schedule = asking(Evaluate([candidate(1), candidate(7), candidate(3)], train=3, adopt=True))
    after = run(begin(tmp_path), schedule, HALF)
    scores = schedule.heard[0]
    best = tried[scores.index(max(scores))]
    assert all(torch.equal(value, best[name]) for name, value in after.model.state_dict().items())
    count = [1, 7, 3][scores.index(max(scores))]
    assert int(after.masks["0.weight"].flatten(1).any(1).sum()) == count


def test_scores_come_from_held_out_images_and_never_from_test(tmp_path, monkeypatch, caplog):
    seen = []
    evaluation = type(DATA).evaluation

    def follow(self, split, *arguments, **keys):
        seen.append(split)
        return evaluation(self, split, *arguments, **keys)

    monkeypatch.setattr(type(DATA), "evaluation", follow)
    run(begin(tmp_path / "a"), asking(Evaluate([candidate(4)])), HALF)
    assert set(seen) == {"val"}
    seen.clear()
    without = fake((3, 8, 8), 4, train=56, test=16, val=0)
    with caplog.at_level(logging.WARNING):
        run(begin(tmp_path / "b", data=without), asking(Evaluate([candidate(4)]), Evaluate([candidate(3)])), HALF)
    assert "test" not in seen
    assert caplog.text.count("dataset.val=0") == 1
    images = torch.cat([batch for batch, _ in candidates.held_out(begin(tmp_path, data=without), 16)])
    calibration = torch.cat([batch for batch, _ in without.calibration(16, 8)])
    assert len(images) == 5
    assert not any(torch.equal(one, other) for one in images for other in calibration)


# ---- Mask -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("units", [Filter(), Element(), Kernel(), Stripe()], ids=lambda units: type(units).__name__)
def test_masks_by_counts_are_met_exactly_and_cost_what_arithmetic_says(tmp_path, units):
    answers, problems = [], []

    def schedule(problem):
        problems.append(problem)
        kept = {group.name: max(group.units // 3 + number, 1) for number, group in enumerate(problem.groups)}
        answers.append((kept, (yield Mask(kept=kept))))
        fewer = {name: count - 1 for name, count in kept.items() if count > 1}
        answers.append(({**kept, **fewer}, (yield Mask(kept=fewer))))

    after = run(begin(tmp_path), schedule, Granularity(units))
    for kept, answer in answers:
        assert answer["kept"] == kept
        assert answer["removed"] == answer["units"] - sum(kept.values())
        assert answer["macs"] == problems[0].cost(kept, "macs")
        assert answer["params"] == problems[0].cost(kept, "params")
    if isinstance(units, Element):
        assert {name: int(mask.sum()) for name, mask in after.masks.items()} == answers[-1][0]


@pytest.mark.parametrize(
    ("kept", "message"), [({"0": 9}, "9 units"), ({"0": 0}, "0 units"), ({"conv": 3}, "no group of units 'conv'")]
)
def test_counts_that_cannot_be_are_one_line(tmp_path, kept, message):
    with pytest.raises(ScheduleError, match=message):
        run(begin(tmp_path), asking(Mask(kept=kept)), HALF)


def test_counts_and_units_that_are_chosen_by_patterns(tmp_path):
    with pytest.raises(ScheduleError, match="chosen by patterns"):
        run(begin(tmp_path), asking(Mask(kept={"0.weight": 3})), Granularity(NM(), 0.5))


def trained() -> nn.Module:
    """With norms whose shifts are not 0 any more: at 0 the ReLU behind them would let nothing through."""
    model = network()
    with torch.no_grad():
        for layer in (model[1], model[4]):
            layer.bias.uniform_(0.1, 1.0, generator=torch.Generator().manual_seed(5))
    return model


def test_a_soft_mask_of_filters_lets_them_grow_back(tmp_path):
    """Only what produces a filter is zeroed; with its norm and consumers at zero no gradient would come through."""
    soft = Mask(monotone=False, soft=True)
    masked = run(begin(tmp_path / "a", model=trained()), asking(soft, Remember("x")), HALF)
    rows = ~masked.masks["3.weight"].flatten(1).any(1)
    assert int(rows.sum()) == 4
    zeroed, moved = {}, {}

    def schedule(problem):
        yield soft
        zeroed.update({name: value.clone() for name, value in state.model.state_dict().items()})
        yield Train(3, total=4, soft=True)
        moved.update({name: value.clone() for name, value in state.model.state_dict().items()})
        yield Mask(monotone=False)
        yield Train(1, total=4)

    state = begin(tmp_path / "b", model=trained())
    after = run(state, schedule, HALF)
    dense = trained().state_dict()
    assert not zeroed["3.weight"][rows].any()
    assert not zeroed["3.bias"][rows].any()
    assert torch.equal(zeroed["4.weight"], dense["4.weight"])
    assert torch.equal(zeroed["9.weight"], dense["9.weight"])
    assert moved["3.weight"][rows].flatten(1).any(1).all(), "every masked filter moves"
    for name, mask in after.masks.items():  # once it is fixed the whole mask holds
        assert not after.model.state_dict()[name][~mask.expand_as(after.model.state_dict()[name])].any()
    gone = ~after.masks["9.weight"].flatten(0, -2).any(0) if after.masks["9.weight"].dim() > 1 else None
    assert gone is not None
    assert int(gone.sum()) == 4


def test_the_next_choice_of_soft_filters_can_differ(tmp_path):
    """A filter that is a little below another grows past it when its weights are let go."""
    soft, chosen = Mask(monotone=False, soft=True), []

    def schedule(problem):
        for _ in range(6):
            yield soft
            chosen.append(tuple(state.model.state_dict()["0.weight"].flatten(1).any(1).tolist()))
            yield Train(2, total=12, soft=True)
        yield Mask()

    state = begin(tmp_path, model=trained())
    run(state, schedule, HALF)
    assert len(set(chosen)) > 1


# ---- Remember and Restore ---------------------------------------------------------------------------------------------


def test_what_is_restored_is_bit_equal_under_the_present_masks(tmp_path):
    state, early = begin(tmp_path), {}

    def schedule(problem):
        yield Train(1, total=3)
        early.update({name: value.clone() for name, value in state.model.state_dict().items()})
        yield Remember("early")
        yield Train(2, total=3)
        yield Mask()
        yield Restore("early", clock=True)

    after = run(state, schedule, Granularity(Element(), 0.6))
    assert any(not torch.equal(value, network().state_dict()[name]) for name, value in early.items())
    for name, value in after.model.state_dict().items():
        wanted = early[name] * after.masks[name] if name in after.masks else early[name]
        assert torch.equal(value, wanted), name


def test_a_clock_that_is_put_back_repeats_the_training_from_there(tmp_path):
    """Without masks, rewinding weights and clock and training again gives the same weights, but for the moments."""
    once = asking(Train(1, total=3), Remember("k"), Restore("k", clock=True), Train(2, total=3))
    twice = asking(Train(1, total=3), Remember("k"), Train(2, total=3), Restore("k", clock=True), Train(2, total=3))
    no_dropout = {"model": nn.Sequential(*(m for m in network() if not isinstance(m, nn.Dropout)))}
    first = run(begin(tmp_path / "a", model=no_dropout["model"]), once, HALF)
    again = nn.Sequential(*(m for m in network() if not isinstance(m, nn.Dropout)))
    second = run(begin(tmp_path / "b", model=again), twice, HALF)
    assert result(first)[0] == result(second)[0]
    assert (first.outcome.epochs, second.outcome.epochs) == (3, 5)
    assert [row["epoch"] for row in second.outcome.history] == [1, 2, 3, 4, 5]
    assert [row["lr"] for row in second.outcome.history[1:3]] == [row["lr"] for row in second.outcome.history[3:]]


def test_masks_come_back_too_where_they_are_asked_for(tmp_path):
    schedule = asking(Mask(0.4), Remember("few"), Mask(), Restore("few", masks=True))
    after = run(begin(tmp_path), schedule, Granularity(Element(), 0.5))
    assert after.outcome.ratio_prunable == pytest.approx(0.2, abs=0.01)
    assert sum(int((~mask).sum()) for mask in after.masks.values()) == schedule.heard[0]["removed"]
    dense = network().state_dict()
    assert all(torch.equal(v, dense[n] * after.masks.get(n, 1)) for n, v in after.model.state_dict().items())


def test_init_is_the_initial_network_and_unknown_tags_are_one_line(tmp_path):
    after = run(begin(tmp_path / "a"), asking(Mask(), Restore("init")), Granularity(Element(), 0.5))
    initial = network(2).state_dict()
    assert all(torch.equal(v, initial[n] * after.masks.get(n, 1)) for n, v in after.model.state_dict().items())
    with pytest.raises(ScheduleError, match=r"nothing is remembered as 'erly'; did you mean 'early'"):
        run(begin(tmp_path / "b"), asking(Remember("early"), Restore("erly")), HALF)


@pytest.mark.parametrize("rewind_to", ["early", "init"])
def test_a_lottery_ticket_resumes_anywhere(tmp_path, monkeypatch, rewind_to):
    schedule = functools.partial(lottery, rewind_to=rewind_to)
    half = Granularity(Element(), 0.9)
    wanted = result(run(begin(tmp_path / "calm"), schedule, half, seconds=ALWAYS))
    count = len(journal(tmp_path / "calm").answers)
    for answers in range(1, count):
        place = tmp_path / str(answers)
        with monkeypatch.context() as patch:
            cut_after(patch, answers)
            with pytest.raises(Cut):
                run(begin(place), schedule, half, seconds=ALWAYS)
        assert result(run(begin(place), schedule, half, seconds=ALWAYS)) == wanted


# ---- Shrink -----------------------------------------------------------------------------------------------------------


def plain() -> nn.Module:
    return nn.Sequential(*(module for module in network() if not isinstance(module, nn.Dropout)))


def test_moments_go_along_when_the_network_shrinks(tmp_path):
    """The smaller network then trains on as the masked one does, to rounding."""
    small = Granularity(Filter(), 0.5, shrink=True)
    masked = run(begin(tmp_path / "a", model=plain()), functools.partial(in_rounds, shrink=False), small)
    shrunk = run(begin(tmp_path / "b", model=plain()), in_rounds, small)
    for name, value in masked.model.state_dict().items():
        assert torch.allclose(value, shrunk.model.state_dict()[name], rtol=1e-3, atol=1e-5), name
    assert masked.lineage == shrunk.lineage
    assert shrunk.outcome.ratio_prunable == masked.outcome.ratio_prunable == 0.5
    assert shrunk.outcome.ratio_channels == masked.outcome.ratio_channels


@pytest.mark.parametrize("units", [Filter(), Stripe()], ids=["filter", "stripe"])
def test_killed_in_the_training_of_a_shrunk_network(tmp_path, monkeypatch, units):
    small = Granularity(units, 0.6, shrink=True)
    wanted = result(run(begin(tmp_path / "calm"), in_rounds, small, seconds=ALWAYS))
    for step in (5, 9):  # of four steps an epoch, the first in the dense network
        place = tmp_path / str(step)
        with monkeypatch.context() as patch:
            cut_at_step(patch, step)
            with pytest.raises(Cut):
                run(begin(place), in_rounds, small, seconds=ALWAYS)
        assert result(run(begin(place), in_rounds, small, seconds=ALWAYS)) == wanted


def test_snapshots_go_along_when_the_network_shrinks(tmp_path):
    schedule = asking(Remember("dense"), Mask(), Shrink(), Train(1), Restore("dense"))
    after = run(begin(tmp_path / "a"), schedule, Granularity(Filter(), 0.5, shrink=True))
    at_once = run(begin(tmp_path / "b"), asking(Mask()), Granularity(Filter(), 0.5, shrink=True))
    assert result(after)[0] == result(at_once)[0]
    init = run(
        begin(tmp_path / "c"), asking(Mask(), Shrink(), Restore("init")), Granularity(Filter(), 0.5, shrink=True)
    )
    kept = init.lineage.kept["3.weight"]
    rows = network(2).state_dict()["3.weight"][list(kept[0])][:, list(kept[1])]
    assert torch.equal(init.model.state_dict()["3.weight"], rows)


def test_the_answer_to_a_shrink_is_the_new_problem_with_the_old_budget(tmp_path):
    heard = []

    def schedule(problem):
        heard.append(problem)
        yield Mask(kept={"0": 5, "3": 4})
        heard.append((yield Shrink()))

    run(begin(tmp_path), schedule, Granularity(Filter(), budget=Budget(macs=0.3), shrink=True))
    before, after = heard
    assert after.whole == {"0": 5, "3": 4}
    assert (after.quantity, after.budget) == (before.quantity, before.budget)
    assert after.cost(after.whole) == before.cost({"0": 5, "3": 4})
    assert before.cost(before.whole) * 0.3 == pytest.approx(before.budget)


def test_units_that_can_only_be_masked_do_not_shrink(tmp_path):
    for granularity in (Granularity(Element(), 0.5), Granularity(Filter(), 0.5, shrink=False)):
        with pytest.raises(ScheduleError, match="shrink=true"):
            run(begin(tmp_path), asking(Mask(), Shrink()), granularity)


# ---- Train ------------------------------------------------------------------------------------------------------------


def test_parts_of_one_training_are_that_training(tmp_path):
    whole = run(begin(tmp_path / "a"), asking(Train(4)), HALF)
    parts = run(begin(tmp_path / "b"), asking(Train(1, total=4), Train(2, total=4), Train(total=4)), HALF)
    assert result(whole)[0] == result(parts)[0]
    assert whole.outcome.history == parts.outcome.history


def test_trainings_of_their_own_begin_afresh_with_other_batches(tmp_path):
    schedule = asking(Train(2), Train(2))
    after = run(begin(tmp_path), schedule, HALF)
    rates = [row["lr"] for row in after.outcome.history]
    assert rates[:2] == rates[2:]
    assert schedule.heard[1]["epoch"] == 2
    assert after.outcome.epochs == 4
    with pytest.raises(ScheduleError, match="more than the 2"):
        run(begin(tmp_path / "b"), asking(Train(3, total=2)), HALF)


# ---- the journal ------------------------------------------------------------------------------------------------------


def test_a_torn_last_line_is_asked_again(tmp_path, monkeypatch):
    schedule = functools.partial(netadapt, step=0.3)
    wanted = result(run(searching(tmp_path / "calm"), schedule, FIFTH))
    with monkeypatch.context() as patch:
        cut_after(patch, 3)
        with pytest.raises(Cut):
            run(searching(tmp_path / "cut"), schedule, FIFTH)
    file = tmp_path / "cut" / "journal"
    content = file.read_bytes()
    for damaged in (content[:-7], content[:-1], content.replace(b'"answer"', b'"Answer"', 1), content + b"0123"):
        file.write_bytes(damaged)
        assert len(journal(tmp_path / "cut").answers) <= 3
        assert result(run(searching(tmp_path / "cut"), schedule, FIFTH)) == wanted
        file.write_bytes(content)


def test_a_schedule_that_asks_something_else_begins_again_and_says_so(tmp_path, caplog):
    run(begin(tmp_path / "a"), asking(Mask(0.5), Train(1)), HALF, seconds=ALWAYS)
    other = asking(Mask(0.25), Train(2))
    with caplog.at_level(logging.WARNING):
        after = run(begin(tmp_path / "a"), other, HALF, seconds=ALWAYS)
    assert caplog.text.count("the stage begins again") == 1
    assert result(after) == result(run(begin(tmp_path / "b"), asking(Mask(0.25), Train(2)), HALF))


def test_a_checkpoint_of_another_version_begins_again(tmp_path, caplog):
    state = begin(tmp_path)
    state.keep({"fit/model/x": torch.zeros(1)}, {"memo": {"step": 1}})
    with caplog.at_level(logging.WARNING):
        after = run(state, asking(Mask()), HALF)
    assert "the stage begins again" in caplog.text
    assert after.outcome.ratio_prunable == 0.5


# ---- the problem ------------------------------------------------------------------------------------------------------


def test_the_problem_says_what_there_is(tmp_path):
    state = begin(tmp_path)
    asked = HALF.ratios(state.model)
    problem = pose(HALF, state.model, state.example_inputs(), asked=asked, masked={}, steps=4, seed=3)
    first, second = problem.groups
    assert (first.name, first.units, first.whole, first.least, first.depth) == ("0", 8, 8, 1, 0)
    assert [layer.name for layer in second.layers] == ["3"]
    assert second.layers[0].weight == (8, 8, 3, 3)
    assert second.layers[0].output == (1, 8, 6, 6)
    assert second.layers[0].macs == 36 * 8 * 8 * 9
    assert (problem.quantity, problem.budget) == ("units", 8)
    assert problem.counts({"0": 0.3, "3": 0.0}) == {"0": 3, "3": 1}
    cheaper = problem.cheapen(problem.whole, first, problem.cost(problem.whole) - 3)
    assert cheaper == {"0": 5, "3": 8}
    assert problem.cheapen(problem.whole, "0", 1) is None
    assert type(problem).from_dict(problem.to_dict()) == problem
    draw = problem.generator("noise").random(3)
    assert (draw == problem.generator("noise").random(3)).all()
    assert not (draw == problem.generator("other").random(3)).all()
    with pytest.raises(ScheduleError, match="no group"):
        problem.group("1")
    with pytest.raises(ScheduleError, match="latency"):
        problem.cost(problem.whole, "latency_ms")


def test_limits_are_in_the_problem(tmp_path):
    state, limited = begin(tmp_path), Granularity(Filter(), 0.5, min_keep=0.4, round_to=2)
    asked = limited.ratios(state.model)
    problem = pose(limited, state.model, state.example_inputs(), asked=asked, masked={}, steps=4)
    assert [(group.least, group.multiple) for group in problem.groups] == [(4, 2), (4, 2)]
    assert problem.counts({"0": 0.1, "3": 0.55}) == {"0": 4, "3": 6}
    assert problem.cheapen(problem.whole, "0", problem.cost(problem.whole) - 1) == {"0": 6, "3": 8}


def test_a_latency_budget_is_predicted_as_its_table_does(tmp_path, monkeypatch):
    """The problem's arithmetic, which is plain data, against the table on the channel plan."""
    state, limited = begin(tmp_path), Granularity(Filter(), budget=Budget(latency_ms=1.5))
    plan = analyse(state.model, state.example_inputs())
    curves = {"0": ([0.2, 1.0], [0.1, 0.5]), "3": ([0.0, 0.5, 1.0], [0.2, 0.3, 0.9]), "9": ([0.0, 1.0], [0.0, 0.2])}
    rest, spread = ([0.0, 1.0], [0.1, 0.4]), ([0.0, 1.0], [1.0, 1.0])
    table = Table(
        plan, plan.count_layers(plan.everything()),
        *({name: tuple(map(np.array, curve)) for name, curve in many.items()} for many in (curves,)),
        tuple(map(np.array, rest)), tuple(map(np.array, spread)),
    )  # fmt: skip
    monkeypatch.setattr("prune_cli.selection.latency_table.measured", lambda *_: table)
    asked = limited.ratios(state.model)
    problem = pose(limited, state.model, state.example_inputs(), asked=asked, masked={}, steps=4)
    assert (problem.quantity, problem.budget) == ("latency_ms", 1.5)
    for first, second in ((8, 8), (3, 8), (5, 2), (1, 1)):
        keep = plan.everything()
        for family, count in zip(plan.families, (first, second), strict=True):
            keep[family.units[count:]] = False
        assert problem.cost({"0": first, "3": second}) == pytest.approx(table.predict(keep).median_ms)
    assert type(problem).from_dict(json.loads(json.dumps(problem.to_dict()))) == problem


def test_schedules_that_count_are_refused_before_training_where_units_cannot_be_counted(tmp_path):
    with pytest.raises(ConfigError, match="chosen by patterns"):
        check(
            begin(tmp_path), criterion=L2, granularity=Granularity(NM(), 0.5), schedule=netadapt,
            distillation=Distillation(), training=training(),
        )  # fmt: skip
