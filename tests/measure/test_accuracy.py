"""Accuracy counts every image once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prune_cli.errors import DataError
from prune_cli.measure.accuracy import accuracy


# ------------------------------------------------------------------------------------------------ accuracy
def test_accuracy_counts_every_example_once() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(103, 9, generator=generator)
    target = torch.randint(0, 9, (103,), generator=generator)
    model = nn.Sequential(nn.Dropout(0.9), nn.Identity())
    for size in (1, 10, 64, 103, 500):
        metrics = accuracy(model, zip(logits.split(size), target.split(size), strict=True))
        assert metrics.total == 103
        assert metrics.correct == int((logits.argmax(1) == target).sum())
        ranked = logits.argsort(1, descending=True)[:, :5]
        assert metrics.correct5 == sum(int(t in row) for t, row in zip(target, ranked, strict=True))
        assert metrics.loss == pytest.approx(float(F.cross_entropy(logits.double(), target)), rel=1e-6)
        assert metrics.acc1 == 100 * metrics.correct / 103
    assert model.training and model[0].training


def test_accuracy_with_a_loss_few_classes_and_named_logits() -> None:
    class Wrapped(nn.Module):
        def forward(self, x: Tensor) -> object:
            return type("Output", (), {"logits": x})()

    logits, target = torch.eye(3), torch.tensor([0, 1, 0])
    metrics = accuracy(
        Wrapped(), [(logits[:2], target[:2]), (logits[2:], target[2:])], lambda x, y: x.sum() / len(y) + 1
    )
    assert (metrics.correct, metrics.acc5, metrics.loss) == (2, 100.0, 2.0)


def test_accuracy_refuses_no_data_and_unknown_classes() -> None:
    with pytest.raises(DataError, match="no examples"):
        accuracy(nn.Identity(), [])
    with pytest.raises(DataError, match="class 5 in the data, the network has 3 outputs"):
        accuracy(nn.Identity(), [(torch.zeros(2, 3), torch.tensor([0, 5]))])
