"""The finetune stage: what is masked stays zero whatever the optimizer does, and a teacher must be there."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from prune_cli.distillation.distillation import Distillation
from prune_cli.distillation.losses import hinton
from prune_cli.errors import ConfigError
from prune_cli.stages.finetune import check, finetune
from tests.session.tiny import begin, training

OPTIMIZERS = {
    "momentum and decay": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": functools.partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
    "rmsprop": functools.partial(torch.optim.RMSprop, lr=0.01, momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masked_weights_stay_zero_and_all_others_move(tmp_path, name):
    state = begin(tmp_path)
    masks = {}
    for weight in ("0.weight", "3.weight", "9.weight"):
        parameter = state.model.get_parameter(weight)
        masks[weight] = torch.rand(parameter.shape, generator=torch.Generator().manual_seed(3)) > 0.5
        parameter.data *= masks[weight]
    before = {weight: state.model.get_parameter(weight).detach().clone() for weight in masks}
    after = finetune(
        state.evolve(masks=masks, stage="finetune"),
        epochs=2,
        training=replace(training(), optimizer=OPTIMIZERS[name]),
        distillation=Distillation(),
    )
    for weight, mask in masks.items():
        found = after.model.get_parameter(weight).detach()
        assert not found[~mask].any() and (found != before[weight])[mask].double().mean() > 0.8
    assert after.outcome.epochs == 2 and len(after.outcome.history) == 2


def test_no_epochs_leave_every_bit(tmp_path):
    state = begin(tmp_path)
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    after = finetune(state, epochs=0, training=training(), distillation=Distillation()).model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_dense_teacher_needs_a_pruning_stage_before(tmp_path):
    state = begin(tmp_path, stage="finetune")
    taught = Distillation(hinton(), teacher="dense")
    with pytest.raises(ConfigError, match=r"none comes before; give distillation\.teacher=PATH"):
        check(state, distillation=taught)
    check(state.evolve(dense=tmp_path), distillation=taught)
