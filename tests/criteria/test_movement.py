"""Movement: the sum by hand, its gradient-free hook, and which schedules can use it."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from prune_cli.criteria.needs import NEEDS
from prune_cli.data.fake import fake
from prune_cli.files.weights import read_state_dict
from prune_cli.training.fit import Progress, fit
from prune_cli.training.lr_schedules import multi_step
from prune_cli.training.step_sums import StepSum, summed

NET = (
    "run", "recipe=quickstart", "model=resnet20", "model.depth=8", "model.widths=[4,8,8]", "threads=1", "device=cpu",
    "latency=false", "stages=[train,prune]", "train.epochs=1", "prune.batch_size=64", "limit_batches=3",
    "criterion=movement", "granularity.ratio=0.5",
)  # fmt: skip
TRAINING = (
    "schedule=iterative", "schedule.epochs=3", "schedule.retrain_epoch=2", "schedule.prune_freq=1", "schedule.start=1",
)  # fmt: skip


def loss(model, images, labels):
    return F.cross_entropy(model(images.double()), labels)


def test_it_is_the_sum_over_steps_of_minus_rate_times_gradient_times_weight():
    data = fake(shape=(1, 2, 2), num_classes=3, train=12, test=3, val=0)
    batches = data.train(4, 0)

    def network():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double()

    model, by_hand = network(), network()
    progress = Progress()
    hook = StepSum(NEEDS["movement"], model, ["1.weight"], lambda: progress.optimizer.param_groups[0]["lr"])
    rates = functools.partial(multi_step, milestones=[1, 2])
    fit(
        model, batches, loss, optimizer=functools.partial(torch.optim.SGD, lr=0.5), lr_schedule=rates, epochs=3,
        regularise=hook, progress=progress,
    )  # fmt: skip
    total, weight = torch.zeros(3, 4).double(), by_hand[1].weight
    for epoch in range(3):
        rate = 0.5 * 0.1**epoch
        for images, labels in batches.epoch(epoch):
            by_hand.zero_grad()
            loss(by_hand, images, labels).backward()
            total -= rate * weight.grad * weight.detach()
            with torch.no_grad():
                for parameter in by_hand.parameters():
                    parameter -= rate * parameter.grad
    torch.testing.assert_close(model[1].weight, weight, rtol=1e-10, atol=1e-14)  # the hook changes nothing
    torch.testing.assert_close(
        summed(NEEDS["movement"], progress.memory, "1.weight", torch.device("cpu")), total, rtol=1e-10, atol=1e-14
    )
    assert total.abs().max() > 1e-4


@pytest.mark.parametrize("granularity", ["element", "stripe", "filter"])
def test_it_prunes_what_training_moved_towards_zero(prune, granularity):
    result = prune(*NET, *TRAINING, f"granularity={granularity}")
    assert result.code == 0, result.err
    assert result.rows.loc["prune", "ratio_prunable"] == pytest.approx(0.5, abs=0.03)


def test_it_chooses_otherwise_than_magnitude(prune):
    masks = []
    for criterion in ("movement", "l1"):
        result = prune(*NET, *TRAINING, f"criterion={criterion}")
        assert result.code == 0, result.err
        masks.append(read_state_dict(result.folder / "prune" / "masks.safetensors"))
    differ = sum(int((mask != masks[1][name]).sum()) for name, mask in masks[0].items())
    assert differ > 0.1 * sum(mask.numel() for mask in masks[0].values())


@pytest.mark.parametrize("schedule", ["one_shot", "iterative", "admm"])
def test_schedules_that_score_before_they_train_are_refused(prune, schedule):
    result = prune(*NET, f"schedule={schedule}")
    assert result.code == 2
    assert len(result.err.strip().splitlines()) == 1
    assert "schedule.start" in result.err
