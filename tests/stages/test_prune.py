"""The prune stage as a function: what it takes out, that it leaves zeros or a smaller network, and what it refuses."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from prune_cli.distillation.distillation import Distillation
from prune_cli.errors import ConfigError
from prune_cli.granularities.element import Element
from prune_cli.granularities.filter import Filter
from prune_cli.granularities.pattern import Pattern
from prune_cli.schedules.one_shot import one_shot
from prune_cli.schedules.requests import Mask
from prune_cli.selection.granularity import Granularity
from prune_cli.stages.prune import check
from tests.session.tiny import L2, begin, run, training


def checked(state, **changes):
    parts = {
        "criterion": L2, "granularity": Granularity(Filter(), 0.5), "schedule": one_shot, "distillation": Distillation(),
        "training": training(),
    }  # fmt: skip
    return check(state, **{**parts, **changes})


def test_the_weakest_weights_of_each_layer_go_and_the_rest_stay_as_they_were(tmp_path):
    state = begin(tmp_path)
    dense = copy.deepcopy(state.model)
    after = run(state, one_shot, Granularity(Element(), 0.25))
    for name, mask in after.masks.items():
        before, now = dense.get_parameter(name), after.model.get_parameter(name)
        gone = round(0.25 * mask.numel())
        assert int((~mask).sum()) == gone
        assert before[~mask].abs().max() <= before[mask].abs().min()
        assert not now[~mask].any() and torch.equal(now[mask], before[mask])
    assert after.outcome.epochs == 0


def test_the_small_network_equals_the_masked_one(tmp_path):
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = []
    for shrink in (False, True):
        after = run(begin(tmp_path), one_shot, Granularity(Filter(), 0.5, shrink=shrink))
        with torch.no_grad():
            found.append(after.model.eval()(images))
        assert (after.lineage is None) != shrink and (after.model[0].out_channels == 4) == shrink
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_later_stages_are_told_that_the_network_will_be_smaller(tmp_path):
    state = begin(tmp_path)
    assert checked(state, granularity=Granularity(Filter(), 0.5, shrink=True)).shrunk_by == "prune"
    assert checked(state).shrunk_by is None


def counts(problem):
    yield Mask(kept={group.name: 1 for group in problem.groups})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"training": replace(training(), fit=replace(training().fit, select_on="val"))},
            "select on a split in finetune",
        ),
        (
            {"granularity": Granularity(Pattern(), 0.75), "schedule": counts},
            "units of this granularity are chosen by patterns",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        checked(begin(tmp_path), **changes)


@pytest.mark.parametrize(("norms", "dependency"), [("inner", "group"), ("all", "inner_only")])
def test_a_network_is_pruned_by_the_norms_that_were_made_sparse(tmp_path, norms, dependency):
    state = begin(tmp_path).evolve(sparse_norms=norms)
    with pytest.raises(ConfigError, match=f"regulariser.norms={norms}, which goes with dependency="):
        checked(state, granularity=Granularity(Filter(), 0.5, dependency=dependency))
    checked(state, granularity=Granularity(Element(), 0.5))
